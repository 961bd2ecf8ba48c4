"""Serving many tenants: mixed batches on one base model, a model for each tenant, and AdapterFusion.

A stream of questions, equally many of each tenant in random order, is there at the beginning; each way answers all of
it in batches of at most `--max_batch` questions: an encoder embeds them, and they are compared with the embeddings of
their tenant's FAQs. The mixed batches are those of the service in `examples/serving`, without HTTP and waiting.
Adapters have random weights, and the encoders of the tenants are copies: the time does not depend on their values.

    python benchmarks/serving.py
    python benchmarks/serving.py --tenants 2 --requests 8 --rounds 1
    python benchmarks/report.py serving benchmarks/results/serving.json
"""

import copy
import os
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from adapters import Fuse
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from measure import compare, environment, ratio, write
from transformers import HfArgumentParser

import hf_adapter_distillation as had  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "serving")]

from faq_data import BUNDLED, Faq, Tenant, load_tenants  # noqa: E402
from faq_embeddings import ADAPTER, EmbeddingPlatform  # noqa: E402
from tenant_batches import Waiting, take_batch  # noqa: E402
from tenant_model import Question, TenantModel  # noqa: E402

MIXED, COPIES, FUSION = "one encoder, mixed batches", "an encoder per tenant", "AdapterFusion"


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    tenants: list[int] = field(default_factory=lambda: [2, 8, 32], metadata={"help": "Numbers of tenants."})
    requests: int = field(default=64, metadata={"help": "Questions in the stream."})
    max_batch: int = field(default=16, metadata={"help": "Questions in a batch, at most."})
    rounds: int = field(default=4, metadata={"help": "Times that each way answers the stream."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    output: str = field(
        default="outputs/serving.json", metadata={"help": "The JSON file; the plot is written beside it."}
    )

    def __post_init__(self) -> None:
        for name in ("requests", "max_batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")
        if not self.tenants or min(self.tenants) < 1:
            raise ValueError(f"--tenants {self.tenants} is out of range; each must be at least 1.")
        if self.requests < max(self.tenants):
            raise ValueError(f"--requests {self.requests} is out of range; it must be at least one for each tenant.")


class EncoderPerTenant(TenantModel):
    """A copy of the encoder for each tenant, without an adapter, as if fine-tuned as a whole."""

    def __init__(self, platform: EmbeddingPlatform, tenants: list[Tenant]) -> None:
        self.platforms = {tenant.name: copy.deepcopy(platform) for tenant in tenants}
        super().__init__(platform, tenants)

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Activate the encoder of the batch's tenant."""
        (tenant,) = tenants
        self.platform = self.platforms[tenant]
        self.encoder = self.platform.encoder.eval()


class FusionOfAll(TenantModel):
    """AdapterFusion over the adapters of all tenants."""

    def embed_faqs(self, tenant: Tenant) -> torch.Tensor:
        """Return random embeddings: the time to find an FAQ does not depend on their values."""
        shape = (len(tenant.faqs), self.platform.model.config.hidden_size)
        return torch.nn.functional.normalize(torch.randn(shape), dim=-1)

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Run all adapters for the batch of a tenant."""
        self.platform.model.set_active_adapters(Fuse(*self.faqs, name="fusion"))


class Setting:
    """The three ways to serve a number of tenants.

    Args:
        args: The arguments.
        base: The platform without adapters; it is copied.
        n_tenants: The number of tenants.
    """

    def __init__(self, args: Arguments, base: EmbeddingPlatform, n_tenants: int) -> None:
        self.args = args
        bundled = load_tenants(str(BUNDLED), seed=0)
        queries = {f"tenant{n}": bundled[n % len(bundled)].faqs for n in range(n_tenants)}
        tenants = [Tenant(name, [Faq(faq.question) for faq in faqs]) for name, faqs in queries.items()]
        names = list(queries)
        shared = copy.deepcopy(base)
        for name in names:
            shared.model.add_adapter(name, config=ADAPTER)
        self.fusion_bytes = -bytes_of([shared.model])
        shared.model.add_adapter_fusion(Fuse(*names, name="fusion"))
        self.fusion_bytes += bytes_of([shared.model])
        self.ways = {
            MIXED: TenantModel(shared, tenants),
            COPIES: EncoderPerTenant(base, tenants),
            FUSION: FusionOfAll(shared, tenants),
        }
        self.ways[MIXED].check()
        rng = random.Random(0)
        asking = [names[n % n_tenants] for n in range(args.requests)]
        rng.shuffle(asking)
        stream = [Question(name, rng.choice(rng.choice(queries[name]).train)) for name in asking]
        of_tenants = [[question for question in stream if question.tenant == name] for name in names]
        separate = [batch for questions in of_tenants for batch in self.batches(questions)]
        self.batches_of = {MIXED: self.batches(stream), COPIES: separate, FUSION: separate}

    def batches(self, questions: list[Question]) -> list[list[Question]]:
        """Split waiting questions into the batches that the service would make of them."""
        waiting = deque(Waiting(question, 0.0, None) for question in questions)
        batches = []
        while waiting:
            batches.append([entry.question for entry in take_batch(waiting, self.args.max_batch)])
        return batches

    def answer(self, way: str) -> None:
        """Answers the stream."""
        for batch in self.batches_of[way]:
            self.ways[way].answer(batch)

    def memory(self) -> dict[str, int]:
        """Return the bytes of the parameters that each way of serving holds, with a fusion for each tenant."""
        shared = bytes_of([self.ways[MIXED].platform.model]) - self.fusion_bytes
        copies = self.ways[COPIES].platforms
        return {
            MIXED: shared,
            COPIES: bytes_of(platform.model for platform in copies.values()),
            FUSION: shared + len(copies) * self.fusion_bytes,
        }


def bytes_of(models: Iterable[torch.nn.Module]) -> int:
    """Count the bytes of the parameters of models."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def measure_tenants(args: Arguments, base: EmbeddingPlatform, n_tenants: int) -> list[dict[str, Any]]:
    """Measures the three ways side by side; returns a row for each."""
    setting = Setting(args, base, n_tenants)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        way: (lambda: None, partial(setting.answer, way)) for way in setting.ways
    }
    times = compare(calls, args.rounds, "cpu")
    memory = setting.memory()
    return [
        {
            "tenants": n_tenants,
            "method": way,
            "queries_per_s": round(args.requests / median(times[way]), 2),
            "rate_ratio": round(ratio(times[COPIES], times[way]), 3),
            "parameters_mb": round(memory[way] / 1e6, 1),
            "batches": len(setting.batches_of[way]),
        }
        for way in setting.ways
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Draw queries per second and memory by number of tenants."""
    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    panels = figure.subplots(1, 2)
    keys = (("queries_per_s", "queries a second", "linear"), ("parameters_mb", "MB of parameters", "log"))
    for ax, (key, label, scale) in zip(panels, keys, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            of_method = [row for row in rows if row["method"] == method]
            ax.plot([row["tenants"] for row in of_method], [row[key] for row in of_method], "o-", label=method)
        ax.set(xlabel="tenants", ylabel=label, xscale="log", yscale=scale)
        ticks = sorted({row["tenants"] for row in rows})
        ax.set_xticks(ticks, labels=map(str, ticks), minor=False)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[1].yaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter=ScalarFormatter())
    panels[0].legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def main() -> None:
    """Run the benchmark."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        base = EmbeddingPlatform(args.model)
        name = args.model or "all-MiniLM-L6-v2"
    except (ValueError, OSError) as error:
        raise SystemExit(f"serving.py: {str(error).splitlines()[0]}") from error
    about = environment("cpu")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"\n{name}, {args.requests} questions; ratios to `{COPIES}`")
    print(f"{'tenants':>7}  {'method':<30}{'queries/s':>10}{'ratio':>7}{'MB':>9}{'batches':>9}")
    rows: list[dict[str, Any]] = []
    for n_tenants in args.tenants:
        for row in measure_tenants(args, base, n_tenants):
            rows.append(row)
            print(
                f"{row['tenants']:>7}  {row['method']:<30}{row['queries_per_s']:>10.1f}{row['rate_ratio']:>7.2f}"
                f"{row['parameters_mb']:>9.1f}{row['batches']:>9}",
                flush=True,
            )
        write(Path(args.output), {"environment": about, "arguments": asdict(args), "rows": rows})
    title = f"{name}, {args.requests} questions\n{about['device']}"
    draw(rows, title).savefig(Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
