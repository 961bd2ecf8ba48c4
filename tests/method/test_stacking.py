import copy
from tempfile import TemporaryDirectory

import pytest
import torch
from tiny_models import make_batch, make_model, make_student, noisy

from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update
from hf_adapter_distillation.method.stacking import (
    can_be_stacked,
    group_alike,
    number_of_columns,
    stack,
    stack_frozen,
    stacked_bytes,
)


def adapters_of(model, names):
    _, layer = adapter_layers(model, names[0])[0]
    return {name: layer.adapters[name] for name in names}


def model_with(**configs):
    model = make_model(dtype=torch.float64)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
        noisy(model, name)
    return model.double()


@pytest.mark.parametrize(
    "configs",
    [
        ["seq_bn"] * 3,
        ["double_seq_bn"] * 3,
        ["seq_bn[reduction_factor=32]"] * 3,
        ["seq_bn[scaling=0.5]"] * 3,
        ["seq_bn[scaling='learned']"] * 3,
        ["seq_bn[scaling='channel']"] * 3,
        ["seq_bn", "seq_bn[scaling=3.0]", "seq_bn[scaling='channel']"],
        ["seq_bn[non_linearity='leakyrelu']"] * 3,
        ["par_bn"] * 3,
        ["scaled_par_bn"] * 3,
    ],
    ids=", ".join,
)
def test_stacked_adapters_put_out_what_the_adapters_do(configs):
    model = model_with(**dict(zip("abc", configs, strict=True)))
    adapters = adapters_of(model, ["a", "b", "c"])
    stacked = stack(adapters)
    hidden_states = torch.randn(2, 3, 32, dtype=torch.float64)
    z = stacked.features(hidden_states)  # (B, T, n, m)
    n, m = z.shape[-2:]
    assert z.shape == (2, 3, 3, adapters["a"].down_sample)
    assert stacked.names == ("a", "b", "c")
    assert stacked.up.shape[1] == number_of_columns(adapters)
    for i, adapter in enumerate(adapters.values()):
        update = z[:, :, i] @ stacked.up[:, i * m : (i + 1) * m].T + stacked.up[:, n * m + i]
        torch.testing.assert_close(
            update, adapter_update(adapter, hidden_states, hidden_states), rtol=1e-12, atol=1e-12
        )
        full, _, up = adapter(hidden_states, residual_input=0.0)
        torch.testing.assert_close(update, up, rtol=1e-12, atol=1e-12)


def test_gradients_reach_the_weights_of_a_trained_adapter():
    model = model_with(a="seq_bn[scaling='learned']")
    (adapter,) = adapters_of(model, ["a"]).values()
    stacked = stack({"a": adapter})
    hidden_states = torch.randn(2, 3, 32, dtype=torch.float64)
    weight = torch.randn(2, 3, 32, dtype=torch.float64)
    z = stacked.features(hidden_states).flatten(-2)
    update = z @ stacked.up[:, :-1].T + stacked.up[:, -1]
    parameters = list(adapter.parameters())
    grads = torch.autograd.grad((update * weight).sum(), parameters)
    wanted = torch.autograd.grad((adapter_update(adapter, hidden_states, hidden_states) * weight).sum(), parameters)
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-10)


def test_what_cannot_be_stacked():
    model = model_with(a="seq_bn", b="seq_bn[non_linearity='prelu']")
    a, b = adapters_of(model, ["a", "b"]).values()
    assert can_be_stacked(a)
    assert not can_be_stacked(b)
    assert stacked_bytes({"a": a}) == 8 * sum(p.numel() for p in a.parameters())
    assert stacked_bytes({"a": a, "b": b}) == 0
    assert group_alike({"a": a, "b": b}, model.adapters_config) is None


def test_a_stack_for_each_width_activation_and_input():
    model = model_with(
        a="seq_bn",
        b="seq_bn[reduction_factor=4]",
        c="seq_bn",
        d="seq_bn[non_linearity='gelu']",
        e="double_seq_bn[non_linearity='relu']",
    )
    adapters = adapters_of(model, ["a", "b", "c", "d"])
    output = next(layer for name, layer in adapter_layers(model, "e") if name.endswith("0.output"))
    adapters["e"] = output.adapters["e"]
    stacks = [stack_frozen(group, torch.float64) for group in group_alike(adapters, model.adapters_config)]
    assert [stacked.names for stacked in stacks] == [("a", "c"), ("b",), ("d",), ("e",)]


# Each pass copies the weights that the teachers have


def load_in_place(model):
    adapter = adapters_of(model, ["bank"])["bank"]
    adapter.load_state_dict({key: value + 1 for key, value in adapter.state_dict().items()})


def load_by_assignment(model):
    adapter = adapters_of(model, ["bank"])["bank"]
    adapter.load_state_dict({key: value + 1 for key, value in adapter.state_dict().items()}, assign=True)


def load_a_file(model):
    other = make_student(make_model(), train=False)
    noisy(other, "bank")
    with TemporaryDirectory() as folder:
        other.save_adapter(folder, "bank")
        model.load_adapter(folder, load_as="bank", with_head=False)


def swap_data(model):
    weight = adapters_of(model, ["bank"])["bank"].adapter_down[0].weight
    weight.data = weight.data * 2


CHANGES = [load_in_place, load_by_assignment, load_a_file, swap_data, lambda model: noisy(model, "bank")]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_teacher_is_used_in_the_next_pass(change):
    def terms(model):
        model.train()(**make_batch())
        return distillations(model.adapters_config)["insurance"].take_record().distillation_loss

    model = make_student(make_model())
    before = terms(model)
    change(model)
    after = terms(model)
    assert after != before
    assert after == terms(copy.deepcopy(model))


def test_a_copy_is_detached_and_in_the_data_type_of_the_pass():
    model = model_with(a="seq_bn", b="seq_bn")
    stacked = stack_frozen(adapters_of(model, ["a", "b"]), torch.bfloat16)
    for tensor in (stacked.down_weight, stacked.down_bias, stacked.up):
        assert tensor.dtype == torch.bfloat16
        assert not tensor.requires_grad


def test_a_scaling_is_part_of_the_up_projections():
    model = model_with(a="seq_bn[scaling=2.0]", b="seq_bn")
    both = stack_frozen(adapters_of(model, ["a", "b"]), torch.float64)
    a, b = adapters_of(model, ["a", "b"]).values()
    weights = [2 * a.adapter_up.weight, b.adapter_up.weight]
    biases = [2 * a.adapter_up.bias.unsqueeze(1), b.adapter_up.bias.unsqueeze(1)]
    assert torch.equal(both.up, torch.cat([*weights, *biases], dim=1))
