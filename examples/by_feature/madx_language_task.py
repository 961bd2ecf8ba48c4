"""MAD-X: a frozen language adapter below the task adapter; the task adapters of teachers are distilled above it.

The student learns on top of one language. At inference another language adapter takes its place (`Stack("sw", ...)`).

    python examples/by_feature/madx_language_task.py --demo
    python examples/by_feature/madx_language_task.py --language_adapter \
        AdapterHub/bert-base-multilingual-cased-en-wiki_pfeiffer --teachers path/to/task_a path/to/task_b
"""

import os
from dataclasses import dataclass, field

import demo
import demo_data
from adapters import AdapterTrainer, AutoAdapterModel, Stack
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, into what, and above which language."""

    model_name_or_path: str = field(
        default="bert-base-multilingual-cased", metadata={"help": "Base model of the adapters."}
    )
    language_adapter: str = field(
        default="AdapterHub/bert-base-multilingual-cased-en-wiki_pfeiffer",
        metadata={"help": "Hub id or folder of the adapter of the data's language."},
    )
    dataset_name: str = field(default="facebook/xnli", metadata={"help": "Hub id of a dataset with a label."})
    dataset_config_name: str = field(default="en", metadata={"help": "Configuration of the dataset, its language."})
    text_columns: list[str] = field(
        default_factory=lambda: ["premise", "hypothesis"], metadata={"help": "One or two columns with the text."}
    )
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "Hub ids or folders of task adapters trained above a language adapter."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)
        if not 1 <= len(self.text_columns) <= 2:
            raise ValueError(
                f"--text_columns {' '.join(self.text_columns)} are not one or two; name those of the text."
            )


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn texts into tokens."""
    demo.check_data(data, [*args.text_columns, "label"])

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(*(batch[c] for c in args.text_columns), truncation=True, max_length=args.max_length)

    others = [column for column in data["train"].column_names if column != "label"]
    return data.map(tokens, batched=True, remove_columns=others).rename_column("label", "labels")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, language adapter, teachers and data, and name them in `args`."""
    *siblings, own = tasks = demo_data.reviews(args.text_columns)
    args.model_name_or_path = demo.save_encoder(tasks, args.text_columns, folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    text = encode(tasks["books"], tokenizer, args)["train"].remove_columns("labels")
    args.language_adapter = demo.train_teacher(
        model, "language", text, DataCollatorForLanguageModeling(tokenizer), folder, "seq_bn_inv",
        lambda model, name: model.add_masked_lm_head(name), steps=50,
    )  # fmt: skip

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_classification_head(name, num_labels=2)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        language = model.load_adapter(args.language_adapter, with_head=False)
        dataset, collator = encode(tasks[name], tokenizer, args)["train"], DataCollatorWithPadding(tokenizer)
        teacher = demo.train_teacher(model, name, dataset, collator, folder, add_head=add_head, below=language)
        args.teachers.append(teacher)
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/madx_language_task", learning_rate=1e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name, args.dataset_config_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        language = model.load_adapter(args.language_adapter, with_head=False)
        teachers = [model.load_adapter(teacher) for teacher in args.teachers]
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=teachers)
        model.add_classification_head(demo.STUDENT, num_labels=data["train"].features["label"].num_classes)
        # The teachers run where the student does, above the same language adapter.
        model.train_adapter(had.AdapterDistillation(Stack(language, demo.STUDENT), teachers=teachers))

    shared = {
        "eval_dataset": encoded["validation"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }
    trainer = had.DistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    language = stock.load_adapter(args.language_adapter, with_head=False)
    student = stock.load_adapter(f"{folder}/{demo.STUDENT}")
    stock.set_active_adapters(Stack(language, student))
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_accuracy"]
    print(f"accuracy before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
