"""Token classification: distil adapters that tag words into one for a new set of tags or texts (CoNLL form).

python examples/by_feature/token_classification.py --demo
python examples/by_feature/token_classification.py --teachers AdapterHub/bert-base-uncased-pf-wnut_17 \
        AdapterHub/bert-base-uncased-pf-conll2003_pos AdapterHub/bert-base-uncased-pf-mit_movie_trivia
"""

import os
from dataclasses import dataclass, field

import demo
import demo_data
from adapters import AdapterTrainer, AutoAdapterModel
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="bert-base-uncased", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="lhoestq/conll2003", metadata={"help": "Hub id of a dataset in words."})
    tag_column: str = field(default="ner_tags", metadata={"help": "The column with a tag for each of the tokens."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a sentence, at most."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn words into word pieces; the first piece of a word gets its tag, the others -100, which no loss counts."""
    demo.check_data(data, ["tokens", args.tag_column])

    def align(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=args.max_length)
        encoded["labels"] = []
        for row, tags in enumerate(batch[args.tag_column]):
            words = encoded.word_ids(row)  # None for special tokens
            first = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            encoded["labels"].append([tags[w] if is_first else -100 for w, is_first in zip(words, first, strict=True)])
        return encoded

    return data.map(align, batched=True, remove_columns=data["train"].column_names)


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """Return the entities of a sentence, `(first word, end, type)`; they start at B-X or at I-X after another type."""
    found: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, new_kind = tag.partition("-")
        if prefix != "I" or new_kind != kind:
            if kind:
                found.add((start, position, kind))
            start, kind = position, new_kind
    return found


def entity_f1(prediction: EvalPrediction, names: list[str]) -> dict[str, float]:
    """Return the F1 of whole entities; an entity is right if its words and its type are."""
    right = predicted = expected = 0
    for guess, labels in zip(prediction.predictions.argmax(-1), prediction.label_ids, strict=True):
        told = entities([names[tag] for tag in guess[labels != -100]])
        true = entities([names[tag] for tag in labels[labels != -100]])
        right, predicted, expected = right + len(told & true), predicted + len(told), expected + len(true)
    return {"f1": 2 * right / max(predicted + expected, 1)}


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    *siblings, own = tasks = demo_data.mentions()
    args.model_name_or_path = demo.save_encoder(tasks, ["tokens"], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    collator = DataCollatorForTokenClassification(tokenizer)

    def add_head(model: PreTrainedModel, name: str) -> None:
        model.add_tagging_head(name, num_labels=5)

    for name in siblings:
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        dataset = encode(tasks[name], tokenizer, args)["train"]
        args.teachers.append(demo.train_teacher(model, name, dataset, collator, folder, add_head=add_head))
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/token_classification", learning_rate=1e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        names = data["train"].features[args.tag_column].feature.names
        model = AutoAdapterModel.from_pretrained(args.model_name_or_path)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        model.add_tagging_head(demo.STUDENT, num_labels=len(names))
        model.train_adapter(demo.STUDENT)

    shared = {
        "eval_dataset": encoded["validation"],
        "data_collator": DataCollatorForTokenClassification(tokenizer),
        "compute_metrics": lambda prediction: entity_f1(prediction, names),
    }
    trainer = had.DistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = trainer.evaluate()["eval_f1"]
    trainer.train()
    after = trainer.evaluate()["eval_f1"]
    model.save_adapter(f"{folder}/{demo.STUDENT}", demo.STUDENT)

    stock = AutoAdapterModel.from_pretrained(args.model_name_or_path)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = AdapterTrainer(stock, training_args, **shared).evaluate()["eval_f1"]
    print(f"entity F1 before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
