"""Onboarding many tenants at once: what a student costs on Ray, in one process, and for 10,000 tenants on paper.

The FAQs of the data are dealt to `--tenants` tenants, and the bundled tenants get the adapters that teach. One process
makes the students of some tenants before and after Ray makes all of them, so that a slow moment of the machine slows
both; its students must be those of Ray, bit for bit.

    python benchmarks/onboarding_platform.py
    python benchmarks/onboarding_platform.py --data path/to/clinc150 --tenants 50
    python benchmarks/report.py onboarding_platform benchmarks/results/onboarding_platform.json
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import transformers
from measure import check_output, environment, write
from transformers import HfArgumentParser

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "platform")]

import onboard  # noqa: E402
from faq_data import BUNDLED, Tenant, load_tenants  # noqa: E402
from faq_embeddings import EmbeddingPlatform, labelled_queries  # noqa: E402
from tenant_students import Outcome, saved_faqs  # noqa: E402

RAY, USUAL = "Ray", "one process, usual steps"
TEACHER_STEPS, TEACHER_QUERIES = 10, 4


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    data: str = field(default=str(BUNDLED), metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    tenants: int = field(default=50, metadata={"help": "Tenants that the FAQs are dealt to."})
    teachers: int = field(default=4, metadata={"help": "Bundled tenants that teach."})
    alone: int = field(default=4, metadata={"help": "Tenants that one process onboards, too."})
    workers: int = field(default=2, metadata={"help": "Workers of Ray; 0 for this process, without Ray."})
    shots: int = field(default=2, metadata={"help": "Training queries for each FAQ."})
    steps: int = field(default=4, metadata={"help": "Steps of a student, few for a short run."})
    long_steps: int = field(default=50, metadata={"help": "Steps of one more student, for the cost of usual ones."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    output: str = field(default="outputs/onboarding_platform.json", metadata={"help": "The JSON file."})

    def __post_init__(self) -> None:
        least = {"tenants": 2, "teachers": 1, "alone": 2, "workers": 0, "shots": 1, "steps": 1, "long_steps": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least {lowest}.")
        if self.alone > self.tenants:
            raise ValueError(f"--alone {self.alone} is more than --tenants {self.tenants}; lower it.")


def deal(tenants: Sequence[Tenant], n_tenants: int) -> list[Tenant]:
    """Deal the FAQs of tenants, in their order, to a number of tenants with equally many.

    Raises:
        ValueError: If they do not suffice for two FAQs each.
    """
    faqs = [faq for tenant in tenants for faq in tenant.faqs]
    each = len(faqs) // n_tenants
    if each < 2:
        raise ValueError(f"--tenants {n_tenants} need two FAQs each, and the data has {len(faqs)}; lower it.")
    return [Tenant(f"tenant{n}", faqs[n * each : (n + 1) * each]) for n in range(n_tenants)]


def write_tenants(tenants: Sequence[Tenant], path: Path) -> None:
    """Write tenants in the form of the bundled ones."""
    content = [{"name": tenant.name, "faqs": saved_faqs(tenant)} for tenant in tenants]
    path.write_text(json.dumps({"tenants": content}), encoding="utf-8")


def train_teachers(args: Arguments, folder: Path) -> None:
    """Train and save a plain adapter for each of the first bundled tenants."""
    platform = EmbeddingPlatform(args.model, str(folder.parent / "training"))
    folder.mkdir()
    for tenant in load_tenants(str(BUNDLED), seed=1)[: args.teachers]:
        name = f"{tenant.name}-teacher"
        platform.new_adapter(name)
        queries = labelled_queries(tenant, "train", TEACHER_QUERIES)
        platform.train(tenant, queries, max_steps=TEACHER_STEPS, learning_rate=2e-3, per_device_train_batch_size=16)
        platform.model.save_adapter(str(folder / name), name, use_safetensors=True)


def memory_of_workers() -> float:
    """Return the resident megabytes of the largest worker, or of this process without workers."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    workers = [process for process in processes if any("StudentMaker" in part for part in process.cmdline())]
    return max(process.memory_info().rss for process in workers or processes[:1]) / 1e6


@dataclass
class Run:
    """What a run of the command takes: its outcomes, and the seconds and megabytes when each came."""

    outcomes: list[Outcome]
    seconds: list[float]
    megabytes: list[float]

    def row(self, workers: int) -> dict[str, Any]:
        """Return the costs: `start_s` until the first worker begins, and what a student takes from then on."""
        start = min(at - outcome.seconds for at, outcome in zip(self.seconds, self.outcomes, strict=True))
        return {
            "workers": workers,
            "students": len(self.outcomes),
            "start_s": round(start, 1),
            "wall_s_per_student": round((self.seconds[-1] - start) / len(self.outcomes), 3),
            "s_in_worker": round(median(outcome.seconds for outcome in self.outcomes), 3),
            "cpu_s_in_worker": round(median(outcome.cpu_seconds for outcome in self.outcomes), 3),
            "busy": round(sum(o.seconds for o in self.outcomes) / max(workers, 1) / (self.seconds[-1] - start), 3),
            "worker_mb": [round(self.megabytes[0]), round(self.megabytes[-1])],
        }


def run(arguments: onboard.Arguments, tenants: Sequence[str] = ()) -> Run:
    """Onboard tenants, or only the named ones, as the command does.

    Raises:
        RuntimeError: If a tenant fails.
    """
    began, result = time.perf_counter(), Run([], [], [])
    maker, _, missing = onboard.prepare(arguments)
    for outcome in onboard.onboard(arguments, maker, [t for t in missing if not tenants or t.name in tenants]):
        if outcome.error is not None:
            raise RuntimeError(f"Tenant {outcome.tenant} failed: {outcome.error}")
        result.outcomes.append(outcome)
        result.seconds.append(time.perf_counter() - began)
        result.megabytes.append(memory_of_workers())
    return result


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each file of a student."""
    for path in sorted(folder.iterdir()):
        yield path.name, path.read_bytes()


def measure(args: Arguments, tenants: Sequence[Tenant], folder: Path) -> dict[str, Any]:
    """Onboard some tenants in one process, all on Ray, and others in one process again.

    Raises:
        RuntimeError: If a tenant fails, or Ray makes another student than one process.
    """
    write_tenants(tenants, folder / "tenants.json")
    train_teachers(args, folder / "teachers")

    def arguments(output: str, workers: int, steps: int = args.steps) -> onboard.Arguments:
        return onboard.Arguments(
            str(folder / "teachers"), str(folder / "tenants.json"), str(folder / output), args.model, workers=workers,
            shots=args.shots, steps=steps,
        )  # fmt: skip

    names = [tenant.name for tenant in tenants[: args.alone]]
    half = args.alone // 2
    before = run(arguments("before", 0), names[:half])
    on_ray = run(arguments("ray", args.workers))
    print(f"Ray: {on_ray.row(args.workers)}", flush=True)
    after = run(arguments("after", 0), names[half:])
    usual = run(arguments("usual", 0, args.long_steps), names[:1])
    for number, name in enumerate(names):
        alone = folder / ("before" if number < half else "after") / name
        if list(files(alone)) != list(files(folder / "ray" / name)):
            raise RuntimeError(f"The student of {name} differs on Ray and in one process.")
    sizes = [sum(len(content) for _, content in files(folder / "ray" / tenant.name)) for tenant in tenants]
    runs = {"one process, before": before, RAY: on_ray, "one process, after": after, USUAL: usual}
    rows = [
        {
            "way": way,
            "steps": args.long_steps if way == USUAL else args.steps,
            **of_way.row(args.workers if way == RAY else 1),
        }
        for way, of_way in runs.items()
    ]
    return {"faqs": len(tenants[0].faqs), "student_mb": round(median(sizes) / 1e6, 3), "rows": rows}


def main() -> None:
    """Run the benchmark."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    paths = [str(EXAMPLES / "platform"), os.environ.get("PYTHONPATH", "")]
    os.environ.setdefault("RAY_worker_niceness", "0")  # the priority of one process; Ray's own is 15
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # where workers find the command's modules
    transformers.utils.logging.set_verbosity_error()
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        tenants = deal(load_tenants(args.data, seed=1), args.tenants)
    except (ValueError, OSError) as error:
        raise SystemExit(f"onboarding_platform.py: {str(error).splitlines()[0]}") from error
    check_output(args.output)
    about = environment("cpu")
    print("\n".join(f"{name}: {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, tenants, Path(folder))
    for row in results["rows"]:
        print(row)
    write(Path(args.output), {"environment": about, "arguments": asdict(args), **results})


if __name__ == "__main__":
    main()
