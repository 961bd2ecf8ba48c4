"""Serve many tenants from one encoder with Ray Serve: questions of different tenants are answered in one batch.

    python examples/platform/demo_students.py --quick
    python examples/platform/serve.py --students outputs/students
    curl -H "content-type: application/json" -d '{"tenant": "bank", "question": "lost my card"}' 127.0.0.1:8000/answer

Open http://127.0.0.1:8000 for a page to ask. `--students` has a folder for each tenant, as `save_adapter` writes it,
with its FAQs in `faqs.json`. Tenants can be added and replaced while it serves. A question takes one pass through the
encoder, whatever the number of FAQs. `--engine local` serves in one process without Ray, one question after another.
"""

import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser

try:
    import fastapi  # noqa: F401
    import uvicorn
except ModuleNotFoundError as error:
    raise SystemExit(f"serve.py: {error.name} is missing; install it with pip install fastapi uvicorn.") from error

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from http_app import OneByOne, make_app  # noqa: E402
from inputs import check_at_least, check_device  # noqa: E402
from ray_cluster import check_address  # noqa: E402
from tenant_service import load_service  # noqa: E402


@dataclass
class Arguments:
    """The arguments of the service."""

    students: str = field(metadata={"help": "Folder with one folder for each tenant's student."})
    model: str | None = field(default=None, metadata={"help": "Encoder. Default: the packaged MiniLM."})
    engine: str = field(default="ray", metadata={"help": "ray, or local: one process, one question after another."})
    max_loaded: int = field(default=64, metadata={"help": "Students in memory, at most."})
    max_batch: int = field(default=32, metadata={"help": "Questions in a batch, at most; with ray."})
    wait_ms: float = field(default=5.0, metadata={"help": "Milliseconds that a question waits for others; with ray."})
    max_waiting: int = field(default=256, metadata={"help": "Questions that wait, at most; more get a 503."})
    max_replicas: int = field(default=1, metadata={"help": "Processes with the model, at most; with ray."})
    address: str | None = field(
        default=None, metadata={"help": "A Ray cluster to join. Default: one on this machine."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})

    def __post_init__(self) -> None:
        check_at_least(self, {"max_batch": 1, "wait_ms": 0, "max_waiting": 1, "max_replicas": 1, "port": 0})
        if self.port > 65535:
            raise ValueError(f"--port {self.port} is out of range; it must be at most 65535.")
        if self.max_loaded < self.max_batch:  # each question of a batch may be of another tenant
            raise ValueError(f"--max_loaded {self.max_loaded} is out of range; it must be at least --max_batch.")
        if self.engine not in ("ray", "local"):
            raise ValueError(f"--engine {self.engine} is unknown; choose ray or local.")
        check_device(self.device)
        self.students = os.path.abspath(self.students)  # replicas have a working directory of their own


def serve_with_ray(args: Arguments) -> None:
    """Serve with Ray until the process is interrupted.

    Raises:
        ValueError: If ray is missing, the students are wrong, or no cluster answers.
    """
    try:
        import ray_engine
    except ModuleNotFoundError as error:
        hint = "install it with pip install 'ray[default,serve]', or serve with --engine local"
        raise ValueError(f"{error.name} is missing; {hint}.") from error
    if args.address:
        check_address(args.address)
    load_service(args.students, args.model, args.max_loaded)  # a mistake is seen here, before Ray starts
    ray_engine.start(asdict(args))
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *received: stopped.set())
    print(f"Serving on http://{args.host}:{args.port}", flush=True)
    stopped.wait()
    ray_engine.stop()


def main() -> None:
    """Run the service until it is interrupted."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        if args.engine == "ray":
            return serve_with_ray(args)
        service = load_service(args.students, args.model, args.max_loaded, args.device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"serve.py: {str(error).splitlines()[0]}") from error
    app = make_app(OneByOne(service, args.max_waiting).ask, Path(args.students), service.metrics)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
