"""The options of the commands that run a model: `train`, `eval` and `predict`.

The module imports neither torch nor transformers, so that the help is there at once.
"""

import codecs
import os
from dataclasses import dataclass, fields
from typing import Any, Literal

import yaml

from ..configuration import Carrier, DistillationConfig, Level, StudentStart, option
from ..downloads import is_pool
from .saved import check_writable

Task = Literal["auto", "classification", "regression", "tokens", "retrieval"]
SavedTask = Literal["auto", "retrieval"]
Format = Literal["jsonl", "csv"]

# The options of transformers.TrainingArguments that most trainings need; `train --help_all` lists the others.
USUAL = {
    "output_dir": "Folder for the student, in its own folder STUDENT, for checkpoints and for the tokenizer.",
    "num_train_epochs": "Epochs, both stages together.",
    "max_steps": "Steps, both stages together, instead of epochs.",
    "learning_rate": "Peak learning rate of the student and its head.",
    "per_device_train_batch_size": "Examples per step and device.",
    "gradient_accumulation_steps": "Micro-batches per step.",
    "eval_strategy": "Time of the evaluations: no, steps or epoch. At the end there is always one.",
    "save_strategy": "Time of the checkpoints: no, steps, epoch or best.",
    "logging_steps": "Steps between two lines of the log; below 1, a share of all steps.",
    "seed": "Seed of the head, the data order and a fraction as eval_split.",
    "bf16": "Train in bfloat16.",
    "use_cpu": "Train on the CPU, even if there is a GPU.",
    "report_to": "Programs that get the log, such as tensorboard, wandb or none.",
    "resume_from_checkpoint": "`true` goes on from the last whole checkpoint.",
    "overwrite_output_dir": "Replace an earlier student, with its checkpoints and its README.md.",
    "push_to_hub": "Push the student to the Hub.",
}


@dataclass(kw_only=True)
class TextArguments:
    """Texts."""

    dataset_config: str | None = option("Configuration of a Hub dataset.", None)
    sep: str | None = option("Separator of a .csv or .tsv file. Default: a comma, or a tab in a .tsv file.", None)
    encoding: str = option("Encoding of a .csv, .tsv, .json or .jsonl file, such as latin-1.", "utf-8")
    text_column: str | None = option(
        "Column of the text, or of the words for labels of tokens. Default: the only column that can be it.", None
    )
    text_pair_column: str | None = option(
        "Column of the second text. Default: the second of a usual pair, such as premise and hypothesis.", None
    )
    max_length: int = option("Maximum number of tokens per example.", 128)

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length={self.max_length} is out of range; it must be at least 1.")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise ValueError(f"encoding={self.encoding!r} is unknown; give one such as utf-8 or latin-1.") from error


@dataclass(kw_only=True)
class DataArguments(TextArguments):
    """Texts with labels."""

    dataset: str = option("A csv, tsv, json, jsonl or parquet file, a folder made with save_to_disk, or a Hub id.")
    label_column: str | None = option(
        "Column of the label: names, whole numbers, numbers for a regression, lists of tags, or the texts that a "
        "retrieval finds. Default: the only column that can be it.",
        None,
    )


@dataclass(kw_only=True)
class TrainArguments(DataArguments):
    """Teachers and student."""

    model: str = option("Base model of the adapters: a folder or a Hub id.")
    teachers: list[str] = option(
        "Folders or Hub ids (with @revision) of saved adapters, or a pool: one folder with the folders of many, of "
        "which --teacher_selection are chosen."
    )
    student: str = option("Name of the new adapter, and of its folder in output_dir.")
    task: Task = option(
        "Kind of the labels; auto: tokens for lists of tags, else classification. retrieval: an embedding model of "
        "Sentence Transformers finds the text of label_column.",
        "auto",
    )
    adapter_config: str | None = option(
        "Method of the student, such as seq_bn[reduction_factor=8] or lora. Default: the one of the teachers.", None
    )
    train_split: str = option("Split to train on; a file has only `train`.", "train")
    eval_split: str | None = option(
        "Split to evaluate on, or a fraction of train_split such as 0.2. Default: `validation`, if there is one.", None
    )
    eval_file: str | None = option("File or folder to evaluate on, instead of a split.", None)
    carrier: Carrier = option("Output that a layer passes on in stage 2.", "student")
    student_start: StudentStart = option("Initial weights of the student.", "weighted")
    level: Level = option("Place of the fusion and of the matching: adapters, or whole layers.", "auto")
    objective: str = option("Objective by name, or weights by name as in {features: 1, logits: 0.5}.", "features")
    layer_weights: list[float] | None = option("One weight per layer, for objectives of layers.", None)
    temperature: float = option("Temperature of the objectives of the output.", 2.0)
    beta: float = option("Divergence of the objective logits: 0 forward KL, 1 reverse KL, between them JSD.", 0.0)
    weights_per_layer: bool = option("Learn weights of the teachers for each layer (student_start=weighted).", False)
    fusion_rank: int | None = option("Width of query and key, without a value. Default: as in the paper.", None)
    teacher_selection: str = option("`all`, or a number: the best teachers on the training data are kept.", "all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.student:
            raise ValueError("student='' is empty; give the new adapter a name.")
        if os.sep in self.student:
            raise ValueError(f"student={self.student!r} is not a folder name; leave out {os.sep!r}.")
        if self.student == "analysis" or self.student.startswith("checkpoint-"):
            raise ValueError(f"student={self.student!r} is the name of a folder of the training; choose another one.")
        if self.eval_file is not None and self.eval_split is not None:
            raise ValueError("eval_split and eval_file exclude each other; leave one of them out.")
        check_task(self.task, self.text_pair_column)
        self.distillation()

    def pool(self) -> str | None:
        """Return the folder of a pool, if that is given for the teachers."""
        return self.teachers[0] if len(self.teachers) == 1 and is_pool(self.teachers[0]) else None

    def distillation(self) -> DistillationConfig:
        """Return the config of the distillation, which checks its values."""
        values = {field.name: vars(self)[field.name] for field in fields(DistillationConfig)}
        if (pool := self.pool()) is not None:
            values["teachers"] = pool
        for name in ("objective", "teacher_selection"):
            values[name] = parse_value(name, values[name])
        return DistillationConfig(**values)


@dataclass(kw_only=True)
class EvalArguments(DataArguments):
    """Adapter and evaluation."""

    adapter: str = option("Folder or Hub id (with @revision) of a saved adapter, with its head if the task has one.")
    model: str | None = option("Base model. Default: the one that the adapter names.", None)
    task: SavedTask = option("auto: the task of the head. retrieval: rank the texts of label_column.", "auto")
    split: str | None = option("Split to evaluate on. Default: `test`, or the only one.", None)
    batch_size: int = option("Examples per batch.", 32)
    output: str | None = option("JSON file for the results.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self.batch_size, self.output)
        check_task(self.task, self.text_pair_column)


@dataclass(kw_only=True)
class PredictArguments(TextArguments):
    """Adapter and predictions."""

    adapter: str = option("Folder or Hub id (with @revision) of a saved adapter, with its head if the task has one.")
    model: str | None = option("Base model. Default: the one that the adapter names.", None)
    task: SavedTask = option("auto: the task of the head. retrieval: find texts among candidates.", "auto")
    candidates: str | None = option("File, folder or Hub id with the texts that a retrieval finds.", None)
    candidates_column: str | None = option(
        "Column of the candidates, by default as label_column of train; texts that stand there twice count once.", None
    )
    top_k: int | None = option(
        "Number of labels with the highest scores. Default: all classes, or the best text of a retrieval.", None
    )
    text: list[str] | None = option(
        "One or more texts. Without it and --dataset: the lines of the standard input.", None
    )
    dataset: str | None = option("A file, folder or Hub id of texts, as for eval, without labels.", None)
    split: str | None = option("Split to predict. Default: `test`, or the only one.", None)
    format: Format = option(
        "jsonl: one JSON object a line; csv: one column per label, or with top_k one row per text and label.", "jsonl"
    )
    batch_size: int = option("Examples per batch.", 32)
    output: str | None = option("File for the predictions, instead of the standard output.", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self.batch_size, self.output)
        if self.text is not None and self.dataset is not None:
            raise ValueError("text and dataset exclude each other; leave one of them out.")
        if self.dataset is None and self.candidates is None:
            for name, default in {"split": None, "dataset_config": None, "sep": None, "encoding": "utf-8"}.items():
                if (value := vars(self)[name]) != default:
                    raise ValueError(f"{name}={value!r} is for --dataset; leave it out.")
        check_task(self.task, self.text_pair_column)
        if self.task == "retrieval" and self.candidates is None:
            raise ValueError("task='retrieval' finds texts among candidates; pass --candidates, a file of them.")
        for name in ("candidates", "candidates_column"):
            if self.task != "retrieval" and (value := vars(self)[name]) is not None:
                raise ValueError(f"{name}={value!r} is for --task retrieval; leave it out.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is out of range; it must be at least 1.")


def check_task(task: str, text_pair_column: str | None) -> None:
    """Check that a retrieval has one text a row."""
    if task == "retrieval" and text_pair_column is not None:
        raise ValueError(f"text_pair_column={text_pair_column!r} is not for --task retrieval; leave it out.")


def check_run(batch_size: int, output: str | None) -> None:
    """Check the batch size and the file of a run."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is out of range; it must be at least 1.")
    if output is not None:
        check_writable(output)


def parse_value(name: str, text: str) -> Any:
    """Return the name, number or mapping that a text stands for."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={text!r} is neither a name nor a mapping such as {{name: 1.0}}.") from error
