"""The terms that distillation adds to the task loss."""

from collections.abc import Iterable

import torch

# Keeps the loss finite where all teachers put out the same constant, for instance zero.
MINIMAL_VARIANCE = 1e-6


def feature_matching_loss(
    student_output: torch.Tensor, fused_output: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Relative squared error of the student's update with respect to the teachers' fused update, in one layer.

    .. math::
        \mathcal{L} = \frac{1}{B} \sum_b \frac{\frac{1}{T_b d} \sum_t \lVert u_{bt} - f_{bt} \rVert^2}
                                              {\mathrm{Var}_{t,i}(f_{bti})}

    with student output u, fused output f, and t running over the T_b non-padding tokens of sequence b. The variance
    makes layers and models comparable; no gradient flows through it. Tokens are averaged within their sequence and
    sequences within the batch, so that the loss of a batch is the mean over its parts however it is split
    (gradient accumulation, several processes).

    Feature matching is the objective of Wang et al., https://arxiv.org/abs/2312.16261; the normalisation is ours.

    Args:
        student_output: The student's update to the residual stream, (batch, seq_len, hidden).
        fused_output: The teachers' fused update, (batch, seq_len, hidden). Detach it where it is a fixed target.
        mask: True (or 1) at the tokens that count, (batch, seq_len). By default all count.

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs), 0 for a batch of padding only.
    """
    dtype = torch.promote_types(student_output.dtype, torch.float32)
    student_output, fused_output = student_output.to(dtype), fused_output.to(dtype)
    if mask is None:
        mask = student_output.new_ones(student_output.shape[:2])  # (B, T)
    mask = mask.to(dtype)
    weight = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1)).unsqueeze(-1)  # (B, T, 1), a row sums to 1 or 0
    target = fused_output.detach()
    mean = (weight * target).sum(dim=1, keepdim=True).mean(dim=-1, keepdim=True)  # (B, 1, 1)
    variance = (weight * (target - mean).square()).sum(dim=1).mean(dim=-1)  # (B,)
    error = (weight * (student_output - fused_output).square()).sum(dim=1).mean(dim=-1)  # (B,)
    return (error / variance.clamp(min=MINIMAL_VARIANCE)).mean()


def value_regularization(values: Iterable[torch.Tensor]) -> torch.Tensor:
    r"""Squared Frobenius distance of the value matrices from the identity, summed over layers.

    As in AdapterFusion (Pfeiffer et al., https://arxiv.org/abs/2005.00247): it keeps each fused output near a convex
    combination of the teachers' outputs.

    Args:
        values: The value matrices, (hidden, hidden) each.

    Returns:
        A scalar.
    """
    distances = [
        (value - torch.eye(len(value), dtype=value.dtype, device=value.device)).square().sum() for value in values
    ]
    return torch.stack(distances).sum()
