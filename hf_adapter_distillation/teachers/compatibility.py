"""Checks of teachers against a student: whether they can be fused, inside the layers or in the layers' outputs."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from adapters import (
    AdapterConfig,
    BnConfig,
    ConfigUnion,
    LoRAConfig,
    ModelAdaptersMixin,
    MTLLoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from transformers.utils import logging

from .._compat import LoRALinear, attention_of, heads_of
from ..configuration import Level
from ..method.layers import FusedLayer, adapter_layers, with_merged_lora
from ..method.parameters import owner
from ..method.whole_layers import holds, whole_layers

logger = logging.get_logger(__name__)

REMEDY = "use one trained on the same base model."
SIZE_MISMATCH = (  # of torch, for the first of the weights
    r"size mismatch for (?P<key>\S+): copying a param with shape torch\.Size\((?P<saved>.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((?P<own>.*?)\)"
)


def size_mismatch(error: Exception) -> str:
    """Return the first weight of another size that an error of torch names, with both sizes, or an empty text."""
    found = re.search(SIZE_MISMATCH, str(error))
    return (
        f"has weights of another size: {found['key']} is {found['saved']}, on the model {found['own']}"
        if found
        else ""
    )


def check_supported(label: str, config: AdapterConfig) -> None:
    """Refuse prompt tuning and MTL-LoRA, which cannot be fused at any level; `label` is the adapter in messages."""
    for part in _parts(config):
        if isinstance(part, PromptTuningConfig):
            raise ValueError(
                f"{label} is a {type(part).__name__}, which makes the sequence longer, so its states do not match the "
                "student's; use prefix tuning, or any other method."
            )
        if isinstance(part, MTLLoRAConfig):
            raise ValueError(
                f"{label} is a {type(part).__name__}, which belongs to several tasks at once; use a LoRA of one task."
            )


def warn_of_masked_prefixes(model: ModelAdaptersMixin, names: Sequence[str]) -> None:
    """Warn of prefix tuning where adapters masks it out: it inverts the boolean masks of causal SDPA attention."""
    parts = {name: _parts(model.adapters_config.get(name)) for name in names}
    with_prefix = [name for name in names if any(isinstance(part, PrefixTuningConfig) for part in parts[name])]
    if not with_prefix or attention_of(model) != "sdpa":
        return
    if any(getattr(module, "is_causal", False) for module in model.base_model.modules()):
        logger.warning(
            f"{', '.join(map(repr, with_prefix))} have prefixes, which adapters masks out of batches with padding in "
            f"the SDPA attention of a {model.config.model_type}, so they do nothing there; load the model with "
            "attn_implementation='eager'."
        )


def _parts(config: AdapterConfig) -> Sequence[AdapterConfig]:
    return config.configs if isinstance(config, ConfigUnion) else [config]


def _method(config: AdapterConfig) -> type[AdapterConfig] | None:
    """Return the method of an adapter that adds an update inside the layer; None for other adapters."""
    if isinstance(config, BnConfig):
        return BnConfig
    plain = {"composition_mode": "add", "use_dora": False, "use_gating": False, "vera_d": None, "vera_b": None}
    if isinstance(config, LoRAConfig) and all(config[key] == value for key, value in plain.items()):
        return LoRAConfig
    return None


def differs_in_layer(label: str, config: AdapterConfig, student_config: AdapterConfig) -> str:
    """Return why a teacher cannot be fused where the student adds its update inside a layer; "" if it can."""
    method = _method(config)
    if method is None or method is not _method(student_config):
        return (
            f"{label} is a {type(config).__name__}, the student a {type(student_config).__name__}; inside the layers "
            "bottleneck adapters are fused with bottleneck adapters, and plain LoRA with plain LoRA"
        )
    if method is LoRAConfig:
        return ""

    def place(config: AdapterConfig) -> tuple[bool, bool]:
        in_sequence = config["original_ln_before"] and not config["is_parallel"]
        return in_sequence and config["residual_before_ln"] is False, config["original_ln_after"]

    if place(config) == place(student_config):
        return ""
    keys = ("is_parallel", "original_ln_before", "residual_before_ln", "original_ln_after")
    differs = ", ".join(
        f"{key}={config[key]!r} and not {student_config[key]!r}" for key in keys if config[key] != student_config[key]
    )
    return f"{label} adds its update at another place of the layer than the student: it has {differs}"


def _attention_key(layer: FusedLayer) -> str | None:
    return layer.attn_key if isinstance(layer, LoRALinear) else None


def _is_at(config: BnConfig | LoRAConfig, layer: FusedLayer) -> bool:
    """Return whether an adapter of a config has a module in a layer, unless it leaves the layer out."""
    key = _attention_key(layer)
    return bool(config.get(layer.location_key)) and (key is None or key in config.attn_matrices)


def misses_in_layer(
    model: ModelAdaptersMixin, label: str, name: str, student_config: AdapterConfig, merged: Collection[str]
) -> str:
    """Return why a teacher has no place inside the layers in common with a student of its method; "" if it has.

    `merged` holds the adapters of `with_merged_lora`.
    """
    layers = adapter_layers(model, name)
    if not layers or name in merged:
        return f"{label} has modules that cannot be fused inside a layer (LoRA in projections that are merged)"
    shared = [layer for _, layer in layers if _is_at(student_config, layer)]
    if not shared:
        places = sorted({_attention_key(layer) or layer.location_key for _, layer in layers})
        return f"{label} sits at {', '.join(places)}, where the student has no modules"
    if all(layer.layer_idx in student_config["leave_out"] for layer in shared):
        return f"{label} sits only in layers that the student leaves out ({student_config['leave_out']})"
    return ""


def choose_level(
    model: ModelAdaptersMixin, level: Level, teachers: Mapping[str, str], student_config: AdapterConfig
) -> tuple[Literal["adapter", "layer"], str]:
    """Choose where teachers and student meet: inside the layers if they can, else in the layers' outputs.

    `teachers` holds the labels in messages by the names on the model.

    Returns:
        The level, and the reason for "layer" where `level` is "auto".

    Raises:
        ValueError: If the requested level is impossible, or a teacher has no layer in common with the student.
    """
    reason = ""
    if level != "layer":
        merged = with_merged_lora(model)
        reasons = (
            differs_in_layer(label, model.adapters_config.get(name), student_config)
            or misses_in_layer(model, label, name, student_config, merged)
            for name, label in teachers.items()
        )
        reason = next(filter(None, reasons), "")
        if not reason:
            return "adapter", ""
        if level == "adapter":
            raise ValueError(f"{reason}; choose level='layer', or give all of them one method and place.")
    for name, label in teachers.items():
        in_common = (_covers(student_config, i) and holds(layer, name) for i, layer in model.iter_layers())
        if not any(in_common):
            raise ValueError(
                f"{label} has no layer in common with the student; let the student's config leave out fewer layers."
            )
    return "layer", reason


def _covers(config: AdapterConfig, index: int) -> bool:
    """Return whether an adapter of a config has modules in the layer of an index."""
    # ReFT lists the layers that it has, the other methods the layers that they leave out.
    return any(
        index not in part.get("leave_out", ()) and (part.get("layers", "all") == "all" or index in part["layers"])
        for part in _parts(config)
    )


def check_weights(model: ModelAdaptersMixin, labels: Mapping[str, str]) -> None:
    """Refuse teachers with weights or heads that are NaN or infinite; `labels` has them in messages by their names."""
    heads = {name: head for name, head in heads_of(model).items() if name in labels}
    named = [(owner(key, labels), key, parameter) for key, parameter in model.base_model.named_parameters()]
    named += [(name, f"heads.{name}.{key}", p) for name, head in heads.items() for key, p in head.named_parameters()]
    for name, key, parameter in named:
        if name and not torch.isfinite(parameter).all():
            raise ValueError(f"{labels[name]} has weights that are NaN or infinite ({key}); train it again.")


def check_devices(model: ModelAdaptersMixin, student: str, teachers: Sequence[str]) -> None:
    """Refuse teachers on another device than the student in a layer; layers and data types may differ."""
    names = {student, *teachers}
    for layer_name, layer in whole_layers(model, student):
        devices = {owner(key, names): parameter.device for key, parameter in layer.named_parameters()}
        for teacher in teachers:
            target = devices.get(student)
            if target is not None and devices.get(teacher, target) != target:
                raise ValueError(
                    f"Teacher {teacher!r} is on {devices[teacher]}, {student!r} on {target} ({layer_name}); "
                    f"call model.to({str(target)!r}) once all adapters are added."
                )
