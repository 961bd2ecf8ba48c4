"""Teachers that PEFT saved."""

import json
import re
from dataclasses import fields

import adapters
import peft
import pytest
import torch
from adapters import LoRAConfig
from messages import one_line
from model_state import snapshot
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, TEACHERS, make_batch, make_dataset, make_model, noisy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5EncoderModel,
    set_seed,
)

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.student.warm_start import is_at_average
from hf_adapter_distillation.teachers.peft_lora import PREFIX

CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


def base(family, task, **sizes):
    set_seed(0)
    config = CONFIGS[family]()
    config.update(sizes)
    return CLASSES[task].from_config(config).eval()


def saved_by_peft(folder, family="bert", task="SEQ_CLS", sizes=(), **config):
    """A LoRA with random weights that PEFT saved, and PEFT's model with it."""
    config = peft.LoraConfig(task_type=task, **config)
    model = peft.get_peft_model(base(family, task, **dict(sizes)), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        ("bert", "SEQ_CLS", {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 16}),
        ("bert", "SEQ_CLS", {"target_modules": ["query"], "r": 4, "lora_alpha": 6, "use_rslora": True}),
        ("bert", "SEQ_CLS", {"target_modules": ["key", "intermediate.dense"], "layers_to_transform": [1]}),
        ("roberta", "SEQ_CLS", {"target_modules": ["query", "key", "value"], "lora_dropout": 0.1}),
        ("distilbert", "SEQ_CLS", {"target_modules": ["q_lin", "v_lin", "lin1"]}),
        ("llama", "CAUSAL_LM", {"target_modules": ["q_proj", "v_proj"]}),
        ("t5", "SEQ_2_SEQ_LM", {"target_modules": ["q", "v", "wo"]}),
        ("bart", "SEQ_2_SEQ_LM", {"target_modules": ["q_proj", "v_proj"]}),
        ("gpt2", "CAUSAL_LM", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
        ("gpt2", "CAUSAL_LM", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
        ("deberta", "SEQ_CLS", {"target_modules": ["in_proj", "intermediate.dense"]}),
        ("modernbert", "SEQ_CLS", {"target_modules": ["Wqkv", "mlp.Wi"]}),
        ("bert", "SEQ_CLS", {"target_modules": ["query", "attention.output.dense"]}),
        ("distilbert", "SEQ_CLS", {"target_modules": ["out_lin"]}),
        ("deberta", "SEQ_CLS", {"target_modules": ["attention.output.dense"]}),
        ("modernbert", "SEQ_CLS", {"target_modules": ["Wo"]}),
        *(
            (family, task, {"target_modules": "all-linear"})
            for family, task in (("llama", "CAUSAL_LM"), ("gemma3", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"))
        ),
        *((family, "SEQ_2_SEQ_LM", {"target_modules": "all-linear"}) for family in ("t5", "bart")),
        (
            "bert",
            "SEQ_CLS",
            {
                "target_modules": ["query", "key", "value"],
                "rank_pattern": {"layer.0.*query": 2, "key": 3},
                "alpha_pattern": {"value": 5},
                "use_rslora": True,
            },
        ),
    ],
)
def test_a_teacher_of_peft_computes_what_peft_does(family, task, config, tmp_path):
    reference = saved_by_peft(tmp_path / "bank", family, task, **config).double()
    model = base(family, task)
    adapters.init(model)
    everywhere = LoRAConfig(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True)
    model.add_adapter("insurance", config=everywhere, distill_from=[str(tmp_path / "bank")])
    model.double()
    batch = make_batch(labels="classification" if task == "SEQ_CLS" else "tokens")
    with torch.no_grad():
        plain = model(**batch).logits
        model.set_active_adapters("bank")
        converted, expected = model.eval()(**batch).logits, reference(**batch).logits
    assert (expected - plain).abs().max() > 1e-4, "the teacher must make a difference"
    torch.testing.assert_close(converted, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lora_in_half_precision_with_different_scalings_is_not_rounded(dtype, tmp_path):
    config = peft.LoraConfig(target_modules=["query", "value"], r=4, lora_alpha=7, alpha_pattern={"value": 5})
    reference = peft.get_peft_model(base("bert", "SEQ_CLS"), config)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter).to(dtype)
    reference.save_pretrained(str(tmp_path / "bank"))
    model = make_model()
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    for part in ("query", "value"):
        path = f"encoder.layer.0.attention.self.{part}"
        layer = reference.get_submodule(f"base_model.model.bert.{path}")
        lora = model.base_model.get_submodule(path).loras["bank"]
        update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        converted = lora.lora_B.double() @ lora.lora_A.double()
        torch.testing.assert_close(lora.scaling * converted, layer.scaling["default"] * update, rtol=1e-6, atol=1e-6)


STARTS = [
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "pissa",
    "pissa_niter_2",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    False,
]
FIELDS = {
    "task_type": "FEATURE_EXTRACTION", "auto_mapping": {"base_model_class": "Bert"}, "peft_version": "0.1",
    "base_model_name_or_path": "someone/uncased", "revision": "v1", "inference_mode": True, "r": 3,
    "target_modules": ["key", "intermediate.dense"], "exclude_modules": ["value"], "lora_alpha": 5,
    "lora_dropout": 0.5, "fan_in_fan_out": True, "bias": "all", "use_rslora": True, "modules_to_save": ["LayerNorm"],
    "layers_to_transform": [1], "layers_pattern": "layer", "rank_pattern": {"query": 2}, "alpha_pattern": {"query": 2},
    "megatron_config": {"a": 1}, "megatron_core": "core", "trainable_token_indices": [1], "use_dora": True,
    "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 1.5}, "corda_config": {"cache_file": "a"},
    "lora_ga_config": {"direction": "ArBr"}, "velora_config": {"num_groups": 2}, "alora_invocation_tokens": [5],
    "use_qalora": True, "qalora_group_size": 8, "monteclora_config": {"num_samples": 2},
    "layer_replication": [[0, 2], [0, 2]], "runtime_config": {"ephemeral_gpu_offload": True}, "lora_bias": True,
    "target_parameters": ["query.weight"], "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1.0}, "ensure_weight_tying": True, "field_of_a_later_version": True,
}  # fmt: skip


def states(model):
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        return model.eval()(**batch).last_hidden_state[batch["attention_mask"].bool()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("field", "value"),
    [*FIELDS.items(), *(("init_lora_weights", start) for start in STARTS), ("modules_to_save", ["word_embeddings"])],
)
def test_each_setting_of_peft_computes_the_same_or_is_refused_by_name(field, value, tmp_path):
    """A value that PEFT refuses, here or without another package, is written into the config of a plain LoRA."""
    folder, plain = tmp_path / "bank", {"target_modules": ["query", "value"]}

    def bert():
        set_seed(0)
        return AutoModel.from_config(CONFIGS["bert"]()).eval()

    try:
        model = peft.get_peft_model(bert(), peft.LoraConfig(**plain | {field: value}))
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        model = peft.get_peft_model(bert(), peft.LoraConfig(**plain))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    expected = states(peft.PeftModel.from_pretrained(bert(), str(folder)))
    config = json.loads((folder / "adapter_config.json").read_text())
    if not config.get(field):
        (folder / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    converted = bert()
    adapters.init(converted)
    refusal = ""
    try:
        converted.add_adapter("insurance", config="lora", distill_from=[str(folder)])
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert re.search(one_line(part=field), refusal)
    else:
        converted.set_active_adapters("bank")
        torch.testing.assert_close(states(converted), expected, rtol=0, atol=1e-5)


def test_all_settings_of_peft_are_in_the_test():
    assert {field.name for field in fields(peft.LoraConfig)} <= FIELDS.keys() | {"peft_type", "init_lora_weights"}


def test_teachers_of_peft_and_of_adapters_are_distilled_together(tmp_path, trainer_args):
    saved_by_peft(tmp_path / "bank", target_modules=["query", "value"], r=4)
    model = make_model()
    model.add_adapter("travel", config="lora")
    noisy(model, "travel")
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank"), "travel"])
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    args = trainer_args(distillation_start=0.0, max_steps=10, distillation_weight=20.0, learning_rate=1e-3)
    trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset())
    trainer.train()
    logs = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs[-1] < logs[0]
    assert {"attention/bank", "attention/travel"} <= trainer.state.log_history[0].keys()
    assert len(adapter_layers(model, "bank")) == 4


def test_layers_that_peft_leaves_out_are_left_out(tmp_path):
    for name in TEACHERS:
        saved_by_peft(tmp_path / name, target_modules=["query", "value"], layers_to_transform=[1], r=2)
    model = make_model()
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / name) for name in TEACHERS])
    model.train_adapter("insurance")
    assert model.adapters_config.get("bank").leave_out == [0]
    assert len(adapter_layers(model, "bank")) == 2
    assert {fusion.location for fusion in fusions_of(model, "insurance")} == {
        f"encoder.layer.1.attention.self.{part}" for part in ("query", "value")
    }
    assert is_at_average(model, "insurance"), "although it has more layers than its teachers"


def damaged(folder, what):
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(config_path.read_text())
    if what == "no weights":
        path.unlink()
    elif what == "pickle":
        path.rename(folder / "adapter_model.bin")
    elif what == "cut weights":
        path.write_bytes(path.read_bytes()[:100])
    elif what == "empty":
        save_file({"base_model.model.classifier.weight": torch.zeros(1)}, path)
    elif what == "half":
        save_file({k: v for k, v in load_file(path).items() if "layer.1.attention.self.query.lora_B" not in k}, path)
    elif what == "no value":
        save_file({k: v for k, v in load_file(path).items() if "layer.1.attention.self.value" not in k}, path)
    elif what in ("third factor", "foreign"):
        key = {"third factor": "bert.encoder.layer.0.attention.self.query.lora_C.weight", "foreign": "foo.bar"}[what]
        save_file(load_file(path) | {("" if what == "foreign" else PREFIX) + key: torch.zeros(2)}, path)
    elif what == "wide":
        save_file({k: torch.zeros(8, 64) if "lora_A" in k else v for k, v in load_file(path).items()}, path)
    config_path.write_text(json.dumps(config | what if isinstance(what, dict) else config))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"use_dora": True}, "is a PEFT adapter with use_dora=True; use a plain LoRA, trained without it."),
        ({"bias": "all"}, "is a PEFT adapter with bias='all'; use a plain LoRA, trained without it."),
        (
            {"rank_pattern": {"query": 2}},
            "has the ranks 8 and 8 in bert.encoder.layer.0.attention.self.query, but its",
        ),
        (
            {"r": 4},
            "has the ranks 8 and 8 in bert.encoder.layer.0.attention.self.query, but its config says r=4; save",
        ),
        (
            {"alpha_pattern": {"(": 2}},
            "has no valid rank of bert.encoder.layer.0.attention.self.query in r, lora_alpha,",
        ),
        ({"base_model_name_or_path": "someone/cased"}, "was made for model_name 'someone/cased', the model has"),
        ("no weights", "cannot be loaded: "),
        ("cut weights", "cannot be loaded: "),
        ("empty", "has no LoRA weights in "),
        ("pickle", "adapter_model.bin is a pickle of an older PEFT; save it again."),
        ("half", "lacks bert.encoder.layer.1.attention.self.query.lora_B.weight; save it again."),
        (
            "no value",
            "has no LoRA in encoder.layer.1.attention.self.value, which its target_modules name; use a whole one that",
        ),
        (
            "third factor",
            "holds bert.encoder.layer.0.attention.self.query.lora_C.weight, which no plain LoRA has; save",
        ),
        ("foreign", "holds foo.bar, which PEFT does not save; save it again."),
        ({"lora_dropout": 2}, "has lora_dropout=2; it must be a number from 0 to below 1."),
        ({"lora_dropout": "a"}, "has lora_dropout='a'; it must be a number from 0 to below 1."),
        ("wide", "was made for a projection bert.encoder.layer.0.attention.self.query of another size"),
    ],
)
def test_what_cannot_be_converted_leaves_the_model_as_it_was(what, message, tmp_path):
    saved_by_peft(tmp_path / "bank", target_modules=["query", "value"])
    damaged(tmp_path / "bank", what)
    model = make_model()
    model.config.name_or_path = "someone/uncased"
    before = snapshot(model)
    with pytest.raises(ValueError, match=one_line(part=message)):
        model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    assert snapshot(model).keys() == before.keys()
    assert not list(model.adapters_config)


def test_a_module_that_takes_no_lora_here_is_named(tmp_path):
    saved_by_peft(tmp_path / "bank", target_modules=["pooler.dense"])
    message = (
        "has LoRA in bert.pooler.dense, which is no linear layer inside the layers of a bert; use a LoRA in "
        "intermediate.dense, key, output.dense, query, value alone."
    )
    with pytest.raises(ValueError, match=one_line(part=message)):
        make_model().add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])


@pytest.mark.parametrize(
    ("family", "task", "of_lora", "of_model", "message"),
    [
        ("llama", "CAUSAL_LM", {"num_hidden_layers": 2}, {"num_hidden_layers": 4},
         "has no LoRA in layers.2.self_attn.q_proj, which its target_modules name; use a whole one that was trained"),
        ("llama", "CAUSAL_LM", {"num_hidden_layers": 2}, {"num_hidden_layers": 1},
         "has LoRA in model.layers.1.self_attn.q_proj, a layer that this llama lacks; use one trained on the same"),
        ("bart", "SEQ_2_SEQ_LM", {"decoder_layers": 1}, {},
         "has no LoRA in decoder.layers.1.self_attn.v_proj, which its target_modules name; use a whole one that was"),
    ],
)  # fmt: skip
def test_a_lora_of_a_base_with_another_number_of_layers_is_named(family, task, of_lora, of_model, message, tmp_path):
    saved_by_peft(tmp_path / "bank", family, task, of_lora, target_modules=["q_proj", "v_proj"])
    model = base(family, task, **of_model)
    adapters.init(model)
    with pytest.raises(ValueError, match=one_line(part=message)):
        model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    assert not list(model.adapters_config)


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": 0}, {"exclude_modules": ["layer.1.attention.self.query"]}]
)
def test_a_lora_that_its_config_limits_to_some_projections_is_whole(settings, tmp_path):
    saved_by_peft(tmp_path / "bank", target_modules=["query", "value"], **settings)
    model = make_model()
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    assert "bank" in model.adapters_config


def test_a_lora_of_the_encoder_alone_is_whole(tmp_path):
    model = peft.get_peft_model(T5EncoderModel(CONFIGS["t5"]()), peft.LoraConfig(target_modules=["q", "v"]))
    model.save_pretrained(str(tmp_path / "bank"))
    model = make_model("t5")
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    assert {key.partition(".")[0] for key, _ in adapter_layers(model, "bank")} == {"encoder"}


def test_a_student_of_another_method_is_fused_with_it_by_layers(tmp_path):
    saved_by_peft(tmp_path / "bank", target_modules=["query"])
    model = make_model()
    model.add_adapter("insurance", config="seq_bn", distill_from=[str(tmp_path / "bank")])
    assert distillations(model.adapters_config)["insurance"].level == "layer"
