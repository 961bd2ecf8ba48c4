"""Mixed teachers: distil adapters of different methods (LoRA, bottleneck, IA3, prefix tuning) into one bottleneck.

python examples/by_feature/mixed_teachers.py --demo
python examples/by_feature/mixed_teachers.py --dataset_name stanfordnlp/sst2 \
        --teachers AdapterHub/bert-base-uncased-pf-imdb path/to/lora path/to/ia3 path/to/prefix_tuning
"""

import os
from dataclasses import dataclass, field

import demo
import demo_data
from adapters import AdapterTrainer, AutoAdapterModel, IA3Config, LoRAConfig, PrefixTuningConfig, SeqBnConfig
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_adapter_distillation as had

METHODS = {
    "lora": LoRAConfig(r=8, alpha=16),
    "bottleneck": SeqBnConfig(reduction_factor=2),
    "ia3": IA3Config(),
    "prefix_tuning": PrefixTuningConfig(flat=True, prefix_length=4),
}


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="stanfordnlp/sst2", metadata={"help": "Hub id of a dataset with a label."})
    text_column: str = field(default="sentence", metadata={"help": "The column with the text."})
    teachers: list[str] = field(
        default_factory=list, metadata={"help": "Hub ids or folders of saved adapters, of any methods."}
    )
    student_config: str = field(default="seq_bn", metadata={"help": "Config of the student, of any method."})
    max_length: int = field(default=128, metadata={"help": "Tokens of an example, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn texts into tokens."""
    demo.check_data(data, [args.text_column, "label"])

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        return tokenizer(batch[args.text_column], truncation=True, max_length=args.max_length)

    others = [column for column in data["train"].column_names if column != "label"]
    return data.map(tokens, batched=True, remove_columns=others).rename_column("label", "labels")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the fraction of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, data and a teacher of each method, and name them in `args`."""
    tasks = demo_data.reviews([args.text_column])
    args.model_name_or_path = demo.save_encoder(tasks, [args.text_column], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    collator = DataCollatorWithPadding(tokenizer)

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_classification_head(name, num_labels=2)

    for number, (name, config) in enumerate(METHODS.items()):
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks["films" if number % 2 else "books"], tokenizer, args)["train"]
        args.teachers.append(demo.train_teacher(model, name, dataset, collator, folder, config, add_head))
    args.student_config = "seq_bn[reduction_factor=2]"  # the tiny model is narrow
    return tasks["hotels"]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        longer = {"max_steps": 120, "learning_rate": 1e-2, "distillation_start": 0.0, "distillation_weight": 0.1}
        args, training_args = demo.parse(Arguments, longer, output_dir="outputs/mixed_teachers", learning_rate=1e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        # With the carrier "mixed" the task itself teaches the fusion which of so different teachers are of use.
        distill_from = had.DistillationConfig(args.teachers, carrier="mixed", student_start="random")
        model.add_adapter(demo.STUDENT, config=args.student_config, distill_from=distill_from)
        model.add_classification_head(demo.STUDENT, num_labels=data["train"].features["label"].num_classes)
        model.train_adapter(demo.STUDENT)

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
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_accuracy"]
    print(f"accuracy before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
