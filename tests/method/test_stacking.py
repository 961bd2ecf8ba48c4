import copy

import pytest
import torch
from model_state import take_terms
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy

from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update
from hf_adapter_distillation.method.stacking import StackCache, can_be_stacked, stack, stacked_bytes


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
    "config",
    [
        "seq_bn",
        "double_seq_bn",
        "seq_bn[reduction_factor=32]",
        "seq_bn[scaling=0.5]",
        "seq_bn[scaling='learned']",
        "seq_bn[scaling='channel']",
        "seq_bn[non_linearity='leakyrelu']",
        "par_bn",
        "scaled_par_bn",
    ],
)
def test_stacked_adapters_put_out_what_the_adapters_do(config):
    model = model_with(a=config, b=config, c=config)
    adapters = adapters_of(model, ["a", "b", "c"])
    stacked = stack(adapters)
    hidden_states = torch.randn(2, 3, 32, dtype=torch.float64)
    z = stacked.features(hidden_states)  # (B, T, n, m)
    n, m = z.shape[-2:]
    assert z.shape == (2, 3, 3, adapters["a"].down_sample)
    assert stacked.names == ("a", "b", "c")
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
    assert StackCache().get({"a": a, "b": b}, model.adapters_config, torch.float64) is None


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
    stacks = StackCache().get(adapters, model.adapters_config, torch.float64)
    assert [stacked.names for stacked in stacks] == [("a", "c"), ("b",), ("d",), ("e",)]


# The cache


def cached(model, names=("a", "b"), dtype=torch.float64, cache=None):
    cache = cache or StackCache()
    return cache, cache.get(adapters_of(model, names), model.adapters_config, dtype)


def down_rows(stacks, model, names=("a", "b")):
    """Whether the copy has the weights that the adapters have now."""
    wanted = torch.cat([adapter.adapter_down[0].weight for adapter in adapters_of(model, names).values()])
    return torch.equal(stacks[0].down_weight, wanted)


def test_teachers_are_copied_once():
    model = model_with(a="seq_bn", b="seq_bn")
    cache, first = cached(model)
    _, second = cached(model, cache=cache)
    assert first is second
    assert cache.nbytes == stacked_bytes(adapters_of(model, ["a", "b"]))
    assert not any(tensor.requires_grad for tensor in (first[0].down_weight, first[0].up))


def load_in_place(model):
    adapter = adapters_of(model, ["a"])["a"]
    adapter.load_state_dict({key: value + 1 for key, value in adapter.state_dict().items()})


def load_by_assignment(model):
    adapter = adapters_of(model, ["a"])["a"]
    adapter.load_state_dict({key: value + 1 for key, value in adapter.state_dict().items()}, assign=True)


def delete_and_add(model):
    model.delete_adapter("a")
    model.add_adapter("a", config="seq_bn")
    model.double()


def swap_data(model):
    weight = adapters_of(model, ["a"])["a"].adapter_down[0].weight
    weight.data = weight.data + 1


@pytest.mark.parametrize("change", [load_in_place, load_by_assignment, delete_and_add, swap_data])
def test_a_changed_teacher_is_copied_anew(change):
    model = model_with(a="seq_bn", b="seq_bn")
    cache, before = cached(model)
    change(model)
    _, after = cached(model, cache=cache)
    assert after is not before
    assert down_rows(after, model)
    assert not down_rows(before, model)


def test_a_model_that_is_copied_has_a_cache_of_its_own():
    model = make_student(make_model())
    model(**make_batch())
    other = copy.deepcopy(model)
    noisy(other, "bank")
    losses = []
    for m in (model, other, model):
        m(**make_batch())
        losses.append(take_terms(m).item())
    assert losses[0] == losses[2] != losses[1]


def caches(model):
    modules = [layer.distillation_fusion["insurance"] for _, layer in adapter_layers(model, "insurance")]
    return [fusion.cache for fusion in modules]


def test_the_copy_follows_the_model():
    model = make_student(make_model()).train()
    keys = set(model.state_dict())
    model(**make_batch())
    size = [cache.nbytes for cache in caches(model)]
    assert all(size)
    model.double()
    assert [cache.nbytes for cache in caches(model)] == [0, 0], "freed at once"
    model(**make_batch()).loss.backward()
    assert [cache.nbytes for cache in caches(model)] == [2 * s for s in size]
    assert set(model.state_dict()) == keys
    assert not any("cache" in key or "stack" in key for key in keys)
    with pytest.warns(UserWarning, match="keeps 2 others"):
        model.delete_adapter("work")
    assert [cache.nbytes for cache in caches(model)] == [0, 0]
    model.train_adapter("insurance")
    model(**make_batch()).loss.backward()
    assert [cache.nbytes for cache in caches(model)] == [2 * s * 2 / 3 for s in size]
    record = distillations(model.adapters_config)["insurance"].record
    assert [row.names for row in record.attention.values()] == [("bank", "travel")] * 2


def test_a_reloaded_teacher_is_used(tmp_path):
    model = make_student(make_model(), train=False)
    noisy(model, "bank")
    model.save_adapter(str(tmp_path), "bank")
    fresh = make_student(make_model())
    fresh.train()
    fresh(**make_batch())
    losses = [take_terms(fresh)]
    fresh.load_adapter(str(tmp_path), load_as="bank", with_head=False, overwrite_ok=True)
    fresh.train_adapter("insurance")
    fresh(**make_batch())
    losses.append(take_terms(fresh))
    assert losses[0] != losses[1]
    _, layer = adapter_layers(fresh, "bank")[0]
    (stacked,) = layer.distillation_fusion["insurance"].cache.get(
        {name: layer.adapters[name] for name in TEACHERS}, fresh.adapters_config, torch.float32
    )
    wanted = adapter_layers(model, "bank")[0][1].adapters["bank"].adapter_down[0].weight
    assert torch.equal(stacked.down_weight[: len(wanted)], wanted)


def test_training_again_copies_again():
    """Writing to `.data` leaves no trace that the cache could see."""
    model = make_student(make_model()).train()
    model(**make_batch())
    take_terms(model)
    noisy(model, "bank")
    model.train_adapter("insurance")
    model(**make_batch())
    terms = take_terms(model)
    for cache in caches(model):
        cache.clear()
    model(**make_batch())
    assert torch.equal(take_terms(model), terms)


def test_the_copy_goes_with_the_fusion():
    model = make_student(make_model()).train()
    model(**make_batch())
    assert all(cache.nbytes for cache in caches(model))
    model.delete_adapter("insurance")
    assert not any(isinstance(value, StackCache) for module in model.modules() for value in vars(module).values())
