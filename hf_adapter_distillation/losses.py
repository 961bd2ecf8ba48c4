"""The terms that distillation adds to the task loss."""

from collections.abc import Iterable

import torch

# Keeps the loss finite where all teachers put out the same constant, for instance zero.
MINIMAL_VARIANCE = 1e-6


def token_weights(mask: torch.Tensor) -> torch.Tensor:
    """The weight of each token in the mean over the tokens of its sequence.

    Args:
        mask: True (or 1) at the tokens that count, (batch, seq_len).

    Returns:
        The weights, (batch, seq_len), float32 (float64 for a float64 mask). Those of a sequence sum to 1, or are all 0
        if no token counts.
    """
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32))
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def feature_matching_loss(
    student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor
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
        weights: What `token_weights` makes of the padding mask, (batch, seq_len).

    Returns:
        The loss, a float32 scalar (float64 for float64 inputs), 0 for a batch of padding only.
    """
    dtype = torch.promote_types(student_output.dtype, torch.float32)
    weights = weights.to(dtype)
    # The variance of a sequence is the mean of its tokens' variances and the variance of their means.
    target = fused_output.detach().to(dtype)
    means = target.mean(dim=-1)  # (B, T)
    variances = (target - means.unsqueeze(-1)).square().mean(dim=-1)  # (B, T)
    mean = (weights * means).sum(dim=1, keepdim=True)  # (B, 1)
    variance = (weights * (variances + (means - mean).square())).sum(dim=1)  # (B,)
    errors = (student_output.to(dtype) - fused_output.to(dtype)).square().mean(dim=-1)  # (B, T)
    error = (weights * errors).sum(dim=1)  # (B,)
    return (error / variance.clamp(min=MINIMAL_VARIANCE)).mean()


def logit_matching_loss(
    student_logits: torch.Tensor, fused_logits: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared difference of the student's logits from those of the fused pass, for the carrier `dual`.

    Logit regression (Ba and Caruana, https://arxiv.org/abs/1312.6184) fits all heads: classes, labels, scores, tokens.

    Args:
        student_logits: The student's logits, of any shape.
        fused_logits: The logits of the fused pass, of the same shape. No gradient flows through them.
        weights: For logits of tokens, (batch, seq_len, ...), what `token_weights` makes of the padding mask.

    Returns:
        The mean over all logits (but those of padding), a float32 scalar (float64 for float64 inputs).
    """
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    errors = (student_logits.to(dtype) - fused_logits.detach().to(dtype)).square()
    if weights is None:
        return errors.mean()
    errors = errors.reshape(*weights.shape, -1).mean(dim=2)  # (B, T)
    return (weights.to(dtype) * errors).sum(dim=1).mean()


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
