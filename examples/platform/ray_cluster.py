"""A Ray cluster to join: its address is checked first, and a mistake is one line."""

from typing import Any

ANSWER_S = 5.0  # the longest wait for a cluster's answer, in seconds


def check_address(address: str) -> None:
    """Ask a Ray cluster for its health: Ray itself tries for two minutes and then ends the process.

    Raises:
        ValueError: If no cluster answers.
    """
    import grpc  # of ray[default]

    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise ValueError(f"--address {address} is no address of a cluster; give HOST:PORT, as ray start prints it.")
    try:
        with grpc.insecure_channel(address) as channel:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=ANSWER_S)
    except grpc.RpcError as error:
        raise ValueError(
            f"--address {address}: no Ray cluster answers there; start one with ray start --head, or leave it out."
        ) from error


def join(address: str, **options: Any) -> None:
    """Join the cluster at an address, with further options of `ray.init`.

    Raises:
        ValueError: If it does not take this process, such as one with another version of Ray or Python.
    """
    import ray

    try:
        ray.init(address, **options)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--address {address}: {type(error).__name__}: {str(error).strip()}") from error
