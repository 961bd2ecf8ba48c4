"""Attention over teachers in one layer: the trainable query, key and value of stage 2."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from .losses import TaskSpecificLoss, at_least_float32
from .stacking import StackedAdapters


class TeacherFusion(nn.Module):
    r"""Fusion of the teachers' updates at one location: a bottleneck layer, or a projection with LoRA.

    .. math::
        q = Q h, \quad k_n = K u_n, \quad v_n = V u_n, \quad a = \mathrm{softmax}_n(q \cdot k_n), \quad
        \mathrm{fused} = \sum_n a_n v_n

    with h the input of the layer's adapters and u_n the update of teacher n. The key has no bias: it would add the
    same number to each score and vanish in the softmax. The value starts at the identity, so the first fused output
    is a convex combination of the updates. The size of the module does not depend on the number of teachers. It also
    holds the layer's weights of the objective `task_specific`.

    Sources: Wang et al., https://arxiv.org/abs/2312.16261 (Q_l, K_l, V_l of each layer); AdapterFusion,
    https://arxiv.org/abs/2005.00247 (the form of the attention).

    Args:
        hidden_size: The width d of the adapters' input.
        output_size: The width of their updates. By default the same.
        location: The name of the layer in the base model, for logs and plots.
        in_decoder: Whether the layer reads states of a decoder, where padding follows the decoder's mask.
    """

    def __init__(
        self,
        hidden_size: int,
        output_size: int | None = None,
        location: str = "",
        in_decoder: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.location = location
        self.in_decoder = in_decoder
        output_size = output_size or hidden_size
        self.query = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)
        self.key = nn.Linear(output_size, output_size, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(output_size, output_size, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.normal_(self.key.weight, std=0.02)
        nn.init.eye_(self.value.weight)
        self.layer_weight = 1.0  # in the mean of the layers' losses
        self.task_specific: TaskSpecificLoss | None = None

    def forward(self, hidden_states: torch.Tensor, updates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the fused update from the update of each adapter, whatever the adapter's form.

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            updates: The addition of each adapter to the residual, (batch, seq_len, n_teachers, output).

        Returns:
            The fused output, (batch, seq_len, output), and the detached attention over teachers,
            (batch, seq_len, n_teachers), whose rows sum to 1.
        """
        # q . (K u_n) = (K^T q) . u_n, and sum_n a_n V u_n = V sum_n a_n u_n: one product with K and V, not N.
        query = self.query(hidden_states) @ self.key.weight  # (B, T, d)
        scores = torch.einsum("btd,btnd->btn", query, updates.to(query.dtype))  # (B, T, N)
        attention = _softmax(scores)  # (B, T, N)
        fused_update = torch.einsum("btn,btnd->btd", attention.to(updates.dtype), updates)  # (B, T, d)
        return self.value(fused_update), attention.detach()  # (B, T, d), (B, T, N)

    def fuse_stacked(
        self, hidden_states: torch.Tensor, stacks: Sequence[StackedAdapters], features: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Compute the same from the bottleneck features, without the update of any single adapter.

        With the up-projection W and bias b of an adapter, the update is u = W z + b and (but for the query's bias)

        .. math::
            q \cdot K u = (h^\top Q^\top K W) z + h^\top Q^\top K b, \quad
            \sum_n a_n V u_n = V \sum_n (W_n (a_n z_n) + a_n b_n)

        Products of more than two matrices are computed in the cheapest order, forward and backward: for many tokens
        with the up-projections, or each other, first, for many teachers with the hidden states. No tensor has the size
        of the teachers' updates, (batch, seq_len, n_teachers, hidden).

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            stacks: The adapters, in the order of the returned attention.
            features: The features of each stack, (batch, seq_len, n, m).
        """
        width = sum(stacked.up.shape[1] for stacked in stacks)
        tokens, hidden_size = hidden_states.shape[0] * hidden_states.shape[1], hidden_states.shape[2]
        in_graph = int(hidden_states.requires_grad)
        # Multiply-adds of each order, forward and backward, divided by the hidden size, without their common part.
        # Updates of another width than the input (LoRA in feed-forward blocks) count as if they had the same width.
        product_first = 3 * hidden_size + 2 * tokens < 5 * tokens  # K^T Q before K^T Q h
        query_cost = (min(3 * hidden_size + 2 * tokens, 5 * tokens) + in_graph * tokens) * hidden_size
        keys_first = width * (5 * hidden_size + in_graph * tokens) < query_cost
        values_first = width * (2 * hidden_size + tokens) < 3 * tokens * hidden_size

        query, key = self.query, self.key.weight
        projections: list[tuple[torch.Tensor, torch.Tensor | None]] = [(stacked.up, None) for stacked in stacks]
        if keys_first:
            projected_query = hidden_states  # (B, T, d)
            keys = [key @ stacked.up for stacked in stacks]  # (d, n * m + n) each
            projections = [(query.weight.T @ k, query.bias @ k) for k in keys]
        elif product_first:
            projected_query = linear(hidden_states, key.T @ query.weight, query.bias @ key)  # (B, T, d), K^T q
        else:
            projected_query = query(hidden_states) @ key  # (B, T, d), K^T q
        scores = [_scores(projected_query, projection, z) for projection, z in zip(projections, features, strict=True)]
        attention = _softmax(torch.cat(scores, dim=-1))  # (B, T, N)

        parts = attention.split([len(stacked.names) for stacked in stacks], dim=-1)
        ups = [self.value.weight @ stacked.up if values_first else stacked.up for stacked in stacks]
        updates = [_weighted_update(*part) for part in zip(parts, ups, features, strict=True)]  # (B, T, d) each
        fused_update = sum(updates[1:], updates[0])
        return fused_update if values_first else self.value(fused_update), attention.detach()


def _scores(
    query: torch.Tensor, projection: tuple[torch.Tensor, torch.Tensor | None], z: torch.Tensor
) -> torch.Tensor:
    n, m = z.shape[-2:]
    matrix, bias = projection
    columns, offsets = linear(query, matrix.T, bias).split([n * m, n], dim=-1)  # (B, T, n * m), (B, T, n)
    products = columns.unflatten(-1, (n, m)) * z  # (B, T, n, m)
    return products.sum(dim=-1, dtype=at_least_float32(z.dtype)) + offsets  # (B, T, n)


def _weighted_update(attention: torch.Tensor, up: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    n, m = z.shape[-2:]
    weights, biases = up.split([n * m, n], dim=-1)  # (d, n * m), (d, n)
    attention = attention.to(z.dtype)  # (B, T, n)
    weighted = (attention.unsqueeze(-1) * z).flatten(-2)  # (B, T, n * m)
    return linear(weighted, weights) + linear(attention, biases)  # (B, T, d)


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(dim=-1, dtype=at_least_float32(scores.dtype))


def fusions_at(module: nn.Module) -> Any:
    """Return the fusions in a module of the model by the names of their students: a `ModuleDict`, or empty."""
    return module._modules.get("distillation_fusion", {})
