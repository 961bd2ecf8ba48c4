"""Causal language modelling: distil LoRA adapters of a decoder (Llama and the like) into one for new texts.

python examples/by_feature/causal_lm.py --demo
python examples/by_feature/causal_lm.py --model_name_or_path meta-llama/Llama-3.2-1B \
        --teachers path/to/lora_a path/to/lora_b
"""

import os
from dataclasses import dataclass, field
from itertools import chain
from math import exp

import adapters
import demo
import demo_data
from adapters import AdapterTrainer, LoRAConfig
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

import hf_adapter_distillation as had


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(
        default="meta-llama/Llama-3.2-1B", metadata={"help": "Base model of the teachers, a decoder."}
    )
    dataset_name: str = field(default="Salesforce/wikitext", metadata={"help": "Hub id of a dataset with texts."})
    dataset_config_name: str = field(default="wikitext-2-raw-v1", metadata={"help": "Configuration of the dataset."})
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    teachers: list[str] = field(
        default_factory=list, metadata={"help": "Hub ids or folders of LoRA adapters, saved by adapters or PEFT."}
    )
    rank: int = field(default=8, metadata={"help": "Rank of the student's LoRA; the teachers may have others."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a training example."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)
        for name in ("rank", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")


def encode(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: Arguments) -> DatasetDict:
    """Join texts and cut their tokens into blocks of the same length; the rest is left out."""
    demo.check_data(data, [args.text_column], list(data))

    def blocks(batch: dict[str, list]) -> dict[str, list]:
        tokens = list(chain.from_iterable(tokenizer(batch[args.text_column])["input_ids"]))
        starts = range(0, len(tokens) - args.block_size + 1, args.block_size)
        cut = [tokens[start : start + args.block_size] for start in starts]
        return {"input_ids": cut, "labels": cut}

    return data.map(blocks, batched=True, remove_columns=data["train"].column_names)


def load_model(args: Arguments) -> PreTrainedModel:
    """Load the frozen decoder with its language modelling head, ready for adapters."""
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    adapters.init(model)
    return model


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, teachers and data, and name them in `args`."""
    tasks = demo_data.colours(args.text_column)
    args.block_size = min(args.block_size, 16)
    args.model_name_or_path = demo.save_decoder(tasks.pop("pretraining")["train"][args.text_column], folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    *siblings, own = tasks
    for name in siblings:
        dataset, config = encode(tasks[name], tokenizer, args)["train"], LoRAConfig(r=args.rank)
        teacher = demo.train_teacher(load_model(args), name, dataset, default_data_collator, folder, config)
        args.teachers.append(teacher)
    return tasks[own]


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(Arguments, output_dir="outputs/causal_lm", learning_rate=2e-4)
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name, args.dataset_config_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        encoded = encode(data, tokenizer, args)
        model = load_model(args)
        model.add_adapter(demo.STUDENT, config=LoRAConfig(r=args.rank), distill_from=args.teachers)
        model.train_adapter(demo.STUDENT)

    shared = {"eval_dataset": encoded["validation"], "data_collator": default_data_collator}
    trainer = had.DistillationTrainer(model, training_args, train_dataset=encoded["train"], **shared)
    before = exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = exp(trainer.evaluate()["eval_loss"])
    model.save_adapter(
        f"{folder}/{demo.STUDENT}", demo.STUDENT, with_head=False
    )  # the head is the frozen base model's

    stock = load_model(args)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = exp(AdapterTrainer(stock, training_args, **shared).evaluate()["eval_loss"])
    print(f"perplexity before training {before:.2f}, after {after:.2f}, loaded without teachers {alone:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
