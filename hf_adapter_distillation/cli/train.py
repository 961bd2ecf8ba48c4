"""What the command line does with a model: the training of a student."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from adapters import AutoAdapterModel, ModelAdaptersMixin
from datasets import Dataset
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from .._compat import ADAPTER_CONFIG_NAME
from ..configuration import Carrier, DistillationConfig, DistillationTrainingArguments, Level, StudentStart
from ..downloads import one_line
from ..hub.push import STUDENT_FILES
from ..student.training_run import finite_metrics
from ..training.trainer import DistillationTrainer
from .data import DataArguments, check_columns, encode, label_ids, labels_of, load, split_of
from .saved import table


@dataclass(kw_only=True)
class TrainArguments(DataArguments):
    """What is distilled into what, and on which data."""

    model: str = field(metadata={"help": "Base model of the teachers: a folder or a Hub id."})
    teachers: list[str] = field(metadata={"help": "Folders or Hub ids (with @revision) of saved adapters."})
    student: str = field(metadata={"help": "Name of the new adapter."})
    adapter_config: str = field(
        default="seq_bn", metadata={"help": "Method of the student, for instance seq_bn[reduction_factor=8] or lora."}
    )
    train_split: str = field(default="train", metadata={"help": "Split that is trained on; a file has `train` alone."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that is evaluated on, or a fraction of the training split, as 0.2. Default: `validation`, "
            "if there is one."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "File or folder to evaluate on instead."})
    carrier: Carrier = field(default="student", metadata={"help": "What a layer passes on in stage 2."})
    student_start: StudentStart = field(default="teachers", metadata={"help": "Where the student starts."})
    level: Level = field(default="auto", metadata={"help": "Where teachers are fused and the student is matched."})
    objective: str = field(
        default="features",
        metadata={
            "help": "What the student is distilled by: a name, or weights by names, as {features: 1, logits: 0.5}."
        },
    )
    layer_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each layer, for objectives of layers."}
    )
    temperature: float = field(default=2.0, metadata={"help": "Temperature of the objectives logits and cross_task."})
    teacher_selection: str = field(
        default="all", metadata={"help": "all, or how many teachers are kept at most: the best on the training data."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if os.sep in self.student:
            raise ValueError(f"student={self.student!r} is no name of a folder; leave out {os.sep!r}.")
        if self.eval_file is not None and self.eval_split is not None:
            raise ValueError("eval_split and eval_file exclude one another; leave one of them out.")
        self.distillation()

    def distillation(self) -> DistillationConfig:
        """The config of these arguments.

        Returns:
            The config, whose values are checked.
        """
        k: Any = self.teacher_selection
        return DistillationConfig(
            teachers=self.teachers,
            carrier=self.carrier,
            student_start=self.student_start,
            level=self.level,
            objective=_mapping_or_name("objective", self.objective),
            layer_weights=self.layer_weights,
            temperature=self.temperature,
            teacher_selection=int(k) if k.isdecimal() else k,
        )


def _mapping_or_name(option: str, text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{option}={text!r} is neither a name nor a mapping such as {{name: 1.0}}.") from error


def train(args: TrainArguments, training_args: DistillationTrainingArguments) -> str:
    """Trains, evaluates and saves a student.

    Args:
        args: What is distilled into what.
        training_args: How.

    Returns:
        The results, and where the student is; on processes other than the first, nothing.
    """
    folder = Path(training_args.output_dir or "") / args.student
    asked = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(asked).lower(), asked)
    _check_output(folder, training_args.overwrite_output_dir or bool(resume))
    data = _splits(args, training_args.seed)
    labels = labels_of(data["train"], args.label_column)
    ids = {name: label_ids(part, args.label_column, labels, "the training data") for name, part in data.items()}
    set_seed(training_args.seed)
    model, tokenizer = load_base(args.model, args.max_length)
    config = _mapping_or_name("adapter_config", args.adapter_config)
    model.add_adapter(args.student, config=config, distill_from=args.distillation())
    names = None if labels.names is None else dict(enumerate(labels.names))
    model.add_classification_head(args.student, num_labels=labels.number, id2label=names)
    model.train_adapter(args.student)
    encoded = {name: encode(part, tokenizer, args, ids[name]) for name, part in data.items()}
    trainer = DistillationTrainer(
        model,
        training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    metrics = {"train_loss": loss} | (trainer.evaluate() if "eval" in data else {})
    if trainer.is_world_process_zero():
        for file in STUDENT_FILES:  # those of another student would be read with it
            (folder / file).unlink(missing_ok=True)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return ""
    counts = [(f"{name} examples", len(part)) for name, part in data.items()]
    rows = [*finite_metrics(metrics).items(), *counts, ("teachers", ", ".join(trainer.block.teachers))]
    return f"{table(rows)}\n\n{args.student!r} is saved in {folder}"


def _check_output(folder: Path, may_exist: bool) -> None:
    if may_exist:
        return
    hint = "pass --overwrite_output_dir, another --output_dir, or --resume_from_checkpoint true to go on from there."
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds a student already; {hint}")
    if any(folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(f"{folder.parent} holds checkpoints of an earlier training; {hint}")


def _splits(args: TrainArguments, seed: int) -> dict[str, Dataset]:
    """The data for `train`, and for `eval` if there is some, checked."""
    data = load(args.dataset, args.dataset_config)
    parts = {"train": split_of(data, args.train_split, args.dataset)}
    fraction = _fraction(args.eval_split)
    if args.eval_file is not None:
        parts["eval"] = split_of(load(args.eval_file), None, args.eval_file)
    elif fraction is None and (args.eval_split is not None or "validation" in data):
        parts["eval"] = split_of(data, args.eval_split or "validation", args.dataset)
    for part in parts.values():
        check_columns(part, args)
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"eval_split={args.eval_split} is out of range; a fraction lies between 0 and 1.")
        both = parts["train"].train_test_split(fraction, seed=seed)
        parts = {"train": both["train"], "eval": both["test"]}
    return parts


def _fraction(split: str | None) -> float | None:
    try:
        return float(split) if split is not None else None
    except ValueError:
        return None


def load_base(name: str, max_length: int) -> tuple[ModelAdaptersMixin, PreTrainedTokenizerBase]:
    """Loads a base model and its tokenizer.

    Args:
        name: A folder or a Hub id.
        max_length: Tokens of an example, at most.

    Returns:
        Both, with a token for padding.

    Raises:
        ValueError: If it is neither, or takes fewer tokens.
        OSError: If the Hub does not give it.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            raise ValueError(f"model={name!r} holds no {CONFIG_NAME}; give the folder of a model.")
    else:
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"model={name!r} is no folder, and no Hub id either.") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoAdapterModel.from_pretrained(name)
    except Exception as error:  # whatever missing files make of the libraries that read them
        raise OSError(f"model={name!r} cannot be loaded: {one_line(error)}") from error
    positions = model.config.to_dict().get("max_position_embeddings") or tokenizer.model_max_length
    if max_length > (limit := min(positions, tokenizer.model_max_length)):
        raise ValueError(f"max_length={max_length} is out of range; {name} takes {limit} tokens at most.")
    if tokenizer.pad_token is None:  # as GPT-2 and Llama come
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The fraction of right answers.

    Args:
        prediction: The logits, or those with other outputs behind them, and the labels.

    Returns:
        The `accuracy`.
    """
    logits: Any = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
