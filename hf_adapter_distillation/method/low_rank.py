"""Updates of one place as products of few columns with coefficients, matched without a tensor of their size."""

from typing import NamedTuple

import torch
from torch.nn.functional import linear

from .layer_match import LayerMatch
from .losses import in_float32, variance_of

COLUMNS_SHARE = 4  # an update has at least so many numbers for each of the teachers' columns
EXTRA_COST = 2  # of narrow products, which run at a lower speed


class LowRankUpdates(NamedTuple):
    r"""The student's and the fused update of one place, by the up-projections of the adapters and their coefficients.

    .. math::
        u = W_s c_s, \quad f = W_f c_f, \quad \lVert u - f \rVert^2
            = c_s^\top W_s^\top W_s c_s - 2 \, c_s^\top W_s^\top W_f c_f + c_f^\top W_f^\top W_f c_f

    The k columns are those of `StackedAdapters.up`. Their products with each other do not depend on the tokens, so a
    token costs k² multiply-adds in place of k d, and no tensor has the size of an update, (batch, seq_len, d).

    Args:
        student_columns: The columns W_s, (d, m + 1).
        student_coefficients: The coefficients c_s, (batch, seq_len, m + 1).
        teacher_columns: The columns W_f, (d, k).
        fused_coefficients: The coefficients c_f, (batch, seq_len, k).
    """

    student_columns: torch.Tensor
    student_coefficients: torch.Tensor
    teacher_columns: torch.Tensor
    fused_coefficients: torch.Tensor

    def match(self, weights: torch.Tensor, hidden_states: torch.Tensor) -> LayerMatch:
        """Compute the same as `FeatureLoss.match` from the updates, in float32, or in float64 for float64.

        Args:
            weights: The `token_weights` of the padding mask, (batch, seq_len).
            hidden_states: What the adapters read, (batch, seq_len, hidden).
        """
        with torch.autocast(weights.device.type, enabled=False):
            own, student, columns, fused, weights = in_float32(*self, weights)

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


def is_cheaper(n_columns: int, n_own: int, input_size: int, output_size: int, tokens: int) -> bool:
    """Return whether low-rank updates cost less time and memory than updates.

    The costs in time are multiply-adds, forward and backward. The student's features are computed once more.

    Args:
        n_columns: The columns of the teachers.
        n_own: The columns of the student.
        input_size: The width of the adapters' input.
        output_size: The width of an update.
        tokens: The tokens of a batch.
    """
    products = n_columns**2 * (output_size + 2 * tokens) + EXTRA_COST * 3 * tokens * input_size * n_own
    return COLUMNS_SHARE * n_columns <= output_size and products <= 2 * tokens * n_columns * output_size


def keeps_digits(device: torch.device) -> bool:
    """Return whether products in float32 keep its digits, without which near updates do not differ; TF32 does not."""
    if device.type != "cuda":
        return True
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 or later, where reading the older flag may be an error
        return matmul.fp32_precision != "tf32"
    return not matmul.allow_tf32
