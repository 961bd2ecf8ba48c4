"""Serving many tenants: mixed batches on one base model against a model for each tenant, one adapter, and `Fuse`.

Each batch has questions of `--in_batch` of the tenants. All ways answer the same batches, and take turns, batch by
batch. A way that cannot mix tenants runs a pass for each tenant of the batch. A question waits until its pass is done.
Adapters have random weights. A few copies of the encoder stand for those of all tenants: they outgrow the caches, too.

`--compared` compares answers of mixed batches with the answers of the tenant's adapter alone. `--seconds` loads
`examples/platform/serve.py` with Ray Serve over HTTP here, with questions of all tenants and of one in turns.

    python benchmarks/serving.py
    python benchmarks/serving.py --rounds 0 --compared 10000 --output outputs/serving_answers.json
    python benchmarks/serving.py --rounds 0 --seconds 40 --output outputs/serving_http.json
    python benchmarks/serving.py --tenants 4 --in_batch 2 --batches 4 --rounds 1
    python benchmarks/report.py serving benchmarks/results/serving.json
"""

import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from adapters import Fuse
from measure import check_output, environment, ratio, write
from serving_http import load_over_http, percentiles
from transformers import HfArgumentParser

import hf_adapter_distillation as had  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "platform")]

from batched_adapters import SPLIT, LoadedAdapter, TenantAdapters  # noqa: E402
from faq_data import BUNDLED, load_tenants  # noqa: E402
from faq_embeddings import ADAPTER, EmbeddingPlatform, search, tokenized  # noqa: E402
from student_folder import Question  # noqa: E402
from tenant_service import TenantService  # noqa: E402

MIXED, BATCH_SPLIT, PLAIN = "mixed batches", "mixed batches by BatchSplit", "one plain adapter"
COPIES, FUSION = "an encoder per tenant", "AdapterFusion of 8"
N_COPIES, N_FUSED = 8, 8
TOLERANCE = 1e-5  # of a score in float32


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    tenants: int = field(default=64, metadata={"help": "Tenants of the platform."})
    in_batch: int = field(default=8, metadata={"help": "Tenants in a batch."})
    batches: list[int] = field(default_factory=lambda: [8, 32], metadata={"help": "Numbers of questions in a batch."})
    rounds: int = field(default=3, metadata={"help": "Times that each tenant stands in a batch; 0 leaves it out."})
    compared: int = field(default=0, metadata={"help": "Answers that are compared with the tenant alone."})
    seconds: float = field(default=0.0, metadata={"help": "Seconds of load over HTTP with Ray."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    output: str = field(default="outputs/serving.json", metadata={"help": "The JSON file."})

    def __post_init__(self) -> None:
        for name, lowest in (("tenants", 1), ("in_batch", 1), ("rounds", 0), ("compared", 0), ("seconds", 0)):
            if not getattr(self, name) >= lowest:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least {lowest}.")
        if self.tenants % self.in_batch:
            raise ValueError(f"--tenants {self.tenants} is out of range; it must be a multiple of --in_batch.")
        for size in self.batches:
            if size < 1 or size % self.in_batch:
                raise ValueError(f"--batches {size} is out of range; it must be a multiple of --in_batch.")


class SplitAdapters(TenantAdapters):
    """Adapters that stay on the model, where one tenant's is plain and several stand in a `BatchSplit`."""

    def load(self, folder: Path, label: str) -> LoadedAdapter:
        """Load a saved adapter."""
        return super().load(folder, label)._replace(way=SPLIT)


def write_students(args: Arguments, base: EmbeddingPlatform, folder: Path) -> dict[str, list[str]]:
    """Write a student with random weights for each tenant, and return the questions of each tenant."""
    bundled, questions = load_tenants(str(BUNDLED), seed=0), {}
    platform = copy.deepcopy(base)
    for number in range(args.tenants):
        name, faqs = f"tenant{number}", bundled[number % len(bundled)].faqs
        transformers.set_seed(number)
        platform.model.add_adapter(name, config=ADAPTER)
        for key, parameter in platform.model.named_parameters():
            if f".{name}." in key:
                parameter.data += 0.05 * torch.randn_like(parameter)
        (folder / name).mkdir(parents=True)
        platform.model.save_adapter(str(folder / name), name)
        platform.model.delete_adapter(name)
        rows = [{"question": faq.question, "queries": []} for faq in faqs]
        (folder / name / "faqs.json").write_text(json.dumps(rows))
        questions[name] = [query for faq in faqs for query in faq.train]
    return questions


class Setting:
    """All ways to serve the tenants.

    Args:
        args: The arguments.
        base: The platform without adapters; it is copied.
        folder: An empty folder for the students.
    """

    def __init__(self, args: Arguments, base: EmbeddingPlatform, folder: Path) -> None:
        self.args = args
        self.questions = write_students(args, base, folder)
        self.names = list(self.questions)
        self.mixed = TenantService(copy.deepcopy(base), folder, args.tenants)
        self.split = TenantService(copy.deepcopy(base), folder, args.tenants)
        self.split.pool.adapters = SplitAdapters(self.split.pool.platform.model)
        began = time.perf_counter()
        self.students = self.mixed.pool.get(self.names)
        self.load_ms = 1000 * (time.perf_counter() - began) / args.tenants
        self.split.pool.get(self.names)
        self.copies = [copy.deepcopy(base.encoder).eval() for _ in range(min(N_COPIES, args.tenants))]
        fused = copy.deepcopy(base)
        names = [f"fused{number}" for number in range(N_FUSED)]
        for name in names:
            fused.model.add_adapter(name, config=ADAPTER)
        self.adapter_bytes = (bytes_of([fused.model]) - bytes_of([base.model])) // N_FUSED
        self.fusion_bytes = -bytes_of([fused.model])
        fused.model.add_adapter_fusion(Fuse(*names))
        self.fusion_bytes += bytes_of([fused.model])
        fused.model.set_active_adapters(Fuse(*names))
        self.base_bytes, self.fused = bytes_of([base.model]), fused.encoder.eval()
        self.answer: dict[str, Callable[[list[Question]], Any]] = {
            MIXED: self.mixed.answer,
            BATCH_SPLIT: self.split.answer,
            PLAIN: lambda batch: self.split.answer([Question(self.names[0], text) for _, text in batch]),
            COPIES: lambda batch: self.answer_by(self.copies[self.number(batch) % len(self.copies)], batch),
            FUSION: lambda batch: self.answer_by(self.fused, batch),
        }

    def number(self, batch: list[Question]) -> int:
        """Return the number of a tenant."""
        return self.names.index(batch[0].tenant)

    @torch.inference_mode()
    def answer_by(self, encoder: Any, batch: list[Question]) -> list[Any]:
        """Answer questions of one tenant by an encoder."""
        embeddings = encoder(dict(tokenized(encoder, [question.text for question in batch])))["sentence_embedding"]
        faqs = self.students[batch[0].tenant].embeddings
        return search(torch.nn.functional.normalize(embeddings, dim=-1), faqs, top_k=len(faqs))

    def passes(self, way: str, batch: list[Question]) -> list[list[Question]]:
        """Return what a way answers together."""
        if way in (MIXED, BATCH_SPLIT, PLAIN):
            return [batch]
        return [[q for q in batch if q.tenant == name] for name in dict.fromkeys(q.tenant for q in batch)]

    def memory(self) -> dict[str, int]:
        """Return the bytes of the parameters that each way holds for all tenants, with a fusion for each."""
        all_adapters = self.base_bytes + self.args.tenants * self.adapter_bytes
        return {
            MIXED: all_adapters,
            BATCH_SPLIT: all_adapters,
            PLAIN: self.base_bytes + self.adapter_bytes,
            COPIES: self.args.tenants * self.base_bytes,
            FUSION: all_adapters + self.args.tenants * self.fusion_bytes,
        }

    def draw(self, size: int, rng: random.Random) -> list[list[Question]]:
        """Return batches in which each tenant stands in one, with as many questions as the others."""
        names, n = rng.sample(self.names, len(self.names)), self.args.in_batch
        groups = [names[first : first + n] for first in range(0, len(names), n)]
        batches = [[Question(t, rng.choice(self.questions[t])) for t in group * (size // n)] for group in groups]
        for batch in batches:
            rng.shuffle(batch)
        return batches


def bytes_of(models: Iterable[torch.nn.Module]) -> int:
    """Count the bytes of the parameters of models."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def measure_batches(setting: Setting, size: int) -> list[dict[str, Any]]:
    """Measure all ways on batches of a size, in turns; return a row for each."""
    rng, args = random.Random(size), setting.args
    batches = [batch for _ in range(args.rounds) for batch in setting.draw(size, rng)]
    times: dict[str, list[float]] = {way: [] for way in setting.answer}
    waits: dict[str, list[float]] = {way: [] for way in setting.answer}
    for number, batch in enumerate([batches[0], *batches]):
        for way in rng.sample(list(setting.answer), len(setting.answer)):
            began = time.perf_counter()
            for of_pass in setting.passes(way, batch):
                setting.answer[way](of_pass)
                if number > 0:  # the first batch is not counted
                    waits[way] += [time.perf_counter() - began] * len(of_pass)
            if number > 0:
                times[way].append(time.perf_counter() - began)
    memory = setting.memory()
    return [
        {
            "batch": size,
            "method": way,
            "queries_per_s": round(size * len(batches) / sum(times[way]), 2),
            "rate_ratio": round(ratio(times[PLAIN], times[way]), 3),
            **percentiles(waits[way]),
            "passes": len(setting.passes(way, batches[0])),
            "parameters_mb": round(memory[way] / 1e6, 1),
        }
        for way in setting.answer
    ]


def compare_answers(setting: Setting) -> dict[str, Any]:
    """Compare answers of mixed batches with the answers of the tenant's adapter alone."""
    args, rng = setting.args, random.Random(1)
    pairs = [Question(name, text) for name, texts in setting.questions.items() for text in texts]
    asked = rng.sample(pairs, min(args.compared, len(pairs)))
    asked += rng.choices(pairs, k=args.compared - len(asked))
    wanted: dict[int, dict[str, float]] = {}
    for name in setting.names:
        numbers = [number for number, question in enumerate(asked) if question.tenant == name]
        numbers.sort(key=lambda number: len(asked[number].text))  # with little padding, unlike the mixed batches
        for first in range(0, len(numbers), max(args.batches)):
            of_batch = numbers[first : first + max(args.batches)]
            answers = setting.split.answer([asked[number] for number in of_batch])
            wanted |= {n: dict(answer.found) for n, answer in zip(of_batch, answers, strict=True)}
    largest, wrong = 0.0, 0
    for first in range(0, len(asked), max(args.batches)):
        answers = setting.mixed.answer(asked[first : first + max(args.batches)])
        for number, answer in enumerate(answers, first):
            found = dict(answer.found)
            assert found.keys() == wanted[number].keys()
            difference = max(abs(found[faq] - score) for faq, score in wanted[number].items())
            largest, wrong = max(largest, difference), wrong + (difference > TOLERANCE)
    return {
        "compared": len(asked),
        "wrong": wrong,
        "largest_difference": largest,
        "load_ms": round(setting.load_ms, 1),
    }


def main() -> None:
    """Run the benchmark."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        base = EmbeddingPlatform(args.model)
    except (ValueError, OSError) as error:
        raise SystemExit(f"serving.py: {str(error).splitlines()[0]}") from error
    check_output(args.output)
    about = environment("cpu")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    results: dict[str, Any] = {"environment": about, "arguments": asdict(args), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(args, base, Path(folder) / "students")
        print(f"\n{args.tenants} tenants, {args.in_batch} in a batch; ratios to `{PLAIN}`")
        columns = f"{'queries/s':>10}{'ratio':>7}{'p50 ms':>9}{'p99 ms':>9}{'passes':>7}{'MB':>9}"
        print(f"{'batch':>5}  {'method':<30}{columns}")
        for size in args.batches if args.rounds else ():
            for row in measure_batches(setting, size):
                results["rows"].append(row)
                print(
                    f"{row['batch']:>5}  {row['method']:<30}{row['queries_per_s']:>10.1f}{row['rate_ratio']:>7.2f}"
                    f"{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}{row['passes']:>7}{row['parameters_mb']:>9.1f}",
                    flush=True,
                )
        if args.seconds:
            results["http"] = load_over_http(args, setting.questions, Path(folder) / "students")
            print(*results["http"], sep="\n", flush=True)
        if args.compared:
            results["answers"] = compare_answers(setting)
            print(results["answers"])
    write(Path(args.output), results)


if __name__ == "__main__":
    main()
