"""Attention over teachers in one layer: the trainable query, key and value of stage 2."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from torch.nn.functional import linear

from .chunked_attention import Chunk, ChunkedAttention
from .losses import TaskSpecificLoss, at_least_float32
from .stacking import StackedAdapters, coefficients, projected_products

MINIMAL_WEIGHT = 1e-6  # whose logarithm is finite in half precision


class TeacherFusion(nn.Module):
    r"""Fusion of the teachers' updates at one location: a bottleneck layer, or a projection with LoRA.

    .. math::
        q = Q h, \quad k_n = K u_n, \quad v_n = V u_n, \quad a = \mathrm{softmax}_n(q \cdot k_n + \log w_n), \quad
        \mathrm{fused} = s \sum_n a_n v_n

    with h the input of the layer's adapters, u_n the update of teacher n, and w_n its weight for the task, all equal
    unless they were learned (`set_weights`). What is left of the weights belongs to a null teacher, whose update is
    zero. The scale s is 1, or the sum of learned weights if that is larger; w_n are then shares of it. The key has no
    bias: it would add the same number to each teacher's score and vanish in the softmax. The value starts at the
    identity, so the first fused output is a convex combination of the updates, times s. With a `rank`, query and key
    project to this width, and the value stays the identity, without weights: the size of the module then follows d,
    and not its square. It does not depend on the number of teachers. The module also holds the layer's weights of the
    objective `task_specific`.

    Sources: Wang et al., https://arxiv.org/abs/2312.16261 (Q_l, K_l, V_l of each layer); AdapterFusion,
    https://arxiv.org/abs/2005.00247 (the form of the attention).

    Args:
        hidden_size: The width d of the adapters' input.
        output_size: The width of their updates. By default the same.
        location: The name of the layer in the base model, for logs and plots.
        in_decoder: Whether the layer reads states of a decoder, where padding follows the decoder's mask.
        rank: The width of query and key. Default: that of the updates, with a value matrix.
    """

    def __init__(
        self,
        hidden_size: int,
        output_size: int | None = None,
        location: str = "",
        in_decoder: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        self.location = location
        self.in_decoder = in_decoder
        output_size = output_size or hidden_size
        width = rank or output_size
        self.query = nn.Linear(hidden_size, width, device=device, dtype=dtype)
        self.key = nn.Linear(output_size, width, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.normal_(self.key.weight, std=0.02)
        self.value: nn.Linear | None = None
        if rank is None:
            self.value = nn.Linear(output_size, output_size, bias=False, device=device, dtype=dtype)
            nn.init.eye_(self.value.weight)
        self.layer_weight = 1.0  # in the mean of the layers' losses
        self.task_specific: TaskSpecificLoss | None = None
        self.set_equal_weights()

    def set_equal_weights(self) -> None:
        """Let the fused update start at the mean of the teachers' updates."""
        self.weighted_names: tuple[str, ...] = ()
        self.scale = 1.0
        # (n_teachers + 1,), the null teacher's last; it follows from `Distillation.weights`, which is saved.
        self.register_buffer("log_weights", None, persistent=False)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Let the fused update start at weights of the teachers; what they lack to 1 is the null teacher's."""
        self.weighted_names, total = tuple(weights), sum(weights.values())
        self.scale = max(1.0, total)
        values = torch.tensor([*weights.values(), self.scale - total], dtype=torch.float64) / self.scale
        weight = self.key.weight
        self.log_weights = values.clamp(min=MINIMAL_WEIGHT).log().to(weight.device, at_least_float32(weight.dtype))

    def weights(self) -> dict[str, float]:
        """Return the weights of the teachers; empty where they are equal."""
        if self.log_weights is None:
            return {}
        of_teachers = self.scale * self.log_weights.exp()[:-1]
        return dict(zip(self.weighted_names, of_teachers.tolist(), strict=True))

    def weights_of(self, names: Sequence[str]) -> torch.Tensor:
        """Return the weights of adapters, (n,), which with the null teacher's sum to the scale."""
        log_weights = self.log_weights_of(names)
        if log_weights is None:
            return torch.full((len(names),), 1 / len(names), dtype=at_least_float32(self.key.weight.dtype))
        return self.scale * log_weights.softmax(dim=0, dtype=at_least_float32(log_weights.dtype))[:-1]

    def log_weights_of(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the logarithms of the shares of adapters and of the null teacher, (n + 1,); None without weights.

        An adapter without a weight, as the student, has the mean weight of the teachers.
        """
        if self.log_weights is None:
            return None
        *of_teachers, null = self.log_weights.unbind()
        by_name = dict(zip(self.weighted_names, of_teachers, strict=True))
        mean = self.log_weights[:-1].logsumexp(dim=0) - log(len(by_name))
        return torch.stack([*(by_name.get(name, mean) for name in names), null])

    def forward(
        self, hidden_states: torch.Tensor, updates: torch.Tensor, log_weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the fused update from the update of each adapter, whatever the adapter's form.

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            updates: The addition of each adapter to the residual, (batch, seq_len, n_teachers, output).
            log_weights: The `log_weights_of` the adapters.

        Returns:
            The fused output, (batch, seq_len, output), and the detached attention over teachers,
            (batch, seq_len, n_teachers), whose rows sum to 1, or with weights to 1 less the null teacher's attention.
        """
        # q . (K u_n) = (K^T q) . u_n, and sum_n a_n V u_n = V sum_n a_n u_n: one product with K and V, not N.
        query = self.query(hidden_states) @ self.key.weight  # (B, T, d)
        scores = torch.einsum("btd,btnd->btn", query, updates.to(query.dtype))  # (B, T, N)
        attention = _softmax(scores, log_weights)  # (B, T, N)
        fused_update = torch.einsum("btn,btnd->btd", attention.to(updates.dtype), updates)  # (B, T, d)
        return self.apply_value(fused_update), attention.detach()  # (B, T, d), (B, T, N)

    def _query_costs(self, hidden_states: torch.Tensor) -> tuple[int, int]:
        """Return the costs of the query with K^T Q, or Q h, first.

        They are the multiply-adds, forward and backward, divided by the hidden size, without the common part. Updates
        of another width than the input (LoRA in feed-forward blocks) count as if they had the same width.
        """
        tokens, hidden_size = hidden_states.shape[0] * hidden_states.shape[1], hidden_states.shape[2]
        rank, in_graph = len(self.key.weight), int(hidden_states.requires_grad)
        return 3 * rank * hidden_size + (2 + in_graph) * tokens * hidden_size, (5 + in_graph) * tokens * rank

    def _project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return K^T q in the cheaper order, (batch, seq_len, output)."""
        product_cost, states_cost = self._query_costs(hidden_states)
        if product_cost < states_cost:
            return linear(hidden_states, self.key.weight.T @ self.query.weight, self.query.bias @ self.key.weight)
        return self.query(hidden_states) @ self.key.weight

    def apply_value(self, fused_update: torch.Tensor) -> torch.Tensor:
        """Multiply a fused update, (batch, seq_len, output), with the value and the scale."""
        return self._scaled(fused_update if self.value is None else self.value(fused_update))

    def _scaled(self, fused_update: torch.Tensor) -> torch.Tensor:
        return fused_update if self.scale == 1 else self.scale * fused_update

    def attend_stacked(
        self, hidden_states: torch.Tensor, stacks: Sequence[StackedAdapters], features: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        r"""Compute the attention, (batch, seq_len, n_teachers), from the bottleneck features, with its graph.

        With the up-projection W and bias b of an adapter, the update is u = W z + b and (but for the query's bias)

        .. math::
            q \cdot K u = (h^\top Q^\top K W) z + h^\top Q^\top K b

        Products of more than two matrices are computed in the cheapest order, forward and backward: for many tokens
        with the up-projections, or each other, first, for many teachers with the hidden states.

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            stacks: The adapters, in the order of the returned attention.
            features: The features of each stack, (batch, seq_len, n, m).
        """
        width, rank = sum(stacked.up.shape[1] for stacked in stacks), len(self.key.weight)
        tokens = hidden_states.shape[0] * hidden_states.shape[1]
        # Multiply-adds, as those of `_query_costs`.
        keys_first = width * (5 * rank + hidden_states.requires_grad * tokens) < min(self._query_costs(hidden_states))
        projections: list[tuple[torch.Tensor, torch.Tensor | None]] = [(stacked.up, None) for stacked in stacks]
        if keys_first:
            projected_query, query = hidden_states, self.query  # (B, T, d)
            keys = [self.key.weight @ stacked.up for stacked in stacks]  # (d, n * m + n) each
            projections = [(query.weight.T @ k, query.bias @ k) for k in keys]
        else:
            projected_query = self._project_query(hidden_states)  # (B, T, d)
        scores = [
            projected_products(projected_query, *projection, z)  # (B, T, n)
            for projection, z in zip(projections, features, strict=True)
        ]
        names = [name for stacked in stacks for name in stacked.names]
        return _softmax(torch.cat(scores, dim=-1), self.log_weights_of(names))  # (B, T, N)

    def coefficients_of(
        self, attention: torch.Tensor, stacks: Sequence[StackedAdapters], features: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return the coefficients of all columns of the up-projections in the fused update, with the scale.

        The attention is (batch, seq_len, n_teachers), the result (batch, seq_len, k). The fusion has no value matrix.
        """
        parts = self._scaled(attention).split([len(stacked.names) for stacked in stacks], dim=-1)
        return torch.cat([coefficients(part.to(z.dtype), z) for part, z in zip(parts, features, strict=True)], dim=-1)

    def fuse_stacked(
        self, hidden_states: torch.Tensor, stacks: Sequence[StackedAdapters], features: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""Compute what `forward` computes from the bottleneck features, without the update of any single adapter.

        .. math::
            \sum_n a_n V u_n = V \sum_n (W_n (a_n z_n) + a_n b_n)

        with the attention of `attend_stacked`, which has the same arguments. No tensor has the size of the teachers'
        updates, (batch, seq_len, n_teachers, hidden).
        """
        attention = self.attend_stacked(hidden_states, stacks, features)
        width, (batch, seq_len, hidden_size) = sum(stacked.up.shape[1] for stacked in stacks), hidden_states.shape
        tokens = batch * seq_len  # the costs are multiply-adds
        values_first = self.value is not None and width * (2 * hidden_size + tokens) < 3 * tokens * hidden_size
        if self.value is not None and values_first:
            stacks = [stacked._replace(up=self.value.weight @ stacked.up) for stacked in stacks]
        parts = attention.split([len(stacked.names) for stacked in stacks], dim=-1)
        updates = [
            stacked.weighted_update(part.to(z.dtype), z)  # (B, T, d)
            for stacked, part, z in zip(stacks, parts, features, strict=True)
        ]
        fused_update = sum(updates[1:], updates[0])
        fused = self._scaled(fused_update) if values_first else self.apply_value(fused_update)
        return fused, attention.detach()

    def fuse_chunks(
        self,
        hidden_states: torch.Tensor,
        chunks: Sequence[Chunk],
        inputs: Sequence[torch.Tensor],
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the same of many frozen adapters with little memory, a chunk after the other.

        Gradients reach the fusion alone.

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            chunks: The adapters, in the order of the returned attention.
            inputs: What the adapters of each chunk read, (batch, seq_len, hidden), without a graph.
            dtype: The data type of features and updates.
        """
        query = self._project_query(hidden_states)  # (B, T, d)
        log_weights = self.log_weights_of([name for chunk in chunks for name in chunk])
        fused_update, attention = ChunkedAttention.apply(query, log_weights, chunks, dtype, *inputs)
        return self.apply_value(fused_update), attention


def _softmax(scores: torch.Tensor, log_weights: torch.Tensor | None) -> torch.Tensor:
    """Return the attention, (batch, seq_len, n), with a null teacher of score 0 where there are weights, (n + 1,)."""
    dtype = at_least_float32(scores.dtype)
    if log_weights is None:
        return scores.softmax(dim=-1, dtype=dtype)
    weighted = nn.functional.pad(scores.to(dtype), (0, 1)) + log_weights.to(dtype)  # (B, T, n + 1)
    return weighted.softmax(dim=-1)[..., :-1]


def fusions_at(module: nn.Module) -> Any:
    """Return the fusions in a module of the model by the names of their students: a `ModuleDict`, or empty."""
    return module._modules.get("distillation_fusion", {})


def fusions_of(model: ModelAdaptersMixin, student: str) -> list[TeacherFusion]:
    """Return all fusions of a student on a model."""
    return [fusions_at(m)[student] for m in model.base_model.modules() if student in fusions_at(m)]
