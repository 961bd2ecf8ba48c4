"""Calibration of the teachers' scores on the data of a new task."""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits


def fit_platt(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Platt scaling: the slope a and the offset b by which a score r predicts the label as :math:`\sigma(a r + b)`.

    The maximum of the likelihood with Platt's smoothed labels, :math:`(N_1 + 1) / (N_1 + 2)` for the N_1 positive and
    :math:`1 / (N_0 + 2)` for the N_0 negative examples, which keeps it finite where a score separates them (Platt,
    Probabilistic outputs for support vector machines, 1999).

    Args:
        scores: The scores of each teacher, (n_teachers, n_examples).
        labels: 0 or 1, (n_examples,).

    Returns:
        Slope and offset, (n_teachers, 2), float64. A teacher whose scores tell nothing has a slope near 0.
    """
    scores = scores.detach().double()
    positive = labels.to(scores) > 0.5
    n_positive, n_negative = positive.sum(), (~positive).sum()
    targets = torch.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2)).expand_as(scores)
    mean = scores.mean(dim=1, keepdim=True)  # (N, 1)
    deviation = scores.std(dim=1, keepdim=True, correction=0).clamp(min=1e-12)  # (N, 1)
    standard = (scores - mean) / deviation  # (N, n)
    line = torch.zeros(len(scores), 2, dtype=torch.float64, device=scores.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        predicted = line[:, :1] * standard + line[:, 1:]  # (N, n)
        value = binary_cross_entropy_with_logits(predicted, targets, reduction="sum")
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    slope, offset = line.detach().split(1, dim=1)  # (N, 1) each
    return torch.cat([slope / deviation, offset - slope * mean / deviation], dim=1)
