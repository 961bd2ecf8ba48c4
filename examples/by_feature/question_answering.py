"""Extractive question answering: distil adapters that find answers in a text into one for new texts (SQuAD form).

python examples/by_feature/question_answering.py --demo
python examples/by_feature/question_answering.py --teachers AdapterHub/bert-base-uncased-pf-newsqa \
        AdapterHub/bert-base-uncased-pf-hotpotqa AdapterHub/bert-base-uncased-pf-quoref
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import demo
import demo_data
import numpy as np
from adapters import AdapterTrainer, AutoAdapterModel
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, default_data_collator

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="rajpurkar/squad", metadata={"help": "Hub id of a dataset in SQuAD's form."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    max_length: int = field(default=384, metadata={"help": "Tokens of question and context; the rest is cut off."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn questions and contexts into tokens, and the first answer into the positions of its first and last token.

    The column `offsets` has the characters of the context that each token stands for, None for all other tokens. An
    answer that was cut off, or is missing, is at token 0.
    """
    demo.check_data(data, ["question", "context", "answers"])
    length = min(args.max_length, tokenizer.model_max_length)

    def locate(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(
            batch["question"], batch["context"], truncation="only_second", max_length=length, padding="max_length",
            return_offsets_mapping=True,
        )  # fmt: skip
        places, offsets = [], []
        for row, (answers, all_offsets) in enumerate(
            zip(batch["answers"], encoded.pop("offset_mapping"), strict=True)
        ):
            context = [part == 1 for part in encoded.sequence_ids(row)]
            offsets.append([o if inside else None for o, inside in zip(all_offsets, context, strict=True)])
            start = answers["answer_start"][0] if answers["text"] else -1
            end = start + len(answers["text"][0]) if answers["text"] else -1
            first = [i for i, o in enumerate(offsets[-1]) if o and o[0] <= start < o[1]]
            last = [i for i, o in enumerate(offsets[-1]) if o and o[0] < end <= o[1]]
            places.append((first[0], last[0]) if first and last else (0, 0))
        encoded["start_positions"], encoded["end_positions"] = map(list, zip(*places, strict=True))
        return {**encoded, "offsets": offsets}

    return data.map(locate, batched=True, remove_columns=data["train"].column_names)


def answer(start: np.ndarray, end: np.ndarray, context: str, offsets: list, max_length: int) -> str:
    """Find the best answer: the start and end token of the context with the greatest sum of scores."""
    inside = np.array([o is not None for o in offsets])
    scores = np.where(inside[:, None] & inside, start[:, None] + end, -np.inf)  # (first token, last token)
    scores = np.where(np.triu(np.ones_like(scores)) - np.triu(np.ones_like(scores), max_length) > 0, scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return context[offsets[first][0] : offsets[last][1]] if inside.any() else ""


def word_f1(told: str, true: str) -> float:
    """Return the F1 of the words of an answer."""
    told_words, true_words = Counter(told.lower().split()), Counter(true.lower().split())
    return 2 * (told_words & true_words).total() / max((told_words + true_words).total(), 1)


def evaluate(trainer: AdapterTrainer, encoded: Dataset, data: Dataset, args: Arguments) -> tuple[float, float]:
    """Exact match and F1 of the student's answers, each against the nearest of the right ones."""
    starts, ends = trainer.predict(encoded.remove_columns("offsets")).predictions[:2]
    exact, f1 = [], []
    for start, end, example, offsets in zip(starts, ends, data, encoded["offsets"], strict=True):
        told = answer(start, end, example["context"], offsets, args.max_answer_length)
        right = example["answers"]["text"] or [""]
        exact.append(any(told.lower() == true.lower() for true in right))
        f1.append(max(word_f1(told, true) for true in right))
    return float(np.mean(exact)), float(np.mean(f1))


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    *siblings, own = tasks = demo_data.facts()
    args.model_name_or_path = demo.save_encoder(tasks, ["question", "context"], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_qa_head(name)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks[name], tokenizer, args)["train"]
        args.teachers.append(
            demo.train_teacher(model, name, dataset, default_data_collator, folder, add_head=add_head)
        )
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/question_answering", learning_rate=1e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        model.add_qa_head(demo.STUDENT)
        model.train_adapter(demo.STUDENT)

    trainer = had.DistillationTrainer(
        model, training_args, train_dataset=encoded["train"], data_collator=default_data_collator
    )
    before = evaluate(trainer, encoded["validation"], data["validation"], args)
    trainer.train()
    after = evaluate(trainer, encoded["validation"], data["validation"], args)
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    trainer = AdapterTrainer(stock, training_args, data_collator=default_data_collator)
    alone = evaluate(trainer, encoded["validation"], data["validation"], args)
    print(
        f"exact match / F1 before training {before[0]:.3f} / {before[1]:.3f}, after {after[0]:.3f} / {after[1]:.3f}, "
        f"loaded without teachers {alone[0]:.3f} / {alone[1]:.3f}"
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
