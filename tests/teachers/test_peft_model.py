"""Models with the adapters of a `PeftModel` in memory."""

import peft
import pytest
import torch
from messages import exactly, one_line
from model_state import snapshot
from tiny_models import CONFIGS, STATIC, make_batch, make_dataset
from transformers import set_seed

import hf_adapter_distillation as had


def peft_model(family="bert", kind="classification", names=("bank", "travel"), **config):
    set_seed(0)
    base = STATIC[kind].from_config(CONFIGS[family]()).eval()
    configs = [peft.LoraConfig(r=4 + i, lora_alpha=3, use_rslora=bool(i), **config) for i, _ in enumerate(names)]
    model = peft.get_peft_model(base, configs[0], adapter_name=names[0])
    for name, each in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, each)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.double()(**make_batch(labels=None)).logits


@pytest.mark.parametrize(
    ("family", "kind", "config"),
    [
        (
            "bert",
            "classification",
            {"target_modules": ["query", "output.dense"], "exclude_modules": ".*attention.output.*"},
        ),
        ("gpt2", "causal_lm", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
        ("llama", "causal_lm", {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
        ("deberta", "classification", {"target_modules": ["in_proj"]}),
        ("modernbert", "classification", {"target_modules": ["Wqkv"]}),
        ("llama", "causal_lm", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
        ("gpt2", "causal_lm", {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_each_adapter_computes_the_same_on_the_same_base_weights(family, kind, config):
    given = peft_model(family, kind, **config)
    base, expected = given.get_base_model(), {}
    places = {parameter.data_ptr() for name, parameter in base.named_parameters() if "lora_" not in name}
    model = had.from_peft(given)
    assert model is base
    assert {p.data_ptr() for name, p in model.named_parameters() if "loras" not in name} == places
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.adapters_config) == ["bank", "travel"]
    given = peft_model(family, kind, **config)
    for name in ("bank", "travel"):
        given.set_adapter(name)
        expected[name] = logits(given)
        model.set_active_adapters(name)
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-9, atol=1e-9)
    assert (expected["bank"] - expected["travel"]).abs().max() > 1e-4


@pytest.mark.parametrize("scales", [(0.25, 0.25), (3.0, 0.5), (0.0, 2.0), (0.0, 0.0)])
def test_a_scale_that_was_set_in_memory_is_kept(scales):
    def scaled():
        model = peft_model(target_modules=["query", "value"])
        for path, layer in model.named_modules():
            if path.endswith(("query", "value")):
                layer.set_scale("travel", scales[path.endswith("value")])
        model.set_adapter("travel")
        return model

    expected, model = logits(scaled()), had.from_peft(scaled())
    model.set_active_adapters("travel")
    torch.testing.assert_close(logits(model), expected, rtol=1e-9, atol=1e-9)


def test_a_head_that_peft_trained_is_the_head_of_the_model_and_is_distilled(trainer_args):
    given = peft_model(names=["bank"], target_modules=["query"], task_type="SEQ_CLS")
    given.classifier.modules_to_save["bank"].weight.data += 1
    before = logits(given)
    model = had.from_peft(given.float())
    model.set_active_adapters("bank")
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    model.float().add_adapter("insurance", config="lora", distill_from=["bank"])
    model.train_adapter("insurance")
    head = model.classifier.weight.clone()
    had.DistillationTrainer(model, trainer_args(max_steps=2), train_dataset=make_dataset()).train()
    assert not torch.equal(head, model.classifier.weight)


def merged(model):
    model.merge_adapter(["travel"])


def with_other_heads(model):
    model.classifier.modules_to_save["travel"].bias.data += 1


def with_loha(model):
    model.peft_config["travel"] = peft.LoHaConfig(target_modules=["query"])


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (merged, ("bank", "travel"),
         "'travel' is merged into the base model; call unmerge_adapter() of the PeftModel first."),
        (with_other_heads, ("bank", "travel"),
         "Adapters 'bank' and 'travel' have different heads in base_model.model.classifier, and the model has one; "
         "save both and load the folders by distill_from, which leaves heads out."),
        (with_loha, ("bank", "travel"), "Adapter 'travel' is a PEFT adapter of type LOHA; from_peft takes LORA"),
        (None, ("bank", "to,go"), "Adapter 'to,go' "),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_leaves_the_model_of_peft_as_it_was(change, names, message):
    given = peft_model(names=names, target_modules=["query"], task_type="SEQ_CLS")
    if change:
        change(given)
    before = snapshot(given)
    with pytest.raises(ValueError, match=one_line(part=message)):
        had.from_peft(given)
    after = snapshot(given)
    assert before.keys() == after.keys()
    assert given.active_adapter == "bank"


def test_settings_modules_and_models_that_do_not_fit_are_named():
    given = peft_model(target_modules=["query"], use_dora=True)
    with pytest.raises(ValueError, match=one_line(part="Adapter 'bank' is a PEFT adapter with use_dora=True")):
        had.from_peft(given)
    with pytest.raises(ValueError, match=one_line(part="Adapter 'bank' has LoRA in bert.pooler.dense, which is no")):
        had.from_peft(peft_model(target_modules=["pooler.dense"]))
    with pytest.raises(TypeError, match=exactly("from_peft takes a PeftModel, not a BertForSequenceClassification.")):
        had.from_peft(given.get_base_model())
    wrapped = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(
        TypeError, match=exactly("The PeftModel wraps a Sequential, which is no model of transformers.")
    ):
        had.from_peft(wrapped)


def test_a_model_of_peft_is_taken_once():
    given = peft_model(target_modules=["query"])
    had.from_peft(given)
    with pytest.raises(ValueError, match=one_line(start="The PeftModel wraps a model with adapters, as")):
        had.from_peft(given)


@pytest.mark.filterwarnings("ignore:Adapter bank was active")
def test_a_model_of_peft_whose_adapters_were_deleted_is_named():
    given = peft_model(target_modules=["query"])
    for name in ("bank", "travel"):
        given.delete_adapter(name)
    message = "The PeftModel has no adapter, since all were deleted; load one by its load_adapter."
    with pytest.raises(ValueError, match=exactly(message)):
        had.from_peft(given)


def test_prompt_tuning_is_named_with_the_methods_that_can_be_taken():
    base = STATIC["classification"].from_config(CONFIGS["bert"]())
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    message = (
        "Adapter 'default' is a PEFT adapter of type PROMPT_TUNING; from_peft takes LORA alone, and distill_from "
        "takes LOHA, LOKR, VERA and others that PEFT converts to LoRA, from the folder that save_pretrained writes."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        had.from_peft(peft.get_peft_model(base, config))
