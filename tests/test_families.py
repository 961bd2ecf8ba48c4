"""Bottleneck adapters and LoRA on each family of models that adapters supports."""

import adapters
import numpy as np
import pytest
import torch
import transformers
from adapters import AutoAdapterModel, LoRAConfig
from conftest import TEACHERS, VOCABULARY, changed, make_batch, noisy, snapshot
from datasets import Dataset

import hf_adapter_distillation as had
from hf_adapter_distillation.layers import adapter_layers

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

MERGED = ("deberta", "gpt2", "modernbert")  # one projection makes queries, keys and values, and LoRA is refused

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
}
STATIC_HEADS = {"encoder-decoder": "seq2seq_lm"}
ADAPTERS = {"seq_bn": "seq_bn", "lora": LoRAConfig(attn_matrices=["q", "v"], r=4)}


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
    else:
        config = transformers.AutoConfig.for_model(family, **STATIC[family])
        model = transformers.AutoModelForSequenceClassification.from_config(without_dropout(config))
    adapters.init(model)
    return model


def data_for(family):
    head = BUILT_IN[family][1] if family in BUILT_IN else STATIC_HEADS.get(family, "classification")
    if head == "image_classification":
        pixels = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype("float32")
        return Dataset.from_dict({"pixel_values": pixels, "labels": [0, 1] * 8}).with_format("torch")
    batch = make_batch(16, labels="classification" if head == "classification" else "tokens")
    if family == "whisper":
        features = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = {"input_features": features, "labels": batch["labels"]}
    return Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")


# transformers' own: of each training of an EncoderDecoderModel, and in DeBERTa and ModernBERT.
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("family", [*BUILT_IN, *STATIC])
def test_both_stages(family, method, trainer_args, tmp_path):
    model = make(family)
    for teacher in TEACHERS:
        model.add_adapter(teacher, config=ADAPTERS[method])
        noisy(model, teacher)
    if family in MERGED and method == "lora":
        with pytest.raises(ValueError, match="has no module that can be fused in this model"):
            model.add_adapter("insurance", config=ADAPTERS[method], distill_from=TEACHERS)
        return
    model.add_adapter("insurance", config=ADAPTERS[method], distill_from=TEACHERS)
    if family in BUILT_IN:
        getattr(model, f"add_{BUILT_IN[family][1]}_head")("insurance")
    model.train_adapter("insurance")
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
    assert len(logs) == 12 and sum(logs[-4:]) < sum(logs[:4])
    assert len(adapter_layers(model, "insurance")) >= 1

    model.eval()
    batch = dataset[:4]
    with torch.no_grad():
        after_training = model(**batch).logits
        model.delete_adapter("bank")
        assert torch.equal(after_training, model(**batch).logits), "the student does not need its teachers"
