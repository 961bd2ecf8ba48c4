"""What the examples of this folder share: their command line, and what `--demo` needs to run offline.

A demo is a real run on toys: a tiny model from a config in code, a tokenizer of a few words, data of `demo_data.py`,
and teachers that `train_teacher` makes of sibling tasks. It ends up with what a user would give on the command line, a
folder with the base model and folders of saved adapters, so that the code around it is the same.
"""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import transformers
from adapters import AdapterConfig, AdapterTrainer, Stack
from datasets import Dataset, DatasetDict
from datasets.utils import disable_progress_bars
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

import hf_adapter_distillation as had

STUDENT = "student"
DEMO_TRAINING = {
    "max_steps": 60, "learning_rate": 2e-3, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 32,
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def parse(
    arguments: type,
    of_demo: dict[str, object] | None = None,
    of_training: type = had.DistillationTrainingArguments,
    **defaults: object,
) -> tuple:
    """Read the command line of an example.

    Args:
        arguments: The dataclass of the example's own arguments.
        of_demo: Training arguments of its demo, where they are not those of all demos.
        of_training: The dataclass of the training arguments.
        **defaults: The example's defaults of the training arguments, which `--demo` makes shorter.

    Returns:
        The example's arguments and the training arguments.
    """
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    parser = HfArgumentParser((arguments, of_training))
    parser.set_defaults(report_to="none", dataloader_pin_memory=False, **defaults)
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO_TRAINING | (of_demo or {}))
        disable_progress_bars()
    return parser.parse_args_into_dataclasses()


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with a one-line error where an argument, or what it names, is wrong."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: {str(error).splitlines()[0]}") from error


def check_teachers(teachers: Sequence[str], demo: bool) -> None:
    """Refuses a run that has nothing to distil from.

    Raises:
        ValueError: If there are no teachers, and no demo that would train some.
    """
    if not teachers and not demo:
        raise ValueError(
            "--teachers is empty; give Hub ids or folders of saved adapters, or --demo for an offline run."
        )


def check_data(data: DatasetDict, columns: Sequence[str], splits: Sequence[str] = ("train", "validation")) -> None:
    """Refuses a dataset without the splits and columns that an example reads.

    Raises:
        ValueError: With the first missing one and those that there are.
    """
    for split in splits:
        if split not in data:
            raise ValueError(f"The dataset has no split {split!r}, only {', '.join(data)}; give another one.")
        for column in columns:
            if column not in (there := data[split].column_names):
                raise ValueError(
                    f"The dataset has no column {column!r} in {split!r}, only {', '.join(there)}; "
                    "rename the column or give another dataset."
                )


def train(
    model: PreTrainedModel,
    dataset: Dataset,
    collator: Callable | None,
    folder: str,
    steps: int,
    learning_rate: float,
    trainer_class: type[Trainer] = Trainer,
) -> None:
    """Trains whatever is not frozen, without a word."""
    training = {**DEMO_TRAINING, "max_steps": steps, "learning_rate": learning_rate, "logging_strategy": "no"}
    training["remove_unused_columns"] = dataset.format["type"] != "custom"  # a transform reads columns of its own
    args = TrainingArguments(f"{folder}/training", report_to="none", dataloader_pin_memory=False, **training)
    trainer = trainer_class(model, args, train_dataset=dataset, data_collator=collator)
    trainer.model_accepts_loss_kwargs = (
        False  # adapters hides the signature by which Trainer decides this; T5 does not
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def make_tokenizer(texts: Sequence[str], single: str, pair: str) -> PreTrainedTokenizerFast:
    """Make a word-piece tokenizer of the words of some texts; words of more than five letters are two pieces.

    Args:
        texts: Where the words are from.
        single: How a text is wrapped, for instance `"[CLS] $A [SEP]"`.
        pair: How two texts are.

    Returns:
        The tokenizer.
    """
    before = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in before.pre_tokenize_str(text.lower())}
    pieces = {word[:5] for word in words} | {f"##{word[5:]}" for word in words if len(word) > 5}
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL.values(), *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = before
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, vocabulary[token]) for token in SPECIAL.values()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **SPECIAL)


def save_base(model: PreTrainedModel, processor: PreTrainedTokenizerFast | ViTImageProcessor, folder: str) -> str:
    """Save a base model with its tokenizer or image processor and return the folder."""
    model.save_pretrained(f"{folder}/base")
    processor.save_pretrained(f"{folder}/base")
    return f"{folder}/base"


def save_encoder(tasks: dict[str, DatasetDict], columns: Sequence[str], folder: str) -> str:
    """Make a tiny BERT and its tokenizer, and pretrain it on the texts of all tasks as masked language model.

    Args:
        tasks: The data.
        columns: The columns with texts, or with lists of words.
        folder: Where to.

    Returns:
        The folder of the model, for `--model_name_or_path`.
    """
    texts = [text for data in tasks.values() for column in columns for text in data["train"][column]]
    texts = [text if isinstance(text, str) else " ".join(text) for text in texts]
    tokenizer = make_tokenizer(texts, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    dataset = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    set_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY))
    train(model, dataset, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3), folder, 300, 2e-3)
    return save_base(model, tokenizer, folder)


def train_teacher(
    model: PreTrainedModel,
    name: str,
    dataset: Dataset,
    collator: Callable | None,
    folder: str,
    config: str | AdapterConfig = "seq_bn",
    add_head: Callable[[PreTrainedModel, str], None] | None = None,
    below: str | None = None,
    steps: int = 150,
) -> str:
    """Trains a plain adapter and saves it; all teachers of a demo start from the same weights.

    Args:
        model: The base model, with adapters.
        name: The name of the teacher.
        dataset: Its training data, ready for the model.
        collator: Makes the batches.
        folder: The folder in which its own one is made.
        config: Its adapter config.
        add_head: Adds its head; a model with a static head needs none.
        below: A frozen adapter of the model that runs below it.
        steps: The number of optimizer steps.

    Returns:
        The teacher's folder, for `--teachers`.
    """
    set_seed(0)
    model.add_adapter(name, config=config)
    if add_head is not None:
        add_head(model, name)
    model.train_adapter(name)
    if below is not None:
        model.set_active_adapters(Stack(below, name))
    train(model, dataset, collator, folder, steps, 1e-2, AdapterTrainer)
    path = Path(folder) / name
    path.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(path), name, with_head=add_head is not None)
    print(f"Trained {name}.")
    return str(path)


def save_decoder(texts: Sequence[str], folder: str) -> str:
    """Make a tiny Llama and its tokenizer, and pretrain it.

    Args:
        texts: The texts.
        folder: Where to.

    Returns:
        The folder of the model, for `--model_name_or_path`.
    """
    tokenizer = make_tokenizer(texts, "[CLS] $A", "[CLS] $A $B")
    set_seed(0)
    sizes = {
        key: TINY[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, **sizes))
    dataset = Dataset.from_dict({"input_ids": tokenizer(list(texts))["input_ids"]})
    train(model, dataset, DataCollatorForLanguageModeling(tokenizer, mlm=False), folder, 150, 5e-3)
    return save_base(model, tokenizer, folder)


def save_encoder_decoder(data: Dataset, folder: str) -> str:
    """Make a tiny T5 and its tokenizer, and pretrain it to copy.

    Args:
        data: A text column, and one with what is to be said of it.
        folder: Where to.

    Returns:
        The folder of the model, for `--model_name_or_path`.
    """
    texts, targets = (list(data[column]) for column in data.column_names)
    tokenizer = make_tokenizer(texts, "$A [SEP]", "$A $B [SEP]")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    set_seed(0)
    model = T5ForConditionalGeneration(config)
    dataset = Dataset.from_dict(
        {"input_ids": tokenizer(texts)["input_ids"], "labels": tokenizer(targets)["input_ids"]}
    )
    train(model, dataset, DataCollatorForSeq2Seq(tokenizer, model), folder, 300, 5e-3)
    return save_base(model, tokenizer, folder)


def save_vision_encoder(data: Dataset, folder: str) -> str:
    """Make a tiny ViT and its image processor, and pretrain it to classify.

    Args:
        data: A column of pictures, and one of four classes.
        folder: Where to.

    Returns:
        The folder of the model, for `--model_name_or_path`.
    """
    image_column, label_column = data.column_names
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    dataset = data.with_transform(
        lambda batch: {**processor(batch[image_column], return_tensors="pt"), "labels": batch[label_column]}
    )
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(image_size=16, patch_size=4, num_labels=4, initializer_range=0.1, **TINY)
    )
    train(model, dataset, None, folder, 200, 1e-3)
    return save_base(model.vit, processor, folder)
