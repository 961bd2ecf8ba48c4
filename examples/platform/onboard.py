"""Onboard many tenants at once: distil a student for each from the platform's teachers, on Ray.

Each worker holds the base model and the teachers once and makes one student after another. A tenant that fails does
not stop the others, and the same command goes on where it stopped. Students are the same bit for bit with any number
of workers; `--workers 0` makes them in this process, without Ray.

    python examples/platform/onboard.py --teachers path/to/teachers
    python examples/platform/onboard.py --teachers path/to/teachers --data path/to/tenants.json --workers 8
    python examples/platform/onboard.py --teachers path/to/teachers --address 192.0.2.1:6379

`--teachers` has a folder for each saved adapter. Each student gets a folder of its tenant's name in `--output`, as
`save_adapter` writes it, with the tenant's FAQs in `faqs.json`.
"""

import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent.parent))

from faq_data import BUNDLED, Tenant, load_tenants  # noqa: E402
from inputs import check_at_least, check_rates, check_seed  # noqa: E402
from ray_cluster import check_address, join  # noqa: E402
from tenant_students import (  # noqa: E402
    Outcome,
    Settings,
    StudentMaker,
    choose_queries,
    first_line,
    open_output,
    remove_partial,
    teacher_folders,
)

OBJECT_STORE_BYTES = 100 * 2**20  # tenants and outcomes are small; /dev/shm may be, too


@dataclass
class Arguments:
    """The arguments of the command."""

    teachers: str = field(metadata={"help": "Folder with one folder for each saved adapter that teaches."})
    data: str = field(default=str(BUNDLED), metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    output: str = field(default="outputs/onboarded", metadata={"help": "The folder of the students."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    workers: int | None = field(
        default=None, metadata={"help": "Processes that make students; 0: this one. Default: as many as CPUs allow."}
    )
    threads: int = field(default=1, metadata={"help": "Threads of a worker; other numbers round in another way."})
    address: str | None = field(
        default=None, metadata={"help": "HOST:PORT of a Ray cluster to join. Default: a cluster of this machine."}
    )
    max_retries: int = field(
        default=2, metadata={"help": "Times that a tenant runs again whose worker died or met an error of a file."}
    )
    shots: int | None = field(default=None, metadata={"help": "Training queries for each FAQ, at most. Default: all."})
    steps: int = field(default=50, metadata={"help": "Steps of a student, all stages."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=16, metadata={"help": "Queries in a training batch."})
    seed: int = field(default=1, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        least = {"workers": 0, "max_retries": 0, "threads": 1, "shots": 1, "steps": 1, "batch_size": 1}
        check_at_least(self, least)
        check_rates(self, "learning_rate")
        check_seed("seed", self.seed)
        if self.address is not None and self.workers == 0:
            raise ValueError(f"--address {self.address} needs workers, and --workers is 0; leave one of them out.")

    def settings(self) -> Settings:
        """Return what decides about the students; folders as paths that hold for processes in other folders."""
        model = str(Path(self.model).resolve()) if self.model and Path(self.model).is_dir() else self.model
        return Settings(
            teachers=str(Path(self.teachers).resolve()),
            model=model,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            seed=self.seed,
            threads=self.threads,
        )


# Ray


def import_ray() -> Any:
    """Import Ray, which sends nothing out.

    Raises:
        ValueError: If it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing; install it with pip install 'ray[default]', or give --workers 0."
        ) from error
    return ray


def start_ray(ray: Any, args: Arguments) -> int:
    """Join the cluster at an address, or start one on this machine; return the number of workers.

    Raises:
        ValueError: If the cluster has fewer CPUs than the workers need.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address is None:  # "local": whatever RAY_ADDRESS says
        ray.init(
            "local",
            num_cpus=args.workers and args.workers * args.threads,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )
    else:
        join(args.address, **quiet)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    workers = args.workers or max(1, cpus // args.threads)
    if workers * args.threads > cpus:
        raise ValueError(f"{workers} workers of --threads {args.threads} are more than the cluster's {cpus} CPUs.")
    return workers


def run_on_ray(ray: Any, n_workers: int, args: Arguments, tenants: Sequence[Tenant]) -> Iterator[Outcome]:
    """Make the students of tenants on workers of Ray.

    Yields:
        The outcome of each tenant as it comes.

    Raises:
        ValueError: If no worker can start.
    """
    options = {"num_cpus": args.threads, "max_restarts": -1, "max_task_retries": args.max_retries}
    remote_maker = ray.remote(**options)(StudentMaker)
    output, times, why = str(Path(args.output).resolve()), f"{args.max_retries + 1} times", ""
    waiting, running, n_done = deque(tenants), {}, 0

    def start_worker() -> None:
        worker = remote_maker.remote(args.settings(), output)
        running[worker.ready.remote()] = worker, None

    for _ in range(min(n_workers, len(tenants))):
        start_worker()
    while running and n_done < len(tenants):
        (reference,), _ = ray.wait(list(running), num_returns=1)
        worker, tenant = running.pop(reference)
        alive = True
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            outcome = Outcome(tenant.name, error=f"{first_line(error.cause)} ({times})")
        except ray.exceptions.RayError as error:
            ray.kill(worker)
            alive, why = False, str(error).strip().splitlines()[-1]
            outcome = tenant and Outcome(tenant.name, error=f"its worker died {times}")
        if outcome is not None:
            n_done += 1
            yield outcome
        if alive and waiting:
            tenant = waiting.popleft()
            running[worker.make.options(retry_exceptions=[OSError]).remote(tenant)] = worker, tenant
        elif not alive and tenant is not None:  # a worker that could not start is not tried again
            start_worker()
    if n_done < len(tenants):
        raise ValueError(f"No worker could start: {why}")


# The command


def run_here(maker: StudentMaker, tenants: Sequence[Tenant]) -> Iterator[Outcome]:
    """Make the students of tenants in this process, without retries.

    Yields:
        The outcome of each tenant as it comes.
    """
    maker.ready()
    try:
        for tenant in tenants:
            try:
                yield maker.make(tenant)
            except OSError as error:
                yield Outcome(tenant.name, error=first_line(error))
    finally:
        gc.unfreeze()


def prepare(args: Arguments) -> tuple[StudentMaker, list[Tenant], list[Tenant]]:
    """Check data, teachers, cluster and output before anything is written or Ray starts.

    Returns:
        The base model with the teachers, all tenants to onboard, and those that have no student yet.

    Raises:
        ValueError: If something is wrong with them.
        OSError: If the base model cannot be loaded, or the output cannot be written.
    """
    teacher_folders(args.teachers)
    tenants = choose_queries(load_tenants(args.data, args.seed), args.shots, args.seed)
    if args.workers != 0:
        import_ray()
    if args.address is not None:
        check_address(args.address)
    if Path(args.output).resolve() == Path(args.teachers).resolve():
        raise ValueError(f"--output {args.output} is the folder of the teachers; choose another one.")
    maker = StudentMaker(args.settings(), args.output)
    new = [tenant for tenant in tenants if tenant.name not in maker.teachers]
    if not new:
        raise ValueError(f"All {len(tenants)} tenants of --data {args.data} have the name of a teacher; add new ones.")
    return maker, new, open_output(Path(args.output), maker.describe(), new)


def stop(number: int, frame: object) -> None:
    """End the command on a signal.

    Raises:
        SystemExit: In any case.
    """
    os.write(2, b"\nonboard.py: stopped; the same command goes on.\n")
    raise SystemExit(128 + number)


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM end the command in order."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def onboard(args: Arguments, maker: StudentMaker, missing: list[Tenant]) -> Iterator[Outcome]:
    """Make the students of tenants.

    Yields:
        The outcome of each tenant as it comes.
    """
    if args.workers == 0 or not missing:
        yield from run_here(maker, missing)
        return
    maker.platform = None  # the workers have their own
    ray = import_ray()
    try:
        n_workers = start_ray(ray, args)
        catch_signals()  # Ray has put a handler of its own there
        yield from run_on_ray(ray, n_workers, args, missing)
    finally:
        ray.shutdown()


def main() -> None:
    """Onboard the tenants.

    Raises:
        SystemExit: If something is wrong, or a tenant failed.
    """
    began, outcomes = time.perf_counter(), []
    catch_signals()
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        maker, tenants, missing = prepare(args)
        there = len(tenants) - len(missing)
        print(f"{len(tenants)} tenants, {there} with a student already; {len(maker.teachers)} teachers.", flush=True)
        try:
            with (
                closing(onboard(args, maker, missing)) as results,
                tqdm(total=len(tenants), initial=there, desc="students", unit="student") as progress,
            ):
                for outcome in results:
                    outcomes.append(outcome)
                    progress.update(outcome.error is None)
        finally:
            remove_partial(Path(args.output))
    except (ValueError, OSError) as error:
        raise SystemExit(f"onboard.py: {first_line(error)}") from error
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        print(f"Tenant {outcome.tenant!r} failed: {outcome.error}", file=sys.stderr)
    made = len(outcomes) - len(failed)
    print(f"{made} students made in {time.perf_counter() - began:.0f} seconds; {args.output} has {there + made}.")
    if failed:
        raise SystemExit(f"onboard.py: {len(failed)} of {len(tenants)} tenants failed; the same command tries again.")


if __name__ == "__main__":
    main()
