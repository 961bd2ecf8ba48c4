"""Each method of adapters on each family of models that adapters supports; makes the table of the docs."""

import adapters
import numpy as np
import pytest
import torch
import transformers
from adapter_kinds import METHODS
from adapters import AdapterModelInterface, AutoAdapterModel
from datasets import Dataset
from marks import in_turn
from methods_table import PAGE
from model_state import changed, configure, snapshot
from tiny_models import TEACHERS, VOCABULARY, make_batch, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = {**SIZE, **TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZE, "image_size": 8, "patch_size": 4}
TWO_STACKS = {
    **TEXT, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "decoder_start_token_id": 2,
}  # fmt: skip
DISTILBERT_SIZE = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
T5_SIZE = {
    "vocab_size": VOCABULARY, "d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_ff": 37,
    "d_kv": 8, "decoder_start_token_id": 0,
}  # fmt: skip

# The settings of a tiny model, and its head.
BUILT_IN = {
    "albert": ({**SIZE, **TEXT, "embedding_size": 16}, "classification"),
    "bart": (TWO_STACKS, "seq2seq_lm"),
    "beit": (IMAGE, "image_classification"),
    "bert": ({**SIZE, **TEXT}, "classification"),
    "bert-generation": ({**SIZE, **TEXT}, "masked_lm"),
    "deberta": ({**SIZE, **TEXT}, "classification"),
    "deberta-v2": ({**SIZE, **TEXT}, "classification"),
    "distilbert": (DISTILBERT_SIZE, "classification"),
    "electra": ({**SIZE, **TEXT, "embedding_size": 16}, "classification"),
    "gpt2": ({**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}, "causal_lm"),
    "gptj": ({**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, "causal_lm"),
    "llama": (CAUSAL, "causal_lm"),
    "mbart": (TWO_STACKS, "seq2seq_lm"),
    "mistral": (CAUSAL, "causal_lm"),
    "mt5": (T5_SIZE, "seq2seq_lm"),
    "plbart": (TWO_STACKS, "seq2seq_lm"),
    "roberta": ({**SIZE, **TEXT}, "classification"),
    "t5": (T5_SIZE, "seq2seq_lm"),
    "vit": (IMAGE, "image_classification"),
    "whisper": ({**TWO_STACKS, "num_mel_bins": 16, "max_source_positions": 8}, "seq2seq_lm"),
    "xlm-roberta": ({**SIZE, **TEXT}, "classification"),
    "xmod": ({**SIZE, **TEXT, "languages": ["en_XX"], "default_language": "en_XX"}, "classification"),
}  # fmt: skip
STATIC = {
    "modernbert": {**SIZE, **TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "gemma2": CAUSAL,
    "gemma3_text": CAUSAL,
    "qwen2": CAUSAL,
    "qwen3": CAUSAL,
    "phi": {**SIZE, **TEXT},
    "encoder-decoder": None,
    "smollm3 (own interface)": CAUSAL,
}
STATIC_HEADS = {"encoder-decoder": "seq2seq_lm"}
INTERFACE = AdapterModelInterface(  # what a user writes for a model that adapters does not know
    adapter_methods=["bottleneck", "lora", "reft"],
    model_embeddings="embed_tokens",
    model_layers="layers",
    layer_self_attn="self_attn",
    layer_cross_attn=None,
    attn_k_proj="k_proj",
    attn_q_proj="q_proj",
    attn_v_proj="v_proj",
    attn_o_proj="o_proj",
    layer_intermediate_proj="mlp.up_proj",
    layer_output_proj="mlp.down_proj",
)
FAMILIES = [*BUILT_IN, "clip", *STATIC]


def without_dropout(config):
    for key, value in config.to_dict().items():
        if "dropout" in key or "pdrop" in key or key == "drop_path_rate":
            setattr(config, key, None if value is None else 0.0)
    return config


def make(family):
    transformers.set_seed(0)
    if family in BUILT_IN:
        config = transformers.AutoConfig.for_model(family, **BUILT_IN[family][0])
        return AutoAdapterModel.from_config(without_dropout(config))
    if family == "encoder-decoder":
        halves = [transformers.AutoConfig.for_model("bert", **SIZE, **TEXT) for _ in range(2)]
        config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*map(without_dropout, halves))
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        model = transformers.EncoderDecoderModel(config)
    elif family == "clip":
        text, vision = ({**SIZE, **TEXT}, IMAGE)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = transformers.CLIPModel(without_dropout(config))
    else:
        config = transformers.AutoConfig.for_model(family.split()[0], **STATIC[family])
        model = transformers.AutoModelForSequenceClassification.from_config(without_dropout(config))
    adapters.init(model, interface=INTERFACE if "own interface" in family else None)
    return model


def data_for(family):
    pixels = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("float32")
    if family == "clip":
        batch = {**make_batch(16, labels=None), "pixel_values": torch.tensor(pixels)}
        return Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")
    head = BUILT_IN[family][1] if family in BUILT_IN else STATIC_HEADS.get(family, "classification")
    if head == "image_classification":
        return Dataset.from_dict({"pixel_values": pixels, "labels": [0, 1] * 8}).with_format("torch")
    batch = make_batch(16, labels="classification" if head == "classification" else "tokens")
    if family == "whisper":
        features = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = {"input_features": features, "labels": batch["labels"]}
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")


def make_student(family, method, **kw):
    """A model with a student that is ready to be trained; None where adapters itself has no such adapter."""
    model, (teachers, student) = make(family), METHODS[method]
    try:
        for name, config in zip(TEACHERS, teachers, strict=True):
            model.add_adapter(name, config=config)
            noisy(model, name, std=0.3 if method in ("seq_bn", "lora") else 0.05)
            model.set_active_adapters(name)
            model(**batch_for(family))
    except (AttributeError, RuntimeError, TypeError, ValueError):  # what adapters raises where it knows no better
        return None
    model.set_active_adapters(None)
    model.add_adapter("insurance", config=student, distill_from=had.DistillationConfig(TEACHERS, **kw))
    if family in BUILT_IN:
        getattr(model, f"add_{BUILT_IN[family][1]}_head")("insurance")
    model.train_adapter("insurance")
    return model


def batch_for(family):
    """Without padding, where adapters 1.3.0 masks out the prefixes of GPT-2, Llama and Mistral."""
    batch = data_for(family)[:8]
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    return {**batch, "return_loss": True} if family == "clip" else batch


def table():
    """What the docs say: `{family: {method: cell}}`."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    header, *body = [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= set("- ")]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


def test_the_table_of_the_docs_has_all_families_and_methods():
    assert {family: list(row) for family, row in table().items()} == {family: list(METHODS) for family in FAMILIES}


# transformers' own: of each training of an EncoderDecoderModel, and in DeBERTa and ModernBERT.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m == "mixed" else pytest.mark.slow) for m in METHODS])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method(family, method, record_property):
    """Both stages in a training loop of one's own; the recorded properties are the cells of the table in the docs."""
    model = make_student(family, method, student_start="random")
    record_property("cases", int(model is not None))
    cell = "–"
    if model is not None:
        distillation = distillations(model.adapters_config)["insurance"]
        cell = {"adapter": "inside", "layer": "outputs"}[distillation.level]
        before, batch = snapshot(model), batch_for(family)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        terms = []
        for step in range(14):
            configure(model, enabled=step >= 2, weight=100.0, regularization=100.0)  # what moves is the student
            loss = model(**batch).loss
            record = distillation.take_record()
            assert torch.isfinite(loss)
            assert (record.distillation_loss is None) == (step < 2)
            if step >= 2:
                terms.append(record.distillation_loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert sum(terms[-3:]) < sum(terms[:3])
        moved = changed(model, before)
        allowed = ("insurance", "classifier.", "score.", "head.")
        assert any("insurance" in name for name in moved)
        assert all(any(part in name for part in allowed) for name in moved), moved
        model.eval()
        with torch.no_grad():
            distilled = model(**batch).loss
            model.set_active_adapters("insurance")
            for teacher in TEACHERS:
                model.delete_adapter(teacher)
            assert torch.equal(distilled, model(**batch).loss), "the student does not need its teachers"
    record_property("family", family)
    record_property("method", method)
    record_property("cell", cell)
    assert table()[family][method] == cell


def test_an_interface_that_names_few_methods(monkeypatch):
    monkeypatch.setattr(INTERFACE, "adapter_methods", ["bottleneck", "lora"])
    model = make_student("smollm3 (own interface)", "mixed", student_start="random")
    loss = model(**batch_for("smollm3 (own interface)")).loss
    record = distillations(model.adapters_config)["insurance"].take_record()
    assert torch.isfinite(loss)
    assert list(record.attention) == ["layers.0", "layers.1"]


# transformers' own: of each training of an EncoderDecoderModel, and in DeBERTa and ModernBERT.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("family", "method"), in_turn([*BUILT_IN, *STATIC], ["seq_bn", "lora"]))
def test_both_stages(family, method, trainer_args):
    model = make_student(family, method)
    before, dataset = snapshot(model), data_for(family)
    args = trainer_args(
        max_steps=16, keep_fusion=True, learning_rate=5e-3, distillation_weight=10.0, distillation_start=0.25
    )
    trainer = had.DistillationTrainer(model, args, train_dataset=dataset)
    trainer.train()
    moved = changed(model, before)
    assert any(".insurance." in name for name in moved)
    assert all(any(part in name for part in (".insurance.", "classifier.", "score.", "head.")) for name in moved), (
        moved
    )
    logs = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert len(logs) == 12
    assert sum(logs[-4:]) < sum(logs[:4])
    level = distillations(model.adapters_config)["insurance"].level
    assert table()[family][method] == {"adapter": "inside", "layer": "outputs"}[level]

    model.eval()
    batch = dataset[:4]
    with torch.no_grad():
        after_training = model(**batch).logits
        model.delete_adapter("bank")
        assert torch.equal(after_training, model(**batch).logits), "the student does not need its teachers"
