"""Text classification: distil adapters of other tasks into one for a task of GLUE, single sentences or pairs.

python examples/by_feature/text_classification.py --demo
python examples/by_feature/text_classification.py --task_name rte --teachers AdapterHub/bert-base-uncased-pf-mnli \
        AdapterHub/bert-base-uncased-pf-qnli AdapterHub/bert-base-uncased-pf-snli
"""

import os
from dataclasses import dataclass, field

import demo
import demo_data
from adapters import AdapterTrainer, AutoAdapterModel
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_adapter_distillation as had

TASKS = {  # the columns with the text; stsb is a regression and not among them
    "cola": ["sentence"], "mnli": ["premise", "hypothesis"], "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"], "qqp": ["question1", "question2"], "rte": ["sentence1", "sentence2"],
    "sst2": ["sentence"], "wnli": ["sentence1", "sentence2"],
}  # fmt: skip
VALIDATION = {"mnli": "validation_matched"}


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="nyu-mll/glue", metadata={"help": "Hub id of the dataset."})
    task_name: str = field(default="rte", metadata={"help": f"Task of GLUE: {', '.join(TASKS)}."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)
        if self.task_name not in TASKS:
            raise ValueError(f"--task_name {self.task_name} is unknown; choose one of {', '.join(TASKS)}.")


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn sentences into tokens."""
    columns = TASKS[args.task_name]
    demo.check_data(data, [*columns, "label"], ["train", VALIDATION.get(args.task_name, "validation")])

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(*(batch[column] for column in columns), truncation=True, max_length=args.max_length)

    encoded = data.map(tokens, batched=True, remove_columns=[c for c in data["train"].column_names if c != "label"])
    return encoded.rename_column("label", "labels")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    tasks = demo_data.reviews(TASKS[args.task_name])
    args.model_name_or_path = demo.save_encoder(tasks, TASKS[args.task_name], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    *siblings, own = tasks

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_classification_head(name, num_labels=2)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks[name], tokenizer, args)["train"]
        collator = DataCollatorWithPadding(tokenizer)
        args.teachers.append(demo.train_teacher(model, name, dataset, collator, folder, add_head=add_head))
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/text_classification", learning_rate=1e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name, args.task_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        model.add_classification_head(demo.STUDENT, num_labels=len(set(data["train"]["label"])))
        model.train_adapter(demo.STUDENT)

    shared = {
        "eval_dataset": encoded[VALIDATION.get(args.task_name, "validation")],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }
    trainer = had.DistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_accuracy"]
    print(f"accuracy before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
