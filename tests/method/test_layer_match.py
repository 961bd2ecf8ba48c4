"""The losses of all layers at once: their equation, their bound, and how little it changes of ordinary layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapter_distillation.method.layer_match import MINIMAL_VARIANCE, RELATIVE_FLOOR, bounded_losses
from hf_adapter_distillation.method.losses import FeatureLoss, token_weights

SCALES = st.sampled_from([0.0, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 1e2, 1e4, 1e6])


def draw(n_layers, batch, seq_len, seed, dtype=torch.float64):
    """Updates of student and teachers and the states that they read, for each layer, and a padding mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n_layers, 3, batch, seq_len, 6)
    layers = torch.randn(shape, generator=generator, dtype=dtype)
    return layers, torch.randint(0, 2, (batch, seq_len), generator=generator)


def losses_of(layers, mask):
    weights = token_weights(mask.double())
    return bounded_losses([FeatureLoss.match(u, f, weights, h) for u, f, h in layers])


def reference(layers, mask):
    """The equation, one sequence after the other."""

    def moments(states, sequence):
        states = states[sequence][mask[sequence].bool()]
        if len(states) == 0:
            return states.sum(), states.sum()  # 0, with a graph
        return ((states - states.mean()) ** 2).mean(), (states**2).mean()

    losses = []
    for u, f, h in layers:
        of_sequences = []
        for b in range(len(u)):
            ratios = []
            for v, g, states in layers:
                power = max(moments(v, b)[1].item(), moments(g, b)[1].item())
                ratios.append(power / max(moments(states, b)[0].item(), MINIMAL_VARIANCE))
            floor = RELATIVE_FLOOR * max(moments(h, b)[0].item(), MINIMAL_VARIANCE) * sum(ratios) / len(ratios)
            of_sequences.append(moments(u - f, b)[1] / max(moments(f, b)[0].item(), floor, MINIMAL_VARIANCE))
        losses.append(sum(of_sequences) / len(of_sequences))
    return torch.stack(losses)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_equals_the_equation(n_layers, batch, seq_len, seed, data):
    layers, mask = draw(n_layers, batch, seq_len, seed)
    layers *= torch.tensor([[data.draw(SCALES) for _ in range(3)] for _ in range(n_layers)])[..., None, None, None]
    layers.requires_grad_()
    losses, expected = losses_of(layers, mask), reference(layers, mask)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(each.sum(), layers, allow_unused=True)[0] for each in (losses, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert not gradients[0][:, 2].any(), "the states that the adapters read get no gradient"


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 10**6), st.data())
def test_the_mean_has_a_bound_at_all_scales(n_layers, dtype, seed, data):
    layers, mask = draw(n_layers, 3, 5, seed, torch.float32)
    layers *= torch.tensor([[data.draw(SCALES) for _ in range(3)] for _ in range(n_layers)])[..., None, None, None]
    layers = layers.to(dtype).requires_grad_()
    losses = losses_of(layers, mask)
    assert losses.mean() <= 4 / RELATIVE_FLOOR * 1.001
    losses.mean().backward()
    assert layers.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 0.03, 0.1])
def test_a_silent_layer_weighs_no_more_than_ten_others(scale):
    """Without the floor its loss and its gradient grow with the inverse square of the scale."""
    layers, mask = draw(4, 3, 5, seed=0)
    layers[1, 1] *= scale
    layers.requires_grad_()
    losses = losses_of(layers, torch.ones_like(mask))
    losses.sum().backward()
    student = layers.grad[:, 0].flatten(1).norm(dim=1)
    assert losses[1] < 10 * losses[[0, 2, 3]].mean()
    assert student[1] < 15 * student[[0, 2, 3]].mean()


def test_ordinary_layers_have_the_loss_of_one_layer_alone():
    """Updates of the same share of the states that they are added to, which grow a hundredfold over the layers."""
    layers, mask = draw(4, 3, 5, seed=0)
    weights = token_weights(torch.ones_like(mask).double())
    layers *= torch.tensor([0.1, 1.0, 10.0, 1000.0]).view(4, 1, 1, 1, 1)
    layers[:, :2] *= 0.05
    alone = torch.stack([FeatureLoss()(u, f, weights) for u, f, _ in layers])
    assert (layers[:, 1].var(dim=(1, 2, 3)) > MINIMAL_VARIANCE).all()
    torch.testing.assert_close(losses_of(layers, torch.ones_like(mask)), alone)


def test_the_parts_of_a_batch_have_the_mean_of_the_whole():
    layers, mask = draw(3, 4, 5, seed=1)
    layers[1, 1] *= 0.01
    parts = [losses_of(layers[:, :, i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(parts) / 2, losses_of(layers, mask), rtol=1e-12, atol=0)


def test_padding_does_not_count():
    layers, mask = draw(2, 3, 5, seed=2)
    before = losses_of(layers, mask)
    layers[..., mask == 0, :] = 1e6
    assert torch.equal(losses_of(layers, mask), before)
    assert losses_of(layers, torch.zeros_like(mask)).tolist() == [0, 0]
