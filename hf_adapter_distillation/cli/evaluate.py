"""The command `eval`: evaluate a saved adapter on labelled texts."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from adapters import AdapterTrainer, ModelAdaptersMixin
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..downloads import read_adapter_config
from ..method.heads import head_config
from ..student.training_run import finite_metrics
from ..teachers.loading import load_saved_adapter
from ..teachers.peft_lora import is_peft
from .data import Labels, check_columns, load, names_in, split_of, with_columns
from .models import load_base, locate_adapter
from .options import EvalArguments, PredictArguments
from .progress import without_noise
from .saved import table
from .tasks import KnownTask, class_rows, collator, compute_metrics, encode, tags_of, targets, task_of_head


class Loaded(NamedTuple):
    """Saved adapter with its head on its base model."""

    model: ModelAdaptersMixin
    tokenizer: PreTrainedTokenizerBase
    name: str
    task: KnownTask


def load_adapter(args: EvalArguments | PredictArguments) -> Loaded:
    """Load a saved adapter without its teachers."""
    saved = locate_adapter(args)
    if is_peft(read_adapter_config(saved.folder)):
        raise ValueError(
            f"{args.adapter} is an adapter of PEFT, whose head adapters does not load; give the folder that "
            "save_adapter wrote, or pass --task retrieval for an adapter of an embedding model."
        )
    model, tokenizer = load_base(saved.base, args.max_length, saved.named_by)
    load_saved_adapter(model, saved.folder, saved.name, f"Adapter {args.adapter!r}")
    model.set_active_adapters(saved.name)
    return Loaded(model, tokenizer, saved.name, task_of_head(model, saved.name, args.adapter))


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
    args = with_columns(examples, args, has_pairs=args.task != "retrieval")
    check_columns(examples, args)
    tables: list[str] = []
    if args.task == "retrieval":
        from .retrieval import evaluate_ranking

        found: dict[str, Any] = evaluate_ranking(args, examples)
    else:
        found, tables = evaluate_head(args, examples)
    results = {"adapter": args.adapter, "dataset": args.dataset, "examples": len(examples), **found}
    if args.output is not None:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return "\n\n".join([table((n, rounded(value)) for n, value in results.items() if n != "classes"), *tables])


def evaluate_head(args: EvalArguments, examples: Dataset) -> tuple[dict[str, Any], list[str]]:
    """Return the metrics of an adapter with a head, with those of each class, and a table of the classes."""
    column, loaded = str(args.label_column), load_adapter(args)
    in_data: set[str] = set()
    if loaded.task != "regression":
        in_data = names_in(tags_of(examples, column) if loaded.task == "tokens" else examples, column)
    labels = labels_of_head(loaded, in_data)
    wanted = targets(examples, args, loaded.task, labels, args.adapter)
    output = run_model(loaded, encode(examples, loaded.tokenizer, args, loaded.task, wanted), args.batch_size)
    metrics = finite_metrics(output.metrics or {})
    found: dict[str, Any] = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    if loaded.task == "regression":
        return found, []
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    rows = class_rows(logits, output.label_ids, list(map(str, labels)))
    header = ["label", "precision", "recall", "f1", "examples"]
    found["classes"] = {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}
    return found, [table([(name, *map("{:.4f}".format, shares), n) for name, *shares, n in rows], header)]


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
