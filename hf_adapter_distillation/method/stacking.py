"""Stack of the adapters of one layer, so that one matrix product serves all of them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from adapters import ModelAdaptersConfig
from torch import nn

from .._compat import Adapter, LoRA, ParallelAdapter
from .losses import at_least_float32

# Of the features of a chunk, in widths of their input: larger chunks are faster, and hold more memory.
MAXIMAL_WIDTH = 2


class StackedAdapters(NamedTuple):
    r"""Weights of adapters of the same width and activation, side by side.

    The update of adapter n is :math:`u_n = W^{up}_n z_n + b_n` with the bottleneck features
    :math:`z_n = \mathrm{act}(W^{down}_n h + b^{down}_n)`. An adapter's scaling is part of its up-projection here. LoRA
    is the case without activation and biases, with A the down-projection and B the up-projection.

    Args:
        names: The n adapters, each of width m.
        down_weight: The down-projections, (n * m, hidden).
        down_bias: Their biases, (n * m,), None if they have none.
        up: The up-projections, then their biases, (hidden, n * m + n).
        activation: The activation, None if there is none.
    """

    names: tuple[str, ...]
    down_weight: torch.Tensor
    down_bias: torch.Tensor | None
    up: torch.Tensor
    activation: nn.Module | None

    def features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the bottleneck features of all adapters, (batch, seq_len, n, m), for (batch, seq_len, hidden)."""
        down = nn.functional.linear(hidden_states, self.down_weight, self.down_bias)  # (B, T, n * m)
        features = down if self.activation is None else self.activation(down)
        return features.unflatten(-1, (len(self.names), -1))  # (B, T, n, m)

    def products(self, vectors: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the products of vectors, (batch, seq_len, hidden), with the update of each adapter, (B, T, n)."""
        return projected_products(vectors, self.up, None, features)

    def weighted_update(self, weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the sum of the updates, each times its weight, (batch, seq_len, hidden).

        The weights are (batch, seq_len, n), the features (batch, seq_len, n, m).
        """
        return nn.functional.linear(coefficients(weights, features), self.up)


def coefficients(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return the coefficients of the columns of `StackedAdapters.up` in the weighted sum of the updates.

    The weights are (batch, seq_len, n), the features (batch, seq_len, n, m), the result (batch, seq_len, n * m + n).
    """
    return torch.cat([(weights.unsqueeze(-1) * features).flatten(-2), weights], dim=-1)


def projected_products(
    vectors: torch.Tensor, projection: torch.Tensor, bias: torch.Tensor | None, features: torch.Tensor
) -> torch.Tensor:
    """Return the products of projected vectors with the features of adapters, (batch, seq_len, n), in float32.

    The projection of the vectors, (batch, seq_len, hidden), is (hidden, n * m + n), with a bias, as
    `StackedAdapters.up`; the last n columns are offsets of the products. The features are (batch, seq_len, n, m).
    """
    n, m = features.shape[-2:]
    columns, offsets = nn.functional.linear(vectors, projection.T, bias).split([n * m, n], dim=-1)
    products = columns.unflatten(-1, (n, m)) * features  # (B, T, n, m)
    return products.sum(dim=-1, dtype=at_least_float32(features.dtype)) + offsets  # (B, T, n)


def input_kind(adapter: Adapter | LoRA) -> tuple[object, ...]:
    """Return the key that adapters of one layer with the same input share.

    For a bottleneck adapter: whether it runs beside the layer's block (and reads the block's input), whether it reads
    the normalised sum of the block's output and the residual stream or just the output, and which sum its update is
    added to. LoRA always reads the input of the projection.
    """
    if isinstance(adapter, LoRA):
        return ()
    return isinstance(adapter, ParallelAdapter), adapter.original_ln_before, adapter.residual_before_ln


def ends_in_up_projection(adapter: Adapter | LoRA) -> bool:
    """Return whether only the scaling follows the up-projection of an adapter: no gate, no norm."""
    return isinstance(adapter, LoRA) or not (adapter.use_gating or adapter.add_layer_norm_after)


def says_nothing(adapter: Adapter | LoRA) -> bool:
    """Return whether the update of an adapter is zero for all inputs, as that of LoRA before its training."""
    if isinstance(adapter, LoRA):
        if adapter.use_dora:  # the weights of the projection are scaled too
            return False
        weights = [adapter.lora_B]
    elif adapter.add_layer_norm_after or not isinstance(adapter.adapter_up, nn.Linear):
        return False
    else:
        weights = list(adapter.adapter_up.parameters())
    return not any(weight.is_meta or bool(weight.any()) for weight in weights)


def can_be_stacked(adapter: Adapter | LoRA) -> bool:
    """Return whether an adapter is linear at both ends, with an activation without weights."""
    if isinstance(adapter, LoRA):
        return True
    ends = (adapter.adapter_down[0], adapter.adapter_up)
    return (
        all(isinstance(end, nn.Linear) for end in ends)
        and ends_in_up_projection(adapter)
        and not list(adapter.non_linearity.parameters())
    )


class _Ends(NamedTuple):
    """Projections of one adapter; None for a missing bias or activation."""

    down: torch.Tensor
    down_bias: torch.Tensor | None
    up: torch.Tensor
    up_bias: torch.Tensor | None
    activation: nn.Module | None


def _ends(adapter: Adapter | LoRA) -> _Ends:
    if isinstance(adapter, LoRA):
        return _Ends(adapter.lora_A, None, adapter.lora_B, None, None)
    down, up = adapter.adapter_down[0], adapter.adapter_up
    return _Ends(down.weight, down.bias, up.weight, up.bias, adapter.non_linearity)


def update_sizes(adapter: Adapter | LoRA) -> tuple[int, int]:
    """Return the widths of an adapter's input and of its update."""
    if isinstance(adapter, LoRA):
        return adapter.lora_A.shape[1], adapter.lora_B.shape[0]
    return adapter.input_size, adapter.input_size


def stack(adapters: Mapping[str, Adapter | LoRA], dtype: torch.dtype | None = None) -> StackedAdapters:
    """Copy the weights of adapters of one width, activation and input side by side; gradients flow to trained weights.

    By default the copy has the data type of the weights.
    """
    ends = [_ends(adapter) for adapter in adapters.values()]
    scales = [adapter.scaling for adapter in adapters.values()]
    zeros = ends[0].up.new_zeros(len(ends[0].up))
    up_biases = [zeros if end.up_bias is None else end.up_bias for end in ends]
    parts = [*(end.up for end in ends), *(bias.unsqueeze(-1) for bias in up_biases)]  # (d, m) and (d, 1)
    if any(isinstance(scale, torch.Tensor) or scale != scales[0] for scale in scales):
        factors = [scale.unsqueeze(-1) if isinstance(scale, torch.Tensor) else scale for scale in scales]
        up = torch.cat([part * factor for part, factor in zip(parts, [*factors, *factors], strict=True)], dim=1)
    else:
        up = torch.cat(parts, dim=1)
        up = up if scales[0] == 1 else up * scales[0]
    down_biases = [end.down_bias for end in ends if end.down_bias is not None]
    return StackedAdapters(
        names=tuple(adapters),
        down_weight=torch.cat([end.down for end in ends]).to(dtype),
        down_bias=torch.cat(down_biases).to(dtype) if down_biases else None,
        up=up.to(dtype),
        activation=ends[0].activation,
    )


def number_of_columns(adapters: Mapping[str, Adapter | LoRA]) -> int:
    """Return the number of columns of `StackedAdapters.up` for adapters of one width."""
    return len(adapters) * (len(_ends(next(iter(adapters.values()))).down) + 1)


def stacked_bytes(adapters: dict[str, Adapter | LoRA]) -> int:
    """Return the bytes that a stack takes in the data type of the weights, 0 if an adapter cannot be stacked."""
    if not all(map(can_be_stacked, adapters.values())):
        return 0
    tensors = [tensor for adapter in adapters.values() for tensor in _ends(adapter)[:4]]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def group_alike(
    teachers: dict[str, Adapter | LoRA], adapters_config: ModelAdaptersConfig
) -> list[dict[str, Adapter | LoRA]] | None:
    """Group adapters by their width, activation and input; None if one cannot be stacked."""
    if not all(map(can_be_stacked, teachers.values())):
        return None
    groups: dict[tuple, dict[str, Adapter | LoRA]] = {}
    for name, teacher in teachers.items():
        activation = adapters_config.get(name).get("non_linearity", "").lower()
        kind = (len(_ends(teacher).down), activation, input_kind(teacher))
        groups.setdefault(kind, {})[name] = teacher
    return list(groups.values())


def split_group(group: dict[str, Adapter | LoRA]) -> list[dict[str, Adapter | LoRA]]:
    """Split adapters of one width into chunks whose features are together at most twice as wide as their input."""
    width, hidden_size = _ends(next(iter(group.values()))).down.shape
    size = max(1, MAXIMAL_WIDTH * hidden_size // width)
    names = list(group)
    return [{name: group[name] for name in names[first : first + size]} for first in range(0, len(names), size)]


@torch.no_grad()
def stack_frozen(adapters: Mapping[str, Adapter | LoRA], dtype: torch.dtype) -> StackedAdapters:
    """Copy the weights of frozen adapters that are alike side by side, without a graph.

    Each forward pass copies anew. A copy that is kept would miss weights that are written through `.data`, and costs
    as much memory; the copy takes few percent of the pass.
    """
    return stack(adapters, dtype)


def mix_stacked(
    adapters: Mapping[str, Adapter | LoRA], dtype: torch.dtype, hidden_states: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the sum of the updates of frozen adapters that are alike, each times its weight, (n,)."""
    stacked = stack_frozen(adapters, dtype)
    features = stacked.features(hidden_states)  # (B, T, n, m)
    of_tokens = weights.to(features.dtype).expand(features.shape[:-1])  # (B, T, n)
    return stacked.weighted_update(of_tokens, features).to(weights.dtype)
