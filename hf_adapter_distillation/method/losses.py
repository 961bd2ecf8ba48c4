"""Loss terms that distillation adds to the task loss.

Each is a scalar in float32 (float64 for float64 inputs). Its weights, (batch, seq_len), are the `token_weights` of the
padding mask.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.linalg import vector_norm
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, linear, mse_loss

from .layer_match import MINIMAL_VARIANCE, LayerMatch

MINIMAL_LENGTH = 1e-8  # keeps the cosine finite where the teachers put out zero
LENGTH_FLOOR = 1e-2  # of the length of the fused update: a shorter update of the student counts as this share of it
PROJECTION_DIVISOR = 8  # `TaskSpecificLoss` matches the updates in their width divided by this number


def token_weights(mask: torch.Tensor) -> torch.Tensor:
    """Return the weight of each token in the mean over the tokens of its sequence, (batch, seq_len).

    The mask, of the same shape, is True (or 1) at the tokens that count. The weights of a sequence sum to 1, or are
    all 0 if no token counts.
    """
    mask = mask.to(at_least_float32(mask.dtype))
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64: the data type of scores, weights and losses."""
    return torch.promote_types(dtype, torch.float32)


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64; on the CPU if its device has no such numbers, as MPS."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def in_float32(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors in float32, or in float64 if the first is."""
    return [tensor.to(at_least_float32(tensors[0].dtype)) for tensor in tensors]


def mean_over_tokens(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of values; with weights, of the tokens and then of the sequences, (batch, seq_len, ...)."""
    if weights is None:
        return values.mean()
    of_tokens = values.flatten(2).mean(dim=2) if values.dim() > 2 else values  # (B, T)
    return (weights.to(values.dtype) * of_tokens).sum(dim=1).mean()


def _mean_square(weights: torch.Tensor, output: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean square of an output, or of its difference to a target, in each sequence, (batch,)."""
    output, weights = in_float32(output, weights)
    difference = output if target is None else output - target.to(output.dtype)
    return (weights * difference.square().mean(dim=-1)).sum(dim=1)


def variance_of(output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the variance of an output over the tokens and dimensions of each sequence, (batch,), without gradient."""
    # It is the mean of the tokens' variances and the variance of their means.
    output, weights = in_float32(output.detach(), weights)
    means = output.mean(dim=-1)  # (B, T)
    variances = (output - means.unsqueeze(-1)).square().mean(dim=-1)  # (B, T)
    mean = (weights * means).sum(dim=1, keepdim=True)  # (B, 1)
    return (weights * (variances + (means - mean).square())).sum(dim=1)


class FeatureLoss(nn.Module):
    r"""Relative squared error of the student's update with respect to the teachers' fused update, in one layer.

    .. math::
        \mathcal{L} = \frac{1}{B} \sum_b \frac{\frac{1}{T_b d} \sum_t \lVert u_{bt} - f_{bt} \rVert^2}
                                              {\mathrm{Var}_{t,i}(f_{bti})}

    with student output u, fused output f, and t running over the T_b non-padding tokens of sequence b. The variance
    makes layers and models comparable; no gradient flows through it. Tokens are averaged within their sequence and
    sequences within the batch, so the loss of a batch is the mean over its micro-batches, however it is split. In a
    training `bounded_losses` computes it for all layers at once, with a floor of the variance.

    Feature matching is the objective of Wang et al., https://arxiv.org/abs/2312.16261; the normalisation is ours.
    """

    def forward(self, student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the loss, 0 for a batch of padding only.

        Args:
            student_output: The student's update to the residual stream, (batch, seq_len, hidden).
            fused_output: The teachers' fused update, (batch, seq_len, hidden). Detach it where it is a fixed target.
            weights: The `token_weights` of the padding mask, (batch, seq_len).
        """
        return self.of_sequences(student_output, fused_output, weights).mean()

    @staticmethod
    def of_sequences(student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the loss of each sequence, (batch,), whose mean `forward` returns."""
        variance = variance_of(fused_output, weights)
        return _mean_square(weights, student_output, fused_output) / variance.clamp(min=MINIMAL_VARIANCE)

    @staticmethod
    def match(
        student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor, hidden_states: torch.Tensor
    ) -> LayerMatch:
        """Match one layer for `bounded_losses`; the adapters' input is (batch, seq_len, hidden)."""
        outputs = (student_output.detach(), fused_output.detach())
        return LayerMatch(
            _mean_square(weights, student_output, fused_output),
            variance_of(fused_output, weights),
            torch.maximum(*(_mean_square(weights, output) for output in outputs)),
            variance_of(hidden_states, weights),
        )


class CosineLoss(nn.Module):
    r"""One minus the cosine between the student's update and the teachers' fused update, in one layer.

    .. math::
        \mathcal{L} = \frac{1}{B} \sum_b \frac{1}{T_b} \sum_t 1 - \frac{u_{bt} \cdot f_{bt}}
            {\max\big(\lVert u_{bt} \rVert, \; 0.01 \, \lVert f_{bt} \rVert\big) \, \lVert f_{bt} \rVert}

    Only the direction of each token's update is matched; `FeatureLoss` matches its length, too. DistilBERT matches
    hidden states by their cosine, https://arxiv.org/abs/1910.01108.

    An update shorter than a hundredth of the fused one counts as that long, without gradient through this floor: near
    an update of zero, where a LoRA starts, the gradient of the cosine has no bound.
    """

    def forward(self, student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the loss, from 0 to 2, of the arguments of `FeatureLoss`."""
        student, fused = in_float32(student_output, fused_output)
        fused_length = vector_norm(fused, dim=-1, keepdim=True).clamp(min=MINIMAL_LENGTH)  # (B, T, 1)
        length = vector_norm(student, dim=-1, keepdim=True).maximum(LENGTH_FLOOR * fused_length.detach())
        cosines = (student / length * (fused / fused_length)).sum(dim=-1)  # (B, T)
        return mean_over_tokens(1 - cosines, weights)

    def match(
        self,
        student_output: torch.Tensor,
        fused_output: torch.Tensor,
        weights: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the loss, which needs no floor: it has a bound of its own."""
        return self(student_output, fused_output, weights)


class TaskSpecificLoss(nn.Module):
    r"""`FeatureLoss` in the subspace of the updates that matters for the task, in one layer.

    .. math::
        \mathcal{L} = \mathrm{FeatureLoss}(P u, P f), \quad
        \mathcal{L}_\mathrm{probe} = \mathrm{task\ loss}\Big(C \sum_t w_t P f_t\Big)

    The projection P and the classifier C behind it learn the task from the detached fused output only. The match does
    not train P. So the student follows its teachers where it matters for the task, and is free elsewhere.

    After the supervised projection of TSKD (BrainDistill, Xie et al., https://arxiv.org/abs/2601.17625). There the
    projection preserves the classifier of a teacher of the task; here the teachers have learnt other tasks, so each
    layer's projection learns the new one from its labels while the student is trained.
    """

    def __init__(
        self,
        hidden_size: int,
        n_labels: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        kind: str = "classes",
    ) -> None:
        super().__init__()
        self.kind = kind  # of the labels (`heads.kind_of_labels`)
        width = min(hidden_size, max(n_labels, hidden_size // PROJECTION_DIVISOR))
        self.projection = nn.Linear(hidden_size, width, bias=False, device=device, dtype=dtype)
        self.classifier = nn.Linear(width, n_labels, device=device, dtype=dtype)
        with torch.no_grad():  # in float32, since there is no half-precision decomposition
            self.projection.weight.copy_(nn.init.orthogonal_(torch.empty(width, hidden_size)))

    def forward(self, student_output: torch.Tensor, fused_output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compute the match, of the arguments of `FeatureLoss`, without gradient to the projection."""
        student, fused = self._project(student_output, fused_output)
        return FeatureLoss.of_sequences(student, fused, weights).mean()

    def match(
        self,
        student_output: torch.Tensor,
        fused_output: torch.Tensor,
        weights: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> LayerMatch:
        """Match one layer for `bounded_losses`, without gradient to the projection."""
        student, fused = self._project(student_output, fused_output)
        return FeatureLoss.match(student, fused, weights, hidden_states)

    def _project(self, *outputs: torch.Tensor) -> list[torch.Tensor]:
        projection = self.projection.weight.detach()  # (p, d)
        return [linear(output.to(projection.dtype), projection) for output in outputs]

    def probe_loss(self, fused_output: torch.Tensor, weights: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the task loss that trains projection and classifier: cross-entropy, or the squared error of values.

        The labels are classes of sequences, (batch,), or of tokens, (batch, seq_len), -100 where there is none; or
        several labels at once, (batch, n_labels), or values, (batch,) or (batch, 1). The head says which. Classes as
        floating point numbers are several labels, as in transformers.
        """
        logits = self.classifier(self.projection(fused_output.detach().to(self.projection.weight.dtype)))  # (B, T, C)
        logits = logits.to(at_least_float32(logits.dtype))
        if self.kind == "tokens":
            counted = (labels != -100).sum().clamp(min=1)
            return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / counted
        logits = torch.einsum("bt,btc->bc", weights.to(logits.dtype), logits)  # (B, C)
        if self.kind == "classes" and not labels.is_floating_point():
            return cross_entropy(logits, labels.reshape(-1))
        targets = labels.reshape(logits.shape).to(logits.dtype)
        if self.kind == "values":
            return (logits - targets).square().mean()
        return binary_cross_entropy_with_logits(logits, targets)

    @torch.no_grad()
    def ratio(self, fused_output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the task-specific ratio: the share of the fused output's variance that the projection keeps.

        It is 0 where the match ignores the teachers, and 1 where it sees all of their output.
        """
        fused, projection, weights = in_float32(fused_output, self.projection.weight, weights)
        basis, _ = torch.linalg.qr(projection.T)  # (d, p)
        weights = weights / len(weights)
        fused = fused - torch.einsum("bt,btd->d", weights, fused)  # (B, T, d)
        kept, total = ((weights * part.square().sum(dim=-1)).sum() for part in (fused @ basis, fused))
        return kept / total.clamp(min=MINIMAL_VARIANCE)


def value_regularization(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute the squared Frobenius distance of the value matrices from the identity, summed over layers.

    As in AdapterFusion (Pfeiffer et al., https://arxiv.org/abs/2005.00247): it keeps each fused output near a convex
    combination of the teachers' outputs.
    """
    values = list(values)
    identities = {len(value): torch.eye(len(value), dtype=value.dtype, device=value.device) for value in values}
    distances = [mse_loss(value, identities[len(value)], reduction="sum") for value in values]
    return torch.stack(distances).sum()
