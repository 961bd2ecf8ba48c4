"""Supervised fine-tuning with trl: distil LoRA adapters of a chat model into one for chats of another kind.

python examples/by_feature/sft_trl.py --demo
python examples/by_feature/sft_trl.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --teachers path/to/lora_a path/to/lora_b --assistant_only_loss --packing
"""

import os
from dataclasses import dataclass, field
from math import exp

import adapters
import demo
import demo_data
from adapters import LoRAConfig
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import SFTTrainer

from hf_adapter_distillation.integrations.trl import SFTDistillationConfig, SFTDistillationTrainer

MESSAGES = "messages"  # the column that trl reads
DEMO_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} [SEP]{% endgeneration %}"
    "{% else %}{{ message['content'] }} [SEP]{% endif %} {% endfor %}"
)


@dataclass
class Arguments:
    """What is distilled, and into what."""

    model_name_or_path: str = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Base model of the teachers, a decoder."}
    )
    dataset_name: str = field(default="HuggingFaceTB/smoltalk", metadata={"help": "Hub id of a dataset of chats."})
    dataset_config_name: str = field(default="everyday-conversations", metadata={"help": "Its configuration."})
    eval_split: str = field(default="test", metadata={"help": "The split to evaluate on."})
    teachers: list[str] = field(
        default_factory=list, metadata={"help": "Hub ids or folders of LoRA adapters, saved by adapters or PEFT."}
    )
    rank: int = field(default=8, metadata={"help": "Rank of the student's LoRA; the teachers may have others."})
    demo: bool = field(default=False, metadata={"help": "Run offline on a tiny model and data made in code."})

    def __post_init__(self) -> None:
        demo.check_teachers(self.teachers, self.demo)
        if self.rank < 1:
            raise ValueError(f"--rank {self.rank} is out of range; it must be at least 1.")


def load_model(args: Arguments) -> PreTrainedModel:
    """Load the frozen decoder with its language modelling head, ready for adapters."""
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    adapters.init(model)
    return model


def prepare_demo(args: Arguments, folder: str) -> DatasetDict:
    """Make model, tokenizer, teachers and data, and name them in `args`."""
    tasks = demo_data.chats(MESSAGES)

    def texts(chats: list) -> list[str]:
        return [" ".join(f"{m['role']} : {m['content']}" for m in chat) for chat in chats]

    pretraining = tasks.pop("pretraining")["train"][MESSAGES]
    args.model_name_or_path, args.eval_split = demo.save_decoder(texts(pretraining), folder), "validation"
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    tokenizer.chat_template, tokenizer.eos_token = DEMO_TEMPLATE, "[SEP]"
    tokenizer.save_pretrained(args.model_name_or_path)
    *siblings, own = tasks
    for name in siblings:
        ids = [tokenizer.apply_chat_template(chat) for chat in tasks[name]["train"][MESSAGES]]
        dataset = tasks[name]["train"].from_dict({"input_ids": ids})
        collator, config = DataCollatorForLanguageModeling(tokenizer, mlm=False), LoRAConfig(r=args.rank)
        teacher = demo.train_teacher(load_model(args), name, dataset, collator, folder, config, steps=80)
        args.teachers.append(teacher)
    return tasks[own]


def load_data(args: Arguments, tokenizer: PreTrainedTokenizerBase, data: DatasetDict) -> dict[str, object]:
    """Return the arguments of the trainers that hold the data."""
    demo.check_data(data, [MESSAGES], ["train", args.eval_split])
    chats = data.select_columns(MESSAGES)
    return {"train_dataset": chats["train"], "eval_dataset": chats[args.eval_split], "processing_class": tokenizer}


def main() -> None:
    """Run the example."""
    with demo.one_line_errors():
        args, training_args = demo.parse(
            Arguments,
            {"bf16": False, "learning_rate": 5e-3, "max_steps": 30},
            SFTDistillationConfig,
            output_dir="outputs/sft_trl",
            assistant_only_loss=True,
        )
        folder = training_args.output_dir
        data = prepare_demo(args, folder) if args.demo else load_dataset(args.dataset_name, args.dataset_config_name)
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        shared = load_data(args, tokenizer, data)
        model = load_model(args)
        model.add_adapter(demo.STUDENT, config=LoRAConfig(r=args.rank), distill_from=args.teachers)
        model.train_adapter(demo.STUDENT)
        trainer = SFTDistillationTrainer(model, training_args, **shared)

    before = exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    after = exp(trainer.evaluate()["eval_loss"])
    model.save_adapter(
        f"{folder}/{demo.STUDENT}", demo.STUDENT, with_head=False
    )  # the head is the frozen base model's

    stock = load_model(args)
    stock.load_adapter(f"{folder}/{demo.STUDENT}", set_active=True)
    alone = exp(SFTTrainer(stock, training_args, **shared).evaluate()["eval_loss"])
    print(f"perplexity before training {before:.2f}, after {after:.2f}, loaded without teachers {alone:.2f}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
