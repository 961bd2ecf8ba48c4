"""Attention over many frozen adapters, a few at a time, so that its memory hardly grows with their number."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from .._compat import Adapter, LoRA
from .losses import at_least_float32
from .stacking import StackedAdapters, stack_frozen

Chunk: TypeAlias = Mapping[str, Adapter | LoRA]  # frozen adapters of one width, activation and input


class ChunkedAttention(torch.autograd.Function):
    r"""Weighted sum of the updates of frozen adapters by a softmax over their products with a query.

    .. math::
        o = \sum_n a_n u_n, \quad a = \mathrm{softmax}_n(q \cdot u_n + \log w_n)

    The forward pass takes a chunk after the other, with the running maximum and sum of FlashAttention (Dao et al.,
    https://arxiv.org/abs/2205.14135). The backward pass stacks the chunks and computes their features again:

    .. math::
        \partial s_n = a_n (\partial o \cdot u_n - \partial o \cdot o), \quad \partial q = \sum_n \partial s_n u_n

    No tensor has the size of all features, (batch, seq_len, n_teachers, m). No gradient reaches the adapters, their
    input and the weights. `TeacherFusion.fuse_stacked` is the same for few adapters, at five products with their
    projections in place of six.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        log_weights: torch.Tensor | None,
        chunks: Sequence[Chunk],
        dtype: torch.dtype,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the sum and the attention.

        Args:
            query: The query of each token, (batch, seq_len, output).
            log_weights: The logarithms of the weights of the adapters and of a null teacher, (n + 1,), if any.
            chunks: The adapters.
            dtype: The data type of features and updates.
            inputs: The input of each chunk, (batch, seq_len, hidden), which autograd protects from changes in place.

        Returns:
            The sum, (batch, seq_len, output), and the attention, (batch, seq_len, n).
        """
        float_type = at_least_float32(dtype)
        maximum = query.new_full((*query.shape[:-1], 1), -torch.inf, dtype=float_type)  # (B, T, 1)
        total, fused, scores = torch.zeros_like(maximum), torch.zeros_like(query, dtype=float_type), []
        of_chunks: Sequence[torch.Tensor | float] = [0.0] * len(chunks)
        if log_weights is not None:
            *of_chunks, null = log_weights.to(float_type).split([*map(len, chunks), 1])
            maximum, total = torch.zeros_like(maximum) + null, total + 1
        query = query.to(dtype)
        for of_chunk, (stacked, features) in zip(of_chunks, _stacked(chunks, inputs, dtype), strict=True):
            scores.append(stacked.products(query, features) + of_chunk)  # (B, T, n)
            before, maximum = maximum, torch.maximum(maximum, scores[-1].amax(dim=-1, keepdim=True))
            shrink, parts = (before - maximum).exp(), (scores[-1] - maximum).exp()
            total = total * shrink + parts.sum(dim=-1, keepdim=True)
            fused = fused * shrink + stacked.weighted_update(parts.to(dtype), features)
        fused = (fused / total).to(dtype)  # (B, T, d)
        attention = (torch.cat(scores, dim=-1) - maximum - total.log()).exp()  # (B, T, n)
        ctx.chunks, ctx.dtype = chunks, dtype
        ctx.save_for_backward(attention, fused, *inputs)
        ctx.mark_non_differentiable(attention)
        return fused, attention

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Compute the gradient of the query, (batch, seq_len, output)."""
        attention, fused, *inputs = ctx.saved_tensors
        gradient, dtype = gradient.to(ctx.dtype), attention.dtype
        of_sum = (gradient.to(dtype) * fused.to(dtype)).sum(dim=-1, keepdim=True)  # (B, T, 1)
        of_query = torch.zeros((), dtype=dtype)
        parts = attention.split([*map(len, ctx.chunks)], dim=-1)
        for part, (stacked, features) in zip(parts, _stacked(ctx.chunks, inputs, ctx.dtype), strict=True):
            of_scores = part * (stacked.products(gradient, features) - of_sum)  # (B, T, n)
            of_query = of_query + stacked.weighted_update(of_scores.to(ctx.dtype), features)
        return of_query.to(ctx.dtype), None, None, None, *(None for _ in inputs)


def _stacked(
    chunks: Sequence[Chunk], inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[StackedAdapters, torch.Tensor]]:
    """Yield each chunk, stacked, with its features, (batch, seq_len, n, m)."""
    for chunk, hidden_states in zip(chunks, inputs, strict=True):
        stacked = stack_frozen(chunk, dtype)
        yield stacked, stacked.features(hidden_states.to(dtype))
