"""The linear layers of a model that can take LoRA: those of adapters, and others that a config names.

adapters has LoRA in query, key and value, and in two projections of the feed-forward block. PEFT adapts any linear
layer. So a LoRA config may name more of them in `attn_matrices`, such as `o_proj` and `gate_proj` of Llama.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from adapters import AdapterConfig, ConfigUnion, LoRAConfig, ModelAdaptersMixin
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .._compat import AdapterLayerBase, LoRALinear, LoRAMergedLinear
from ..method.fusion import fusions_at

logger = logging.get_logger(__name__)

ATTENTION_KEYS = ("q", "k", "v")  # in `attn_matrices`; the parts of a merged projection have this order
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # in a path


class Projection(NamedTuple):
    """A linear layer that can take LoRA.

    Args:
        key: Its name in `attn_matrices`; None where a setting of its location alone decides.
        location: The setting of its location, such as `selfattn_lora`.
    """

    module: nn.Module
    key: str | None
    location: str

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of its inputs and outputs."""
        module: Any = self.module
        return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def projections_of(model: ModelAdaptersMixin) -> dict[str, Projection]:
    """Return the linear layers that can take LoRA, by their paths in the base model.

    One that adapters leaves out has as its key the shortest end of its path that no other module has (`o_proj`).
    """
    base = model.base_model
    modules = dict(_modules(base))
    layers = {id(layer) for _, layer in base.iter_layers()}
    inside = tuple(f"{path}." for path, module in modules.items() if id(module) in layers)
    others = {
        path: LAYER_NUMBER.sub("*", path)
        for path, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and not isinstance(module, AdapterLayerBase)
        and path.startswith(inside)
    }
    taken = [LAYER_NUMBER.sub("*", path) for path in modules if path not in others]
    keys = _ends(set(others.values()), taken)
    found = {}
    for path, module in modules.items():
        if path in others:
            found[path] = Projection(module, keys[others[path]], "selfattn_lora")
        elif isinstance(module, LoRALinear):
            found[path] = Projection(module, module.attn_key, module.location_key)
        elif isinstance(module, LoRAMergedLinear):
            found[path] = Projection(module, None, module.location_key)
    return found


def holders_of(model: ModelAdaptersMixin, adapter: str) -> dict[str, Any]:
    """Return the projections that hold the LoRA of an adapter, by their paths in the base model."""
    return {path: module for path, module in _modules(model.base_model) if adapter in getattr(module, "loras", ())}


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model with their paths, without those of adapters and students."""
    for name, child in module.named_children():
        holds_adapters = isinstance(module, AdapterLayerBase) and isinstance(child, nn.ModuleDict)
        if not holds_adapters and child is not fusions_at(module):
            yield prefix + name, child
            yield from _modules(child, f"{prefix}{name}.")


def common_ends(paths: Collection[str], names: Iterable[str]) -> list[str]:
    """Return short ends of some paths (`query`, `output.dense`), which no other name has."""
    return sorted(set(_ends(paths, [name for name in names if name not in paths]).values()))


def _ends(paths: Collection[str], others: Iterable[str]) -> dict[str, str]:
    """Return for each path its shortest end that no other one has."""
    other_parts, found = [name.split(".") for name in others], {}
    for path in paths:
        parts = path.split(".")
        ends = (parts[-n:] for n in range(1, len(parts) + 1))
        end = next((end for end in ends if not any(other[-len(end) :] == end for other in other_parts)), parts)
        found[path] = ".".join(end)
    return found


def further_keys(config: Any) -> set[str]:
    """Return the linear layers that a config names in `attn_matrices`, beside those of adapters."""
    return {key for _, keys in _with_further_keys(config) for key in keys}


def _with_further_keys(config: Any) -> list[tuple[LoRAConfig, set[str]]]:
    """Return the parts of a config that name linear layers beside those of adapters, with these names."""
    if isinstance(config, str) and "attn_matrices" not in config:
        return []
    try:
        loaded = AdapterConfig.load(config)
    except Exception:  # adapters refuses it itself, with anything
        return []
    parts = loaded.configs if isinstance(loaded, ConfigUnion) else [loaded]
    lora = [part for part in parts if isinstance(part, LoRAConfig) and isinstance(part.attn_matrices, list | tuple)]
    return [(part, keys) for part in lora if (keys := {*part.attn_matrices}.difference(ATTENTION_KEYS))]


def check_keys(model: ModelAdaptersMixin, label: str, config: AdapterConfig) -> None:
    """Raise `ValueError` if a config names a linear layer that cannot have LoRA; `label` is the adapter in it."""
    if not (parts := _with_further_keys(config)):
        return
    projections, kind = projections_of(model).values(), model.config.model_type
    known = {projection.key for projection in projections if projection.key}
    has_merged = any(isinstance(projection.module, LoRAMergedLinear) for projection in projections)
    for part, keys in parts:
        if unknown := sorted(keys - known):
            raise ValueError(
                f"{label} has {unknown[0]!r} in attn_matrices, which is no linear layer of this {kind} that can take "
                f"LoRA; choose of {', '.join(sorted(known.union(ATTENTION_KEYS if has_merged else ())))}."
            )
        if not part.selfattn_lora:
            raise ValueError(f"{label} has {min(keys)!r} in attn_matrices, but selfattn_lora=False; set it to True.")
        if has_merged and keys.issuperset(part.attn_matrices):
            raise ValueError(
                f"{label} has none of q, k and v in attn_matrices, which adapters cannot run in the merged projection "
                f"of a {kind}; add one of them."
            )


def warn_of_further(adapter: str, config: AdapterConfig) -> None:
    """Warn that adapters without this package leaves out a part of a saved adapter."""
    if what := _left_out(adapter, config):
        logger.warning_once(  # type: ignore[attr-defined]
            f"{what}; import it there, too, or export the adapter by save_adapter_as_peft."
        )


def check_known_to_adapters(adapter: str, config: Any) -> None:
    """Raise `ValueError` if adapters without this package would leave out a part of an adapter."""
    if what := _left_out(adapter, config):
        raise ValueError(
            f"{what}; push it for PEFT, by push_adapter_to_hub(..., format='peft'), or by adapter-distill export and "
            "hf upload."
        )


def _left_out(adapter: str, config: Any) -> str:
    """Return what adapters without this package leaves out of an adapter, for a message; "" if nothing."""
    if not (keys := sorted(further_keys(config))):
        return ""
    return (
        f"{adapter!r} has LoRA in {', '.join(keys)}, which adapters leaves out where it is loaded without "
        "hf_adapter_distillation"
    )


def wrap_named(model: ModelAdaptersMixin, config: Any) -> None:
    """Let the linear layers that a config names take LoRA, with the same weights and outputs."""
    if not (keys := further_keys(config)):
        return
    for path, projection in projections_of(model).items():
        module: Any = projection.module
        if projection.key not in keys or isinstance(module, LoRALinear):
            continue
        wrapped = LoRALinear.wrap(
            module,
            projection.location.removesuffix("_lora"),
            model.config,
            model.adapters_config,
            attn_key=projection.key,
            fan_in_fan_out=isinstance(module, Conv1D),
            bias=module.bias is not None,
        )
        parent, _, name = path.rpartition(".")
        setattr(model.base_model.get_submodule(parent), name, wrapped.train(module.training))
