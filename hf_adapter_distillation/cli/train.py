"""The command `train`: distil teachers into a student on labelled texts."""

from contextlib import suppress
from dataclasses import replace
from math import ceil
from pathlib import Path
from shutil import rmtree
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..downloads import ADAPTER_CONFIG_NAME
from ..hub.card import CARD_NAME
from ..hub.push import STUDENT_FILES, write_all_formats
from ..student.summary import as_table, summary_rows
from ..training.arguments import DistillationTrainingArguments
from ..training.trainers import DistillationTrainer
from .data import Labels, check_columns, load, split_of, with_columns
from .models import add_student_adapter, load_base
from .options import TrainArguments
from .progress import SilentMixin, shorten, without_noise
from .tasks import (
    KnownTask,
    Labelled,
    add_head,
    collator,
    compute_metrics,
    encode,
    labels_of_task,
    targets,
    task_of_data,
)


class SilentTrainer(SilentMixin, DistillationTrainer):
    """Trainer of a student with a head."""


class RemoveEarlier(TrainerCallback):
    """Callback that removes the checkpoints and the card of an earlier student once a training begins.

    A later run would resume from these checkpoints, and push this card, as if they were of the new student.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the student

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove them."""
        if not state.is_world_process_zero:
            return
        for checkpoint in self.folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if checkpoint.name.rpartition("-")[2].isdecimal():
                rmtree(checkpoint)
        (self.folder / CARD_NAME).unlink(missing_ok=True)


@without_noise()
def train(args: TrainArguments, training_args: DistillationTrainingArguments) -> str:
    """Train, evaluate and save a student, and return a table of the results, empty on processes but the first."""
    folder = Path(training_args.output_dir or "") / args.student
    if folder.parent.is_file():
        raise ValueError(f"output_dir={training_args.output_dir!r} is a file; name a folder.")
    if folder.is_file():
        raise ValueError(f"{folder} is a file, the place of the student; move it, or choose another --student.")
    resume: Any = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if not (training_args.overwrite_output_dir or resume):
        check_unused(folder)
    labelled = load_labelled(args, training_args.seed)
    set_seed(training_args.seed)
    trainer = make_trainer(labelled, training_args)
    shorten(trainer)
    if training_args.overwrite_output_dir and not resume:
        trainer.add_callback(RemoveEarlier(folder))
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    if "eval" in labelled.data:
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
    if not resume:  # Trainer divides the loss of the steps since then by all steps
        rows += [("train_loss", f"{loss:.4g}")]
    rows += [(f"{name} examples", str(len(part))) for name, part in labelled.data.items()]
    rows += [("saved in", str(folder))]
    lines = lines_that_load(labelled, folder)
    return as_table([*rows, *zip(["loaded by", "", ""], lines, strict=False)])


def make_trainer(labelled: Labelled, training_args: Any) -> Any:
    """Load the model, add the student, and return its trainer."""
    if labelled.task == "retrieval":
        from .retrieval import make_retrieval_trainer

        return make_retrieval_trainer(labelled, training_args)
    args, task = labelled.args, labelled.task
    model, tokenizer = load_base(args.model, args.max_length)
    add_student_adapter(model, args)
    add_head(model, args.student, task, labelled.labels)
    model.train_adapter(args.student)
    encoded = {
        name: encode(part, tokenizer, args, task, labelled.targets[name]) for name, part in labelled.data.items()
    }
    return SilentTrainer(
        model,
        training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"),
        data_collator=collator(task, tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )


def lines_that_load(labelled: Labelled, folder: Path) -> list[str]:
    """Return the lines that load a student in stock adapters."""
    name, saved = repr(labelled.args.model), repr(str(folder))
    if labelled.task == "retrieval":
        load = f"model[0].auto_model.load_adapter({saved}, set_active=True)"
        return [f"model = SentenceTransformer({name})", "adapters.init(model[0].auto_model)", load]
    return [f"model = AutoAdapterModel.from_pretrained({name})", f"model.load_adapter({saved}, set_active=True)"]


def check_unused(folder: Path) -> None:
    """Check that a training to a folder would overwrite neither a student nor checkpoints."""
    hint = "pass --overwrite_output_dir, another --output_dir, or --resume_from_checkpoint true to go on from there."
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(f"{folder} already holds a student; {hint}")
    if any(folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(f"{folder.parent} holds checkpoints of an earlier training; {hint}")


def load_labelled(args: TrainArguments, seed: int) -> Labelled:
    """Load and check the examples with their labels, and split off a fraction for `eval` if that is wanted."""
    args, data, fraction = load_splits(args)
    task = task_of_data(data["train"], args)
    labels = labels_of_task(data, str(args.label_column), task)
    labelled = with_targets(args, task, data, labels)  # before the split: errors name rows of the file
    if fraction is None:
        return labelled
    if ceil(fraction * len(data["train"])) == len(data["train"]):
        raise ValueError(f"eval_split={args.eval_split} leaves no row to train on; give more rows, or leave it out.")
    halves = data["train"].train_test_split(fraction, seed=seed)
    return with_targets(args, task, {"train": halves["train"], "eval": halves["test"]}, labels)


def with_targets(args: TrainArguments, task: KnownTask, data: dict[str, Dataset], labels: Labels) -> Labelled:
    """Return examples with their targets."""
    wanted = {name: targets(part, args, task, labels, "the training data") for name, part in data.items()}
    return Labelled(args, task, data, labels, wanted)


def load_splits(args: TrainArguments) -> tuple[TrainArguments, dict[str, Dataset], float | None]:
    """Load and check the examples; return the columns, the examples, and the fraction to split off for `eval`."""
    data = load(args.dataset, args)
    parts = {"train": split_of(data, args.train_split, args.dataset)}
    fraction = None
    with suppress(ValueError):  # from the name of a split
        fraction = float(args.eval_split or "")
    if args.eval_file is not None:
        parts["eval"] = split_of(load(args.eval_file, replace(args, dataset_config=None)), None, args.eval_file)
    elif fraction is None and (args.eval_split is not None or "validation" in data):
        parts["eval"] = split_of(data, args.eval_split or "validation", args.dataset)
    args = with_columns(parts["train"], args, has_pairs=args.task != "retrieval")
    for part in parts.values():
        check_columns(part, args, args.eval_file or args.dataset)
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"eval_split={args.eval_split} is out of range; a fraction lies between 0 and 1.")
    return args, parts, fraction
