"""The state of a distillation: found by the student, and never set in silence."""

from dataclasses import FrozenInstanceError

import pytest
from tiny_models import make_model, make_student
from torch import nn

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations


def test_a_distillation_is_found_by_its_student_or_by_the_active_setup():
    model = make_student(make_model())
    found = had.distillation_of(model)
    assert found is had.distillation_of(model, "insurance")
    assert found is distillations(model.adapters_config)["insurance"]
    model.set_active_adapters("bank")
    assert had.distillation_of(model, "insurance") is found
    with pytest.raises(ValueError, match="No distilled student is active"):
        had.distillation_of(model)


@pytest.mark.parametrize(("name", "students"), [("bank", "'insurance'"), ("gone", "'insurance'")])
def test_an_adapter_that_is_not_distilled_is_named(name, students):
    model = make_student(make_model())
    with pytest.raises(ValueError, match=f"'{name}' is not distilled from teachers; .* on the model: {students}"):
        had.distillation_of(model, name)


def test_a_model_without_adapters_is_named():
    with pytest.raises(TypeError, match="Linear has no adapters; call adapters.init"):
        had.distillation_of(nn.Linear(1, 1))


def test_settings_are_replaced_and_never_set_where_nobody_reads_them():
    distillation = had.distillation_of(make_student(make_model()))
    with pytest.raises(FrozenInstanceError):
        distillation.settings.weight = 2.0
    with pytest.raises(AttributeError):
        distillation.weight = 2.0
    distillation.settings = had.StageSettings(weight=2.0)
    assert distillation.settings.enabled


def test_the_record_is_taken_once():
    model = make_student(make_model())
    assert had.distillation_of(model).record is None
    with pytest.raises(AssertionError, match="no forward pass"):
        had.distillation_of(model).take_record()
