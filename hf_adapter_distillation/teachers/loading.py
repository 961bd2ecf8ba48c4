"""Where teachers come from: the model, local folders, the Hub."""

import difflib
import json
import os
import pickle
from pathlib import Path

import safetensors  # the module: datasets hashes functions by pickling what they refer to, and not this class
import torch
from adapters import AdapterConfig, LoRAConfig, ModelAdaptersMixin, ModelWithHeadsAdaptersMixin

from .._compat import (
    ADAPTER_CONFIG_NAME,
    HEAD_CONFIG_NAME,
    HEAD_WEIGHTS_NAME,
    SAFE_HEAD_WEIGHTS_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    AdapterLoader,
)
from ..composition import check_name
from ..student.provenance import download, hub_reason, is_hub_id
from .peft_lora import WEIGHTS_NAME as PEFT_WEIGHTS_NAME
from .peft_lora import is_peft, load_peft_lora, peft_lora_config

Source = dict[str, str | None]

# All that is downloaded of a repository, which may hold checkpoints and code, too.
ADAPTER_FILES = [
    ADAPTER_CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, HEAD_CONFIG_NAME, SAFE_HEAD_WEIGHTS_NAME, HEAD_WEIGHTS_NAME,
    PEFT_WEIGHTS_NAME,
]  # fmt: skip


def locate_teacher(model: ModelAdaptersMixin, teacher: str) -> tuple[str, Path | None, Source]:
    """Finds out what one entry of `distill_from` means; downloads it if it is on the Hub, adds nothing to the model.

    Args:
        model: The model.
        teacher: The name of an adapter on the model, a local folder, or a Hub id, with `@revision` if wanted.

    Returns:
        The name that the teacher has or will have on the model, its folder (None if it is on the model already), and
        its source.

    Raises:
        ValueError: If it is none of these, or cannot be downloaded, or its name is taken.
    """
    if teacher in model.adapters_config:
        return teacher, None, {"source": teacher, "revision": None}
    folder, revision = Path(teacher), None
    if not os.path.isdir(teacher):
        folder = _download(model, teacher)
        revision = folder.name
    # That of a symbolic link is its own, not that of the folder it leads to.
    name = os.path.basename(os.path.abspath(teacher.partition("@")[0] if revision else teacher))
    check_name(name, f"Teacher {teacher!r}", "rename the folder")
    if name in model.adapters_config or name in getattr(model, "heads", {}):
        raise ValueError(
            f"Teacher {teacher!r} would be named {name!r}, and the model has an adapter or head of that name; "
            f"distill from {name!r} if it is the same, else rename the folder."
        )
    return name, folder, {"source": teacher, "revision": revision}


def _download(model: ModelAdaptersMixin, teacher: str) -> Path:
    if not is_hub_id(teacher):
        close = difflib.get_close_matches(teacher, list(model.adapters_config), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "it is no local folder or Hub id either."
        known = ", ".join(map(repr, model.adapters_config)) or "none"
        raise ValueError(f"Unknown teacher {teacher!r}: {hint} Adapters on the model: {known}.")
    try:
        return download(teacher, ADAPTER_FILES)
    except OSError as error:
        raise ValueError(
            f"Teacher {teacher!r} is no adapter on the model, no local folder, and the Hub did not give it: "
            f"{hub_reason(error)}."
        ) from error


def check_folder(model: ModelAdaptersMixin, teacher: str, folder: Path) -> dict | LoRAConfig:
    """Reads the config of a saved adapter, also of PEFT, and refuses one that was made for another base model.

    Args:
        model: The model that the adapter is meant for.
        teacher: The entry of `distill_from`, for messages.
        folder: The local folder.

    Returns:
        The saved adapter config (the part that describes the adapter).

    Raises:
        ValueError: If the folder holds no adapter, or one for another model type, hidden size or base model, or an
            adapter of PEFT that cannot be converted.
    """
    path = folder / ADAPTER_CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"Teacher {teacher!r} holds no {ADAPTER_CONFIG_NAME}; give a folder made by save_adapter.")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if is_peft(saved):
            made_for, config = {"model_name": saved.get("base_model_name_or_path")}, None
        else:
            made_for = {key: saved[key] for key in ("model_type", "hidden_size", "model_name")}
            config = saved["config"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no adapter config ({error}); save the teacher anew with save_adapter.") from error
    here = {
        "model_type": model.config.model_type,
        "hidden_size": getattr(model.config, "hidden_size", None),
        "model_name": model.model_name,
    }
    for key, value in made_for.items():
        # Local paths name the same model differently on each machine, so only two Hub ids are compared.
        is_path = key == "model_name" and any(
            not v or os.path.isabs(v) or os.path.exists(v) for v in (here[key], value)
        )
        if value != here[key] and not is_path:
            raise ValueError(
                f"Teacher {teacher!r} was made for {key} {value!r}, the model has {here[key]!r}; "
                f"use teachers trained on the same base model."
            )
    return peft_lora_config(model, teacher, folder, saved) if is_peft(saved) else config


def load_teacher(model: ModelAdaptersMixin, teacher: str, name: str, folder: Path, config: dict | LoRAConfig) -> None:
    """Loads a saved teacher, with its head if there is one.

    Args:
        model: The model to load it on.
        teacher: The entry of `distill_from`, for messages.
        name: The name that it gets on the model.
        folder: The local folder.
        config: What `check_folder` returned for it.

    Raises:
        ValueError: If weights are missing from the folder or cannot be read.
    """
    if isinstance(config, LoRAConfig):  # converted from PEFT's
        return load_peft_lora(model, teacher, name, folder, config)
    info: dict[str, list[str]] = {}
    # A static head is the model's only one: loading a teacher's head would overwrite it.
    with_head = {"with_head": hasattr(model, "heads")} if isinstance(model, ModelWithHeadsAdaptersMixin) else {}
    # A file of the head "bank" holds that of "bank2", too, if the model had one.
    heads = (
        {key: weight.clone() for key, weight in model.heads.state_dict().items()} if hasattr(model, "heads") else {}
    )
    try:
        _check_own_weights(model, name, folder)
        model.load_adapter(str(folder), load_as=name, use_safetensors=True, loading_info=info, **with_head)
    except Exception as error:  # whatever a damaged file makes of the libraries that read it
        raise ValueError(f"Teacher {teacher!r} cannot be loaded: {first_line(error)}") from error
    finally:
        if heads:
            model.heads.load_state_dict(heads, strict=False)
    if missing := [key for key in info.get("missing_keys", []) if f".{name}." in key]:
        raise ValueError(
            f"Teacher {teacher!r} lacks {len(missing)} weights that this model needs, {missing[0]!r} the first; "
            f"use teachers trained on the same base model."
        )


def _check_own_weights(model: ModelAdaptersMixin, name: str, folder: Path) -> None:
    """Refuses files with weights of the base model or of other adapters, which adapters would load over those."""
    saved_as = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8")).get("name")
    rename = AdapterLoader(model).rename_func(saved_as, name)
    prefix = f"{model.base_model_prefix}."
    here = {key.removeprefix(prefix) for key in model.state_dict() if not key.startswith("heads.")}
    files = [(SAFE_WEIGHTS_NAME, WEIGHTS_NAME)]
    if hasattr(model, "heads"):
        head_files = (SAFE_HEAD_WEIGHTS_NAME, HEAD_WEIGHTS_NAME)
        if any((folder / file).exists() for file in head_files) and not (folder / HEAD_CONFIG_NAME).is_file():
            raise ValueError(f"it has the weights of a head, and no {HEAD_CONFIG_NAME}; save it anew.")
        files.append(head_files)
    for safe_name, pickled_name in files:
        if (folder / safe_name).exists():
            with safetensors.safe_open(folder / safe_name, "pt") as file:
                keys = list(file.keys())
        elif (folder / pickled_name).exists():
            try:
                keys = list(torch.load(folder / pickled_name, map_location="meta", weights_only=True))
            except pickle.UnpicklingError as error:
                raise ValueError(f"{pickled_name} is damaged, or holds other things than weights.") from error
        else:
            continue
        if foreign := [key for key in keys if rename(key).removeprefix(prefix) in here]:
            raise ValueError(f"{foreign[0]} in its files belongs to the model, not to the teacher; save it anew.")


def first_line(error: Exception) -> str:
    """What an error says, in one line, with its type where that tells more."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, OSError | RuntimeError | ValueError) else f"{type(error).__name__}: {text}"


def read_config(who: str, config: object) -> AdapterConfig:
    """Makes an adapter config of what a user passed, or a saved adapter has.

    Args:
        who: Whose config it is, for messages.
        config: A config, a dict, or a string.

    Returns:
        The config.

    Raises:
        ValueError: If it is none.
    """
    try:
        made = AdapterConfig.load(config)
    except Exception as error:
        raise ValueError(f"{who} has no valid adapter config: {first_line(error)}") from error
    if made is None:
        raise ValueError(f"{who} has no adapter config; save it anew with save_adapter.")
    return made
