"""The arguments of `streaming_tenants.py`, its jobs, and the file of JSON lines with their results."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from measure import environment

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from inputs import check_at_least, check_device, check_rates, check_seed  # noqa: E402

LANGUAGE_MODELS = ("language-model", "assistant")
ARCHITECTURES = ("embeddings", "cross-encoder", "classifier", *LANGUAGE_MODELS)
POOLS = ("unrelated", "relatives", "streaming", "random")
FIRST_KEY = '{"method": '  # how a line begins


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    architecture: str = field(default="embeddings", metadata={"help": f"One of {', '.join(ARCHITECTURES)}."})
    data: str = field(default="clinc/clinc_oos", metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Names of methods. Default: all."})
    tenants: list[str] = field(default_factory=list, metadata={"help": "The new tenants. Default: all, in turn."})
    pool: str = field(default="unrelated", metadata={"help": f"The teachers of a new tenant: {', '.join(POOLS)}."})
    others: int = field(default=0, metadata={"help": "Unrelated teachers, the first in the data. Default: all."})
    shots: str = field(default="3", metadata={"help": "Training queries per FAQ of the new tenant, or all."})
    seeds: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Seeds of queries and weights."})
    steps: int = field(default=90, metadata={"help": "Optimizer steps of each method, all stages together."})
    batch_size: int = field(default=16, metadata={"help": "Queries, or pairs, in a training batch."})
    n_wrong: int = field(default=3, metadata={"help": "Wrong FAQs that a query is paired with (cross-encoder)."})
    test_queries: int = field(default=15, metadata={"help": "Test queries per FAQ, at most; a query meets all FAQs."})
    search_tenants: int = field(default=2, metadata={"help": "Tenants whose validation queries choose the rates."})
    search_queries: int = field(default=10, metadata={"help": "Validation queries per FAQ."})
    teacher_queries: int = field(default=50, metadata={"help": "Training queries per FAQ of the other tenants."})
    teacher_epochs: int = field(default=3, metadata={"help": "Epochs of each teacher."})
    teacher_batch_size: int = field(default=16, metadata={"help": "Batch size of a teacher."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the teachers."})
    teachers_dir: str = field(
        default="", metadata={"help": "Where teachers are kept. Default: outputs/teachers_<architecture>."}
    )
    latency: bool = field(default=False, metadata={"help": "Time single queries; for a cross-encoder always."})
    processes: int = field(default=1, metadata={"help": "Runs at the same time; several have one thread each."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in training."})
    output: str = field(default="", metadata={"help": "The JSON lines. Default: outputs/<setting>.jsonl."})

    def __post_init__(self) -> None:
        for name, choices in (("architecture", ARCHITECTURES), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)} is unknown; choose of {', '.join(choices)}.")
        counts = ("steps", "batch_size", "n_wrong", "test_queries", "search_queries", "processes")
        of_teachers = ("teacher_queries", "teacher_epochs", "teacher_batch_size")
        check_at_least(self, {**dict.fromkeys((*counts, *of_teachers), 1), "search_tenants": 0, "others": 0})
        check_rates(self, "teacher_learning_rate")
        for seed in self.seeds:
            check_seed("seeds", seed)
        if self.shots != "all" and not self.shots.isdecimal():
            raise ValueError(f"--shots {self.shots} is out of range; give a number of queries, 0 for none, or all.")
        if self.architecture in LANGUAGE_MODELS and (self.device != "cpu" or self.bf16 or self.latency):
            raise ValueError(
                f"--architecture {self.architecture} knows no --device, --bf16 or --latency; leave it out."
            )
        if self.architecture == "classifier" and (self.latency or self.shots == "0"):
            unknown = "--latency" if self.latency else "--shots 0"
            raise ValueError(f"--architecture classifier knows no {unknown}; leave it out.")
        check_device(self.device)
        self.teachers_dir = self.teachers_dir or f"outputs/teachers_{self.architecture}"
        self.output = self.output or f"outputs/{self.architecture}_{self.pool}_{self.shots}.jsonl"

    @property
    def n_shots(self) -> int | str:
        """Return the training queries per FAQ as a number, or "all"."""
        return self.shots if self.shots == "all" else int(self.shots)

    def n_measured(self, split: str) -> int:
        """Return the queries of each FAQ, at most, that measure a run on a split."""
        return self.search_queries if split == "validation" else self.test_queries

    def of_results(self) -> dict[str, Any]:
        """Return the arguments that two runs must share to be compared."""
        free = ["methods", "tenants", "seeds", "latency", "processes", "output", "teachers_dir", "device", "bf16"]
        if self.architecture != "cross-encoder":
            free.append("n_wrong")
        common = {name: value for name, value in asdict(self).items() if name not in free}
        data = Path(self.data).name if Path(self.data).exists() else self.data
        return common | {"data": data, "shots": self.n_shots}

    def of_teachers(self) -> dict[str, Any]:
        """Return the arguments that determine the teachers."""
        shared = ("architecture", "data", "model", "n_wrong", "teacher")
        return {name: value for name, value in self.of_results().items() if name.startswith(shared)}

    def of_training(self) -> dict[str, Any]:
        """Return the training arguments that follow from the device."""
        return {"use_cpu": self.device == "cpu", "bf16": self.bf16, "disable_tqdm": True, "logging_strategy": "no"}


def halves(steps: int) -> tuple[int, int]:
    """Return the steps of the two trainings of AdapterFusion, at least one each."""
    return -(-steps // 2), max(1, steps // 2)


class Method(NamedTuple):
    """A way to onboard a tenant.

    Args:
        onboard: Onboards the tenant of a run.
        rates: The learning rates that it chooses from, on validation queries.
        rate_of: The method whose choice it takes instead of its own.
        needs_labels: Whether it needs labelled queries of the new tenant.
    """

    onboard: Callable[[Any], Any]
    rates: tuple[float, ...]
    rate_of: str = ""
    needs_labels: bool = True


class Job(NamedTuple):
    """One training and evaluation of a method."""

    method: str
    tenant: str
    seed: int
    learning_rate: float
    queries: str

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Job":
        """Return the job of a line."""
        return cls(*(line[name] for name in cls._fields))


def started(args: Arguments, job: Job, teachers: list[str]) -> dict[str, Any]:
    """Return what a line says of a job before it runs."""
    return {**job._asdict(), "shots": args.n_shots, "teachers": len(teachers)}


def finished(args: Arguments, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with the software, the machine and the arguments that it was made with."""
    about = environment(args.device)
    del about["command"]
    return line | {"environment": about, "arguments": args.of_results()}


def upgraded(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with today's arguments; older lines are all of the cross-encoder."""
    arguments = {"others": 0} | line.get("arguments", {})  # they had no such limit
    if "streaming" not in arguments:
        return line | {"arguments": arguments}
    pool = "streaming" if arguments.pop("streaming") else "unrelated"
    shots = arguments["shots"] or "all"
    arguments |= {"architecture": "cross-encoder", "pool": pool, "shots": shots}
    return line | {"shots": shots, "arguments": arguments}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs of a file, with today's arguments.

    Raises:
        ValueError: If the file holds anything but runs, and perhaps a last line that was cut off.
        OSError: If it cannot be read.
    """
    lines: list[dict[str, Any]] = []
    whole, cut_off = _split_at_last_line(path)
    try:
        for text in whole.splitlines():
            lines.append(upgraded(json.loads(text)))
            Job.of(lines[-1])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Line {len(lines) + 1} of {path} is no run of this benchmark; choose another file."
        ) from error
    if not FIRST_KEY.startswith(cut_off[: len(FIRST_KEY)]):
        raise ValueError(f"The last line of {path} is no run of this benchmark; choose another file.")
    return lines


def drop_cut_off(path: Path) -> None:
    """Drop a last line that was cut off when the benchmark was killed."""
    if path.exists():
        whole, cut_off = _split_at_last_line(path)
        if cut_off:
            path.write_text(whole, encoding="utf-8")


def _split_at_last_line(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8")
    end = text.rfind("\n") + 1
    return text[:end], text[end:]


def check_lines(args: Arguments, lines: list[dict[str, Any]]) -> None:
    """Refuse lines that were made with other arguments.

    Raises:
        ValueError: With the first such argument.
    """
    for line in lines:
        for name, value in args.of_results().items():
            if line["arguments"].get(name) != value:
                raise ValueError(
                    f"{args.output} holds runs with --{name} {line['arguments'].get(name)}, not {value}; "
                    "choose another --output."
                )
