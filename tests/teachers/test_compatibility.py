"""Which teachers fit a student, and at which level they are fused."""

import pytest
import torch
from adapters import AdapterPlusConfig, AutoAdapterModel, LoRAConfig
from messages import exactly, one_line
from model_state import changed, everything, snapshot
from tiny_models import CONFIGS, make_batch, make_model, noisy, with_teachers

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations


def test_a_block_written_by_hand_is_checked_too():
    model = make_model()
    model.add_adapter("bank", config="lora")
    model.add_adapter("insurance", config="seq_bn")
    model.train_adapter(had.AdapterDistillation("insurance", teachers=["bank"]))
    assert distillations(model.adapters_config)["insurance"].level == "layer"
    model.add_adapter("prompt", config="prompt_tuning")
    with pytest.raises(ValueError, match="'prompt' is a PromptTuningConfig, which makes the sequence longer"):
        model.train_adapter(had.AdapterDistillation("insurance", teachers=["prompt"]))


IN_MERGED = "modules that cannot be fused inside a layer (LoRA in projections that are merged)"
ALL_PROJECTIONS = LoRAConfig(intermediate_lora=True, output_lora=True)


@pytest.mark.parametrize(
    ("family", "teacher", "student", "message"),
    [
        ("bert", "dora", "lora", "Teacher 'bank' is a DoRAConfig, the student a LoRAConfig; inside the layers"),
        ("bert", "ia3", "lora", "Teacher 'bank' is a IA3Config, the student a LoRAConfig; inside the layers"),
        ("bert", "vera", "lora", "Teacher 'bank' is a VeraConfig, the student a LoRAConfig; inside the layers"),
        ("bert", "lora", "seq_bn", "Teacher 'bank' is a LoRAConfig, the student a SeqBnConfig; inside the layers"),
        ("bert", "seq_bn", "lora", "Teacher 'bank' is a SeqBnConfig, the student a LoRAConfig; inside the layers"),
        (
            "bert",
            LoRAConfig(attn_matrices=["k"]),
            "lora",
            "Teacher 'bank' sits at k, where the student has no modules",
        ),
        ("gpt2", "lora", "lora", f"Teacher 'bank' has {IN_MERGED}"),
        ("gpt2", ALL_PROJECTIONS, ALL_PROJECTIONS, f"Teacher 'bank' has {IN_MERGED}"),
        ("modernbert", ALL_PROJECTIONS, ALL_PROJECTIONS, f"Teacher 'bank' has {IN_MERGED}"),
    ],
)
def test_what_cannot_be_fused_inside_the_layers_is_fused_in_their_outputs(family, teacher, student, message):
    model = make_model(family, **({"kind": "base"} if family == "modernbert" else {}))
    model.add_adapter("bank", config=teacher)
    before = snapshot(model)
    forced = had.DistillationConfig(["bank"], level="adapter")
    with pytest.raises(ValueError, match=one_line(start=message)):
        model.add_adapter("insurance", config=student, distill_from=forced)
    assert not changed(model, before)
    assert "insurance" not in model.adapters_config
    model.add_adapter("insurance", config=student, distill_from=["bank"])
    distillation = distillations(model.adapters_config)["insurance"]
    assert distillation.level == "layer"
    assert distillation.level_reason.startswith(message)


def test_a_teacher_behind_the_norm_and_a_student_before_it_meet_in_the_layers_output():
    model = make_model()
    model.add_adapter("plus", config=AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0))
    reason = (
        "Teacher 'plus' adds its update at another place of the layer than the student: it has "
        "residual_before_ln=False and not True, original_ln_after=False and not True"
    )
    forced = had.DistillationConfig(["plus"], level="adapter")
    message = f"{reason}; choose level='layer', or give all of them one method and place."
    with pytest.raises(ValueError, match=exactly(message)):
        model.add_adapter("insurance", config="seq_bn", distill_from=forced)
    assert "insurance" not in model.adapters_config
    model.add_adapter("insurance", config="seq_bn", distill_from=["plus"])
    distillation = distillations(model.adapters_config)["insurance"]
    assert (distillation.level, distillation.level_reason) == ("layer", reason)


def test_a_saved_teacher_whose_head_is_not_finite_is_refused(tmp_path):
    source, folder = with_teachers(teachers=["bank"]), tmp_path / "bank"
    source.heads["bank"][1].weight.data[0, 0] = float("nan")
    source.save_adapter(str(folder), "bank")
    model = make_model()
    before = everything(model)
    why = "has weights that are NaN or infinite (heads.bank.1.weight); train it again."
    with pytest.raises(ValueError, match=exactly(f"Teacher {str(folder)!r} {why}")):
        model.add_adapter("insurance", distill_from=[str(folder)])
    assert everything(model) == before


@pytest.mark.parametrize(
    ("family", "config", "attention", "is_masked"),
    [
        ("llama", "prefix_tuning", "sdpa", True),
        ("gpt2", "mam", "sdpa", True),
        ("llama", "prefix_tuning", "eager", False),
        ("llama", "lora", "sdpa", False),
        ("bert", "prefix_tuning", "sdpa", False),
    ],
)
def test_prefixes_that_adapters_masks_out_are_named(family, config, attention, is_masked, caplog):
    """They change nothing in a batch with padding, which is what the warning is about."""
    model = make_model(family, "base")
    model.config._attn_implementation = attention
    model.add_adapter("bank", config=config)
    noisy(model, "bank")
    model.add_adapter("insurance", config=config, distill_from=["bank"])
    message = "'insurance', 'bank' have prefixes, which adapters masks out of batches with padding in the SDPA"
    assert (message in caplog.text) == is_masked
    if config == "prefix_tuning":
        outputs = []
        for active in (None, "bank"):
            model.set_active_adapters(active)
            with torch.no_grad():
                outputs.append(model.eval()(**make_batch(labels=None))[0])
        assert torch.allclose(*outputs, atol=1e-4) == is_masked


def test_prefixes_of_a_block_written_by_hand_and_of_a_pool_are_named_too(tmp_path, caplog):
    model = make_model("llama", "base")
    for name in ("bank", "travel"):
        model.add_adapter(name, config="prefix_tuning")
        noisy(model, name)
        model.save_adapter(str(tmp_path / name), name)
    model.add_adapter("insurance", config="prefix_tuning")
    model.train_adapter(had.AdapterDistillation("insurance", teachers=["bank"]))
    assert "'insurance', 'bank' have prefixes, which adapters masks out" in caplog.text
    caplog.clear()
    model = make_model("llama", "base")
    pool = had.DistillationConfig(str(tmp_path), teacher_selection=1)
    model.add_adapter("insurance", config="prefix_tuning", distill_from=pool)
    model.train_adapter("insurance")
    had.choose_teachers(model, [make_batch(labels=None)], loss=lambda batch: model(**batch)[0].square().mean())
    assert "have prefixes, which adapters masks out" in caplog.text


def model_of(family="bert", **changes):
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    return AutoAdapterModel.from_config(config)


@pytest.mark.parametrize("config", ["lora", "seq_bn", "mam"])
@pytest.mark.parametrize("num_hidden_layers", [1, 3])
def test_an_adapter_of_a_deeper_or_shallower_base_is_refused(config, num_hidden_layers, tmp_path):
    """Its hidden size is that of the model, so the config alone does not tell."""
    folder, model = str(tmp_path / "deep"), model_of(num_hidden_layers=num_hidden_layers)
    with_teachers(config=config, teachers=["bank"]).save_adapter(folder, "bank")
    before = everything(model)
    message = one_line(start=f"Teacher {folder!r} ", part="; use one trained on the same base model.")
    with pytest.raises(ValueError, match=message):
        model.add_adapter("insurance", config=config, distill_from=[folder])
    assert everything(model) == before


def test_weights_of_another_size_are_named_with_both_sizes(tmp_path):
    folder = str(tmp_path / "wide")
    with_teachers(model_of("llama"), config="lora", teachers=["bank"]).save_adapter(folder, "bank")
    message = (
        f"Teacher {folder!r} has weights of another size: model.layers.0.self_attn.v_proj.loras.wide.lora_B is "
        "[32, 8], on the model [16, 8]; use one trained on the same base model."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        model_of("llama", num_key_value_heads=2).add_adapter("insurance", config="lora", distill_from=[folder])
