"""A `PeftModel` in memory as a model with adapters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import adapters
import torch
from adapters import ModelAdaptersMixin
from torch import nn
from transformers import PreTrainedModel

from .._compat import on_meta
from ..composition import check_name
from ..downloads import one_line
from .peft_lora import PREFIX, add_peft_lora, convert_peft_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.utils.other import ModulesToSaveWrapper


# The attribute of a model with the paths of the modules that PEFT trained with an adapter.
MODULES_OF_PEFT = "modules_of_peft"


def from_peft(peft_model: "PeftModel") -> ModelAdaptersMixin:
    """Turn a `PeftModel` into a model with adapters: its base model, with the LoRA of each of its adapters by name.

    The base model is the same object with the same weights in memory; only the LoRA are copied. PEFT's layers are
    taken out of it (`unload`), so the `PeftModel` cannot be used any more: reload it, or save it before. A head that
    PEFT trained (`modules_to_save`) becomes the head of the model. All parameters require gradients again, as in a
    model that was just loaded; no adapter is active.

    Example:
        >>> model = from_peft(peft_model)
        >>> model.add_adapter("insurance", config="lora", distill_from=["bank", "travel"])

    Raises:
        TypeError: If it is no `PeftModel`, or wraps something else than a model of transformers.
        ValueError: If there is no adapter, adapters does not know the model, an adapter cannot be converted, adapters
            have different heads or are merged into the base model. The `PeftModel` is then unchanged.
    """
    from peft import PeftModel  # optional, and there where a PeftModel is

    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"from_peft takes a PeftModel, not a {type(peft_model).__name__}.")
    if not peft_model.peft_config:
        raise ValueError("The PeftModel has no adapter, since all were deleted; load one by its load_adapter.")
    base: Any = peft_model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"The PeftModel wraps a {type(base).__name__}, which is no model of transformers.")
    if isinstance(base, ModelAdaptersMixin):
        raise ValueError(
            "The PeftModel wraps a model with adapters, as from_peft leaves it; use the model that it returned, "
            "or load the PeftModel again."
        )
    lora = _converted(peft_model, base)
    _check_heads(peft_model, list(lora))
    trained = [path.removeprefix(PREFIX) for path, _ in _trained_modules(peft_model)]
    base = peft_model.unload()
    setattr(base, MODULES_OF_PEFT, trained)
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    adapters.init(base)
    for name, converted in lora.items():
        add_peft_lora(base, name, converted)
    return base


def _converted(peft_model: "PeftModel", base: PreTrainedModel) -> dict[str, Any]:
    """Return the LoRA of all adapters, converted for a copy of the base model without weights."""
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    empty = on_meta(type(base), base.config)
    try:
        adapters.init(empty)
    except Exception as error:  # adapters raises anything on models that it does not know
        raise ValueError(f"adapters has no support for a {type(base).__name__}: {one_line(error)}") from error
    for module in peft_model.modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            merged = ", ".join(map(repr, module.merged_adapters))
            raise ValueError(f"{merged} is merged into the base model; call unmerge_adapter() of the PeftModel first.")
    converted = {}
    for name, config in peft_model.peft_config.items():
        label = f"Adapter {name!r}"
        check_name(name, label, "load it under another name")
        if config.peft_type != "LORA":
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"{label} is a PEFT adapter of type {kind}; from_peft takes LORA alone, and distill_from takes LOHA, "
                "LOKR, VERA and others that PEFT converts to LoRA, from the folder that save_pretrained writes."
            )
        saved = config.to_dict()
        weights = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
        converted[name] = convert_peft_lora(empty, saved, weights, label, _scalings(peft_model, name))
    return converted


def _scalings(peft_model: "PeftModel", name: str) -> dict[str, float]:
    """Return the factors of the updates in memory, which `set_scale` of a layer may have changed."""
    from peft.tuners.lora import LoraLayer

    layers = {path: each for path, each in peft_model.named_modules() if isinstance(each, LoraLayer)}
    return {path.removeprefix(PREFIX): each.scaling[name] for path, each in layers.items() if name in each.scaling}


def _check_heads(peft_model: "PeftModel", names: list[str]) -> None:
    """Refuse adapters with different heads, since the model has one."""
    for key, module in _trained_modules(peft_model):
        heads = {name: _state(module.modules_to_save, name, module.original_module) for name in names}
        for name, head in heads.items():
            if not all(torch.equal(weight, head[part]) for part, weight in heads[names[0]].items()):
                raise ValueError(
                    f"Adapters {names[0]!r} and {name!r} have different heads in {key}, and the model has one; save "
                    "both and load the folders by distill_from, which leaves heads out."
                )


def _trained_modules(peft_model: "PeftModel") -> "list[tuple[str, ModulesToSaveWrapper]]":
    """Return the modules that PEFT trained whole (`modules_to_save`), by their paths."""
    from peft.utils.other import ModulesToSaveWrapper

    modules = peft_model.named_modules()
    return [(path, module) for path, module in modules if isinstance(module, ModulesToSaveWrapper)]


def _state(modules: Any, name: str, original: nn.Module) -> Mapping[str, torch.Tensor]:
    return (modules[name] if name in modules else original).state_dict()
