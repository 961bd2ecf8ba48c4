"""Is a distilled adapter better? FAQ retrieval over tenants, method by method, in settings that platforms have.

Each tenant in turn is the new one, and the adapters of others are the teachers (`--pool`, see `pools.py`). First each
method chooses its learning rate, on validation queries of the first tenants; then it runs for each tenant and seed. A
finished run is one JSON line of the output; the same command goes on where it stopped.

    python benchmarks/streaming_tenants.py --data path/to/clinc150 --pool relatives
    python benchmarks/streaming_tenants.py --data path/to/clinc150 --shots 0 --seeds 1
    python benchmarks/streaming_tenants.py --methods "plain adapter" "AdapterDistillation" --device cuda --bf16
    python benchmarks/streaming_tenants.py --architecture cross-encoder --data path/to/clinc150
    python benchmarks/streaming_tenants.py --architecture classifier --data path/to/clinc150 --pool relatives
    python benchmarks/streaming_tenants.py --architecture language-model --data path/to/clinc150 --others 3
    python benchmarks/streaming_tenants.py --architecture assistant --data path/to/clinc150 --others 3
    python benchmarks/report.py streaming_tenants benchmarks/results/embeddings_relatives_3.jsonl
"""

import json
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import assistant_runs
import classifier_runs
import cross_encoder_runs
import embedding_runs
import language_model_runs
import torch
from pools import RELATIVE, TEACHER_SEED, check_tenants, load_tenants, teachers_to_train
from tenant_jobs import Arguments, Job, Method, check_lines, drop_cut_off, read_lines
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser

from inputs import load_model, open_folder  # isort: skip

RUNS = {
    "embeddings": embedding_runs,
    "cross-encoder": cross_encoder_runs,
    "classifier": classifier_runs,
    "language-model": language_model_runs,
    "assistant": assistant_runs,
}
METRICS = {"auc": "AUC", "accuracy_at_1": "accuracy@1", "mrr": "MRR"}
SEARCH_SEED = 0


def chosen_rates(
    of_architecture: Mapping[str, Method], methods: list[str], lines: list[dict[str, Any]]
) -> dict[str, float]:
    """Choose for each method the learning rate with the best MRR on the validation queries.

    An assistant, which ranks no FAQs, has the share of its right answers in place of an MRR.
    """
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["queries"] == "validation":
            quality = line["mrr"] if "mrr" in line else line["accuracy_at_1"]
            found[line["method"]][line["learning_rate"]].append(quality)
    best = {method: max(rates, key=lambda rate: fmean(rates[rate])) for method, rates in found.items()}
    return {name: best.get(of_architecture[name].rate_of or name, of_architecture[name].rates[0]) for name in methods}


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
    done = {Job.of(line) for line in lines}
    todo = [job for job in dict.fromkeys(jobs) if job not in done]
    drop_cut_off(Path(args.output))
    for line in run_all(args, RUNS[args.architecture].run_job, todo, "runs"):
        lines.append(line)
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        metrics = "".join(f"{name} {line[key]:.3f}  " for key, name in METRICS.items() if key in line)
        tqdm.write(
            f"{line['method']:<36}{line['tenant']:<20}{line['queries']:<11} seed {line['seed']}  "
            f"rate {line['learning_rate']:<7g} {metrics}{line['seconds']:.0f} s"
        )


def prepare(args: Arguments) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """Check the arguments against the data, the teachers and the finished runs, before any training.

    Returns:
        The tenants that can be new ones, the lines of the finished runs, and the teachers that are not trained yet.

    Raises:
        ValueError: If an argument does not fit, or there is no such model.
        OSError: If the data cannot be downloaded.
    """
    of_architecture = RUNS[args.architecture].METHODS
    if unknown := [name for name in args.methods if name not in of_architecture]:
        choices = ", ".join(map(repr, of_architecture))
        raise ValueError(f"--methods {unknown[0]!r} is unknown; choose of {choices}.")
    if args.shots == "0" and (needy := [name for name in args.methods if of_architecture[name].needs_labels]):
        raise ValueError(f"--methods {needy[0]!r} needs labelled queries; raise --shots or leave it out.")
    if args.batch_size < 3 and "AdapterDistillation: similarity" in args.methods:
        raise ValueError(
            f"--batch_size {args.batch_size} is too small to compare queries by similarity; raise it to 3."
        )
    has_setfit = find_spec("setfit") is not None
    if "SetFit" in args.methods and not has_setfit:
        raise ValueError("--methods 'SetFit' needs its package; install it with pip install --no-deps setfit.")
    args.methods = args.methods or [
        name
        for name, method in of_architecture.items()
        if (args.shots != "0" or not method.needs_labels) and (has_setfit or name != "SetFit")
    ]
    tenants = load_tenants(args.data, TEACHER_SEED)
    names = [tenant.name for tenant in tenants]
    if unknown := sorted(set(args.tenants) - set(names)):
        raise ValueError(f"--tenants {unknown[0]} is not in the data; choose of {', '.join(names)}.")
    if args.pool == "streaming" and names[0] in args.tenants:
        raise ValueError(f"--tenants {names[0]} is the first to arrive and has no teachers; leave it out.")
    check_tenants(args, tenants)
    if args.model is not None:
        load_model(AutoConfig.from_pretrained, args.model)
    open_folder("The folder of --output,", Path(args.output).parent)
    if Path(args.output).is_dir():
        raise ValueError(f"--output {args.output} is a folder; give a file.")
    open_folder("--teachers_dir", args.teachers_dir)
    lines = read_lines(Path(args.output)) if Path(args.output).exists() else []
    check_lines(args, lines)
    candidates = names[1:] if args.pool == "streaming" else names  # the first tenant has no teachers
    teachers = names[: args.others + 1] if args.others else list(names)
    if args.pool == "relatives":
        new = dict.fromkeys([*candidates[: args.search_tenants], *(args.tenants or candidates)])
        teachers += [f"{name}{RELATIVE}" for name in new]
    return candidates, lines, teachers_to_train(args, teachers)


def main() -> None:
    """Run the benchmark."""
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        candidates, lines, missing = prepare(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"streaming_tenants.py: {str(error).splitlines()[0]}") from error
    print(
        f"{args.architecture}, pool {args.pool}: {len(candidates)} tenants, {args.shots} labelled queries per FAQ of "
        f"a new one.\nEach method: {args.steps} steps of {args.batch_size}, at that of its rates with the best MRR "
        f"on {args.search_queries} validation\nqueries per FAQ of {args.search_tenants} tenants; {args.test_queries} "
        "test queries per FAQ, each with all FAQs."
    )
    for text in run_all(args, RUNS[args.architecture].train_teacher, missing, "teachers"):
        tqdm.write(text)

    methods = RUNS[args.architecture].METHODS
    searched = dict.fromkeys(methods[name].rate_of or name for name in args.methods)
    search = [
        Job(method, tenant, SEARCH_SEED, rate, "validation")
        for method in searched
        for rate in methods[method].rates
        for tenant in candidates[: args.search_tenants]
        if len(methods[method].rates) > 1
    ]
    run_jobs(args, search, lines)
    rates = chosen_rates(methods, args.methods, lines)
    print("Learning rates: " + ", ".join(f"{method} {rate:g}" for method, rate in rates.items()))
    new = args.tenants or candidates
    jobs = [Job(m, tenant, seed, rates[m], "test") for seed in args.seeds for m in args.methods for tenant in new]
    run_jobs(args, jobs, lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
