"""The command `eval`: evaluate a saved adapter on texts with labels."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters import AdapterTrainer, ModelAdaptersMixin
from transformers import DataCollatorWithPadding, TrainingArguments

from ..configuration import option
from ..downloads import locate_saved
from ..method.heads import head_config, kind_of_labels
from ..student.provenance import read_saved
from ..student.training_run import finite_metrics
from ..teachers.loading import ADAPTER_FILES, load_saved_adapter
from .data import DataArguments, Labels, check_columns, encode, label_ids, load, names_in, split_of
from .saved import check_writable, table
from .train import accuracy, load_base


@dataclass(kw_only=True)
class EvalArguments(DataArguments):
    """Adapter and data of an evaluation."""

    adapter: str = option("Folder or Hub id (with @revision) of a saved adapter with its head.")
    split: str | None = option("Split to evaluate on. Default: `test`, or the only one.", None)
    batch_size: int = option("Examples per batch.", 32)
    output: str | None = option("JSON file for the results.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is out of range; it must be at least 1.")
        if self.output is not None:
            check_writable(self.output)


def evaluate(args: EvalArguments) -> str:
    """Evaluate a saved adapter without its teachers, and return a table of the results."""
    examples = split_of(load(args.dataset, args.dataset_config), args.split, args.dataset)
    check_columns(examples, args)
    folder = locate_saved(args.adapter, ADAPTER_FILES)
    name = str(read_saved(folder).get("name") or "adapter")  # PEFT saves none
    model, tokenizer = load_base(args.model, args.max_length)
    load_saved_adapter(model, folder, name, f"Adapter {args.adapter!r}")
    model.set_active_adapters(name)
    labels = _labels(model, name, args.adapter, names_in(examples, args.label_column))
    ids = label_ids(examples, args.label_column, labels, args.adapter)
    encoded = encode(examples, tokenizer, args, ids)
    with TemporaryDirectory() as unused:
        settings = TrainingArguments(unused, per_device_eval_batch_size=args.batch_size, report_to=[])
        collator = DataCollatorWithPadding(tokenizer)
        trainer = AdapterTrainer(model, settings, data_collator=collator, compute_metrics=accuracy)
        metrics = finite_metrics(trainer.evaluate(encoded))
    results = {"adapter": args.adapter, "dataset": args.dataset, "examples": len(examples)}
    results |= {name.removeprefix("eval_"): value for name, value in metrics.items()}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return table(results.items())


def _labels(model: ModelAdaptersMixin, name: str, source: str, names_in_data: set[str]) -> Labels:
    """Return the classes of an adapter's head."""
    if name not in model.heads:
        raise ValueError(f"{source} has no head, so there is nothing to evaluate; save the adapter with its head.")
    config = head_config(model, name)
    if config["head_type"] != "classification" or kind_of_labels(model, name) != "classes":
        raise ValueError(f"{source} has a head for {config['head_type']}, not for classes of texts.")
    label2id = config.get("label2id") or {}
    names = sorted(label2id, key=label2id.__getitem__)
    # The default names of transformers stand for numbers, unless the data have such names.
    defaults = [f"LABEL_{number}" for number in range(len(names))]
    return list(range(config["num_labels"])) if names == defaults and names_in_data.isdisjoint(names) else names
