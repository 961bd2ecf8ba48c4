"""Platt scaling against scikit-learn, and where there is nothing to calibrate."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from hf_adapter_distillation.teachers.calibration import fit_platt


def reference(scores, labels):
    """The same maximum: each example counts as positive and as negative, with the smoothed label as its weight."""
    n_positive, n_negative = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    x = np.concatenate([scores, scores])[:, None]
    y = np.concatenate([np.ones_like(labels), np.zeros_like(labels)])
    regression = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    regression.fit(x, y, sample_weight=np.concatenate([targets, 1 - targets]))
    return [regression.coef_.item(), regression.intercept_.item()]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(4, 60), st.floats(0.1, 20))
def test_equals_a_logistic_regression_on_smoothed_labels(seed, n, scale):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    labels[0], labels[1] = 0, 1
    scores = scale * (torch.randn(2, n, generator=generator, dtype=torch.float64) + labels) + 3
    for (slope, offset), one in zip(fit_platt(scores, labels).tolist(), scores, strict=True):
        expected_slope, expected_offset = reference(one.numpy(), labels.numpy())
        expected = torch.sigmoid(expected_slope * one + expected_offset)
        torch.testing.assert_close(torch.sigmoid(slope * one + offset), expected, rtol=0, atol=1e-3)


def test_a_score_that_tells_nothing_becomes_the_share_of_positives():
    labels = torch.tensor([1, 0, 0, 0] * 25)
    slope, offset = fit_platt(torch.full((1, 100), 7.0), labels)[0].tolist()
    probability = torch.tensor(slope * 7 + offset).sigmoid().item()
    assert probability == pytest.approx((25 * 26 / 27 + 75 / 77) / 100, abs=1e-6)


def test_scores_that_separate_the_labels_stay_finite():
    line = fit_platt(torch.tensor([[-1e4, -1e4, 1e4, 1e4], [1.0, 2.0, -1.0, -2.0]]), torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(line).all()
    assert line[0, 0] > 0 > line[1, 0], "one that is turned round is turned back"
    assert torch.isfinite(fit_platt(torch.randn(1, 5), torch.ones(5))).all(), "one label alone"
