"""Adapters from local folders and the Hub: locate them, check them, load them."""

import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import safetensors  # the module: datasets hashes functions by pickling what they refer to, and not this class
import torch
from adapters import AdapterConfig, ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from safetensors.torch import load_file

from .._compat import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS, HEAD_CONFIG_NAME, HEAD_WEIGHTS, AdapterLoader, heads_of
from ..composition import check_name
from ..downloads import download, hub_reason, is_hub_id, is_repo_id, one_line, read_adapter_config, suggestion
from .compatibility import REMEDY, check_weights, size_mismatch
from .peft_conversion import lora_by_peft
from .peft_lora import PEFT_WEIGHTS_NAME, PeftLoRA, add_peft_lora, convert_peft_lora, is_peft, read_peft_weights

Source = dict[str, str | None]

# The only files that are downloaded of a repository, which may hold checkpoints and code, too.
ADAPTER_FILES = [ADAPTER_CONFIG_NAME, *ADAPTER_WEIGHTS, HEAD_CONFIG_NAME, *HEAD_WEIGHTS, PEFT_WEIGHTS_NAME]


class SavedAdapter(NamedTuple):
    """Saved adapter that suits a model."""

    folder: Path
    label: str  # the adapter in messages
    saved_name: Any  # as it stands in the file
    config: dict | AdapterConfig
    lora: PeftLoRA | None = None  # where PEFT saved it
    conversion: str | None = None  # from another method of PEFT, with its error


class Teacher(NamedTuple):
    """Entry of `distill_from`, located and checked."""

    name: str  # on the model, now or once it is loaded
    label: str  # the teacher in messages
    source: Source
    saved: SavedAdapter | None  # None for an adapter that is on the model already


def locate_teacher(model: ModelAdaptersMixin, entry: str) -> Teacher:
    """Resolve one entry of `distill_from`: an adapter on the model, a local folder, or a Hub id (with `@revision`).

    An adapter on the Hub is downloaded, and named after its repository, with `_` for each dot. Nothing is added to the
    model.

    Raises:
        ValueError: If it is none of these, cannot be downloaded, suits another base model, or its name is taken.
    """
    label = f"Teacher {entry!r}"
    if entry in model.adapters_config:
        return Teacher(entry, label, {"source": entry, "revision": None}, None)
    if is_folder := os.path.isdir(entry):
        name, remedy = name_from_folder(entry, label), "rename the folder"
    else:
        name, remedy = _name_from_id(model, entry), "give a folder of another name that holds it"
        check_name(name, label, remedy)
    if name in model.adapters_config or name in heads_of(model):
        raise ValueError(
            f"{label} would be named {name!r}, and the model has an adapter or head of that name; "
            f"distill from {name!r} if it is the same, else {remedy}."
        )
    folder = Path(entry) if is_folder else _download(entry)
    revision = None if is_folder else folder.name
    saved = check_saved_adapter(model, folder, label)
    source = {"source": entry, "revision": revision}
    return Teacher(name, label, source | ({"conversion": saved.conversion} if saved.conversion else {}), saved)


def _name_from_id(model: ModelAdaptersMixin, teacher: str) -> str:
    """Return the name that an adapter gets from its Hub id; names of adapters have no dots, unlike repositories."""
    if not is_hub_id(teacher):
        hint = suggestion(teacher, model.adapters_config) or "it is no local folder or Hub id either."
        adapters = ", ".join(map(repr, model.adapters_config)) or "none"
        raise ValueError(f"Unknown teacher {teacher!r}: {hint} Adapters on the model: {adapters}.")
    return teacher.partition("@")[0].rpartition("/")[2].replace(".", "_")


def _download(teacher: str) -> Path:
    try:
        return download(teacher, ADAPTER_FILES)
    except OSError as error:
        raise ValueError(
            f"Teacher {teacher!r} is no adapter on the model, no local folder, and the Hub did not give it: "
            f"{hub_reason(error)}."
        ) from error


def name_from_folder(folder: str | Path, label: str) -> str:
    """Return the name that an adapter gets from its folder; raise `ValueError` if no adapter can have it."""
    name = os.path.basename(os.path.abspath(folder))  # a symbolic link keeps its own name
    check_name(name, label, "rename the folder")
    return name


def load_saved_adapter(model: ModelAdaptersMixin, folder: str | Path, name: str, label: str | None = None) -> None:
    """Load an adapter that adapters or PEFT saved, with its head if there is one and the model's heads are flexible.

    `label` is the adapter in messages, for instance "Student 'bank'"; by default "Adapter" and the folder.

    Raises:
        ValueError: If the folder holds no adapter, or one for another base model, or weights that cannot be read.
    """
    add_saved_adapter(model, check_saved_adapter(model, folder, label or f"Adapter {str(folder)!r}"), name)


def check_saved_adapter(model: ModelAdaptersMixin, folder: str | Path, label: str) -> SavedAdapter:
    """Read the config of a saved adapter; refuse another base model, and a PEFT adapter that cannot be converted."""
    folder = Path(folder)
    saved = read_adapter_config(folder, label)
    of_model = {
        "model_type": model.config.model_type,
        "hidden_size": getattr(model.config, "hidden_size", None),
        "model_name": model.model_name,
    }
    if is_peft(saved):
        made_for = {"model_name": saved.get("base_model_name_or_path")}
    elif missing := [key for key in (*of_model, "config") if key not in saved]:
        path = folder / ADAPTER_CONFIG_NAME
        raise ValueError(f"{path} is no adapter config ({missing[0]!r} is missing); save the adapter again.")
    else:
        made_for = {key: saved[key] for key in of_model}
    if not _are_other_ids(model.model_name, made_for["model_name"]):
        del made_for["model_name"]
    for key, value in made_for.items():
        if value != of_model[key]:
            raise ValueError(f"{label} was made for {key} {value!r}, the model has {of_model[key]!r}; {REMEDY}")
    if not is_peft(saved):
        return SavedAdapter(folder, label, saved.get("name"), saved["config"])
    weights, conversion = read_peft_weights(folder, label), None
    if saved["peft_type"] != "LORA":
        saved, weights, conversion = lora_by_peft(model, folder, saved, weights, label)
    lora = convert_peft_lora(model, saved, weights, label)
    return SavedAdapter(folder, label, None, lora.config, lora, conversion)


def _are_other_ids(first: Any, second: Any) -> bool:
    """Return whether two names of models are ids on the Hub, and of different models."""
    if not all(is_repo_id(name) and not os.path.exists(name) for name in (first, second)):
        return False  # each machine has its own paths of the same model
    if "/" in first and "/" in second:
        return first != second
    return first.rpartition("/")[2] != second.rpartition("/")[2]  # old ids have no owner


def load_teacher(model: ModelAdaptersMixin, teacher: Teacher, with_head: bool = True) -> None:
    """Load and freeze a teacher that is not on the model, and check its weights.

    Raises:
        ValueError: If the weights cannot be loaded, or are not finite. The model is then what it was.
    """
    saved, name = teacher.saved, teacher.name
    try:
        if saved:
            add_saved_adapter(model, saved, name, with_head)
            model.apply_to_adapter_layers(lambda i, layer: layer.freeze_adapter(name))
        check_weights(model, {name: teacher.label})
    except BaseException:
        if saved:
            remove_adapter(model, name)
        raise


def remove_adapter(model: ModelAdaptersMixin, name: str) -> None:
    """Remove an adapter with its head from a model, as far as they are on it."""
    model.delete_adapter(name)
    if name in heads_of(model):
        model.delete_head(name)


def add_saved_adapter(model: ModelAdaptersMixin, adapter: SavedAdapter, name: str, with_head: bool = True) -> None:
    """Add an adapter that `check_saved_adapter` returned; refuse missing and unreadable weights."""
    folder, label, saved_name = adapter.folder, adapter.label, adapter.saved_name
    if adapter.lora is not None:
        return add_peft_lora(model, name, adapter.lora)
    info: dict[str, list[str]] = {}
    # A static head is the model's only one: loading a saved head would overwrite it.
    with_head = with_head and isinstance(model, ModelWithFlexibleHeadsAdaptersMixin)
    # A file of the head "bank" holds that of "bank2", too, if the model had one.
    heads = {key: weight.clone() for key, weight in model.heads.state_dict().items()} if with_head else {}
    try:
        check_formats(folder)
        _check_foreign_weights(model, folder, saved_name, name)
        model.load_adapter(str(folder), load_as=name, with_head=with_head, use_safetensors=True, loading_info=info)
    except Exception as error:  # adapters, torch and safetensors raise anything on damaged files and configs
        if mismatch := size_mismatch(error):
            raise ValueError(f"{label} {mismatch}; {REMEDY}") from error
        raise ValueError(f"{label} cannot be loaded: {one_line(error)}") from error
    finally:
        if heads:
            model.heads.load_state_dict(heads, strict=False)
    for kind, what in (
        ("missing_keys", "lacks {} weights that this model needs"),
        ("unexpected_keys", "has {} weights that this model lacks"),
    ):
        if keys := [key for key in info.get(kind, []) if f".{name}." in key]:
            raise ValueError(f"{label} {what.format(len(keys))}, {keys[0]!r} the first; {REMEDY}")
    is_shared = name in model.base_model.shared_parameters
    if is_shared and not any("shared_parameters." in key for key in _saved_keys(folder, *ADAPTER_WEIGHTS)):
        raise ValueError(
            f"{label} lacks the weights that its layers share, which adapters leaves out where the model has no head; "
            "save it again from an AutoAdapterModel."
        )


def _check_foreign_weights(model: ModelAdaptersMixin, folder: Path, saved_name: Any, name: str) -> None:
    """Refuse files with weights of the base model or of other adapters, which adapters would load over those."""
    rename = AdapterLoader(model).rename_func(saved_name, name)
    prefix = f"{model.base_model_prefix}."
    of_model = {key.removeprefix(prefix) for key in model.state_dict() if not key.startswith("heads.")}
    keys = _saved_keys(folder, *ADAPTER_WEIGHTS)
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        if any((folder / file).exists() for file in HEAD_WEIGHTS) and not (folder / HEAD_CONFIG_NAME).is_file():
            raise ValueError(f"it has the weights of a head, and no {HEAD_CONFIG_NAME}; save it again.")
        keys += _saved_keys(folder, *HEAD_WEIGHTS)
    if foreign := [key for key in keys if rename(key).removeprefix(prefix) in of_model]:
        raise ValueError(f"{foreign[0]} in its files belongs to the model, not to the adapter; save it again.")


def check_formats(folder: Path) -> None:
    """Refuse a folder whose safetensors and pickles hold other weights: adapters reads the former on request only."""
    for names in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        safe, pickled = (folder / name for name in names)
        if not (safe.is_file() and pickled.is_file()):
            continue
        first, second = load_file(safe), torch.load(pickled, map_location="cpu", weights_only=True)
        if first.keys() != second.keys() or any(not value.equal(second[key]) for key, value in first.items()):
            raise ValueError(
                f"{folder} holds two versions of the weights, {safe.name} and {pickled.name}; delete the older file."
            )


def _saved_keys(folder: Path, safe_name: str, pickled_name: str) -> list[str]:
    """Return the names of the saved weights in one of two files; none if neither exists."""
    if (folder / safe_name).exists():
        with safetensors.safe_open(folder / safe_name, "pt") as file:
            return list(file.keys())
    if not (folder / pickled_name).exists():
        return []
    try:
        return list(torch.load(folder / pickled_name, map_location="meta", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{pickled_name} is damaged, or holds other things than weights.") from error


def read_config(label: str, config: object) -> AdapterConfig:
    """Make an adapter config of a dict or string; raise a `ValueError` about its owner (`label`) if it is invalid."""
    try:
        adapter_config = AdapterConfig.load(config)
    except (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{label} has no valid adapter config: {one_line(error)}") from error
    if adapter_config is None:
        raise ValueError(f"{label} has no adapter config; save it again with save_adapter.")
    return adapter_config
