"""Projections that take LoRA, those of adapters and others."""

import pytest
import torch
from adapters import LoRAConfig
from messages import exactly
from model_state import snapshot
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.student.warm_start import is_at_average
from hf_adapter_distillation.teachers.projections import further_keys, projections_of

EVERY = {
    "llama": ["q", "k", "v", "o_proj", "gate_proj"],
    "bert": ["q", "k", "v", "attention.output.dense"],
    "t5": ["q", "k", "v", "o"],
    "bart": ["q", "k", "v", "out_proj"],
    "gpt2": ["attn.c_proj"],
    "distilbert": ["q", "k", "v", "out_lin"],
    "deberta": ["attention.output.dense"],
    "modernbert": ["attn.Wo"],
}


def everywhere(family, **kw):
    return LoRAConfig(attn_matrices=EVERY[family], intermediate_lora=True, output_lora=True, **kw)


@pytest.mark.parametrize("family", EVERY)
def test_the_linear_layers_inside_the_layers_are_named_by_their_ends(family):
    model = make_model(family, "base")
    found = projections_of(model)
    assert {projection.key for projection in found.values()} - {None} == set(EVERY[family])
    linear = {name for name, module in model.base_model.named_modules() if hasattr(module, "weight")}
    assert found.keys() <= linear
    assert not any("pooler" in path or "embed" in path for path in found)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "distilbert"])
def test_names_and_outputs_stay_when_adapters_and_students_are_there(family):
    model = make_model(family)
    names, before = {path: each.key for path, each in projections_of(model).items()}, snapshot(model)
    with torch.no_grad():
        plain = model.eval()(**make_batch(labels=None)).last_hidden_state
    model.add_adapter("travel", config="seq_bn")
    model.add_adapter("bank", config=everywhere(family))
    model.add_adapter("insurance", config="seq_bn", distill_from=["travel"])
    model.train_adapter("insurance")
    assert {path: each.key for path, each in projections_of(model).items()} == names
    assert all(torch.equal(snapshot(model)[key], weight) for key, weight in before.items())
    model.set_active_adapters(None)
    with torch.no_grad():
        assert torch.equal(model.eval()(**make_batch(labels=None)).last_hidden_state, plain)


@pytest.mark.parametrize("train", [True, False])
def test_a_layer_that_takes_lora_later_has_the_mode_and_the_weights_that_it_had(train):
    model = make_model("llama").train(train)
    layer = model.base_model.layers[0].self_attn.o_proj
    model.add_adapter("bank", config=everywhere("llama"))
    wrapped = model.base_model.layers[0].self_attn.o_proj
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias is None
    assert wrapped.training is train
    model.add_adapter("travel", config=everywhere("llama"))
    assert model.base_model.layers[0].self_attn.o_proj is wrapped


def test_students_are_distilled_in_all_of_them(trainer_args):
    model = make_student(make_model("llama"), config=everywhere("llama"), student_start="average")
    assert is_at_average(model, "insurance")
    places = {fusion.location.rpartition(".")[2] for fusion in fusions_of(model, "insurance")}
    assert places == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    layer = model.base_model.layers[1].mlp.gate_proj
    teachers = [layer.loras[name] for name in TEACHERS]
    mean = sum(each.lora_B @ each.lora_A for each in teachers) / len(teachers)
    student = layer.loras["insurance"]
    u, s, v = torch.linalg.svd(mean)
    best = (u[:, : student.r] * s[: student.r]) @ v[: student.r]
    torch.testing.assert_close(student.lora_B @ student.lora_A, best, rtol=1e-4, atol=1e-4)
    before = student.lora_B.clone()
    had.DistillationTrainer(model, trainer_args(max_steps=2), train_dataset=make_dataset()).train()
    assert not torch.equal(before, student.lora_B)


def test_a_student_is_loaded_whole_with_the_package_and_warns_of_adapters_without_it(tmp_path, caplog):
    model = make_student(make_model("llama"), config=everywhere("llama"), head="classification")
    noisy(model, "insurance")
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    assert "'insurance' has LoRA in gate_proj, o_proj, which adapters leaves out" in caplog.text
    again = make_model("llama")
    again.load_adapter(str(tmp_path / "insurance"), set_active=True)
    model.set_active_adapters("insurance")
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (
            "llama",
            LoRAConfig(attn_matrices=["q", "o_prj"]),
            "has 'o_prj' in attn_matrices, which is no linear layer of this llama that can take LoRA; choose of "
            "gate_proj, k, o_proj, q, v.",
        ),
        (
            "gpt2",
            "lora[attn_matrices=['lm_head']]",
            "has 'lm_head' in attn_matrices, which is no linear layer of this gpt2 that can take LoRA; choose of "
            "attn.c_proj, k, q, v.",
        ),
        (
            "gpt2",
            LoRAConfig(attn_matrices=["attn.c_proj"]),
            "has none of q, k and v in attn_matrices, which adapters cannot run in the merged projection of a gpt2; "
            "add one of them.",
        ),
        (
            "bert",
            LoRAConfig(attn_matrices=["attention.output.dense"], selfattn_lora=False, output_lora=True),
            "has 'attention.output.dense' in attn_matrices, but selfattn_lora=False; set it to True.",
        ),
    ],
)
def test_a_student_in_a_layer_that_cannot_have_lora_is_named(family, config, message):
    model = make_model(family)
    model.add_adapter("bank", config="lora")
    with pytest.raises(ValueError, match=exactly(f"Student 'insurance' {message}")):
        model.add_adapter("insurance", config=config, distill_from=["bank"])
    assert "insurance" not in model.adapters_config


def test_configs_of_adapters_name_no_further_layers():
    for config in ("lora", "seq_bn", "ia3", "mam", "prefix_tuning", None, "lora[r=2]", {"architecture": "nothing"}):
        assert not further_keys(config)
    assert further_keys("lora[attn_matrices=['q','o']]") == {"o"}
    assert further_keys(everywhere("llama").to_dict()) == {"o_proj", "gate_proj"}
