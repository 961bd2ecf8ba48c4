"""Is a distilled adapter better? FAQ retrieval over tenants that arrive one after another, method by method.

Each tenant in turn is the new one, and the adapters of all others (with `--streaming`, of those that came before it)
are the teachers. First each method chooses its learning rate, on validation queries of the first tenants; then it runs
for each tenant and seed. A finished run is one JSON line of the output; the same command goes on where it stopped.

    python benchmarks/streaming_tenants.py --data path/to/clinc150
    python benchmarks/streaming_tenants.py --data path/to/clinc150 --shots 10 --steps 450 --seeds 1
    python benchmarks/streaming_tenants.py --methods "plain adapter" "AdapterDistillation" --device cuda --bf16
    python benchmarks/report.py streaming_tenants benchmarks/results/streaming_tenants_3.jsonl
"""

import json
import logging
import multiprocessing
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transformers
from adapters import Stack
from measure import environment
from onboarding import METHODS, NEW, Onboarding, example
from tqdm.auto import tqdm
from transformers import BatchEncoding, HfArgumentParser

import hf_adapter_distillation as had

from faq_cross_encoder import ADAPTER  # isort: skip
from faq_data import Tenant, hold_out, load_tenants, make_pairs  # isort: skip

TEACHER_SEED = 0
SEARCH_SEED = 0
QUERY_LOG = 20  # queries of each FAQ, at most, that are read without labels


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    data: str = field(default="clinc/clinc_oos", metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Names of methods."})
    tenants: list[str] = field(default_factory=list, metadata={"help": "The new tenants. Default: all, in turn."})
    streaming: bool = field(default=False, metadata={"help": "Teachers are the tenants before the new one alone."})
    shots: int = field(default=3, metadata={"help": "Training queries a FAQ of the new tenant; 0 for all."})
    seeds: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Seeds of queries and weights."})
    steps: int = field(default=90, metadata={"help": "Optimizer steps of each method, all stages together."})
    batch_size: int = field(default=16, metadata={"help": "Pairs in a training batch."})
    n_wrong: int = field(default=3, metadata={"help": "Wrong FAQs that a training query is paired with."})
    test_queries: int = field(default=10, metadata={"help": "Test queries per FAQ, at most; a query meets all FAQs."})
    search_tenants: int = field(default=2, metadata={"help": "Tenants whose validation queries choose the rates."})
    search_queries: int = field(default=10, metadata={"help": "Validation queries a FAQ."})
    teacher_queries: int = field(default=50, metadata={"help": "Training queries a FAQ of the other tenants."})
    teacher_epochs: int = field(default=3, metadata={"help": "Epochs of each teacher."})
    teacher_batch_size: int = field(default=16, metadata={"help": "Pairs in a training batch of a teacher."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the teachers."})
    teachers_dir: str = field(default="outputs/streaming_tenants", metadata={"help": "Where teachers are kept."})
    processes: int = field(default=1, metadata={"help": "Runs at the same time; several have one thread each."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in training."})
    output: str = field(default="outputs/streaming_tenants.jsonl", metadata={"help": "The file of JSON lines."})

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "n_wrong", "test_queries", "search_queries", "teacher_queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")
        for name in ("shots", "search_tenants"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must not be negative.")
        if self.processes < 1:
            raise ValueError(f"--processes {self.processes} is out of range; it must be at least 1.")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"--methods {unknown[0]!r} is unknown; choose of {', '.join(map(repr, METHODS))}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda finds no GPU; leave it out to run on the CPU.")

    def of_results(self) -> dict[str, Any]:
        """Return the arguments that two runs must share to be compared."""
        free = ("methods", "tenants", "seeds", "processes", "output", "teachers_dir", "device", "bf16")
        common = {name: value for name, value in asdict(self).items() if name not in free}
        return common | {"data": Path(self.data).name if Path(self.data).exists() else self.data}

    def of_teachers(self) -> dict[str, Any]:
        """Return the arguments that determine the teachers."""
        shared = ("data", "model", "n_wrong", "teacher")
        return {name: value for name, value in self.of_results().items() if name.startswith(shared)}


class Job(NamedTuple):
    """One training and evaluation of a method."""

    method: str
    tenant: str
    seed: int
    learning_rate: float
    queries: str


def load(args: Arguments, seed: int, **settings: Any) -> tuple[example.CrossEncoderPlatform, list[Tenant]]:
    """Load a platform without adapters, and the tenants with their queries in the order of a seed."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    folder = Path(tempfile.gettempdir()) / "streaming_tenants"
    platform = example.CrossEncoderPlatform(
        example.Arguments(seed=seed, model=args.model, output_dir=str(folder), **settings)
    )
    platform.model.to(args.device)
    return platform, load_tenants(args.data, seed)


def options(args: Arguments) -> dict[str, Any]:
    """Return the training arguments that follow from the device."""
    return {"use_cpu": args.device == "cpu", "bf16": args.bf16, "disable_tqdm": True, "logging_strategy": "no"}


def shots_of(args: Arguments, tenant: Tenant) -> int:
    """Return the training queries of each FAQ of a new tenant."""
    return args.shots or max(len(faq.train) for faq in tenant.faqs)


def train_teacher(args: Arguments, name: str) -> str:
    """Trains and keeps the adapter of a tenant; returns a line about it."""
    settings = {"learning_rate": args.teacher_learning_rate, "batch_size": args.teacher_batch_size}
    platform, tenants = load(args, TEACHER_SEED, **settings)
    tenant = next(tenant for tenant in tenants if tenant.name == name)
    hold_out(tenant, args.teacher_queries, args.search_queries)
    platform.new_adapter(name)
    pairs = make_pairs(tenant, "train", platform.tokenizer, args.teacher_queries, args.n_wrong, TEACHER_SEED)
    seconds = platform.train(pairs, args.teacher_epochs, **options(args))
    test = make_pairs(tenant, "validation", platform.tokenizer, args.search_queries, None, TEACHER_SEED)
    metrics = platform.evaluate(test, len(tenant.faqs))
    folder = Path(args.teachers_dir) / name
    with tempfile.TemporaryDirectory(dir=args.teachers_dir) as temporary:
        platform.model.save_adapter(f"{temporary}/{name}", name)
        Path(temporary, name, "made_with.json").write_text(json.dumps(args.of_teachers() | metrics, indent=1))
        Path(temporary, name).rename(folder)
    return f"teacher {name}: accuracy@1 {metrics['accuracy_at_1']:.3f} on its own tenant, {seconds:.0f} s"


def teachers_to_train(args: Arguments, names: list[str]) -> list[str]:
    """Return the tenants whose adapters are not trained yet.

    Raises:
        ValueError: If an existing adapter was trained with other arguments.
    """
    missing = []
    for name in names:
        file = Path(args.teachers_dir) / name / "made_with.json"
        if not file.is_file():
            missing.append(name)
            continue
        made_with = json.loads(file.read_text())
        if different := [key for key, value in args.of_teachers().items() if made_with.get(key) != value]:
            raise ValueError(
                f"{file.parent} was made with --{different[0]} {made_with.get(different[0])}, not "
                f"{args.of_teachers()[different[0]]}; choose another --teachers_dir."
            )
    return missing


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboards a tenant with one method, and measures it."""
    settings = {"learning_rate": job.learning_rate, "batch_size": args.batch_size}
    platform, tenants = load(args, job.seed, **settings)
    number = [tenant.name for tenant in tenants].index(job.tenant)
    new = tenants.pop(number)
    others = tenants[:number] if args.streaming else tenants
    shots = shots_of(args, new)
    model, tokenizer = platform.model, platform.tokenizer

    def pairs(tenant: Tenant, split: str, n_queries: int, n_wrong: int | None) -> Any:
        return make_pairs(tenant, split, tokenizer, n_queries, n_wrong, job.seed)

    for tenant in [new, *others]:
        hold_out(tenant, shots, args.search_queries)
    for tenant in others:
        model.load_adapter(str(Path(args.teachers_dir) / tenant.name), load_as=tenant.name, set_active=False)
    model.to(args.device)
    run = Onboarding(
        platform=platform,
        teachers=[tenant.name for tenant in others],
        train=pairs(new, "train", shots, args.n_wrong),
        others=[pairs(tenant, "train", shots, args.n_wrong) for tenant in others],
        query_log=lambda: pairs(new, "validation", QUERY_LOG, None),
        steps=args.steps,
        options=options(args),
    )
    save = METHODS[job.method].onboard(run)
    n_queries = args.search_queries if job.queries == "validation" else args.test_queries
    test = pairs(new, job.queries, n_queries, None)
    line = {**job._asdict(), "shots": args.shots, "teachers": len(others), **platform.evaluate(test, len(new.faqs))}
    line["seconds"] = run.seconds
    if job.queries == "test":
        line |= costs(platform, save, platform.batches(test, len(new.faqs))[:12])
    if job.queries == "test" and job.method.startswith("AdapterDistillation"):
        model.train_adapter(NEW)
        first = test.select(range(min(96, len(test))))
        table = had.teacher_attention(model, first, platform.collator)
        line["attention"] = {layer: {name: cell.mean for name, cell in row.items()} for layer, row in table.items()}
    about = environment(args.device)
    del about["command"]
    return line | {"environment": about, "arguments": args.of_results()}


def costs(
    platform: example.CrossEncoderPlatform, save: Callable[[str], None], batches: list[BatchEncoding]
) -> dict[str, float]:
    """Measure the milliseconds of a query, also relative to a plain adapter on the same model, and storage."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        megabytes = example.stored_megabytes(Path(folder))
    setup = platform.model.active_adapters
    platform.model.add_adapter("reference", config=ADAPTER)
    platform.model.to(platform.model.device)
    times = platform.milliseconds({"method": setup, "plain": Stack("reference")}, batches)
    platform.model.set_active_adapters(setup)
    return {"ms": times["method"], "ms_ratio": times["method"] / times["plain"], "MB": megabytes}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the finished runs; drop a last line that was cut off when the benchmark was killed."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def check_lines(args: Arguments, lines: list[dict[str, Any]]) -> None:
    """Refuses lines that were made with other arguments.

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


def job_of(line: dict[str, Any]) -> Job:
    """Return the job of a line."""
    return Job(*(line[name] for name in Job._fields))


def chosen_rates(methods: list[str], lines: list[dict[str, Any]]) -> dict[str, float]:
    """Choose for each method the learning rate with the best MRR on the validation queries."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["queries"] == "validation":
            found[line["method"]][line["learning_rate"]].append(line["mrr"])
    best = {method: max(rates, key=lambda rate: fmean(rates[rate])) for method, rates in found.items()}
    return {name: best.get(METHODS[name].rate_of or name, METHODS[name].rates[0]) for name in methods}


def run_all(args: Arguments, function: Callable, items: list, what: str) -> Iterator[Any]:
    """Yield the results of `function(args, item)` as they come, from single-threaded processes if several."""
    with tqdm(total=len(items), desc=what, disable=None) as progress:
        if args.processes == 1:
            for item in items:
                yield function(args, item)
                progress.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.processes, context, torch.set_num_threads, (1,)) as pool:
            futures = [pool.submit(function, args, item) for item in items]
            try:
                for future in as_completed(futures):
                    yield future.result()
                    progress.update()
            finally:
                pool.shutdown(cancel_futures=True)


def run_jobs(args: Arguments, jobs: list[Job], lines: list[dict[str, Any]]) -> None:
    """Run the jobs that have no line yet, and append their lines to the output."""
    done = {job_of(line) for line in lines}
    todo = [job for job in dict.fromkeys(jobs) if job not in done]
    for line in run_all(args, run_job, todo, "runs"):
        lines.append(line)
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(
            f"{line['method']:<32}{line['tenant']:<20}{line['queries']:<11} seed {line['seed']}  "
            f"rate {line['learning_rate']:<7g} AUC {line['auc']:.3f}  accuracy@1 {line['accuracy_at_1']:.3f}  "
            f"MRR {line['mrr']:.3f}  {line['seconds']:.0f} s"
        )


def main() -> None:
    """Run the benchmark."""
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        tenants = load_tenants(args.data, TEACHER_SEED)
        names = [tenant.name for tenant in tenants]
        if unknown := set(args.tenants) - set(names):
            raise ValueError(f"--tenants {min(unknown)} is not in the data; choose of {', '.join(names)}.")
        if args.streaming and names[0] in args.tenants:
            raise ValueError(f"--tenants {names[0]} is the first to arrive and has no teachers; leave it out.")
        for tenant in tenants:
            hold_out(tenant, max(shots_of(args, tenant), args.teacher_queries), args.search_queries)
        lines = read_lines(Path(args.output))
        check_lines(args, lines)
        missing = teachers_to_train(args, names)
    except (ValueError, OSError) as error:
        raise SystemExit(f"streaming_tenants.py: {str(error).splitlines()[0]}") from error
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.teachers_dir).mkdir(parents=True, exist_ok=True)
    print(
        f"{len(names)} tenants; {args.shots or 'all'} queries a FAQ of a new one, with {args.n_wrong} wrong FAQs.\n"
        f"Each method: {args.steps} steps of {args.batch_size} pairs, at that of its rates with the best MRR on\n"
        f"{args.search_queries} validation queries a FAQ of {args.search_tenants} tenants; "
        f"{args.test_queries} test queries a FAQ, each with all FAQs."
    )
    for text in run_all(args, train_teacher, missing, "teachers"):
        tqdm.write(text)

    candidates = names[1:] if args.streaming else names  # the first tenant has no teachers
    searched = dict.fromkeys(METHODS[name].rate_of or name for name in args.methods)
    search = [
        Job(method, tenant, SEARCH_SEED, rate, "validation")
        for method in searched
        for rate in METHODS[method].rates
        for tenant in candidates[: args.search_tenants]
        if len(METHODS[method].rates) > 1
    ]
    run_jobs(args, search, lines)
    rates = chosen_rates(args.methods, lines)
    print("Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()))
    new = args.tenants or candidates
    jobs = [Job(m, tenant, seed, rates[m], "test") for seed in args.seeds for m in args.methods for tenant in new]
    run_jobs(args, jobs, lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
