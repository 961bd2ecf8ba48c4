import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapter_distillation.losses import (
    MINIMAL_VARIANCE,
    feature_matching_loss,
    logit_matching_loss,
    token_weights,
    value_regularization,
)


def reference(student, fused, mask):
    """The equation, one sequence after the other."""
    losses = []
    for u, f, m in zip(student, fused, mask.bool(), strict=True):
        u, f = u[m], f[m]
        if len(f) == 0:
            losses.append(u.sum())  # 0, with a graph
            continue
        variance = ((f - f.mean()) ** 2).mean().detach().clamp(min=MINIMAL_VARIANCE)
        losses.append(((u - f) ** 2).mean() / variance)
    return torch.stack(losses).mean()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_equals_the_equation(batch, seq_len, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, seq_len, hidden)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.randint(0, 2, (batch, seq_len), generator=generator)
    expected, loss = reference(*inputs, mask), feature_matching_loss(*inputs, token_weights(mask.double()))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(expected, inputs, materialize_grads=True)
    for grad, other in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def test_by_hand():
    fused = torch.tensor([[[1.0, -1.0], [3.0, -3.0]]])  # variance (1 + 1 + 9 + 9) / 4 = 5
    student = fused + 1.0  # squared error 1
    assert feature_matching_loss(student, fused, token_weights(torch.ones(1, 2))).item() == pytest.approx(1 / 5)
    assert feature_matching_loss(student, fused, token_weights(torch.tensor([[1, 0]]))).item() == pytest.approx(1.0)


def test_the_mean_of_the_parts_is_the_loss_of_the_whole():
    torch.manual_seed(0)
    student, fused = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(6, 5, 4, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([1, 5, 2, 3, 4, 5])[:, None]).double()
    mask = token_weights(mask)
    whole = feature_matching_loss(student, fused, mask)
    parts = [feature_matching_loss(student[i : i + 2], fused[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_padding_does_not_count():
    torch.manual_seed(0)
    student, fused = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    before = feature_matching_loss(student, fused, token_weights(mask))
    student[mask == 0] = 1e6
    assert torch.equal(feature_matching_loss(student, fused, token_weights(mask)), before)


def test_constant_teachers_and_padded_rows_are_finite():
    student, fused = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4)
    loss = feature_matching_loss(student, fused, token_weights(torch.tensor([[1, 1, 1], [0, 0, 0]])))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()
    assert feature_matching_loss(student, fused, token_weights(torch.zeros(2, 3))).item() == 0


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    student, fused = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weights = token_weights(torch.ones(2, 3))
    loss = feature_matching_loss(student.bfloat16(), fused.bfloat16(), weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(feature_matching_loss(student, fused, weights).item(), rel=2e-2)


def test_value_regularization():
    values = [torch.eye(3), torch.eye(2) + torch.tensor([[0.0, 2.0], [1.0, 0.0]])]
    assert value_regularization(values).item() == pytest.approx(5.0)


def test_logits_by_hand():
    student = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    fused = torch.tensor([[1.0, 0.0], [3.0, -1.0]], requires_grad=True)
    loss = logit_matching_loss(student, fused)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 9) / 4)
    assert student.grad.tolist() == [[0.0, 1.0], [-1.5, 0.0]] and fused.grad is None
    assert logit_matching_loss(student.bfloat16(), fused.bfloat16()).dtype == torch.float32
    assert logit_matching_loss(student.double(), fused.double()).dtype == torch.float64
