"""The command `train`: distil teachers into a student on texts with labels."""

import os
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from adapters import AutoAdapterModel, ModelAdaptersMixin
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from .._compat import ADAPTER_CONFIG_NAME
from ..configuration import Carrier, DistillationConfig, DistillationTrainingArguments, Level, StudentStart, option
from ..downloads import is_repo_id, one_line
from ..hub.push import STUDENT_FILES
from ..student.training_run import finite_metrics
from ..training.trainers import DistillationTrainer
from .data import DataArguments, check_columns, encode, label_ids, labels_of, load, split_of
from .saved import table


@dataclass(kw_only=True)
class TrainArguments(DataArguments):
    """Teachers, student and data of a training."""

    teachers: list[str] = option("Folders or Hub ids (with @revision) of saved adapters.")
    student: str = option("Name of the new adapter, and of its folder in output_dir.")
    adapter_config: str = option("Method of the student, such as seq_bn[reduction_factor=8] or lora.", "seq_bn")
    train_split: str = option("Split to train on; a file has only `train`.", "train")
    eval_split: str | None = option(
        "Split to evaluate on, or a fraction of train_split such as 0.2. Default: `validation`, if there is one.", None
    )
    eval_file: str | None = option("File or folder to evaluate on, instead of a split.", None)
    carrier: Carrier = option("Output that a layer passes on in stage 2.", "student")
    student_start: StudentStart = option("Initial weights of the student.", "teachers")
    level: Level = option("Place of the fusion and of the matching: adapters, or whole layers.", "auto")
    objective: str = option("Objective by name, or weights by name as in {features: 1, logits: 0.5}.", "features")
    layer_weights: list[float] | None = option("One weight per layer, for objectives of layers.", None)
    temperature: float = option("Temperature of the objectives logits and cross_task.", 2.0)
    teacher_selection: str = option("`all`, or a number of teachers: the best on the training data are kept.", "all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if os.sep in self.student:
            raise ValueError(f"student={self.student!r} is not a folder name; leave out {os.sep!r}.")
        if self.eval_file is not None and self.eval_split is not None:
            raise ValueError("eval_split and eval_file exclude each other; leave one of them out.")
        self.distillation()

    def distillation(self) -> DistillationConfig:
        """Return the config of the distillation, which checks its values."""
        values = {field.name: vars(self)[field.name] for field in fields(DistillationConfig)}
        for name in ("objective", "teacher_selection"):
            values[name] = parse_value(name, values[name])
        return DistillationConfig(**values)


def parse_value(name: str, text: str) -> Any:
    """Return the name, number or mapping that a text stands for."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}={text!r} is neither a name nor a mapping such as {{name: 1.0}}.") from error


def train(args: TrainArguments, training_args: DistillationTrainingArguments) -> str:
    """Train, evaluate and save a student, and return a table of the results; nothing on processes but the first."""
    folder = Path(training_args.output_dir or "") / args.student
    resume: Any = training_args.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if not (training_args.overwrite_output_dir or resume):
        check_unused(folder)
    data = load_splits(args, training_args.seed)
    labels = labels_of(data["train"], args.label_column)
    ids = {name: label_ids(part, args.label_column, labels, "the training data") for name, part in data.items()}

    set_seed(training_args.seed)
    model, tokenizer = load_base(args.model, args.max_length)
    config = parse_value("adapter_config", args.adapter_config)
    model.add_adapter(args.student, config=config, distill_from=args.distillation())
    id2label = dict(enumerate(labels)) if isinstance(labels[0], str) else None
    model.add_classification_head(args.student, num_labels=len(labels), id2label=id2label)
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
    metrics = {"train_loss": trainer.train(resume_from_checkpoint=resume).training_loss}
    if "eval" in data:
        metrics |= trainer.evaluate()
    if trainer.is_world_process_zero():
        for file in STUDENT_FILES:  # files of an earlier student would be loaded with this one
            (folder / file).unlink(missing_ok=True)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return ""
    examples = {f"{name} examples": len(part) for name, part in data.items()}
    results = finite_metrics(metrics) | examples | {"teachers": ", ".join(trainer.block.teachers)}
    return f"{table(results.items())}\n\n{args.student!r} is saved in {folder}"


def check_unused(folder: Path) -> None:
    """Check that a training to a folder would overwrite neither a student nor checkpoints."""
    hint = "pass --overwrite_output_dir, another --output_dir, or --resume_from_checkpoint true to go on from there."
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ValueError(f"{folder} already holds a student; {hint}")
    if any(folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise ValueError(f"{folder.parent} holds checkpoints of an earlier training; {hint}")


def load_splits(args: TrainArguments, seed: int) -> dict[str, Dataset]:
    """Load and check the examples for `train`, and for `eval` if there are any."""
    data = load(args.dataset, args.dataset_config)
    parts = {"train": split_of(data, args.train_split, args.dataset)}
    fraction = None
    with suppress(ValueError):  # from the name of a split
        fraction = float(args.eval_split or "")
    if args.eval_file is not None:
        parts["eval"] = split_of(load(args.eval_file), None, args.eval_file)
    elif fraction is None and (args.eval_split is not None or "validation" in data):
        parts["eval"] = split_of(data, args.eval_split or "validation", args.dataset)
    for part in parts.values():
        check_columns(part, args)
    if fraction is None:
        return parts
    if not 0 < fraction < 1:
        raise ValueError(f"eval_split={args.eval_split} is out of range; a fraction lies between 0 and 1.")
    halves = parts["train"].train_test_split(fraction, seed=seed)
    return {"train": halves["train"], "eval": halves["test"]}


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


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of correct predictions."""
    logits: Any = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # some models return more outputs
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
