"""The command `train`: distil teachers into a student on labelled texts."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters import AutoAdapterModel, ModelAdaptersMixin
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..downloads import ADAPTER_CONFIG_NAME, is_repo_id, one_line
from ..hub.push import STUDENT_FILES, write_all_formats
from ..student.summary import as_table, summary_rows
from ..training.arguments import DistillationTrainingArguments
from ..training.trainers import DistillationTrainer
from .data import check_columns, load, split_of, with_columns
from .options import TrainArguments, parse_value
from .progress import shorten, without_noise
from .tasks import add_head, collator, compute_metrics, encode, labels_of_task, targets, task_of_data


class SilentTrainer(DistillationTrainer):
    """Trainer whose summary is printed once, with the evaluation and the folder of the student."""

    def _show_summary(self) -> None:
        pass


@without_noise()
def train(args: TrainArguments, training_args: DistillationTrainingArguments) -> str:
    """Train, evaluate and save a student, and return a table of the results.

    It is empty on processes but the first.
    """
    folder = Path(training_args.output_dir or "") / args.student
    resume: Any = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if not (training_args.overwrite_output_dir or resume):
        check_unused(folder)
    args, data = load_splits(args, training_args.seed)
    column, task = str(args.label_column), task_of_data(data["train"], args)
    labels = labels_of_task(data["train"], column, task)
    wanted = {name: targets(part, column, task, labels, "the training data") for name, part in data.items()}

    set_seed(training_args.seed)
    model, tokenizer = load_base(args.model, args.max_length)
    config = parse_value("adapter_config", args.adapter_config)
    model.add_adapter(args.student, config=config, distill_from=args.distillation())
    add_head(model, args.student, task, labels)
    model.train_adapter(args.student)

    encoded = {name: encode(part, tokenizer, args, task, wanted[name]) for name, part in data.items()}
    trainer = SilentTrainer(
        model,
        training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"),
        data_collator=collator(task, tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )
    shorten(trainer)
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    if "eval" in data:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        for file in STUDENT_FILES:  # files of an earlier student would be loaded with this one
            (folder / file).unlink(missing_ok=True)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return ""
    write_all_formats(folder, folder, args.student)
    assert (run := trainer.distillation.run) is not None
    rows = summary_rows(args.student, run)
    rows += [("train_loss", f"{loss:.4g}"), *((f"{name} examples", str(len(part))) for name, part in data.items())]
    rows += [
        ("saved in", str(folder)),
        ("loaded by", f"model = AutoAdapterModel.from_pretrained({args.model!r})"),
        ("", f"model.load_adapter({str(folder)!r}, set_active=True)"),
    ]
    return as_table(rows)


def check_unused(folder: Path) -> None:
    """Check that a training to a folder would overwrite neither a student nor checkpoints."""
    hint = "pass --overwrite_output_dir, another --output_dir, or --resume_from_checkpoint true to go on from there."
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(f"{folder} already holds a student; {hint}")
    if any(folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(f"{folder.parent} holds checkpoints of an earlier training; {hint}")


def load_splits(args: TrainArguments, seed: int) -> tuple[TrainArguments, dict[str, Dataset]]:
    """Load and check the examples for `train`, and for `eval` if there are any; return them with their columns."""
    data = load(args.dataset, args)
    parts = {"train": split_of(data, args.train_split, args.dataset)}
    fraction = None
    with suppress(ValueError):  # from the name of a split
        fraction = float(args.eval_split or "")
    if args.eval_file is not None:
        parts["eval"] = split_of(load(args.eval_file, replace(args, dataset_config=None)), None, args.eval_file)
    elif fraction is None and (args.eval_split is not None or "validation" in data):
        parts["eval"] = split_of(data, args.eval_split or "validation", args.dataset)
    args = with_columns(parts["train"], args)
    for part in parts.values():
        check_columns(part, args)
    if fraction is None:
        return args, parts
    if not 0 < fraction < 1:
        raise ValueError(f"eval_split={args.eval_split} is out of range; a fraction lies between 0 and 1.")
    halves = parts["train"].train_test_split(fraction, seed=seed)
    return args, {"train": halves["train"], "eval": halves["test"]}


def load_base(name: str, max_length: int) -> tuple[ModelAdaptersMixin, PreTrainedTokenizerBase]:
    """Load a base model, which must take `max_length` tokens, and its tokenizer with a padding token."""
    tokenizer, model = load_pretrained(name, AutoTokenizer, AutoAdapterModel)
    positions = model.config.to_dict().get("max_position_embeddings") or tokenizer.model_max_length
    if max_length > (limit := min(positions, tokenizer.model_max_length)):
        raise ValueError(f"max_length={max_length} is out of range; {name} takes {limit} tokens at most.")
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_pretrained(name: str, *classes: Any) -> list[Any]:
    """Load a base model, and what else belongs to it, from a folder or the Hub."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            raise ValueError(f"model={name!r} holds no {CONFIG_NAME}; give the folder of a model.")
    elif not is_repo_id(name):
        raise ValueError(f"model={name!r} is neither a folder nor a Hub id.")
    try:
        return [each.from_pretrained(name) for each in classes]
    except Exception as error:  # tokenizers raises a plain Exception on damaged files
        raise OSError(f"model={name!r} cannot be loaded: {one_line(error)}") from error
