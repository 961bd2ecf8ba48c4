import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, normalize

from hf_adapter_distillation.method.logit_losses import LogitLoss
from hf_adapter_distillation.method.losses import (
    MINIMAL_VARIANCE,
    CosineLoss,
    FeatureLoss,
    TaskSpecificLoss,
    in_float64,
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
    expected, loss = reference(*inputs, mask), FeatureLoss()(*inputs, token_weights(mask.double()))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(expected, inputs, materialize_grads=True)
    for grad, other in zip(torch.autograd.grad(loss, inputs), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)


def test_by_hand():
    fused = torch.tensor([[[1.0, -1.0], [3.0, -3.0]]])  # variance (1 + 1 + 9 + 9) / 4 = 5
    student = fused + 1.0  # squared error 1
    assert FeatureLoss()(student, fused, token_weights(torch.ones(1, 2))).item() == pytest.approx(1 / 5)
    assert FeatureLoss()(student, fused, token_weights(torch.tensor([[1, 0]]))).item() == pytest.approx(1.0)


def test_the_mean_of_the_parts_is_the_loss_of_the_whole():
    torch.manual_seed(0)
    student, fused = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(6, 5, 4, dtype=torch.float64)
    mask = (torch.arange(5) < torch.tensor([1, 5, 2, 3, 4, 5])[:, None]).double()
    mask = token_weights(mask)
    whole = FeatureLoss()(student, fused, mask)
    parts = [FeatureLoss()(student[i : i + 2], fused[i : i + 2], mask[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)


def test_padding_does_not_count():
    torch.manual_seed(0)
    student, fused = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    before = FeatureLoss()(student, fused, token_weights(mask))
    student[mask == 0] = 1e6
    assert torch.equal(FeatureLoss()(student, fused, token_weights(mask)), before)


def test_constant_teachers_and_padded_rows_are_finite():
    student, fused = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 4)
    loss = FeatureLoss()(student, fused, token_weights(torch.tensor([[1, 1, 1], [0, 0, 0]])))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    assert FeatureLoss()(student, fused, token_weights(torch.zeros(2, 3))).item() == 0


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    student, fused = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    weights = token_weights(torch.ones(2, 3))
    loss = FeatureLoss()(student.bfloat16(), fused.bfloat16(), weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(FeatureLoss()(student, fused, weights).item(), rel=2e-2)


def test_value_regularization():
    values = [torch.eye(3), torch.eye(2) + torch.tensor([[0.0, 2.0], [1.0, 0.0]])]
    assert value_regularization(values).item() == pytest.approx(5.0)


def softmax(row):
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def test_cosine_by_hand():
    student = torch.tensor([[[2.0, 0.0], [3.0, 3.0]]], dtype=torch.float64, requires_grad=True)
    fused = torch.tensor([[[5.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    loss = CosineLoss()(student, fused, token_weights(torch.ones(1, 2)))
    assert loss.item() == pytest.approx((0 + 1 - 1 / math.sqrt(2)) / 2)
    loss.backward()  # of -cos at (3, 3) towards (0, 1): (xy, -x^2) / |u|^3, and half of it
    size = 18**1.5
    assert student.grad.flatten().tolist() == pytest.approx([0, 0, 9 / size / 2, -9 / size / 2])
    assert CosineLoss()(student, fused, token_weights(torch.tensor([[1, 0]]))).item() == pytest.approx(0)


@pytest.mark.parametrize("length", [0.0, 1e-12, 0.005, 0.02, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_short_update_counts_as_a_hundredth_of_the_fused_one(length, scale):
    torch.manual_seed(0)
    directions = normalize(torch.randn(2, 2, 3, 4, dtype=torch.float64), dim=-1)
    student, fused = (scale * length * directions[0]).requires_grad_(), (scale * directions[1]).requires_grad_()
    loss = CosineLoss()(student, fused, token_weights(torch.ones(2, 3).double()))
    if length > 0.01:
        expected = (1 - cosine_similarity(student, fused, dim=-1)).mean()
    else:
        unit = fused / fused.norm(dim=-1, keepdim=True)
        expected = (1 - (student * unit).sum(dim=-1) / (0.01 * scale)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
    wanted = torch.autograd.grad(expected, (student, fused))
    for grad, other in zip(torch.autograd.grad(loss, (student, fused)), wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-15)


def test_the_cosine_of_silent_teachers_has_no_gradient_in_the_student():
    student = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)]).requires_grad_()
    loss = CosineLoss()(student, torch.zeros(2, 3, 4), token_weights(torch.ones(2, 3)))
    loss.backward()
    assert loss.item() == 1
    assert not student.grad.any()


def test_the_length_of_an_update_is_free_for_the_cosine_alone():
    torch.manual_seed(0)
    fused, weights = torch.randn(2, 3, 4), token_weights(torch.ones(2, 3))
    assert CosineLoss()(3 * fused, fused, weights).item() == pytest.approx(0, abs=1e-6)
    assert FeatureLoss()(3 * fused, fused, weights).item() > 1


def task_specific(projection, n_labels=2, kind="classes"):
    loss = TaskSpecificLoss(len(projection[0]), n_labels, dtype=torch.float64, kind=kind)
    loss.projection.weight = torch.nn.Parameter(torch.tensor(projection, dtype=torch.float64))
    loss.classifier = torch.nn.Linear(len(projection), n_labels, dtype=torch.float64)
    return loss


def test_the_task_specific_match_is_that_of_the_projections():
    torch.manual_seed(0)
    student = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    fused = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = token_weights(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    every = task_specific(torch.eye(3).tolist())
    torch.testing.assert_close(every(student, fused, weights), FeatureLoss()(student, fused, weights))
    first = task_specific([[2.0, 0.0, 0.0]])
    loss = first(student, fused, weights)
    torch.testing.assert_close(loss, FeatureLoss()(student[..., :1], fused[..., :1], weights))
    loss.backward()
    assert (student.grad[..., 0] != 0).any()
    assert (student.grad[..., 1:] == 0).all()
    assert (fused.grad[..., 0] != 0).any()
    assert first.projection.weight.grad is None


def test_the_probe_learns_from_the_labels_and_moves_nothing_else():
    fused = torch.tensor([[[1.0, 5.0], [3.0, 7.0]], [[0.0, 2.0], [9.0, 9.0]]], dtype=torch.float64, requires_grad=True)
    weights = token_weights(torch.tensor([[1, 1], [1, 0]]))
    probe = task_specific([[1.0, 0.0]])
    with torch.no_grad():
        probe.classifier.weight.copy_(torch.tensor([[0.0], [1.0]]))
        probe.classifier.bias.zero_()
    loss = probe.probe_loss(fused, weights, torch.tensor([1, 0]))  # logits (0, 2) and (0, 0)
    assert loss.item() == pytest.approx((-math.log(softmax([0, 2])[1]) + math.log(2)) / 2)
    loss.backward()
    assert fused.grad is None
    assert (probe.projection.weight.grad != 0).any()
    assert torch.equal(probe.probe_loss(fused, weights, torch.tensor([[1], [0]])), loss)
    floats = probe.probe_loss(fused, weights, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    probe.kind = "tokens"
    tokens = probe.probe_loss(fused, weights, torch.tensor([[1, -100], [0, -100]]))
    assert tokens.item() == pytest.approx((-math.log(softmax([0, 1])[1]) + math.log(2)) / 2)
    probe.kind = "labels"
    several = probe.probe_loss(fused, weights, torch.tensor([[0, 1], [0, 1]]))
    assert several.item() == pytest.approx((3 * math.log(2) + math.log(1 + math.exp(-2))) / 4)
    assert torch.equal(floats, several)


@pytest.mark.parametrize(("kind", "loss"), [("values", (1 + 9) / 2), ("labels", None)])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_the_probe_of_one_label_in_either_shape(kind, loss, shape):
    fused = torch.tensor([[[1.0, 5.0], [3.0, 7.0]], [[0.0, 2.0], [9.0, 9.0]]], dtype=torch.float64)
    weights = token_weights(torch.tensor([[1, 1], [1, 0]]))
    one = task_specific([[1.0, 0.0]], n_labels=1, kind=kind)
    with torch.no_grad():
        one.classifier.weight.fill_(1.0)
        one.classifier.bias.zero_()  # logits 2 and 0
    labels = torch.tensor([1.0, 3.0]) if kind == "values" else torch.tensor([1, 0])
    expected = loss or (math.log(1 + math.exp(-2)) + math.log(2)) / 2
    assert one.probe_loss(fused, weights, labels.reshape(shape)).item() == pytest.approx(expected)


def test_the_task_specific_ratio_by_hand():
    fused = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])  # variance 1 and 4
    weights = token_weights(torch.ones(1, 2))
    assert task_specific([[3.0, 0.0]]).ratio(fused, weights).item() == pytest.approx(1 / 5)
    assert task_specific([[1.0, 1.0], [0.0, 1.0]]).ratio(fused, weights).item() == pytest.approx(1.0)


@pytest.mark.parametrize("hidden", [1, 4, 64])
def test_a_fresh_projection_is_orthonormal_and_no_wider_than_the_updates(hidden):
    weight = TaskSpecificLoss(hidden, 2).projection.weight
    assert len(weight) == min(hidden, max(2, hidden // 8))
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), rtol=0, atol=1e-5)
    assert TaskSpecificLoss(hidden, 2, dtype=torch.bfloat16).projection.weight.dtype == torch.bfloat16


OBJECTIVES = {
    "features": lambda u, f, w: FeatureLoss()(u, f, w),
    "cosine": lambda u, f, w: CosineLoss()(u, f, w),
    "task_specific": lambda u, f, w: task_specific([[1.0, 0.0, 2.0, 0.0]])(u, f, w),
    "logits": lambda u, f, w: LogitLoss()(u[:, 0], f[None, :, 0]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_means_over_examples_and_float32_at_least(name):
    """The loss of a batch is the mean of its parts, which accumulation and several processes rely on."""
    torch.manual_seed(0)
    student, fused = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(6, 5, 4, dtype=torch.float64)
    weights = token_weights((torch.arange(5) < torch.tensor([1, 5, 2, 3, 4, 5])[:, None]).double())
    objective = OBJECTIVES[name]
    whole = objective(student, fused, weights)
    parts = [objective(student[i : i + 2], fused[i : i + 2], weights[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=0)
    if name != "task_specific":  # whose weights have a type of their own
        half = objective(student.bfloat16(), fused.bfloat16(), weights)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(whole.item(), rel=3e-2)


def test_numbers_in_float64_lie_on_the_cpu_where_the_device_has_none():
    class OnMPS(torch.Tensor):
        device = torch.device("mps")
        double = property(lambda self: pytest.fail("MPS has no float64"))

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    values = torch.tensor([1.5, 2.0])
    for tensor in (values, values.as_subclass(OnMPS)):
        assert in_float64(tensor).dtype == torch.float64
        assert in_float64(tensor).tolist() == [1.5, 2.0]
