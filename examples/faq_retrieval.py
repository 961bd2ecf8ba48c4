"""FAQ retrieval for tenants: distil the adapters of existing tenants into the adapter of a new one.

A cross-encoder reads a query together with each FAQ of its tenant; the score ranks the FAQs. All tenants share one
frozen base model, each has an adapter of its own. A new tenant with only a few queries a FAQ is onboarded in four
ways, all with the same number of optimizer steps: a plain adapter, AdapterFusion over the other tenants' adapters, a
plain adapter that starts from their average, and AdapterDistillation.

    python examples/faq_retrieval.py
    python examples/faq_retrieval.py --quick --ask "my phone is gone"
    python examples/faq_retrieval.py --data path/to/clinc150 --new_tenant travel --model bert-base-uncased
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import adapters
import torch
import transformers
from adapters import AdapterCompositionBlock
from datasets import Dataset
from faq_cross_encoder import CrossEncoderPlatform, stored_megabytes
from faq_data import BUNDLED, Tenant, hold_out, load_tenants, make_pairs
from transformers import HfArgumentParser

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """The arguments of the example; `--quick` lowers the numbers that cost time."""

    data: str | None = field(
        default=None, metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id. Default: the bundled data."}
    )
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    new_tenant: str = field(default="", metadata={"help": "The tenant to onboard. Default: the last one."})
    shots: int = field(default=3, metadata={"help": "Training queries a FAQ of the new tenant."})
    teacher_queries: int = field(default=10, metadata={"help": "Training queries a FAQ of the other tenants."})
    test_queries: int = field(default=8, metadata={"help": "Test queries a FAQ of the new tenant, at most."})
    n_wrong: int = field(default=3, metadata={"help": "Wrong FAQs that a training query is paired with."})
    teacher_epochs: int = field(default=6, metadata={"help": "Epochs of each existing tenant's adapter."})
    epochs: int = field(default=12, metadata={"help": "Epochs of the new tenant, all stages together."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=8, metadata={"help": "Pairs in a training batch."})
    carrier: str = field(default="student", metadata={"help": "What a layer passes on in stage 2."})
    output_dir: str = field(default="outputs/faq_retrieval", metadata={"help": "Where adapters and plot are written."})
    ask: str = field(default="", metadata={"help": "A query of your own for the new tenant."})
    quick: bool = field(default=False, metadata={"help": "A run that shows that all works, not how well."})
    seed: int = field(default=1, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.type is int and f.name != "seed"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")
        if self.quick:
            self.teacher_queries, self.teacher_epochs, self.epochs, self.test_queries = 6, 2, 3, 1


def train_teachers(platform: CrossEncoderPlatform, tenants: list[Tenant]) -> list[str]:
    """Trains an adapter for each existing tenant; returns their names."""
    args = platform.args
    for number, tenant in enumerate(tenants, start=1):
        platform.new_adapter(tenant.name)
        pairs = make_pairs(tenant, "train", platform.tokenizer, args.teacher_queries, args.n_wrong, args.seed)
        platform.train(pairs, args.teacher_epochs, what=f"Teacher {number} of {len(tenants)}, {tenant.name}")
    return [tenant.name for tenant in tenants]


def onboard(platform: CrossEncoderPlatform, tenant: Tenant, teachers: list[str]) -> dict[str, dict[str, float]]:
    """Onboards the new tenant in four ways; returns a row of the table for each."""
    args, model = platform.args, platform.model
    train = make_pairs(tenant, "train", platform.tokenizer, args.shots, args.n_wrong, args.seed)
    test = make_pairs(tenant, "test", platform.tokenizer, args.test_queries, None, args.seed)
    folder = Path(args.output_dir) / "adapters"
    rows: dict[str, dict[str, float]] = {}
    setups: dict[str, AdapterCompositionBlock] = {}

    def finish(method: str, seconds: float, save: Callable[[Path], None]) -> None:
        path = folder / method.replace(" ", "_")
        path.mkdir(parents=True, exist_ok=True)
        save(path)
        setups[method] = model.active_adapters
        rows[method] = {
            **platform.evaluate(test, len(tenant.faqs)),
            "MB": stored_megabytes(path),
            "train_s": seconds,
        }

    def plain(name: str, epochs: float, what: str) -> float:
        platform.new_adapter(name)
        return platform.train(train, epochs, what=what)

    seconds = plain("plain", args.epochs, "Plain adapter")
    finish("plain adapter", seconds, lambda path: model.save_adapter(str(path / "plain"), "plain"))

    seconds = plain("own", args.epochs / 2, "AdapterFusion, own adapter")
    fusion = platform.fuse("own", teachers)
    seconds += platform.train(train, args.epochs / 2, what="AdapterFusion, fusion")

    def save_fusion(path: Path) -> None:
        model.save_adapter_fusion(str(path / "fusion"), fusion)
        model.save_adapter(str(path / "own"), "own")

    finish("AdapterFusion", seconds, save_fusion)

    platform.average("average", teachers)
    seconds = platform.train(train, args.epochs, what="Plain adapter from the teachers' average")
    finish("teachers' average", seconds, lambda path: model.save_adapter(str(path / "average"), "average"))

    platform.new_adapter(tenant.name, had.DistillationConfig(teachers=teachers, carrier=args.carrier))
    seconds = platform.train(
        train, args.epochs, had.DistillationTrainer, "AdapterDistillation", keep_fusion=True, logging_steps=50
    )
    finish("AdapterDistillation", seconds, lambda path: model.save_adapter(str(path / tenant.name), tenant.name))

    times = platform.milliseconds(setups, platform.batches(test, len(tenant.faqs))[:24])
    for method, milliseconds in times.items():
        rows[method]["ms"] = milliseconds

    model.train_adapter(tenant.name)
    table = had.teacher_attention(model, test.select(range(min(96, len(test)))), platform.collator)
    figure = had.plot_teacher_attention(table, title=f"Where {tenant.name}'s adapter looked")
    figure.savefig(Path(args.output_dir) / "teacher_attention.png")
    model.set_active_adapters(tenant.name)
    return rows


def answer(platform: CrossEncoderPlatform, tenant: Tenant, query: str) -> str:
    """Return the tenant's best FAQ for a query, in words."""
    encoded = platform.tokenizer([query] * len(tenant.faqs), [faq.question for faq in tenant.faqs], truncation=True)
    (batch,) = platform.batches(Dataset.from_dict(dict(encoded)), len(tenant.faqs))
    scores = platform.score(batch)
    best = tenant.faqs[max(range(len(scores)), key=scores.__getitem__)]
    return f"  Q: {query}\n  -> {best.question} {best.answer}"


def write_results(args: Arguments, rows: dict[str, dict[str, float]]) -> None:
    """Write the table with the arguments and versions that produced it."""
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in (had, adapters, transformers, torch)},
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    (Path(args.output_dir) / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def prepare() -> tuple[Arguments, CrossEncoderPlatform, Tenant, list[Tenant]]:
    """Read and check arguments, data and model, before any training.

    Returns:
        The arguments, the platform, the new tenant and the existing ones.

    Raises:
        ValueError: If an argument, or what it names, is wrong.
        OSError: If the model cannot be loaded.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tenants = load_tenants(args.data or str(BUNDLED), args.seed)
    names = [tenant.name for tenant in tenants]
    new_name = args.new_tenant or names[-1]
    if new_name not in names:
        raise ValueError(f"--new_tenant {new_name} is not in the data; choose one of {', '.join(names)}.")
    new = tenants[names.index(new_name)]
    existing = [tenant for tenant in tenants if tenant is not new][: 3 if args.quick else None]
    hold_out(new, args.shots)
    had.DistillationConfig(teachers=[tenant.name for tenant in existing], carrier=args.carrier)  # checks the carrier
    return args, CrossEncoderPlatform(args), new, existing


def main() -> None:
    """Run the example."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        args, platform, new, existing = prepare()
    except (ValueError, OSError) as error:
        raise SystemExit(f"faq_retrieval.py: {str(error).splitlines()[0]}") from error
    teachers = train_teachers(platform, existing)
    rows = onboard(platform, new, teachers)

    print(f"\nNew tenant {new.name}: {len(new.faqs)} FAQs, {args.shots} training queries each")
    print(f"Teachers: {', '.join(teachers)}\n")
    print(f"{'':<22}{'AUC':>8}{'acc@1':>8}{'MRR':>8}{'ms/query':>10}{'MB':>8}{'train s':>9}")
    for method, row in rows.items():
        print(
            f"{method:<22}{row['auc']:>8.3f}{row['accuracy_at_1']:>8.3f}{row['mrr']:>8.3f}"
            f"{row['ms']:>10.1f}{row['MB']:>8.2f}{row['train_s']:>9.1f}"
        )
    if args.quick:
        print("\nA quick run trains too little for these numbers to mean anything; leave --quick out for that.")
    write_results(args, rows)
    print(f"\nThe student, the plot and results.json are in {args.output_dir}; it answers:")
    queries = [args.ask] if args.ask else [faq.test[0] for faq in new.faqs[:3]]
    print("\n".join(answer(platform, new, query) for query in queries))
    print(f"\n{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
