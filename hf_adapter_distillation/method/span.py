"""Updates of a layer as combinations of few columns, which are matched without the size of an update."""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from .layer_match import LayerMatch
from .losses import in_float32, variance_of


class Span(NamedTuple):
    r"""The student's and the fused update of one place, as combinations of the up-projections of the adapters.

    .. math::
        u = W_s c_s, \quad f = W_f c_f, \quad \lVert u - f \rVert^2
            = c_s^\top W_s^\top W_s c_s - 2 \, c_s^\top W_s^\top W_f c_f + c_f^\top W_f^\top W_f c_f

    The k columns are those of `StackedAdapters.up`. Their products with each other do not depend on the tokens, so a
    token costs k² multiply-adds in place of k d, and no tensor has the size of an update, (batch, seq_len, d).

    Args:
        names: The n teachers.
        attention: The attention over them, (batch, seq_len, n), detached.
        student_columns: The columns W_s, (d, m + 1).
        student: The combinations c_s, (batch, seq_len, m + 1).
        columns: The columns W_f of the teachers, (d, k).
        fused: The combinations c_f, (batch, seq_len, k).
    """

    names: tuple[str, ...]
    attention: torch.Tensor
    student_columns: torch.Tensor
    student: torch.Tensor
    columns: torch.Tensor
    fused: torch.Tensor

    def match(self, weights: torch.Tensor, hidden_states: torch.Tensor) -> LayerMatch:
        """Compute what `FeatureLoss.match` computes from the updates, in float32, or in float64 for float64.

        Args:
            weights: The `token_weights` of the padding mask, (batch, seq_len).
            hidden_states: What the adapters read, (batch, seq_len, hidden).
        """
        with torch.autocast(weights.device.type, enabled=False):
            student, fused, own, columns, weights = in_float32(
                self.student, self.fused, self.student_columns, self.columns, weights
            )

            def mean_square(squares: torch.Tensor) -> torch.Tensor:
                return (weights * squares).sum(dim=1).clamp(min=0) / len(columns)  # (B,)

            of_student = (student * linear(student, own.T @ own)).sum(dim=-1)  # (B, T)
            of_fused = (fused * linear(fused, columns.T @ columns)).sum(dim=-1)
            of_both = (student * linear(fused, own.T @ columns)).sum(dim=-1)
            error = mean_square(of_student - 2 * of_both + of_fused)
            with torch.no_grad():
                fused_power = mean_square(of_fused)
                means = (weights * linear(fused, columns.mean(dim=0).unsqueeze(0)).squeeze(-1)).sum(dim=1)  # (B,)
                power = torch.maximum(mean_square(of_student), fused_power)
                variance = (fused_power - means.square()).clamp(min=0)
        return LayerMatch(error, variance, power, variance_of(hidden_states, weights))
