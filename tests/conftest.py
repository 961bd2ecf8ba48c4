"""Tiny models and data, made in code; nothing is downloaded."""

import os
import re

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

from types import SimpleNamespace

import adapters
import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState
from adapters import AutoAdapterModel
from datasets import Dataset
from hub_server import Hub
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertModel,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    set_seed,
)

import hf_adapter_distillation as had
from hf_adapter_distillation._compat import COMPILES

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the marks of the long form of a test

VOCABULARY = 60
TEACHERS = ["bank", "travel", "work"]

needs_compiler = pytest.mark.skipif(not COMPILES, reason="the compiler of this torch cannot trace adapters")

CONFIGS = {
    "bert": lambda **kw: BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, **kw
    ),
    "roberta": lambda **kw: RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, **kw
    ),
    "distilbert": lambda **kw: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=37, **kw
    ),
    "gpt2": lambda **kw: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0, **kw
    ),
    "llama": lambda **kw: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw,
    ),
    "t5": lambda **kw: T5Config(
        vocab_size=VOCABULARY, d_model=32, num_layers=2, num_decoder_layers=2, num_heads=4, d_ff=37, d_kv=8,
        decoder_start_token_id=0, **kw,
    ),
    "bart": lambda **kw: BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, **kw,
    ),
}  # fmt: skip

STATIC = {
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "base": AutoModel,
}


def make_model(family="bert", kind="flex", seed=0, dropout=False, dtype=torch.float32):
    """A tiny model with adapters: `kind` is "flex" or one of STATIC."""
    set_seed(seed)
    config = CONFIGS[family]()
    if not dropout:
        for key, value in config.to_dict().items():
            if "dropout" in key or "pdrop" in key:
                setattr(config, key, None if value is None else 0.0)
    if kind == "flex":
        model = AutoAdapterModel.from_config(config)
    else:
        model = STATIC[kind].from_config(config)
        adapters.init(model)
    return model.to(dtype)


def exactly(message):
    """Return the pattern for `match` that only the whole message fits."""
    return rf"\A{re.escape(message)}\Z"


def noisy(model, name, std=0.3):
    """Gives an adapter weights that differ from those at its start, so that teachers are told apart."""
    for place in model.get_adapter(name).values():
        for module in place.values():
            for parameter in module.parameters():
                parameter.data += std * torch.randn_like(parameter)


def copy_weights(model, source, targets):
    """Gives adapters the weights of another one."""
    for target in targets:
        for place, modules in model.get_adapter(source).items():
            for location, module in modules.items():
                model.get_adapter(target)[place][location].load_state_dict(module.state_dict())


def make_student(
    model, student="insurance", teachers=TEACHERS, config="seq_bn", head="classification", train=True, **kw
):
    """Adds teachers (with heads on flex models) and a student distilled from them."""
    for teacher in teachers:
        model.add_adapter(teacher, config=config)
        noisy(model, teacher)
        if hasattr(model, "heads"):
            getattr(model, f"add_{head}_head")(teacher)
    model.add_adapter(student, config=config, distill_from=had.DistillationConfig(teachers=list(teachers), **kw))
    if train:
        model.train_adapter(student)
        if hasattr(model, "heads") and student not in model.heads:
            getattr(model, f"add_{head}_head")(student)
            model.train_adapter(student)
    return model


def make_batch(batch=4, seq_len=8, seed=0, labels="classification"):
    """A batch whose rows are padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (batch, seq_len), generator=generator)
    lengths = torch.randint(3, seq_len + 1, (batch,), generator=generator)
    attention_mask = (torch.arange(seq_len) < lengths[:, None]).long()
    made = {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
    if labels == "classification":
        made["labels"] = torch.randint(0, 2, (batch,), generator=generator)
    elif labels == "tokens":
        made["labels"] = torch.where(attention_mask == 1, input_ids, -100)
    return made


def make_dataset(n=16, labels="classification", seed=0):
    """The same as a dataset."""
    return Dataset.from_dict({key: value.tolist() for key, value in make_batch(n, seed=seed, labels=labels).items()})


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    """The names of the parameters that are not bitwise what they were."""
    now = dict(model.named_parameters())
    return {name for name, value in before.items() if name in now and not torch.equal(now[name], value)}


@pytest.fixture
def trainer_args(tmp_path):
    def make(**kwargs):
        defaults = {
            "output_dir": str(tmp_path / "training"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "distillation_start": 0.5,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
        }
        return had.DistillationTrainingArguments(**{**defaults, **kwargs})

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub on the loopback interface, where huggingface_hub is logged in as `me`."""
    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
        huggingface_hub.utils.reset_sessions()  # the last one is offline
        yield server
    huggingface_hub.utils.reset_sessions()


@pytest.fixture(autouse=True)
def no_mixed_precision_or_compiler_for_the_next_test():
    """TrainingArguments(bf16=True, torch_compile=True) leave environment variables and accelerate's state behind."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    if os.environ.pop("ACCELERATE_MIXED_PRECISION", "no") != "no":
        AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """The folder of a tiny BERT with a tokenizer trained on a few sentences."""
    folder = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = ["my card is gone", "when does the train leave", "what do i pay for the parcel", "how is the weather"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(folder)
    return folder
