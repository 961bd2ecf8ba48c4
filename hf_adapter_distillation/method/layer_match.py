"""The relative squared errors of all layers at once, which have a bound whatever the teachers say."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

MINIMAL_VARIANCE = 1e-6  # keeps the loss finite where all teachers put out the same constant, for instance zero
RELATIVE_FLOOR = 0.1  # of the mean over the layers: a smaller variance of the teachers counts as this share of it


class LayerMatch(NamedTuple):
    """Match of one layer, (batch,) each: its squared errors, and what they are relative to, without gradient."""

    error: torch.Tensor  # mean square of the student's update less the fused one
    variance: torch.Tensor  # of the fused update
    power: torch.Tensor  # mean square of the fused or of the student's update, the larger one
    input_variance: torch.Tensor  # of the states that the layer's adapters read


def bounded_losses(matches: Sequence[LayerMatch]) -> torch.Tensor:
    r"""Compute the relative squared errors of all layers, (n_layers,), whose mean is at most 4 / `RELATIVE_FLOOR`.

    .. math::
        \mathcal{L}_l = \frac{1}{B} \sum_b \frac{e_{lb}}{\max\big(\mathrm{Var}(f_{lb}), \;
            0.1 \, \mathrm{Var}(h_{lb}) \, \frac{1}{L} \sum_k p_{kb} / \mathrm{Var}(h_{kb})\big)}

    with the squared error e of `FeatureLoss`, the states h that the adapters of a layer read, and the power p, the
    mean square of the fused or of the student's update, the larger one. In most layers the variance of the fused
    update f is the larger term, and the loss is that of `FeatureLoss`. A layer in which the teachers say nothing, or
    nearly nothing, would outweigh all others and the task with it. There the second term stands for an update as large
    as in the other layers, in proportion to the states it is added to: in language models they grow a hundredfold
    from layer to layer. Since the error is at most 4 p, the mean over the layers has a bound.
    """
    error, variance, power, input_variance = (torch.stack(parts) for parts in zip(*matches, strict=True))  # (L, B)
    input_variance = input_variance.clamp(min=MINIMAL_VARIANCE)
    ratios = (power / input_variance).nan_to_num(0.0, 0.0, 0.0)  # an overflow counts in its own layer alone
    floor = RELATIVE_FLOOR * input_variance * ratios.mean(dim=0)  # (L, B)
    return (error / variance.maximum(floor).clamp(min=MINIMAL_VARIANCE)).mean(dim=1)
