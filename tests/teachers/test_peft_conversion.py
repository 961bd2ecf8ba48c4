"""Teachers of other methods of PEFT, which PEFT converts to LoRA."""

import json
import re
from importlib.metadata import PackageNotFoundError, version

import adapters
import peft
import pytest
import torch
from messages import one_line
from model_state import snapshot
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, STATIC, make_batch
from transformers import set_seed

from hf_adapter_distillation.student.provenance import read_provenance
from hf_adapter_distillation.teachers import peft_conversion

pytestmark = [
    pytest.mark.skipif(
        Version(version("peft")) < Version(peft_conversion.OLDEST_PEFT), reason="this PEFT converts nothing"
    ),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
LOHA = {"target_modules": ["query", "intermediate.dense"], "r": 2}


def base(family, kind, dtype=torch.float32):
    set_seed(0)
    return STATIC[kind].from_config(CONFIGS[family]()).eval().to(dtype)


def saved_by_peft(folder, family="bert", kind="classification", method="LoHaConfig", **config):
    """An adapter with weights that say something, and PEFT's model with it; its head is the base model's."""
    model = peft.get_peft_model(base(family, kind), getattr(peft, method)(**config)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return model


def student_of(folder, family="bert", kind="classification", dtype=torch.float32):
    model = base(family, kind, dtype)
    adapters.init(model)
    model.add_adapter("insurance", config="lora", distill_from=[str(folder)])
    return model.eval()


@pytest.mark.parametrize(
    ("family", "kind", "method", "config", "rank"),
    [
        ("bert", "base", "LoHaConfig", LOHA, 4),
        ("bert", "classification", "LoKrConfig", {"target_modules": ["value"], "r": 2, "task_type": "SEQ_CLS"}, 8),
        ("llama", "causal_lm", "LoHaConfig", {"target_modules": ["q_proj", "o_proj", "gate_proj"], "r": 2}, 4),
        ("llama", "causal_lm", "VeraConfig", {"target_modules": ["q_proj", "v_proj"], "r": 6}, 6),
        (
            "bert",
            "base",
            "VBLoRAConfig",
            {"target_modules": ["query", "value"], "r": 2, "num_vectors": 8, "vector_length": 4},
            None,
        ),
        ("t5", "seq2seq_lm", "LoKrConfig", {"target_modules": ["q", "wo"], "r": 2}, 8),
    ],
)
def test_a_converted_teacher_computes_nearly_what_peft_does(family, kind, method, config, rank, tmp_path):
    reference = saved_by_peft(tmp_path / "bank", family, kind, method, **config)
    model = student_of(tmp_path / "bank", family, kind)
    batch = make_batch(labels="tokens" if family == "t5" else None)
    key = "last_hidden_state" if kind == "base" else "logits"
    with torch.no_grad():
        expected = reference(**batch)[key]
        plain = model(**batch)[key]
        model.set_active_adapters("bank")
        converted = model(**batch)[key]
    assert (expected - plain).abs().max() > 1e-4, "the teacher must make a difference"
    torch.testing.assert_close(converted, expected, rtol=1e-5, atol=1e-5)
    assert rank in (None, model.adapters_config.get("bank").r)
    model.save_adapter(str(tmp_path / "saved"), "insurance")
    (teacher,) = read_provenance(tmp_path / "saved").teachers
    saved = json.loads((tmp_path / "bank" / "adapter_config.json").read_text())
    note, _, error = teacher.conversion.rpartition(" ")
    assert note == f"from {saved['peft_type']} by peft {peft.__version__}, relative error"
    assert float(error) < 1e-5


def test_the_error_of_a_conversion_is_that_of_its_updates(tmp_path, monkeypatch, caplog):
    """With too low a rank, measured on the products themselves."""
    reference = saved_by_peft(tmp_path / "bank", kind="base", **LOHA)
    monkeypatch.setattr(peft_conversion, "KEPT", 1)
    model = student_of(tmp_path / "bank", kind="base")
    missed = total = 0.0
    for path, module in reference.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            lora = model.get_submodule(path).loras["bank"]
            update = module.get_delta_weight("default")
            missed += (update - lora.scaling * lora.lora_B @ lora.lora_A).square().sum().item()
            total += update.square().sum().item()
    error = (missed / total) ** 0.5
    assert error > 0.1
    message = (
        f"was converted to LoRA of rank 1: from LOHA by peft {peft.__version__}, relative error {error:.1e} of its"
    )
    assert message in caplog.text


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig", "VeraConfig"])
def test_a_teacher_on_a_base_in_half_precision_is_converted_in_float32(method, tmp_path, caplog):
    saved_by_peft(tmp_path / "bank", kind="base", method=method, target_modules=["query"], r=2)
    student_of(tmp_path / "bank", kind="base", dtype=torch.bfloat16)
    error = float(re.search("relative error ([^ ]+)", caplog.text)[1])
    assert error < 1e-6


def test_a_base_without_a_pooler_is_converted(tmp_path):
    model = saved_by_peft(tmp_path / "bank", "roberta", **LOHA)
    assert model.base_model.model.roberta.pooler is None
    assert "bank" in student_of(tmp_path / "bank", "roberta").adapters_config


def test_a_base_in_few_bits_is_named_before_anything_is_changed(tmp_path):
    saved_by_peft(tmp_path / "bank", kind="base", **LOHA)
    model = base("bert", "base")
    adapters.init(model)
    projection = model.encoder.layer[0].attention.self.query
    projection.weight = torch.nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    message = (
        "is a PEFT adapter of type LOHA, which is not converted on a base model in 4 or 8 bits; convert it on the "
        "base model in full precision, save it by save_adapter_as_peft, and distil from that."
    )
    with pytest.raises(ValueError, match=one_line(part=message)):
        model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    assert not list(model.adapters_config)


def damaged(folder, what):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    if what == "wide":
        weights = {key: torch.zeros(2, 64) if "w1_b" in key else weight for key, weight in weights.items()}
    elif what == "other modules":
        config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    elif what == "foreign":
        weights = {key.replace("layer.1", "layer.7"): weight for key, weight in weights.items()}
    elif what == "half":
        weights = {key: weight for key, weight in weights.items() if "layer.1" not in key}
    save_file(weights, path)


@pytest.mark.parametrize(
    ("method", "config", "what", "message"),
    [
        ("IA3Config", {"target_modules": ["query"], "feedforward_modules": []}, "",
         "of type IA3 that cannot be converted: PEFT has no way from it to LoRA; use LORA, LOHA, LOKR or VERA."),
        ("PromptTuningConfig", {"num_virtual_tokens": 2, "task_type": "SEQ_CLS"}, "",
         "of type PROMPT_TUNING that cannot be converted: PEFT has no way from it to LoRA; use"),
        ("LoHaConfig", {"target_modules": ["pooler.dense"]}, "",
         "has LoRA in bert.pooler.dense, which is no linear layer inside the layers of a bert; use"),
        ("LoHaConfig", LOHA, "wide",
         "layer.0.attention.self.query.hada_w1_b.default is [2, 64], on the model [2, 32]; use one trained on"),
        ("VeraConfig", {"target_modules": ["query"], "r": 2}, "other modules",
         "found. Please check `peft_config.target_modules`; use one trained on the same base model."),
        ("LoHaConfig", LOHA, "foreign", " has no place in the bert; use one of the same base model."),
        ("LoHaConfig", {**LOHA, "modules_to_save": ["LayerNorm"]}, "",
         "it holds base_model.model.bert.embeddings.LayerNorm.weight of the base model (modules_to_save)."),
        ("LoHaConfig", {**LOHA, "modules_to_save": ["word_embeddings"]}, "",
         "it holds base_model.model.bert.embeddings.word_embeddings.weight of the base model (modules_to_save)."),
        ("LoHaConfig", LOHA, "half", "layer.1.attention.self.query.hada_w1_a.default is missing; save it again."),
    ],
)  # fmt: skip
def test_what_peft_cannot_convert_leaves_the_model_as_it_was(method, config, what, message, tmp_path):
    reference = saved_by_peft(tmp_path / "bank", method=method, **config)
    if "modules_to_save" in config:
        for name, parameter in reference.named_parameters():
            parameter.data += "modules_to_save" in name
        reference.save_pretrained(str(tmp_path / "bank"))
    if what:
        damaged(tmp_path / "bank", what)
    model = base("bert", "classification")
    adapters.init(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=one_line(part=message)):
        model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not list(model.adapters_config)


@pytest.mark.parametrize(
    ("installed", "found"), [("0.18.1", "peft 0.18.1 is too old"), (None, "peft is not installed")]
)
def test_a_missing_or_old_peft_is_named_with_the_command(installed, found, tmp_path, monkeypatch):
    saved_by_peft(tmp_path / "bank", **LOHA)

    def version(package):
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(peft_conversion, "version", version)
    command = "pip install 'peft>=0.19'"
    message = f"of type LOHA, which PEFT 0.19 or newer may convert to LoRA, and {found}; install it with {command}."
    with pytest.raises(ValueError, match=one_line(part=message)):
        student_of(tmp_path / "bank")
