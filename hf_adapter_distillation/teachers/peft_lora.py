"""LoRA adapters of PEFT (https://github.com/huggingface/peft) as adapters on a model.

`student.peft_export` is the other direction, with the same names: PEFT names a projection by its path in a model of
transformers. Adapters wraps the projections in place, so the path below the base model is the same.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from adapters import LoRAConfig, ModelAdaptersMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers.utils import logging

from .._compat import LoRAMergedLinear, children_of_base
from .projections import ATTENTION_KEYS, LAYER_NUMBER, Projection, common_ends, projections_of

logger = logging.get_logger(__name__)

PEFT_WEIGHTS_NAME, OLD_WEIGHTS_NAME = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
DEFAULT_RANK = DEFAULT_ALPHA = 8  # of PEFT

# Settings of PEFT that do not change what the saved factors compute, or that other settings switch on.
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "runtime_config", "ensure_weight_tying", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
    "modules_to_save",  # by its weights
}  # fmt: skip
# Values of `init_lora_weights` in lower case; the other starts change the weights of the base model.
HARMLESS_STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}

Factors = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r)


class PeftLoRA(NamedTuple):
    """A LoRA of PEFT in the form of adapters.

    Args:
        factors: `lora_A` and `lora_B` of adapters, by the path of the projection in the base model.
    """

    config: LoRAConfig
    factors: dict[str, Factors]


def is_peft(saved: dict) -> bool:
    """Return whether a saved adapter config is one of PEFT."""
    return "peft_type" in saved


def read_peft_weights(folder: Path, label: str) -> dict[str, torch.Tensor]:
    """Read the weights that PEFT saved; `label` is the adapter in messages, for instance "Teacher 'bank'"."""
    file, old = folder / PEFT_WEIGHTS_NAME, folder / OLD_WEIGHTS_NAME
    if old.is_file() and not file.exists():
        raise ValueError(f"{label} cannot be loaded: {old} is a pickle of an older PEFT; save it again.")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{label} cannot be loaded: {file} is missing or damaged; save it again.") from error


@torch.no_grad()
def convert_peft_lora(
    model: ModelAdaptersMixin,
    saved: dict,
    weights: Mapping[str, torch.Tensor],
    label: str,
    scalings_in_memory: Mapping[str, float] | None = None,
) -> PeftLoRA:
    """Return the adapter that computes the same as a LoRA of PEFT, without a head that was saved with it.

    Layers without a saved weight are left out, as PEFT does with `layers_to_transform`. In the others the adapter may
    have more modules; they compute zero, as LoRA does before training. Smaller ranks are filled up with zeros.

    Args:
        saved: The contents of `adapter_config.json`.
        weights: The contents of `adapter_model.safetensors`.
        label: The LoRA in messages.
        scalings_in_memory: The factors of the updates by the saved paths of the projections, by default those of the
            config.

    Raises:
        ValueError: If it is no plain LoRA, has a module that is no projection with LoRA in adapters' model, or lacks
            one that its config names.
    """
    _check_plain(saved, label)
    projections, scalings = projections_of(model), {}
    parts: dict[str, dict[str, Factors]] = {}  # by path and key: merged projections have several parts
    for saved_path, (down, up) in _factors(model, weights, label).items():
        path = _checked_path(model, projections, saved_path, down, up, label)
        rank, of_config = _rank_and_scaling(saved, saved_path, label)
        scalings[path] = (scalings_in_memory or {}).get(saved_path, of_config)
        if (down.shape[0], up.shape[1]) != (rank, rank):
            raise ValueError(
                f"{label} has the ranks {down.shape[0]} and {up.shape[1]} in {saved_path}, but its config says "
                f"r={rank}; save it again."
            )
        module, key, _ = projections[path]
        parts[path] = _split(down, up) if isinstance(module, LoRAMergedLinear) else {key or "": (down, up)}
    scaling = next(filter(None, scalings.values()), 0.0)
    _check_whole(projections, parts.keys(), saved, label)
    config = _config(model, projections, parts, scaling, _dropout(saved, label))
    factors = {}
    for path, of_path in parts.items():
        ratio = scalings[path] / scaling if scaling else 1.0
        kept = [part for key, part in of_path.items() if not key or key in config.attn_matrices]
        padded = [_padded(*part, config.r, ratio) for part in kept]
        factors[path] = (torch.cat([down for down, _ in padded]), torch.cat([up for _, up in padded]))
    return PeftLoRA(config, factors)


def _check_plain(saved: dict, label: str) -> None:
    """Refuse other methods of PEFT, and settings under which the factors compute something else."""
    if saved["peft_type"] != "LORA":
        raise ValueError(
            f"{label} is a PEFT adapter of type {saved['peft_type']}; only LORA is converted; use a LoRA."
        )
    for key, value in saved.items():
        is_start = key == "init_lora_weights" and str(value).lower() in HARMLESS_STARTS
        if key not in HARMLESS and not is_start and value and value != "none":
            raise ValueError(f"{label} is a PEFT adapter with {key}={value!r}; use a plain LoRA, trained without it.")


def _config(
    model: ModelAdaptersMixin,
    projections: Mapping[str, Projection],
    parts: Mapping[str, Mapping[str, Factors]],
    scaling: float,
    dropout: float,
) -> LoRAConfig:
    """Return the config of an adapter with the largest rank of some parts."""
    ranks = {(path, key): down.shape[0] for path, part in parts.items() for key, (down, _) in part.items()}
    rank = max(1, *ranks.values())
    places = {projections[path].location for path in parts}
    modules = [projections[path].module for path in parts]
    keys = {key for (_, key), rank in ranks.items() if key and rank}
    has_merged = any(isinstance(projection.module, LoRAMergedLinear) for projection in projections.values())
    if has_merged and "selfattn_lora" in places and keys.isdisjoint(ATTENTION_KEYS):
        keys.add(ATTENTION_KEYS[0])  # adapters cannot run a merged projection without a part; this one computes zero
    return LoRAConfig(
        selfattn_lora="selfattn_lora" in places,
        intermediate_lora="intermediate_lora" in places,
        output_lora="output_lora" in places,
        attn_matrices=sorted(keys),
        r=rank,
        alpha=scaling * rank,
        dropout=dropout,
        leave_out=[i for i, layer in model.base_model.iter_layers() if set(modules).isdisjoint(layer.modules())],
    )


def add_peft_lora(model: ModelAdaptersMixin, name: str, lora: PeftLoRA) -> None:
    """Add an adapter that `convert_peft_lora` returned for the model, or for another model of its config."""
    model.add_adapter(name, config=lora.config)
    fill_peft_lora(model, name, lora)


@torch.no_grad()
def fill_peft_lora(model: ModelAdaptersMixin, name: str, lora: PeftLoRA) -> None:
    """Give an adapter on the model the factors of a LoRA of its config."""
    for path, (down, up) in lora.factors.items():
        factors: Any = model.base_model.get_submodule(f"{path}.loras.{name}")
        factors.lora_A.copy_(down)
        factors.lora_B.copy_(up)


def _factors(model: ModelAdaptersMixin, weights: Mapping[str, torch.Tensor], label: str) -> dict[str, Factors]:
    """Return the factors by the saved paths of the projections."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    heads = []
    for key, tensor in weights.items():
        saved_path, part, _ = key.rpartition(".lora_")
        if part:
            found.setdefault(saved_path.removeprefix(PREFIX), {})[key[len(saved_path) :]] = tensor
        elif not key.startswith(PREFIX):
            raise ValueError(f"{label} holds {key}, which PEFT does not save; save it again.")
        elif is_of_base(model, key):
            raise ValueError(
                f"{label} is a PEFT adapter that holds {key} of the base model (modules_to_save); "
                "use a LoRA trained without it."
            )
        else:
            heads.append(key)
    if heads:
        logger.warning(f"{label} has a head, which is not taken from PEFT: {heads[0]} in its files.")
    if not found:
        raise ValueError(f"{label} has no LoRA weights in {PEFT_WEIGHTS_NAME}; save it again.")
    for saved_path, tensors in found.items():
        if tensors.keys() != set(FACTORS):
            raise _no_factors(model, saved_path, tensors.keys(), label)
    return {saved_path: (tensors[FACTORS[0]], tensors[FACTORS[1]]) for saved_path, tensors in found.items()}


def _no_factors(model: ModelAdaptersMixin, saved_path: str, parts: Collection[str], label: str) -> ValueError:
    if set(parts) < set(FACTORS):
        (missing,) = set(FACTORS).difference(parts)
        return ValueError(f"{label} lacks {saved_path}{missing}; save it again.")
    if _projection_at(projections_of(model), saved_path) is None:
        return _no_projection(model, saved_path, label)
    unknown = min(set(parts).difference(FACTORS))
    return ValueError(f"{label} holds {saved_path}{unknown}, which no plain LoRA has; save it again.")


def _no_projection(model: ModelAdaptersMixin, saved_path: str, label: str) -> ValueError:
    paths = projections_of(model)
    if any(LAYER_NUMBER.sub("n", f".{saved_path}").endswith(LAYER_NUMBER.sub("n", f".{path}")) for path in paths):
        return ValueError(
            f"{label} has LoRA in {saved_path}, a layer that this {model.config.model_type} lacks; use one trained on "
            "the same base model."
        )
    numbered = (name for name, _ in model.base_model.named_modules())
    names = common_ends({LAYER_NUMBER.sub("*", path) for path in paths}, {LAYER_NUMBER.sub("*", p) for p in numbered})
    return ValueError(
        f"{label} has LoRA in {saved_path}, which is no linear layer inside the layers of a "
        f"{model.config.model_type}; use a LoRA in {', '.join(names)} alone."
    )


def _projection_at(projections: Iterable[str], saved_path: str) -> str | None:
    """Return the path of a projection in the base model, by its path in the model that PEFT adapted."""
    return next((path for path in projections if saved_path == path or saved_path.endswith(f".{path}")), None)


def _checked_path(
    model: ModelAdaptersMixin,
    projections: Mapping[str, Projection],
    saved_path: str,
    down: torch.Tensor,
    up: torch.Tensor,
    label: str,
) -> str:
    """Return the path of a projection whose sizes fit the factors, by its path in the model that PEFT adapted."""
    path = _projection_at(projections, saved_path)
    if path is None:
        raise _no_projection(model, saved_path, label)
    sizes = projections[path].sizes
    if down.dim() != 2 or up.dim() != 2 or (down.shape[1], up.shape[0]) != sizes:
        size = f"a projection {saved_path} of another size"
        raise ValueError(f"{label} was made for {size}; use one trained on the same base model.")
    return path


def _check_whole(projections: Iterable[str], found: Collection[str], saved: dict, label: str) -> None:
    """Refuse a LoRA without a projection that its config names, of which PEFT only warns."""
    targets, layers = saved.get("target_modules"), saved.get("layers_to_transform")
    if not isinstance(targets, Collection) or isinstance(targets, str):
        return
    if layers not in (None, []) or saved.get("exclude_modules"):
        return
    parts = {_part(path) for path in found}  # a LoRA of the encoder of a T5 alone, or of one tower of a CLIP, is whole
    for path in projections:
        is_named = any(f".{path}".endswith(f".{end}") or f".{end}".endswith(f".{path}") for end in targets)
        if is_named and path not in found and _part(path) in parts:
            raise ValueError(
                f"{label} has no LoRA in {path}, which its target_modules name; use a whole one that was trained on "
                "the same base model."
            )


def _part(path: str) -> str:
    """Return the list of layers that holds a projection, such as `encoder.layer`."""
    return LAYER_NUMBER.split(path, maxsplit=1)[0]


def _rank_and_scaling(saved: dict, saved_path: str, label: str) -> tuple[int, float]:
    """Return the rank that the config gives a projection, and the factor of its update."""

    def value(patterns: dict[str, Any] | None, default: Any) -> Any:
        return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", saved_path)), default)

    try:
        rank = value(saved.get("rank_pattern"), saved.get("r", DEFAULT_RANK))
        alpha = value(saved.get("alpha_pattern"), saved.get("lora_alpha", DEFAULT_ALPHA))
        return rank, alpha / (rank**0.5 if saved.get("use_rslora") else rank)
    except (AttributeError, TypeError, ZeroDivisionError, re.error) as error:
        keys = "r, lora_alpha, rank_pattern and alpha_pattern"
        raise ValueError(f"{label} has no valid rank of {saved_path} in {keys}; save it again.") from error


def _dropout(saved: dict, label: str) -> float:
    value = saved.get("lora_dropout") or 0.0
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{label} has lora_dropout={value!r}; it must be a number from 0 to below 1.")
    return value


def _split(down: torch.Tensor, up: torch.Tensor) -> dict[str, Factors]:
    """Return the factors of the parts of a merged projection, each without the columns of B that are zero in it."""
    parts = {}
    for key, rows in zip(ATTENTION_KEYS, up.chunk(len(ATTENTION_KEYS)), strict=True):
        used = rows.any(0)
        parts[key] = (down[used], rows[:, used])
    return parts


def _padded(down: torch.Tensor, up: torch.Tensor, rank: int, ratio: float) -> Factors:
    """Return factors of a larger rank with the same product times a ratio."""
    more = rank - down.shape[0]
    if ratio != 1:
        up = up.to(torch.promote_types(up.dtype, torch.float32)) * ratio  # half precision would round it
    return pad(down, (0, 0, 0, more)), pad(up, (0, more))


def is_of_base(model: ModelAdaptersMixin, key: str) -> bool:
    """Return whether a weight that PEFT saved belongs to the base model, and not to a head."""
    key = key.removeprefix(PREFIX)
    return key.startswith(f"{model.base_model_prefix}.") or key.partition(".")[0] in children_of_base(model)
