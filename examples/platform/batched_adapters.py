"""The adapters of many tenants on one model, and what makes a batch run each row through the adapter of its tenant.

adapters' `BatchSplit` cuts a batch into a part for each tenant, and runs the parts one after another in each layer.
The adapter layer here runs all rows at once: it gathers the weights of the rows, and multiplies with one `bmm`. It
serves plain bottlenecks of one config. Other methods use `BatchSplit` if that computes them rightly; the rest answers
one question at a time.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import (
    AdapterConfig,
    BatchSplit,
    BnConfig,
    ConfigUnion,
    LoRAConfig,
    ModelAdaptersMixin,
    MTLLoRAConfig,
    PrefixTuningConfig,
)
from adapters.methods.modeling import Adapter
from torch import nn

from hf_adapter_distillation.teachers.loading import load_saved_adapter

ROWS, SPLIT, ALONE = "rows", "split", "alone"
Weights = list[tuple[torch.Tensor, torch.Tensor]]  # the weight (in, out) and bias (1, out) of each linear layer


class RowLinear(nn.Module):
    """A linear layer that has other weights for each row of a batch."""

    weight: torch.Tensor  # (B, in, out)
    bias: torch.Tensor  # (B, 1, out)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply to each row its own weights."""
        return torch.baddbmm(self.bias, hidden_states, self.weight)  # (B, T, out)


class LoadedAdapter(NamedTuple):
    """The adapter of a student in memory.

    Attributes:
        name: Its name on the model while it is there.
        way: How questions of different tenants share a forward pass: `ROWS`, `SPLIT` or `ALONE`.
        config: The config of the adapter as JSON; adapters of other configs need another forward pass.
        weights: For `ROWS` the weights, which are not on the model; else empty.
    """

    name: str
    way: str
    config: str
    weights: Weights


def way_of(config: AdapterConfig) -> str:
    """Return how tenants with adapters of a config share a forward pass.

    A gate is a mean over the tokens of a text and its padding, so that another text in the batch changes it.
    """
    if isinstance(config, ConfigUnion):
        return SPLIT if all(way_of(part) != ALONE for part in config.configs) else ALONE
    if isinstance(config, BnConfig):
        if config.use_gating or config.inv_adapter:
            return ALONE
        is_plain = not (config.phm_layer or config.ln_before or config.ln_after) and isinstance(config.scaling, float)
        return ROWS if is_plain else SPLIT
    if isinstance(config, LoRAConfig):
        return ALONE if config.use_gating or config.use_dora or isinstance(config, MTLLoRAConfig) else SPLIT
    return SPLIT if isinstance(config, PrefixTuningConfig) and not config.use_gating else ALONE


def bottlenecks(model: ModelAdaptersMixin, name: str) -> Iterator[Adapter]:
    """Yield the bottlenecks of an adapter, the first layer's first."""
    for of_layer in model.get_adapter(name).values():
        for module in of_layer.values():
            yield from (part for part in module.modules() if isinstance(part, Adapter))


class RowAdapter:
    """An adapter on a model, whose linear layers take other weights for each row.

    Args:
        model: The model; the adapter is added.
        name: The name of the adapter.
        config: A config of the way `ROWS`.
    """

    def __init__(self, model: ModelAdaptersMixin, name: str, config: AdapterConfig) -> None:
        self.name = name
        self.layers: list[RowLinear] = []
        model.add_adapter(name, config=config)
        for bottleneck in bottlenecks(model, name):
            bottleneck.adapter_down[0], bottleneck.adapter_up = RowLinear(), RowLinear()
            self.layers += [bottleneck.adapter_down[0], bottleneck.adapter_up]

    def set_rows(self, rows: Sequence[Weights]) -> None:
        """Gather the weights for a batch; the first row gets the first ones."""
        for number, layer in enumerate(self.layers):
            layer.weight = torch.stack([weights[number][0] for weights in rows])  # (B, in, out)
            layer.bias = torch.stack([weights[number][1] for weights in rows])  # (B, 1, out)


class TenantAdapters:
    """The loaded adapters on one model. Only one thread may use it, since the active setup belongs to the model."""

    def __init__(self, model: ModelAdaptersMixin) -> None:
        self.model = model
        self.row_adapters: dict[str, RowAdapter] = {}
        self.n_loaded = 0  # names are not used twice, and do not depend on the tenants'

    def load(self, folder: Path, label: str) -> LoadedAdapter:
        """Load a saved adapter, and activate it alone.

        Args:
            folder: The folder, as `save_adapter` writes it.
            label: The adapter in messages.

        Raises:
            ValueError: If the folder holds no adapter for this model; the model is as it was before.
        """
        self.n_loaded += 1
        name = f"student{self.n_loaded}"
        try:
            load_saved_adapter(self.model, folder, name, label)
        except Exception:
            if name in self.model.adapters_config:
                self.model.delete_adapter(name)
            raise
        self.model.to(self.model.device, self.model.dtype)  # adapters are loaded in float32 on the CPU
        self.model.set_active_adapters(name)
        config = self.model.adapters_config.get(name)
        return LoadedAdapter(name, way_of(config), json.dumps(config.to_dict(), sort_keys=True), [])

    def finish(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """Return a loaded adapter that is ready for batches; the model no longer holds it if it runs by rows."""
        if adapter.way != ROWS:
            return adapter
        if adapter.config not in self.row_adapters:
            config = self.model.adapters_config.get(adapter.name)
            name = f"rows{len(self.row_adapters)}"
            self.row_adapters[adapter.config] = RowAdapter(self.model, name, config)
        linears = (
            linear
            for bottleneck in bottlenecks(self.model, adapter.name)
            for linear in (bottleneck.adapter_down[0], bottleneck.adapter_up)
        )
        weights = [(linear.weight.detach().T.contiguous(), linear.bias.detach()[None]) for linear in linears]
        self.model.delete_adapter(adapter.name)
        return adapter._replace(weights=weights)

    def remove(self, adapter: LoadedAdapter) -> None:
        """Free the memory of an adapter; the caller drops the last reference to its weights."""
        if adapter.name in self.model.adapters_config:
            self.model.delete_adapter(adapter.name)

    def activate(self, rows: Sequence[LoadedAdapter]) -> None:
        """Set the model up for a batch of adapters of one config; rows of one adapter stand together."""
        first = rows[0]
        if first.way == ROWS:
            row_adapter = self.row_adapters[first.config]
            row_adapter.set_rows([adapter.weights for adapter in rows])
            self.model.set_active_adapters(row_adapter.name)
            return
        sizes = {name: len(list(of_name)) for name, of_name in groupby(adapter.name for adapter in rows)}
        block = BatchSplit(*sizes, batch_sizes=list(sizes.values()))
        self.model.set_active_adapters(block if len(sizes) > 1 else first.name)
