"""Base models whose weights bitsandbytes holds in 4 or 8 bits; where it is installed, on the CPU as well."""

from functools import partial

import adapters
import peft
import pytest
import torch
from model_state import changed, snapshot
from tiny_models import CONFIGS, IN_ALL, TEACHERS, make_batch, make_dataset, noisy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow  # it compiles its kernels for the CPU


def quantized(folder, bits):
    """A Llama whose weights are saved in a folder, or there already."""
    if not folder.is_dir():
        config = CONFIGS["llama"]()
        config.intermediate_size = 64  # 4 bits come in pairs
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("teachers", "student", "level"),
    [
        (["lora"] * 3, "lora", "adapter"),
        ([IN_ALL] * 3, IN_ALL, "adapter"),
        (["seq_bn"] * 3, "seq_bn", "adapter"),
        (["lora", "seq_bn", "ia3"], "lora", "layer"),
    ],
)
def test_both_stages(bits, teachers, student, level, trainer_args, tmp_path):
    model = quantized(tmp_path / "base", bits)
    adapters.init(model)
    assert model.get_submodule("model.layers.0.self_attn.q_proj").weight.dtype in (torch.uint8, torch.int8)
    for name, config in zip(TEACHERS, teachers, strict=True):
        model.add_adapter(name, config=config)
        noisy(model, name, std=0.1)
    distill_from = had.DistillationConfig(TEACHERS, student_start="random")
    model.add_adapter("insurance", config=student, distill_from=distill_from)
    model.train_adapter("insurance")
    assert distillations(model.adapters_config)["insurance"].level == level
    before = snapshot(model)
    args = trainer_args(max_steps=8, distillation_start=0.25, distillation_weight=10.0, keep_fusion=True)
    trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset(labels="tokens"))
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all(".insurance." in name for name in moved)
    terms = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert len(terms) == 6
    assert sum(terms[-2:]) < sum(terms[:2])


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_of_peft_in_all_linear_layers_are_taken_and_exported(bits, tmp_path):
    base = partial(quantized, tmp_path / "base", bits)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    given = peft.get_peft_model(peft.prepare_model_for_kbit_training(base()), config, "bank").train()
    given.add_adapter("travel", config)
    given.set_adapter("travel")
    batch = make_batch(labels="tokens")
    expected = given(**batch).logits
    model = had.from_peft(given)
    model.set_active_adapters("travel")
    assert torch.equal(model(**batch).logits, expected)
    model.add_adapter("insurance", config=model.adapters_config.get("bank"), distill_from=["bank", "travel"])
    had.save_adapter_as_peft(model, "insurance", tmp_path / "insurance")
    model.set_active_adapters("insurance")
    exported = peft.PeftModel.from_pretrained(base(), str(tmp_path / "insurance")).train()
    assert torch.equal(exported(**batch).logits, model(**batch).logits)
