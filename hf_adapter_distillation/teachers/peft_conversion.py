"""Other methods of PEFT, such as LoHa, LoKr and VeRA, as LoRA: PEFT itself converts them."""

import re
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from packaging.version import Version
from torch import nn
from transformers.utils import logging

from .._compat import on_meta, original_class
from ..downloads import one_line
from .compatibility import REMEDY, size_mismatch
from .peft_lora import FACTORS, PREFIX, is_of_base

logger = logging.get_logger(__name__)

OLDEST_PEFT = "0.19"  # the first with `convert_to_lora`
# The fraction of the squared singular values that the LoRA keeps. All that a sum in float32 can tell, which leaves out
# values below 1e-4 of the largest or so: a teacher's rank costs nothing after the training.
KEPT = 1.0
NO_CONVERSION = "PEFT has no way from it to LoRA; use LORA, LOHA, LOKR or VERA."


def check_peft(label: str) -> None:
    """Raise `ValueError` if PEFT is missing or too old for a conversion; `label` is the adapter in messages."""
    try:
        installed = version("peft")
    except PackageNotFoundError:
        installed = ""
    if not installed or Version(installed) < Version(OLDEST_PEFT):
        found = f"peft {installed} is too old" if installed else "peft is not installed"
        raise ValueError(
            f"{label}, which PEFT {OLDEST_PEFT} or newer may convert to LoRA, and {found}; "
            f"install it with pip install 'peft>={OLDEST_PEFT}'."
        )


def lora_by_peft(
    model: ModelAdaptersMixin, folder: Path, saved: dict, weights: Mapping[str, torch.Tensor], label: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """Convert a saved adapter to LoRA by `peft.convert_to_lora`, at the rank that keeps its updates up to rounding.

    Args:
        saved: The contents of `adapter_config.json`.
        weights: The contents of `adapter_model.safetensors`.

    Returns:
        The config and the weights of the LoRA as PEFT saves them, and a note on the conversion with its error: the
        Frobenius norm of the difference of all updates of weights, relative to the norm of the updates.

    Raises:
        ValueError: If PEFT is missing or too old, or cannot convert or load the adapter, or the base model is in few
            bits.
    """
    kind = str(saved["peft_type"])
    if not all(weight.is_floating_point() for weight in model.base_model.parameters()):
        raise ValueError(
            f"{label} is a PEFT adapter of type {kind}, which is not converted on a base model in 4 or 8 bits; "
            "convert it on the base model in full precision, save it by save_adapter_as_peft, and distil from that."
        )
    check_peft(f"{label} is a PEFT adapter of type {kind}")
    import peft  # optional

    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ValueError(NO_CONVERSION)
        config.task_type = config.modules_to_save = None  # the base model alone, without a head
        config.inference_mode = False  # what requires gradients must be in the file
        with torch.random.fork_rng():
            adapted = peft.get_peft_model(_base_alone(model, weights), config).eval()
        if not adapted.supports_lora_conversion():
            raise ValueError(NO_CONVERSION)
        _check_adapter_alone(model, adapted, weights)
        loaded = peft.set_peft_model_state_dict(adapted, dict(weights))
        _check_loaded(model, adapted, loaded)
        lora_config, lora_weights = peft.convert_to_lora(adapted, rank=KEPT)
        missed = _relative_error(adapted, lora_weights)
    except Exception as error:  # PEFT and torch raise anything on adapters that do not fit
        mismatch = size_mismatch(error)
        reason = one_line(error) if not mismatch else f"it {mismatch}"
        if mismatch or re.search("[Tt]arget.modules", reason):  # which a model of another kind lacks
            reason = f"{reason.rstrip('.')}; {REMEDY}"
        raise ValueError(f"{label} is a PEFT adapter of type {kind} that cannot be converted: {reason}") from error
    note = f"from {kind} by peft {peft.__version__}, relative error {missed:.1e}"
    rank = max(weight.shape[0] for key, weight in lora_weights.items() if key.endswith(FACTORS[0]))
    logger.warning(f"{label} was converted to LoRA of rank {rank}: {note} of its updates.")
    return lora_config.to_dict(), lora_weights, note


def _base_alone(model: ModelAdaptersMixin, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the base model as it was before `adapters.init`, with the same weights in memory, for PEFT to adapt.

    It is inside another module where PEFT saved the weights from a model with a head.
    """
    base = model.base_model
    alone = on_meta(original_class(base), base.config)
    for name, _ in list(alone.named_children()):
        if getattr(base, name, None) is None:  # such as the pooler below some heads
            setattr(alone, name, None)
    state = base.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()}, assign=True)
    prefix = model.base_model_prefix
    if not any(key.startswith(f"{PREFIX}{prefix}.") for key in weights):
        return alone
    with_head = nn.Module()
    with_head.add_module(prefix, alone)
    return with_head


def _check_adapter_alone(model: ModelAdaptersMixin, adapted: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that would be read into the base model, whose memory is the user's."""
    of_base = {weight.data_ptr() for weight in model.base_model.state_dict().values()}
    shared = [key for key, weight in adapted.state_dict().items() if weight.data_ptr() in of_base]
    if held := [key for key in shared if key in weights]:
        raise ValueError(f"it holds {held[0]} of the base model (modules_to_save).")


def _check_loaded(model: ModelAdaptersMixin, adapted: nn.Module, loaded: Any) -> None:
    """Refuse weights without a place in the base model, and parameters of the adapter without a weight."""
    if foreign := [key for key in loaded.unexpected_keys if is_of_base(model, key)]:
        raise ValueError(
            f"{foreign[0]} has no place in the {model.config.model_type}; use one of the same base model."
        )
    names: dict[int, set[str]] = {}  # of each parameter: some methods share one between the layers
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), set()).add(name)
    for of_one in names.values():
        if of_one <= set(loaded.missing_keys):
            raise ValueError(f"{min(of_one)} is missing; save it again.")


@torch.no_grad()
def _relative_error(adapted: nn.Module, lora: Mapping[str, torch.Tensor]) -> float:
    """Compare what the layers of PEFT add to each unit vector with the products of the factors."""
    missed = total = 0.0
    for key, down in lora.items():
        if not key.endswith(FACTORS[0]):
            continue
        path = key.removesuffix(FACTORS[0])
        layer: Any = deepcopy(adapted.get_submodule(path)).float()  # half precision would round what is compared
        up = lora[path + FACTORS[1]]
        inputs = torch.eye(down.shape[1], device=down.device)[None]
        update = (layer(inputs) - layer.get_base_layer()(inputs))[0].double()  # (in, out)
        missed += float((update - (up.double() @ down.double()).T).square().sum())
        total += float(update.square().sum())
    return (missed / total) ** 0.5 if total else 0.0
