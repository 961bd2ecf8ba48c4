"""The tables of the docs, in Markdown, from the result files.

python benchmarks/report.py stage2_step benchmarks/results/stage2_step.json
python benchmarks/report.py inference benchmarks/results/inference.json
python benchmarks/report.py profile_training benchmarks/results/profile_training.json
python benchmarks/report.py serving benchmarks/results/serving.json
python benchmarks/report.py onboarding_platform benchmarks/results/onboarding_platform.json
python benchmarks/report.py onboarding_on_paper benchmarks/results/onboarding_platform.json
python benchmarks/report.py faq_retrieval benchmarks/results/faq_retrieval.json
python benchmarks/report.py llm_routing benchmarks/results/llm_skills.json
python benchmarks/report.py llm_answers benchmarks/results/llm_skills.json
python benchmarks/report.py streaming_tenants benchmarks/results/streaming_tenants_3.jsonl
python benchmarks/report.py tenants benchmarks/results/streaming_tenants_3.jsonl
python benchmarks/report.py training_data benchmarks/results/streaming_tenants_*.jsonl
python benchmarks/report.py embeddings benchmarks/results/embeddings_*.jsonl
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import quality
import quality_embeddings
from tenant_jobs import read_lines
from transformers import PretrainedConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import faq_table  # noqa: E402


def markdown(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def arithmetic(config: PretrainedConfig, batch: int, seq_len: int, n_teachers: int, reduction_factor: int) -> float:
    """Return the multiply-adds of a step with the carrier `student`, relative to a plain adapter's step.

    Counted are matrix products, forward and backward. The base model's layers take 12 d^2 a token each way, and no
    gradient goes below the first adapter; adapters are `seq_bn` of width m = d / reduction_factor.
    """
    from hf_adapter_distillation.method.stacking import MAXIMAL_WIDTH

    tokens, d, layers = batch * seq_len, config.hidden_size, config.num_hidden_layers
    m = d // reduction_factor
    base = 12 * d * d + 2 * seq_len * d  # forward; the attention's products double in backward
    backward = (12 * d * d + 4 * seq_len * d) * (layers - 1) / layers
    plain = tokens * (base + backward + 6 * m * d)
    features, columns = n_teachers * m, n_teachers * (m + 1)
    teachers = tokens * d * (features + 4 * columns)
    query_key = min(3 * d + 2 * tokens, 5 * tokens) * d * d
    value = 3 * tokens * d * d
    if features > MAXIMAL_WIDTH * d:  # in chunks, whose features are computed again in backward
        teachers += tokens * d * features
    else:
        query_key, value = min(query_key, 5 * columns * d * d), min(value, columns * (2 * d + tokens) * d)
    return (plain + teachers + query_key + value) / plain


def stage2_step(results: dict[str, Any]) -> str:
    """Return a row per shape and number of teachers: times, then memory, relative to the plain adapter's step.

    The arithmetic is that of bottlenecks, so a table of LoRA has none.
    """
    from measure import SHAPES

    arguments = results["arguments"]
    is_counted = not arguments.get("config", "").startswith("lora")
    methods = list(dict.fromkeys(row["method"] for row in results["rows"] if row["method"] != "plain"))
    held = [method for method in methods if method != "per teacher"]
    measured: dict[tuple[str, int], dict[str, Any]] = {}
    for row in results["rows"]:
        measured.setdefault((row["shape"], row["teachers"]), {})[row["method"]] = row
    rows = []
    for (shape, n), by_method in measured.items():
        batch, seq_len, factor = (arguments[name] for name in ("batch", "seq_len", "reduction_factor"))
        limit = [f"{arithmetic(SHAPES[shape](), batch, seq_len, n, factor):.2f}"] if is_counted else []
        times = [f"{by_method[m]['time_ratio']:.2f}" if m in by_method else "–" for m in methods]
        peaks = [f"{by_method[m]['peak_ratio']:.2f}" if m in by_method else "–" for m in held]
        rows.append([shape, n, f"{by_method['plain']['ms']:.0f}", *times, *limit, *peaks])
    counted = ["arithmetic"] if is_counted else []
    header = ["shape", "N", "plain, ms", *methods, *counted, *(f"memory: {method}" for method in held)]
    return markdown(header, rows)


def inference(results: dict[str, Any]) -> str:
    """Return a row per shape and method: latency at each batch size, memory, and storage per tenant."""
    batches = results["arguments"]["batches"]
    measured: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        measured.setdefault((row["shape"], row["method"]), {}).setdefault(row["batch"], row)
    rows = []
    for (shape, method), by_batch in measured.items():
        times = [f"{by_batch[b]['ms']:.1f} ({by_batch[b]['time_ratio']:.2f})" for b in batches]
        last = by_batch[batches[-1]]
        rows.append(
            [shape, method, *times, f"{last['peak_mb']:.0f}", f"{last['parameters']:,}", f"{last['stored_mb']:.2f}"]
        )
    header = ["shape", "method", *(f"batch {b}, ms" for b in batches), "peak MB", "parameters", "stored MB"]
    return markdown(header, rows)


def profile_training(results: dict[str, Any]) -> str:
    """Return a row per method: the seconds of each part of an epoch."""
    seconds = results["seconds"]
    header = ["", *next(iter(seconds.values()))]
    return markdown(header, ([method, *(f"{s:.2f}" for s in parts.values())] for method, parts in seconds.items()))


def serving(results: dict[str, Any]) -> str:
    """Return a row per size of a batch and way to serve its tenants."""
    header = ["questions", "way", "queries per second", "/ one adapter", "p50, ms", "p99, ms", "passes", "MB"]
    rows = (
        [
            row["batch"],
            row["method"],
            f"{row['queries_per_s']:.1f}",
            f"{row['rate_ratio']:.2f}",
            f"{row['p50_ms']:,.0f}",
            f"{row['p99_ms']:,.0f}",
            row["passes"],
            f"{row['parameters_mb']:,.0f}",
        ]
        for row in results["rows"]
    )
    return markdown(header, rows)


def serving_http(results: dict[str, Any]) -> str:
    """Return a row for the load of all tenants, and one for the load of one tenant."""
    header = ["questions of", "users", "queries per second", "/ one tenant", "p50, ms", "p99, ms", "mean batch"]
    rows = (
        [
            row["asked"],
            row["users"],
            f"{row['queries_per_s']:.1f}",
            f"{row['rate_ratio']:.2f}",
            f"{row['p50_ms']:,.0f}",
            f"{row['p99_ms']:,.0f}",
            f"{row['mean_batch']:.1f}",
        ]
        for row in results["http"]
    )
    return markdown(header, rows)


def serving_answers(results: dict[str, Any]) -> str:
    """Return what came of the comparison of mixed batches with each tenant alone."""
    answers = results["answers"]
    header = ["answers compared", "wrong", "largest difference of a score", "ms to load a student"]
    cells = (answers["compared"], answers["wrong"], answers["largest_difference"], answers["load_ms"])
    return markdown(header, [[f"{cells[0]:,}", cells[1], f"{cells[2]:.1e}", f"{cells[3]:.0f}"]])


def onboarding_platform(results: dict[str, Any]) -> str:
    """Return a row per way to onboard the tenants."""
    header = [
        "way",
        "workers",
        "steps",
        "students",
        "start, s",
        "s per student",
        "CPU s per student",
        "busy",
        "MB of a worker",
    ]
    rows = (
        [
            row["way"],
            row["workers"],
            row["steps"],
            row["students"],
            f"{row['start_s']:.0f}",
            f"{row['wall_s_per_student']:.1f}",
            f"{row['cpu_s_in_worker']:.1f}",
            f"{100 * row['busy']:.0f}%",
            " to ".join(f"{megabytes:,}" for megabytes in dict.fromkeys(row["worker_mb"])),
        ]
        for row in results["rows"]
    )
    return markdown(header, rows)


PAPER_TENANTS, PAPER_WORKERS = 10_000, (2, 16, 64, 256)


def onboarding_on_paper(results: dict[str, Any]) -> str:
    """Return the hours and gigabytes that 10,000 tenants would take, by number of workers and by steps."""
    rows = {row["way"]: row for row in results["rows"]}
    ray, usual = rows["Ray"], rows["one process, usual steps"]
    hours = [PAPER_TENANTS * row["cpu_s_in_worker"] / ray["busy"] / 3600 for row in (ray, usual)]
    disk = f"{PAPER_TENANTS * results['student_mb'] / 1000:.1f}"
    columns = (f"hours, {row['steps']} steps" for row in (ray, usual))
    header = ["workers, a core each", *columns, "GB of memory for the workers", "GB of disk for the students"]
    return markdown(
        header,
        (
            [n, *(f"{of_one / n:.1f}" for of_one in hours), f"{n * ray['worker_mb'][-1] / 1000:,.1f}", disk]
            for n in PAPER_WORKERS
        ),
    )


def adapter_memory(results: dict[str, Any]) -> str:
    """Return a row per number of LoRA: the megabytes on one base model, and those of a model for each LoRA."""
    header = ["LoRA", "base model, MB", "all LoRA, MB", "one base model, MB", "the process, MB"]
    header.append("a model for each, MB")
    rows = []
    for row in results["rows"]:
        sizes = (row["base"], row["loras"] * row["lora"], row["shared"], row["resident"], row["separate"])
        rows.append([row["loras"], *(f"{size / 1e6:,.1f}" for size in sizes)])
    return markdown(header, rows)


def pool(results: dict[str, Any]) -> str:
    """Return a row per size of the pool: times in CPU seconds, and megabytes."""
    header = [
        "adapters in the pool", "choice, s", "training of the student, s", "choice / training", "plain adapter, s",
        "memory of the choice, MB", "all adapters, MB", "place of the relative",
    ]  # fmt: skip
    rows = [
        [
            f"{row['adapters']:,}",
            f"{row['adding'] + row['ranking']:.1f}",
            f"{row['training']:.1f}",
            f"{(row['adding'] + row['ranking']) / row['training']:.2f}",
            f"{row['plain']:.1f}",
            f"{row['ranking_bytes'] / 1e6:,.0f}",
            f"{row['all_bytes'] / 1e6:,.0f}",
            row["place_of_relative"],
        ]
        for row in results["rows"]
    ]
    return markdown(header, rows)


def faq_retrieval(results: dict[str, Any]) -> str:
    """Return the table of the example, a row per way to onboard the tenant."""
    header, *rows = faq_table.cells(results["rows"])
    return markdown(header, rows)


def llm_routing(results: dict[str, Any]) -> str:
    """Return the table of a language model that routes messages, a row per way to onboard the tenant."""
    header, *rows = faq_table.cells(results["rows"]["routing"])
    return markdown(header, rows)


def llm_answers(results: dict[str, Any]) -> str:
    """Return the table of a language model that answers with labels, a row per way to onboard the tenant."""
    header, *rows = faq_table.cells(results["rows"]["answers"])
    return markdown(header, rows)


def read(path: Path, *more: Path) -> Any:
    """Return the content of a result file: a dict, or for JSON lines a list of the dicts of all files."""
    if path.suffix != ".jsonl":
        return json.loads(path.read_text(encoding="utf-8"))
    return [line for file in (path, *more) for line in read_lines(file)]


def streaming_tenants(lines: list[dict[str, Any]]) -> str:
    """Return the table of the methods on the streaming tenants."""
    return markdown(*quality.methods(lines))


def variants(lines: list[dict[str, Any]]) -> str:
    """Return the table of the variants of AdapterDistillation."""
    return markdown(*quality.variants(lines))


def objectives(lines: list[dict[str, Any]]) -> str:
    """Return the table of objectives, chosen teachers and unlabelled queries."""
    return markdown(*quality.objectives(lines))


def training_costs(lines: list[dict[str, Any]]) -> str:
    """Return the table of training costs."""
    return markdown(*quality.training_costs(lines))


def tenants(lines: list[dict[str, Any]]) -> str:
    """Return the table of the methods tenant by tenant."""
    return markdown(*quality.tenants(lines))


def training_data(lines: list[dict[str, Any]]) -> str:
    """Return the table of the methods by amount of training data."""
    return markdown(*quality.training_data(lines))


def embeddings(lines: list[dict[str, Any]]) -> str:
    """Return the table of the methods on embeddings."""
    return markdown(*quality_embeddings.embeddings(lines))


def comparison(lines: list[dict[str, Any]]) -> str:
    """Return the same runs in four columns."""
    return markdown(*quality_embeddings.comparison(lines))


TABLES = {
    table.__name__: table
    for table in (
        stage2_step,
        inference,
        profile_training,
        serving,
        serving_http,
        serving_answers,
        onboarding_platform,
        onboarding_on_paper,
        adapter_memory,
        pool,
        faq_retrieval,
        llm_routing,
        llm_answers,
        streaming_tenants,
        variants,
        objectives,
        training_costs,
        tenants,
        training_data,
        embeddings,
        comparison,
    )
}


def report_embeddings(*paths: Path) -> None:
    """Print a table for each file, and draw a panel for each beside the first, under its name."""
    files = {path.stem: read(path) for path in paths}
    for name, lines in files.items():
        print(f"{name}\n\n{embeddings(lines)}\n")
    quality_embeddings.draw_differences(files).savefig(paths[0].with_name(f"{paths[0].stem}_differences.png"))
    quality_embeddings.draw_cost(files).savefig(paths[0].with_name(f"{paths[0].stem}_cost.png"))


def main() -> None:
    """Print a table, or several, and draw the plots that belong to it."""
    name, path, *more = sys.argv[1], *map(Path, sys.argv[2:])
    if name == "embeddings":
        return report_embeddings(path, *more)
    results = read(path, *more)
    print(TABLES[name](results))
    if name == "training_data":
        quality.draw_training_data(results).savefig(path.with_name("training_data.png"))
    if name == "streaming_tenants":
        quality.draw_cost(results).savefig(path.with_name(f"{path.stem}_cost.png"))
        if any("attention" in line for line in results):
            quality.draw_attention(results).savefig(path.with_name(f"{path.stem}_attention.png"))


if __name__ == "__main__":
    main()
