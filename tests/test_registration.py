import importlib.metadata
import inspect
import warnings

import adapters.composition
import pytest
import torch
from adapters import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin, Stack
from adapters.composition import ALLOWED_NESTINGS
from adapters.context import ForwardContext
from adapters.hub_mixin import PushAdapterToHubMixin
from adapters.methods.adapter_layer_base import ComposableAdapterLayerBase
from adapters.methods.lora import LoRAMergedLinear
from tiny_models import make_batch, make_model, make_student

import hf_adapter_distillation as had
from hf_adapter_distillation import _compat

TOUCHED = (
    PushAdapterToHubMixin,
    ModelAdaptersMixin,
    ModelWithHeadsAdaptersMixin,
    ForwardContext,
    ComposableAdapterLayerBase,
    LoRAMergedLinear,
)


def state_of_adapters():
    nestings = {key: list(value) for key, value in ALLOWED_NESTINGS.items()}
    return [dict(vars(owner)) for owner in TOUCHED], nestings, dict(vars(adapters.composition))


@pytest.fixture
def registered():
    yield
    had.register()


def test_register_and_unregister_are_reversible_and_idempotent(registered):
    with_package = state_of_adapters()
    had.register()
    assert state_of_adapters() == with_package
    had.unregister()
    stock = state_of_adapters()
    assert stock != with_package
    assert not hasattr(adapters.composition, "AdapterDistillation")
    assert had.AdapterDistillation not in ALLOWED_NESTINGS
    assert all(
        "hf_adapter_distillation" not in getattr(v, "__module__", "") for c in TOUCHED for v in vars(c).values()
    )
    had.unregister()
    assert state_of_adapters() == stock
    had.register()
    had.unregister()
    assert state_of_adapters() == stock


def test_models_made_before_and_after_the_import_behave_the_same(registered):
    had.unregister()
    early = make_model()
    had.register()
    late = make_model()
    losses = []
    for model in (early, late):
        torch.manual_seed(0)
        losses.append(make_student(model)(**make_batch()).loss)
    assert torch.equal(*losses)


def test_plain_adapters_are_untouched(registered):
    model = make_model()
    model.add_adapter("plain", config="double_seq_bn")
    model.add_classification_head("plain")
    model.train_adapter("plain")
    with_package = model(**make_batch())
    had.unregister()
    stock = model(**make_batch())
    assert torch.equal(with_package.loss, stock.loss)
    assert torch.equal(with_package.logits, stock.logits)
    assert "distillations" not in vars(model.adapters_config)


@pytest.mark.parametrize(("family", "has_bias"), [("deberta", False), ("modernbert", False), ("gpt2", True)])
def test_a_merged_projection_without_a_bias_gets_none(family, has_bias, registered):
    def has_biases():
        modules = make_model(family, "base").modules()
        return {module.bias is not None for module in modules if isinstance(module, LoRAMergedLinear)}

    assert has_biases() == {has_bias}
    had.unregister()
    assert has_biases() == {True}


def test_wrappers_keep_names_and_docstrings():
    assert ModelAdaptersMixin.add_adapter.__name__ == "add_adapter"
    for owner in (ModelAdaptersMixin, ModelWithHeadsAdaptersMixin):
        assert "adapter_name (str)" in owner.add_adapter.__doc__
        assert "distill_from (list" in owner.add_adapter.__doc__
        parameters = list(inspect.signature(owner.add_adapter).parameters)
        assert parameters[-1] == "distill_from"
        assert parameters[:3] == ["self", "adapter_name", "config"]


def test_a_setup_with_a_stack_around_the_block_runs():
    model = make_student(make_model())
    model.add_adapter("german", config="seq_bn")
    model.set_active_adapters(Stack("german", model.active_adapters))
    model.train()
    assert model(**make_batch()).loss.requires_grad


def test_untested_versions_warn_with_the_range(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "9.9")
    with pytest.warns(UserWarning, match="is tested with") as caught:
        _compat.warn_if_untested()
    first, second = (str(warning.message) for warning in caught)
    assert "tested with adapters>=1.3.0,<2, not with 9.9" in first
    assert "tested with transformers>=4.57.6,<4.58, not with 9.9" in second


def test_tested_versions_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _compat.warn_if_untested()
