"""What the command line does with a model: the evaluation of a saved adapter."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from adapters import AdapterTrainer, ModelAdaptersMixin
from transformers import DataCollatorWithPadding, TrainingArguments

from ..downloads import locate_saved
from ..method.heads import head_config, kind_of_labels
from ..student.provenance import read_saved
from ..student.training_run import finite_metrics
from ..teachers.loading import ADAPTER_FILES, check_folder, load_teacher
from .data import DataArguments, Labels, check_columns, encode, label_ids, load, split_of
from .saved import check_writable, table
from .train import accuracy, load_base


@dataclass(kw_only=True)
class EvalArguments(DataArguments):
    """Which adapter is evaluated on which data."""

    model: str = field(metadata={"help": "Base model of the adapter: a folder or a Hub id."})
    adapter: str = field(metadata={"help": "Folder or Hub id (with @revision) of a saved adapter with its head."})
    split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: `test`, or the only one."}
    )
    batch_size: int = field(default=32, metadata={"help": "Examples at a time."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} is out of range; it must be at least 1.")
        if self.output is not None:
            check_writable(self.output)


def evaluate(args: EvalArguments) -> str:
    """Evaluates a saved adapter, without its teachers.

    Args:
        args: Which one, and on which data.

    Returns:
        The results.
    """
    data = load(args.dataset, args.dataset_config)
    examples = split_of(data, args.split, args.dataset)
    check_columns(examples, args)
    folder = locate_saved(args.adapter, ADAPTER_FILES)
    name = str(read_saved(folder).get("name") or "adapter")
    model, tokenizer = load_base(args.model, args.max_length)
    try:
        load_teacher(model, args.adapter, name, folder, check_folder(model, args.adapter, folder))
    except ValueError as error:
        raise ValueError(str(error).replace("Teacher ", "Adapter ").replace("use teachers", "use adapters")) from error
    model.set_active_adapters(name)
    encoded = encode(
        examples, tokenizer, args, label_ids(examples, args.label_column, _labels(model, name, args), args.adapter)
    )
    with TemporaryDirectory() as unused:
        settings = TrainingArguments(unused, per_device_eval_batch_size=args.batch_size, report_to=[])
        collator = DataCollatorWithPadding(tokenizer)
        trainer = AdapterTrainer(model, settings, data_collator=collator, compute_metrics=accuracy)
        metrics = {
            key.removeprefix("eval_"): value for key, value in finite_metrics(trainer.evaluate(encoded)).items()
        }
    results = {"adapter": args.adapter, "dataset": args.dataset, "examples": len(examples), **metrics}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return table(results.items())


def _labels(model: ModelAdaptersMixin, name: str, args: EvalArguments) -> Labels:
    """The labels of the head of an adapter."""
    if name not in model.heads:
        raise ValueError(
            f"{args.adapter} has no head, so there is nothing to evaluate; save the adapter with its head."
        )
    config = head_config(model, name)
    if config["head_type"] != "classification" or kind_of_labels(model, name) != "classes":
        raise ValueError(f"{args.adapter} has a head for {config['head_type']}, not for classes of texts.")
    label2id: Mapping[str, int] = config.get("label2id") or {}
    names = tuple(sorted(label2id, key=lambda label: label2id[label]))
    numbered = all(label == f"LABEL_{number}" for number, label in enumerate(names))  # what transformers calls them
    return Labels(config["num_labels"], None if numbered else names)
