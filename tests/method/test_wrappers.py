"""The model with adapters inside the model of a trainer."""

import pytest
import torch
from tiny_models import TEACHERS, make_batch, make_model, make_student
from torch import nn
from wrapped_models import Classifier

from hf_adapter_distillation.method.wrappers import accepted_inputs, model_with_adapters, noting_inputs


def test_the_outermost_model_with_adapters_is_found():
    model = make_student(make_model())
    assert model_with_adapters(model) is model, "not its base model, which has adapters as well"
    assert model_with_adapters(nn.Sequential(nn.Linear(2, 2), Classifier(model))) is model
    plain, student = make_model(), make_student(make_model())
    assert model_with_adapters(nn.ModuleList([plain, student])) is student, "the one with a distilled student"


def test_a_wrapper_must_have_one_student():
    with pytest.raises(TypeError, match="^Linear has no adapters; call adapters.init"):
        model_with_adapters(nn.Linear(2, 2))
    both = nn.ModuleDict({"left": make_student(make_model()), "right": make_student(make_model())})
    with pytest.raises(ValueError, match="^ModuleDict has distilled students in 'left' and 'right', but one model"):
        model_with_adapters(both)


def test_columns_that_a_model_does_not_take_are_left_out():
    batch = make_batch() | {"weight": torch.ones(4), "text": ["a"] * 4}
    assert set(accepted_inputs(make_student(make_model()), batch)) == {"input_ids", "attention_mask", "labels"}
    assert set(accepted_inputs(make_model(kind="base"), batch)) == {"input_ids", "attention_mask"}


def test_inputs_are_noted_at_each_call_of_the_wrapped_model():
    model = make_student(make_model(kind="base"), teachers=TEACHERS)
    first, second = make_batch(), make_batch(seed=1)
    calls = []
    with noting_inputs(model, calls.append):
        for batch in (first, second):
            Classifier(model)(**batch, return_dict=False)
    assert [call.keys() for call in calls] == [{"input_ids", "attention_mask"}] * 2
    assert torch.equal(calls[0]["input_ids"], first["input_ids"])
    assert torch.equal(calls[1]["input_ids"], second["input_ids"])
    assert "forward" not in vars(model)
