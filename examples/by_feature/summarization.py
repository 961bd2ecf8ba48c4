"""Summarisation: distil adapters of an encoder-decoder (T5 and the like) into one for new texts.

python examples/by_feature/summarization.py --demo
python examples/by_feature/summarization.py --dataset_name knkarthick/samsum --teachers path/to/xsum path/to/cnn
"""

import os
from collections import Counter
from dataclasses import dataclass, field

import adapters
import demo
import demo_data
import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(default="google-t5/t5-small", metadata={"help": "Base model of the teachers."})
    dataset_name: str = field(default="knkarthick/samsum", metadata={"help": "Hub id of a dataset with summaries."})
    text_column: str = field(default="dialogue", metadata={"help": "The column with the text."})
    summary_column: str = field(default="summary", metadata={"help": "The column with the summary."})
    prefix: str = field(default="summarize: ", metadata={"help": "What stands before each text."})
    teachers: list[str] = field(default_factory=list, metadata={"help": "Hub ids or folders of saved adapters."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a text, at most."})
    max_summary_length: int = field(default=64, metadata={"help": "Tokens of a summary, at most."})
    eval_examples: int = field(default=200, metadata={"help": "Texts of the validation split that are summarised."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Turn texts and summaries into tokens."""
    demo.check_data(data, [args.text_column, args.summary_column])

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        texts = [args.prefix + text for text in batch[args.text_column]]
        encoded = tokenizer(texts, truncation=True, max_length=args.max_length)
        summaries = tokenizer(
            text_target=batch[args.summary_column], truncation=True, max_length=args.max_summary_length
        )
        return {**encoded, "labels": summaries["input_ids"]}

    return data.map(tokens, batched=True, remove_columns=data["train"].column_names)


def load_model(args: Arguments) -> PreTrainedModel:
    """Load the frozen encoder-decoder with its language modelling head, ready for adapters."""
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path)
    adapters.init(model)
    return model


def word_f1(told: str, true: str) -> float:
    """Return the F1 of the words of a summary (ROUGE-1, without stemming)."""
    told_words, true_words = Counter(told.lower().split()), Counter(true.lower().split())
    return 2 * (told_words & true_words).total() / max((told_words + true_words).total(), 1)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, encoded: Dataset, data: Dataset, tokenizer: PreTrainedTokenizerBase, args: Arguments
) -> float:
    """Return the mean ROUGE-1 of the summaries that the active adapter writes."""
    model.eval()
    scores = []
    for start in range(0, min(args.eval_examples, len(data)), 16):
        rows = range(start, min(start + 16, args.eval_examples, len(data)))
        inputs = encoded.select(rows).select_columns(["input_ids", "attention_mask"])
        batch = tokenizer.pad(inputs.to_dict(), return_tensors="pt").to(model.device)
        written = model.generate(**batch, max_new_tokens=args.max_summary_length)
        summaries = zip(tokenizer.batch_decode(written, skip_special_tokens=True), data.select(rows), strict=True)
        scores += [word_f1(told, example[args.summary_column]) for told, example in summaries]
    return sum(scores) / len(scores)


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    tasks, args.prefix = demo_data.reports(args.text_column, args.summary_column), ""
    args.model_name_or_path = demo.save_encoder_decoder(tasks.pop("pretraining")["train"], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    *siblings, own = tasks
    for name in siblings:
        model, dataset = load_model(args), encode(tasks[name], tokenizer, args)["train"]
        collator = DataCollatorForSeq2Seq(tokenizer, model)
        args.teachers.append(demo.train_teacher(model, name, dataset, collator, folder))
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/summarization", learning_rate=5e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = load_model(args)
        model.add_adapter(demo.STUDENT, config="seq_bn", distill_from=args.teachers)
        model.train_adapter(demo.STUDENT)

    test = (encoded["validation"], data["validation"], tokenizer, args)
    trainer = had.DistillationTrainer(
        model, training_args, train_dataset=encoded["train"], data_collator=DataCollatorForSeq2Seq(tokenizer, model)
    )
    before = evaluate(model, *test)
    trainer.train()
    after = evaluate(model, *test)
    model.save_adapter(
        f"{folder}/{demo.STUDENT}", demo.STUDENT, with_head=False
    )  # the head is the frozen base model's

    stock = load_model(args).to(model.device)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = evaluate(stock, *test)
    print(f"ROUGE-1 before training {before:.3f}, after {after:.3f}, loaded without teachers {alone:.3f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
