"""A trainer of your own: both stages for a trainer with its own loss and arguments, here for unbalanced classes.

python examples/by_feature/own_trainer.py --demo
python examples/by_feature/own_trainer.py --teachers AdapterHub/bert-base-uncased-pf-imdb \
        AdapterHub/bert-base-uncased-pf-sst2
"""

import os
from dataclasses import dataclass, field
from typing import Any

import demo
import demo_data
import torch
from adapters import AdapterTrainer, AutoAdapterModel
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="cornell-movie-review-data/rotten_tomatoes", metadata={"help": "Hub id."})
    text_column: str = field(default="text", metadata={"help": "Column with the text; labels 0 and 1 are in `label`."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


class WeightedTrainer(Trainer):
    """A trainer whose loss weights the rare class, 1."""

    def compute_loss(
        self, model: PreTrainedModel, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the weighted cross-entropy from the logits."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weight = torch.tensor([1.0, self.args.weight_of_rare], device=outputs.logits.device)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weight)
        return (loss, outputs) if return_outputs else loss


class WeightedDistillationTrainer(had.DistillationMixin, WeightedTrainer):
    """The same in two stages."""


@dataclass
class WeightedArguments(had.DistillationArgumentsMixin, TrainingArguments):
    """The arguments of both."""

    weight_of_rare: float = field(default=4.0, metadata={"help": "Weight of an example of class 1 in the loss."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_of_rare <= 0:
            raise ValueError(f"--weight_of_rare {self.weight_of_rare} is out of range; it must be above 0.")


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn texts into tokens."""
    demo.check_data(data, [args.text_column, "label"])
    encoded = data.map(
        lambda batch: tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length),
        batched=True,
        remove_columns=[column for column in data["train"].column_names if column != "label"],
    )
    return encoded.rename_column("label", "labels")


def balanced_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean over the classes of the fraction of right answers."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    of_classes = [right[prediction.label_ids == label].mean() for label in sorted(set(prediction.label_ids))]
    return {"balanced_accuracy": float(sum(of_classes) / len(of_classes))}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, in which one review in five is good, and name them in `args`."""
    tasks = demo_data.reviews([args.text_column])
    args.model_name_or_path = demo.save_encoder(tasks, [args.text_column], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    *siblings, own = tasks

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_classification_head(name, num_labels=2)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks[name], tokenizer, args)["train"]
        collator = DataCollatorWithPadding(tokenizer)
        args.teachers.append(demo.train_teacher(model, name, dataset, collator, folder, add_head=add_head))
    data = tasks[own]
    data["train"] = data["train"].filter(lambda row, i: row["label"] == 0 or i % 8 == 1, with_indices=True)
    return data


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(
            Arguments, of_training=WeightedArguments, output_dir="outputs/own_trainer", learning_rate=1e-4
        )
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        model.add_classification_head(demo.STUDENT, num_labels=2)
        model.train_adapter(demo.STUDENT)

    shared = {
        "eval_dataset": encoded["validation"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": balanced_accuracy,
    }
    trainer = WeightedDistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = trainer.evaluate()["eval_balanced_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_balanced_accuracy"]
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_balanced_accuracy"]
    print(f"balanced accuracy before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
