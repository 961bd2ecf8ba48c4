"""The state of a distillation: found by the student, and never set in silence."""

from dataclasses import FrozenInstanceError

import adapters
import pytest
import torch
from tiny_models import make_model, make_student
from torch import nn
from transformers import BertConfig, BertModel

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block, distillations
from hf_adapter_distillation.method.layer_pass import LayerPass


def test_a_distillation_is_found_by_its_student_or_by_the_active_setup():
    model = make_student(make_model())
    found = had.distillation_of(model)
    assert found is had.distillation_of(model, "insurance")
    assert found is distillations(model.adapters_config)["insurance"]
    model.set_active_adapters("bank")
    assert had.distillation_of(model, "insurance") is found
    with pytest.raises(ValueError, match="No distilled student is active"):
        had.distillation_of(model)


def test_a_pass_inside_another_one_gives_it_back():
    distillation, outer, inner = had.distillation_of(make_student(make_model())), LayerPass(), LayerPass()
    with distillation.inspected_by(outer):
        with distillation.inspected_by(inner):
            assert distillation.inspection is inner
        assert distillation.inspection is outer
    assert distillation.inspection is None


@pytest.mark.parametrize(("name", "students"), [("bank", "'insurance'"), ("gone", "'insurance'")])
def test_an_adapter_that_is_not_distilled_is_named(name, students):
    model = make_student(make_model())
    with pytest.raises(ValueError, match=f"'{name}' is not distilled from teachers; .* on the model: {students}"):
        had.distillation_of(model, name)


def test_a_model_without_adapters_is_named():
    with pytest.raises(TypeError, match="Linear has no adapters; call adapters.init"):
        had.distillation_of(nn.Linear(1, 1))


class Classifier(nn.Module):
    """A wrapper of a user around a model."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


@pytest.mark.parametrize(
    ("wrap", "attribute"),
    [(Classifier, "encoder"), (lambda model: torch.compile(model, backend="eager"), "_orig_mod")],
)
def test_a_wrapper_is_told_which_of_its_modules_to_pass(wrap, attribute):
    model = make_student(make_model())
    wrapper = wrap(model)
    advice = f"is a wrapper; pass the model with adapters itself, its submodule '{attribute}'.$"
    with pytest.raises(TypeError, match=f"^{type(wrapper).__name__} {advice}"):
        had.distillation_of(wrapper)
    assert had.distillation_of(wrapper.get_submodule(attribute)) is had.distillation_of(model), "what the advice gives"
    with pytest.raises(TypeError, match=f"^Sequential {advice.replace(attribute, '0.' + attribute)}"):
        active_block(nn.Sequential(wrapper))
    with pytest.raises(TypeError, match=f"^Classifier {advice.replace(attribute, 'encoder')}"):
        had.distillation_of(Classifier(model), "insurance")


def test_a_wrapper_of_a_model_without_adapters_is_told_where_to_add_them():
    wrapper = Classifier(BertModel(BertConfig(num_hidden_layers=1, hidden_size=12)))
    with pytest.raises(
        TypeError, match="^Classifier is a wrapper; call adapters.init with .* 'encoder', and pass that.$"
    ):
        had.distillation_of(wrapper)
    adapters.init(wrapper.encoder)
    with pytest.raises(ValueError, match="No distilled student is active"):
        had.distillation_of(wrapper.encoder)


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
    with pytest.raises(RuntimeError, match="No forward pass"):
        had.distillation_of(model).take_record()
