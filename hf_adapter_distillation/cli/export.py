"""The command `export`: save a LoRA for PEFT."""

from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import adapters
import transformers
from adapters import AutoAdapterModel
from transformers import AutoConfig, PreTrainedModel

from .._compat import HEAD_CONFIG_NAME
from ..downloads import locate_saved, one_line, read_adapter_config, read_config_file
from ..student.peft_export import check_lora_config, write_as_peft
from ..student.provenance import provenance_of
from ..teachers.loading import ADAPTER_FILES, load_saved_adapter, read_config
from .models import base_of, load_pretrained
from .progress import without_noise


@without_noise()
def export(args: Namespace) -> str:
    """Save an adapter for PEFT, with its head if it has one and with its provenance if it was distilled."""
    folder = locate_saved(args.source, ADAPTER_FILES)
    saved, label = read_adapter_config(folder), f"Adapter {args.source!r}"
    if "peft_type" in saved:
        raise ValueError(f"{args.source} is an adapter of PEFT already.")
    check_lora_config(label, read_config(label, saved.get("config")))
    base = base_of(saved, args.source, args.model)
    provenance = provenance_of(saved, args.source).to_dict() if "distillation" in saved else None
    with_head = not args.no_head and (folder / HEAD_CONFIG_NAME).is_file()
    head = read_config_file(folder / HEAD_CONFIG_NAME) if with_head else {}
    own_class = _own_class(saved)
    load = partial(_load_own, own_class, head) if own_class else AutoAdapterModel.from_pretrained
    (model,) = load_pretrained(base, load, named_by=None if args.model else args.source)
    name = str(saved.get("name") or Path(args.source).name)
    load_saved_adapter(model, folder, name, label)
    if own_class and with_head:
        try:
            model.load_head(str(folder), use_safetensors=True)
        except Exception as error:  # adapters, torch and safetensors raise anything on damaged files
            raise ValueError(f"{label} has a head that cannot be loaded: {one_line(error)}") from error
    write_as_peft(model, name, args.output, with_head, provenance)
    return f"{name!r} is saved for PEFT in {args.output}"


def _own_class(saved: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """Return the class of transformers from which an adapter was saved; None for a class with flexible heads."""
    found = getattr(transformers, str(saved.get("model_class")), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _load_own(own_class: type[PreTrainedModel], head: Mapping[str, Any], base: str) -> Any:
    """Load a base model in a class, with as many labels as a saved head."""
    found, wanted = AutoConfig.from_pretrained(base).model_type, getattr(own_class.config_class, "model_type", None)
    if found != wanted:  # the class would take what the config lacks from its defaults, and so become a large model
        raise ValueError(f"it is a {found}, and the adapter was saved from a {wanted}")
    model = own_class.from_pretrained(base, **{"num_labels": head["num_labels"]} if "num_labels" in head else {})
    adapters.init(model)
    return model
