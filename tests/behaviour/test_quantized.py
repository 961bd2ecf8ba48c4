"""Base models whose weights bitsandbytes holds in 4 or 8 bits; where it is installed, on the CPU as well."""

import adapters
import pytest
import torch
from adapters import LoRAConfig
from model_state import changed, snapshot
from tiny_models import CONFIGS, TEACHERS, make_dataset, noisy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow  # it compiles its kernels for the CPU

IN_ALL = LoRAConfig(attn_matrices=["q", "k", "v", "o_proj", "gate_proj"], intermediate_lora=True, output_lora=True)


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
    folder, config = str(tmp_path / "base"), CONFIGS["llama"]()
    config.intermediate_size = 64  # 4 bits come in pairs
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, device_map="cpu", dtype=torch.float32
    )
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
