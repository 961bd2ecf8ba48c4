"""The command `eval`: evaluate a saved adapter on labelled texts."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from adapters import AdapterTrainer, ModelAdaptersMixin
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..downloads import locate_saved
from ..method.heads import head_config
from ..student.provenance import read_saved
from ..student.training_run import finite_metrics
from ..teachers.loading import ADAPTER_FILES, load_saved_adapter
from .data import Labels, check_columns, load, names_in, split_of, with_columns
from .options import EvalArguments, PredictArguments
from .progress import without_noise
from .saved import table
from .tasks import KnownTask, class_rows, collator, compute_metrics, encode, tags_of, targets, task_of_head
from .train import load_base


class Loaded(NamedTuple):
    """Saved adapter with its head on its base model."""

    model: ModelAdaptersMixin
    tokenizer: PreTrainedTokenizerBase
    name: str
    task: KnownTask


def load_adapter(args: EvalArguments | PredictArguments) -> Loaded:
    """Load a saved adapter without its teachers."""
    folder = locate_saved(args.adapter, ADAPTER_FILES)
    saved = read_saved(folder)
    base = args.model or saved.get("model_name") or saved.get("base_model_name_or_path")  # the last is of PEFT
    if not base:
        raise ValueError(f"{args.adapter} names no base model; pass --model.")
    name = str(saved.get("name") or "adapter")  # PEFT saves none
    model, tokenizer = load_base(base, args.max_length)
    load_saved_adapter(model, folder, name, f"Adapter {args.adapter!r}")
    model.set_active_adapters(name)
    return Loaded(model, tokenizer, name, task_of_head(model, name, args.adapter))


def run_model(loaded: Loaded, encoded: Dataset, batch_size: int) -> PredictionOutput:
    """Return the logits, the labels and the metrics of encoded texts."""
    with TemporaryDirectory() as unused:
        settings = TrainingArguments(
            unused, per_device_eval_batch_size=batch_size, report_to=[], dataloader_pin_memory=False
        )
        batches, metrics = collator(loaded.task, loaded.tokenizer), compute_metrics
        trainer = AdapterTrainer(loaded.model, settings, data_collator=batches, compute_metrics=metrics)
        return trainer.predict(encoded, metric_key_prefix="eval")


@without_noise()
def evaluate(args: EvalArguments) -> str:
    """Evaluate a saved adapter without its teachers, and return tables of the results, also of each class."""
    examples = split_of(load(args.dataset, args), args.split, args.dataset)
    args = with_columns(examples, args)
    check_columns(examples, args)
    column, loaded = str(args.label_column), load_adapter(args)
    in_data: set[str] = set()
    if loaded.task != "regression":
        in_data = names_in(tags_of(examples, column) if loaded.task == "tokens" else examples, column)
    labels = labels_of_head(loaded, in_data)
    wanted = targets(examples, column, loaded.task, labels, args.adapter)
    encoded = encode(examples, loaded.tokenizer, args, loaded.task, wanted)
    output = run_model(loaded, encoded, args.batch_size)
    metrics = finite_metrics(output.metrics or {})
    results: dict[str, Any] = {"adapter": args.adapter, "dataset": args.dataset, "examples": len(examples)}
    results |= {name.removeprefix("eval_"): value for name, value in metrics.items()}
    parts = [table((name, rounded(value)) for name, value in results.items())]
    if loaded.task != "regression":
        logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
        rows = class_rows(logits, output.label_ids, list(map(str, labels)))
        header = ["label", "precision", "recall", "f1", "examples"]
        parts.append(table([(name, *map("{:.4f}".format, shares), n) for name, *shares, n in rows], header))
        results["classes"] = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return "\n\n".join(parts)


def rounded(value: Any) -> Any:
    """Return a number with four digits behind the point, and anything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else value


def labels_of_head(loaded: Loaded, names_in_data: set[str]) -> Labels:
    """Return the classes of an adapter's head; none of a regression."""
    if loaded.task == "regression":
        return []
    config = head_config(loaded.model, loaded.name)
    label2id = config.get("label2id") or {}
    names = sorted(label2id, key=label2id.__getitem__)
    # The default names of transformers stand for numbers, unless the data have such names.
    defaults = [f"LABEL_{number}" for number in range(len(names))]
    return list(range(config["num_labels"])) if names == defaults and names_in_data.isdisjoint(names) else names
