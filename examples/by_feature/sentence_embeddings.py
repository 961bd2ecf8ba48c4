"""Sentence embeddings: distil adapters of an embedding model into one for a new task, with Sentence Transformers.

python examples/by_feature/sentence_embeddings.py --demo
python examples/by_feature/sentence_embeddings.py --teachers path/to/quora path/to/nq
"""

import os
from dataclasses import dataclass, field

import adapters
import demo
import demo_data
from datasets import DatasetDict, load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from transformers import PrinterCallback

import hf_adapter_distillation  # noqa: F401  (registers with adapters)
from hf_adapter_distillation.integrations.sentence_transformers import (
    SentenceTransformerDistillationTrainer,
    SentenceTransformerDistillationTrainingArguments,
)

# The demo has few answers, and a batch must not have one of them as match and as mismatch.
OF_DEMO = {"learning_rate": 1e-2, "batch_sampler": "no_duplicates"}


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Embedding model of the teachers."}
    )
    dataset_name: str = field(default="sentence-transformers/gooaq", metadata={"help": "Hub id of pairs of texts."})
    columns: list[str] = field(
        default_factory=lambda: ["anchor", "positive"], metadata={"help": "Columns with a text and its match."}
    )
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def accuracy(model: SentenceTransformer, data: DatasetDict, columns: list[str]) -> float:
    """Return the fraction of texts whose match is the nearest of all."""
    anchors, positives = (data["validation"][column] for column in columns)
    answers = sorted(set(positives))
    nearest = model.similarity(model.encode(list(anchors)), model.encode(answers)).argmax(dim=1)
    right = [answers[i] == positive for i, positive in zip(nearest.tolist(), positives, strict=True)]
    return sum(right) / len(right)


def train_teacher(name: str, data: DatasetDict, base: str, folder: str) -> str:
    """Train a plain adapter of the embedding model, and return its folder."""
    model = SentenceTransformer(base, device="cpu")
    transformer = model[0].auto_model
    adapters.init(transformer)
    transformer.add_adapter(name, config="seq_bn")
    transformer.train_adapter(name)
    settings = {**demo.DEMO_TRAINING, **OF_DEMO, "max_steps": 100, "logging_strategy": "no"}
    args = SentenceTransformerTrainingArguments(
        f"{folder}/training", report_to="none", dataloader_pin_memory=False, **settings
    )
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, args, train_dataset=data["train"], loss=loss)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    transformer.save_adapter(f"{folder}/{name}", name)
    print(f"Trained {name}.")
    return f"{folder}/{name}"


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    tasks = demo_data.questions(args.columns)
    args.model_name_or_path = demo.save_encoder(tasks, args.columns, folder)
    *siblings, own = tasks
    args.teachers += [train_teacher(name, tasks[name], args.model_name_or_path, folder) for name in siblings]
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(
            Arguments,
            OF_DEMO,
            of_training=SentenceTransformerDistillationTrainingArguments,
            output_dir="outputs/sentence_embeddings",
            learning_rate=1e-4,
        )
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        if "validation" not in data:
            data = DatasetDict(zip(("train", "validation"), data["train"].train_test_split(200).values(), strict=True))
        demo.check_data(data, args.columns)
        data = data.select_columns(args.columns)
        model = SentenceTransformer(args.model_name_or_path)
        before = accuracy(model, data, args.columns)
        transformer = model[0].auto_model
        adapters.init(transformer)
        transformer.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        transformer.train_adapter(demo.STUDENT)

    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerDistillationTrainer(model, training_args, train_dataset=data["train"], loss=loss)
    trainer.train()
    after = accuracy(model, data, args.columns)
    trainer.save_model(folder)

    stock = SentenceTransformer(folder)
    adapters.init(stock[0].auto_model)
    stock[0].auto_model.load_adapter(f"{folder}/{demo.STUDENT}", use_safetensors=True, set_active=True)
    alone = accuracy(stock, data, args.columns)
    print(f"accuracy at 1 before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
