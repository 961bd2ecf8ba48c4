import math

import pytest
import torch

from hf_adapter_distillation.method.logit_losses import (
    CrossTaskLoss,
    LogitLoss,
    divergence,
    log_mixture,
    logit_matching_loss,
    two_classes,
)
from hf_adapter_distillation.method.losses import token_weights


def softmax(row):
    exponentials = [math.exp(x) for x in row]
    return [x / sum(exponentials) for x in exponentials]


def test_logits_by_hand():
    student = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    fused = torch.tensor([[1.0, 0.0], [3.0, -1.0]], requires_grad=True)
    loss = logit_matching_loss(student, fused)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 9) / 4)
    assert student.grad.tolist() == [[0.0, 1.0], [-1.5, 0.0]]
    assert fused.grad is None
    assert logit_matching_loss(student.bfloat16(), fused.bfloat16()).dtype == torch.float32
    assert logit_matching_loss(student.double(), fused.double()).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_labels_by_hand(temperature):
    logits, teachers = [[0.0, math.log(3)]], [[[0.0, 0.0]], [[0.0, math.log(3)]]]
    student = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    of_teachers = torch.tensor(teachers, dtype=torch.float64, requires_grad=True)
    loss = LogitLoss(temperature)(student, of_teachers)
    p = softmax([x / temperature for x in logits[0]])
    each = [softmax([x / temperature for x in teacher[0]]) for teacher in teachers]
    soft = [(a + b) / 2 for a, b in zip(*each, strict=True)]
    if temperature == 1:
        assert soft == pytest.approx([0.375, 0.625])
        assert p == pytest.approx([0.25, 0.75])
    divergence = sum(q * math.log(q / r) for q, r in zip(soft, p, strict=True))
    assert loss.item() == pytest.approx(temperature**2 * divergence)
    loss.backward()
    assert student.grad[0].tolist() == pytest.approx([temperature * (r - q) for q, r in zip(soft, p, strict=True)])
    assert of_teachers.grad is None


def test_soft_labels_of_tokens_leave_out_padding():
    torch.manual_seed(0)
    student, teachers = torch.randn(2, 3, 5), torch.randn(4, 2, 3, 5)
    weights = token_weights(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    loss = LogitLoss()(student, teachers, weights)
    rows = [LogitLoss()(student[b, :n], teachers[:, b, :n]) for b, n in ((0, 2), (1, 1))]
    assert loss.item() == pytest.approx(sum(rows).item() / 2)
    assert LogitLoss()(student, student.unsqueeze(0)).item() == pytest.approx(0, abs=1e-6)


def test_cross_task_by_hand():
    """Teacher a is on the wrong side of the first item; of the two wrong items the second is before the third."""
    r, labels = [0.5, -0.2, 0.1], torch.tensor([1, 0, 0])
    teachers = [[-2.0, -1.5, -3.0], [3.0, 0.5, -4.0]]
    student = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    loss = CrossTaskLoss(temperature=2.0, margin=1.0)(student, torch.tensor(teachers, dtype=torch.float64), labels)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    corrected = [[1.0, -1.5, -3.0], [3.0, -1.0, -4.0]]
    soft = [(sigmoid(a / 2) + sigmoid(b / 2)) / 2 for a, b in zip(*corrected, strict=True)]
    own = [sigmoid(x / 2) for x in r]
    matched = [q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) for q, p in zip(soft, own, strict=True)]
    ranked = math.log(1 + math.exp(r[2] - r[1]))  # one pair, whose weight cancels out
    assert loss.item() == pytest.approx(4 * sum(matched) / 3 + ranked)
    loss.backward()
    gradient = [2 * (p - q) / 3 for q, p in zip(soft, own, strict=True)]
    gradient[1] -= sigmoid(r[2] - r[1])
    gradient[2] += sigmoid(r[2] - r[1])
    assert student.grad.tolist() == pytest.approx(gradient)


def test_cross_task_without_labels_corrects_nothing_and_compares_all():
    student, teachers = torch.tensor([0.0, 1.0]), torch.tensor([[2.0, -2.0]])
    loss = CrossTaskLoss(temperature=1.0)
    ranked = math.log(1 + math.exp(1.0))
    matched = LogitLoss(1.0)(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[[0.0, 2.0], [0.0, -2.0]]]))
    assert loss(student, teachers, None).item() == pytest.approx(matched.item() + ranked, rel=1e-6)
    corrected = loss(student, teachers, torch.tensor([0, 1]))  # both are clipped, and no two share a label
    assert corrected.item() != pytest.approx(loss(student, teachers, None).item(), rel=1e-2)
    ties = loss(student, torch.zeros(1, 2), None)
    assert ties.item() == pytest.approx(
        LogitLoss(1.0)(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.zeros(1, 2, 2)).item()
    )


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_divergence_by_hand(beta):
    """Of GKD's definition: at 0 and 1 the forward and the reverse divergence, between them a mean of both."""
    p, q = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    target, student = (torch.tensor(x, dtype=torch.float64).log() for x in (p, q))
    assert divergence(target, student, beta).item() == pytest.approx(expected)
    assert divergence(target, target, beta).item() == pytest.approx(0, abs=1e-12)
    certain = divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log(), beta)
    assert certain.isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_label_that_all_exclude_adds_nothing(beta):
    """Some models give -inf to labels, or to tokens of the vocabulary, that do not exist."""
    torch.manual_seed(0)
    teachers, logits = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    results = []
    for width in (0, 1):
        student = logits.clone().requires_grad_()
        of_student, of_teachers = (
            torch.cat([y, y.new_full((*y.shape[:-1], width), -torch.inf)], -1) for y in (student, teachers)
        )
        loss = LogitLoss(temperature=1.5, beta=beta)(of_student, of_teachers)
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
    assert results[0][0] > 0


def test_teachers_with_larger_shares_count_more():
    torch.manual_seed(0)
    student, teachers = torch.randn(2, 3), torch.randn(2, 2, 3)
    shares = torch.tensor([0.9, 0.1])
    soft = 0.9 * (teachers[0] / 2).softmax(-1) + 0.1 * (teachers[1] / 2).softmax(-1)
    torch.testing.assert_close(log_mixture(teachers, 2.0, shares), soft.log())
    expected = 4 * (soft * (soft.log() - (student / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(LogitLoss()(student, teachers, None, shares), expected)


def test_an_example_without_a_label_is_not_corrected_and_forms_no_pairs():
    student, teachers = torch.tensor([0.3, -0.5, 0.2]), torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.1, 0.3]])
    labels = torch.tensor([1, 0, -100])
    loss = CrossTaskLoss()(student, teachers, labels)
    corrected = torch.tensor([[1.0, -1.0, -1.0], [1.0, -1.0, 0.3]])
    expected = LogitLoss(2.0)(two_classes(student), two_classes(corrected))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
