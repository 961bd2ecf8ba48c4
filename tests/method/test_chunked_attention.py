"""Many frozen teachers a few at a time, against the update of each teacher one after the other."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import distillation_of, make_batch, make_model, make_student, noisy
from torch import nn

from hf_adapter_distillation import TeacherFusion
from hf_adapter_distillation.method import layers
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update
from hf_adapter_distillation.method.stacking import split_group
from hf_adapter_distillation.teachers.learner import Learner

CONFIGS = {
    "a": "seq_bn[reduction_factor=1]",
    "b": "seq_bn[reduction_factor=1, scaling=0.5]",
    "c": "seq_bn[reduction_factor=16]",
    "d": "seq_bn[reduction_factor=1]",
}


def adapters_of_a_layer(names=CONFIGS, dtype=torch.float64):
    model = make_model(dtype=dtype)
    for name in names:
        model.add_adapter(name, config=CONFIGS[name])
        noisy(model, name)
    _, layer = adapter_layers(model.to(dtype), "a")[0]
    return {name: layer.adapters[name].requires_grad_(False) for name in names}


def random_fusion(rank=None, weights=None, dtype=torch.float64):
    fusion = TeacherFusion(32, dtype=dtype, rank=rank)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    if weights:
        fusion.set_weights(weights)
    return fusion


def with_gradients(form, fusion, hidden_states):
    """(fused, attention, gradients of the fusion) of a form of the fusion."""
    fused, attention = form()
    weight = torch.cos(torch.arange(hidden_states.numel())).view_as(hidden_states).to(fused)
    return fused, attention, torch.autograd.grad((fused * weight).sum(), list(fusion.parameters()))


@settings(deadline=None, max_examples=20)
@given(
    order=st.permutations(list(CONFIGS)),
    rank=st.sampled_from([None, 3]),
    weights=st.sampled_from(
        [None, {"a": 0.5, "b": 1e-9, "c": 0.2, "d": 0.1}, {"a": 0.8, "b": 0.1, "c": 0.7, "d": 0.2}]
    ),
    scale=st.sampled_from([1.0, 10.0]),  # at which the softmax is nearly one teacher
    together=st.booleans(),
)
def test_equals_the_plain_fusion(order, rank, weights, scale, together):
    """Of adapters of two widths, of which those of one width may share a chunk."""
    torch.manual_seed(0)
    adapters, fusion = adapters_of_a_layer(), random_fusion(rank, weights)
    hidden_states = scale * torch.randn(2, 3, 32, dtype=torch.float64)
    parts = [["b", "d"], ["c"], ["a"]] if together else [[name] for name in order]
    names = [name for part in parts for name in part]
    chunks = [{name: adapters[name] for name in part} for part in parts]

    def plain():
        updates = [adapter_update(adapters[name], hidden_states, 0.0) for name in names]
        return fusion(hidden_states, torch.stack(updates, dim=2), fusion.log_weights_of(names))

    def chunked():
        return fusion.fuse_chunks(hidden_states, chunks, [hidden_states] * len(chunks), torch.float64)

    (fused, attention, gradients), wanted = (with_gradients(form, fusion, hidden_states) for form in (chunked, plain))
    torch.testing.assert_close(fused, wanted[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(attention, wanted[1], rtol=1e-9, atol=1e-10)
    assert not attention.requires_grad
    torch.testing.assert_close(gradients, wanted[2], rtol=1e-8, atol=1e-8)


def test_no_chunk_is_wider_than_two_hidden_sizes():
    adapters = adapters_of_a_layer(["a", "b", "d"])
    assert [list(part) for part in split_group(adapters)] == [["a", "b"], ["d"]]
    assert [list(part) for part in split_group(adapters_of_a_layer(["a"]))] == [["a"]]


@pytest.mark.parametrize("config", ["seq_bn[reduction_factor=1]", "lora[r=32]", "par_bn[reduction_factor=1]"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_with_many_teachers_equals_the_stacked_one(config, checkpointing, monkeypatch):
    found = []
    for chunked in (True, False):
        model = make_student(make_model(), config=config).double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with monkeypatch.context() as patch:
            calls, original = [], TeacherFusion.fuse_chunks
            patch.setattr(TeacherFusion, "fuse_chunks", lambda *a, c=calls, f=original: c.append(1) or f(*a))
            if not chunked:
                patch.setattr(layers, "split_group", lambda group: [group])
            output = model(**make_batch())
            record = distillation_of(model).record
            output.loss.backward()
        assert bool(calls) == chunked
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert any("distillation_fusion" in name for name in gradients)
        found.append((output.loss, record.distillation_loss, gradients))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_bfloat16_is_close_under_autocast():
    adapters, fusion = adapters_of_a_layer(dtype=torch.float32), random_fusion(dtype=torch.float32)
    hidden_states = 0.1 * torch.randn(2, 3, 32)
    chunks, inputs = [{name: adapter} for name, adapter in adapters.items()], [hidden_states] * 4
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            fused, attention = fusion.fuse_chunks(hidden_states, chunks, inputs, dtype)
        found.append(
            (fused.float(), attention, torch.autograd.grad(fused.float().square().sum(), fusion.key.weight)[0])
        )
        assert attention.dtype == torch.float32
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.05 * exact.norm()


def test_hidden_states_that_change_before_the_backward_pass_are_an_error():
    adapters, fusion, hidden_states = adapters_of_a_layer(), random_fusion(), torch.randn(2, 3, 32).double()
    chunks, inputs = [{name: adapter} for name, adapter in adapters.items()], [hidden_states] * 4
    fused, _ = fusion.fuse_chunks(hidden_states.clone(), chunks, inputs, torch.float64)
    hidden_states += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fused.sum().backward()


def held_by_the_graph(n_teachers, weighing):
    """The bytes that the graph of a pass holds for the backward pass, beside those of the model."""
    model = make_student(make_model(), teachers=[f"teacher{n}" for n in range(n_teachers)]).train()
    known = {parameter.data_ptr() for parameter in model.parameters()}
    held = {}

    def keep(tensor):
        if tensor.data_ptr() not in known:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = make_batch(16)
    learner = Learner(model, active_block(model), lambda batch: model(**batch).loss, False, 1, [], lambda t: t, 1.0)
    with (
        learner.running() if weighing else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        assert model(**batch).loss.requires_grad
    return sum(held.values())


@pytest.mark.parametrize(("weighing", "of_token"), [(False, 1), (True, 0)])
def test_what_the_graph_holds_grows_with_the_attention_alone(weighing, of_token):
    """One number for each token and teacher in each of the two layers, or in a weighing for each teacher."""
    n_tokens, n_layers, more = 16 * 8, 2, 48
    growth = held_by_the_graph(64 + more, weighing) - held_by_the_graph(64, weighing)
    assert growth == pytest.approx(4 * n_tokens * n_layers * more * of_token, rel=0.05, abs=100 * more)
