"""Tiny models, students and data, made in code."""

import adapters
import torch
from adapters import AdapterSetup, AutoAdapterModel, LoRAConfig, Stack
from datasets import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DebertaConfig,
    DistilBertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    set_seed,
)

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations

VOCABULARY = 60
TEACHERS = ["bank", "travel", "work"]
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
    "gemma3": lambda **kw: Gemma3TextConfig(  # without a class with flexible heads
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=37, pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw,
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
    "deberta": lambda **kw: DebertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, **kw
    ),
    "modernbert": lambda **kw: ModernBertConfig(  # without a class with flexible heads
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **kw,
    ),
}  # fmt: skip
STATIC = {
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
    "tagging": AutoModelForTokenClassification,
    "base": AutoModel,
}
HEADS = {
    "classification": {"num_labels": 3},
    "tagging": {"num_labels": 3},
    "qa": {},
    "causal_lm": {},
    "multiple_choice": {"num_choices": 2},
}  # kinds of heads, and how they are added
# LoRA in all linear layers of a Llama.
IN_ALL = LoRAConfig(attn_matrices=["q", "k", "v", "o_proj", "gate_proj"], intermediate_lora=True, output_lora=True)
ALL_OBJECTIVES = {"features": 1.0, "cosine": 0.5, "task_specific": 0.7, "logits": 0.3, "cross_task": 0.2}


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
    """Adds teachers (with heads on flex models) and a student distilled from them, by default with equal weights."""
    kw.setdefault("student_start", "teachers")
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


def with_teachers(model=None, teachers=TEACHERS, config="seq_bn", head="classification"):
    """Adds teachers with heads, and no student."""
    model = model or make_model()
    for name in teachers:
        model.add_adapter(name, config=config)
        noisy(model, name)
        if hasattr(model, "heads"):
            getattr(model, f"add_{head}_head")(name)
    return model


def distillation_of(model):
    return distillations(model.adapters_config)["insurance"]


def with_teachers_of_their_own_scores(model):
    """Heads that tell the teachers apart."""
    torch.manual_seed(1)
    for name in TEACHERS:
        for parameter in model.heads[name].parameters():
            parameter.data = torch.randn_like(parameter)
    return model


def of_head(head, **kwargs):
    """A student on a model with heads of one kind, and a batch for it."""
    model = make_model("gpt2" if head == "causal_lm" else "bert", dtype=torch.float64)
    config = kwargs.pop("head_config", HEADS.get(head, {}))
    for teacher in TEACHERS:
        model.add_adapter(teacher, config="seq_bn")
        getattr(model, f"add_{head}_head")(teacher, **config)
    settings = had.DistillationConfig(TEACHERS, student_start="random", **kwargs)
    model.add_adapter("insurance", config="seq_bn", distill_from=settings)
    getattr(model, f"add_{head}_head")("insurance", **config)
    model = with_teachers_of_their_own_scores(model.double())
    model.train_adapter("insurance")
    batch = make_batch(labels=None)
    mask = batch["attention_mask"]
    if head == "qa":
        batch |= {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([1, 2, 2, 1])}
    elif head == "multiple_choice":
        batch = {name: torch.stack([value, value.flip(0)], 1) for name, value in batch.items()}
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    elif head == "classification":
        batch["labels"] = torch.tensor([0, 1, 2, 0])
    else:
        batch["labels"] = torch.where(mask == 1, batch["input_ids"] % 3, -100)
    return model, batch


def heard(model, teacher, batch, head=True):
    """The output of a model under one teacher, or under none."""
    setup = Stack(teacher) if teacher else None
    with AdapterSetup(setup, head_setup=teacher if head else None), torch.no_grad():
        return model.eval()(**batch, output_hidden_states=True)
