"""What a saved student says about its origin, and what the Hub says when it refuses."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any

import requests
import torch
from adapters import ModelAdaptersMixin
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .._compat import ADAPTER_CONFIG_NAME
from ..method.distillation import Distillation


def adapter_digest(model: ModelAdaptersMixin, name: str) -> str:
    """The SHA-256 digest of an adapter's weights: their places in the base model, types, shapes and values.

    Args:
        model: The model, with or without heads.
        name: The name of the adapter.

    Returns:
        64 hexadecimal digits, the same for an adapter under another name or on another copy of the base model.
    """
    digest = hashlib.sha256()
    for place, modules in sorted(model.get_adapter(name).items()):
        for location, module in sorted(modules.items()):
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(f"{place}.{location}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def provenance(model: ModelAdaptersMixin, distillation: Distillation) -> dict[str, Any]:
    """What `save_adapter` writes under `"distillation"` into the student's `adapter_config.json`.

    Args:
        model: The model.
        distillation: The student's distillation.

    Returns:
        A dict that JSON can hold: the config, teachers with sources, revisions and weight digests, the versions of
        the libraries, and once the training has ended its settings, last losses and evaluation.
    """
    teachers = [
        {"name": name, **distillation.sources[name], "digest": adapter_digest(model, name)}
        for name in distillation.config.teachers
    ]
    settings = {key: value for key, value in asdict(distillation.config).items() if key != "teachers"}
    settings["level"] = distillation.level
    packages = ("hf-adapter-distillation", "adapters", "transformers", "torch")
    return {
        "method": "AdapterDistillation (Wang et al., EMNLP 2023 Industry, arXiv 2312.16261)",
        "teachers": teachers,
        **settings,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        **(distillation.training or {}),
    }


def read_provenance(folder: str) -> dict[str, Any]:
    """What a saved student says about its distillation.

    Args:
        folder: A folder that `save_adapter` wrote for a distilled student.

    Returns:
        What `provenance` made.

    Raises:
        ValueError: If the folder holds a plain adapter, or none, or what it says is damaged.
    """
    return provenance_of(read_saved(folder), folder)


def read_saved(folder: str | Path) -> dict[str, Any]:
    """The config of a saved adapter.

    Args:
        folder: The folder.

    Returns:
        What `adapter_config.json` holds.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        inside = sorted(Path(folder).glob(f"*/{ADAPTER_CONFIG_NAME}"))
        hint = f"did you mean {inside[0].parent}?" if inside else "give a folder made by save_adapter."
        raise ValueError(f"{folder} holds no {ADAPTER_CONFIG_NAME}; {hint}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({_one_line(error)}); save the adapter anew.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is no adapter config; save the adapter anew.")
    return saved


def provenance_of(saved: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    """The provenance in the config of a saved adapter.

    Args:
        saved: What `read_saved` returned.
        source: Where it was found, for messages.

    Returns:
        What `provenance` made.

    Raises:
        ValueError: If the adapter was not distilled, or what it says about it is damaged.
    """
    if "distillation" not in saved:
        raise ValueError(f"{source} holds an adapter that was not distilled; it names no teachers.")
    run = saved["distillation"]
    if not (_is_whole(run) and isinstance(saved.get("name"), str)):
        raise ValueError(f'"distillation" in the {ADAPTER_CONFIG_NAME} of {source} is damaged; save the student anew.')
    return run


def _is_whole(run: Any) -> bool:
    """Whether a provenance, which others may have written, has the form that `provenance` gives it."""

    def is_dict(value: Any, of: type | UnionType) -> bool:
        return isinstance(value, dict) and all(isinstance(each, of) for each in value.values())

    if not isinstance(run, dict) or not isinstance(run.get("teachers"), list) or not is_dict(run.get("versions"), str):
        return False
    for teacher in run["teachers"]:
        known = is_dict(teacher, str | None) and all(isinstance(teacher.get(key), str) for key in ("name", "source"))
        if not known or not {"revision", "digest"} <= teacher.keys():
            return False
    attention = run.get("attention", {})
    rows: list[Any] = list(attention.values()) if isinstance(attention, dict) else [None]
    if not all(is_dict(row, int | float) and row.keys() == rows[0].keys() for row in rows):
        return False
    losses = run.get("losses", {})
    results = [run.get("evaluation", {}), *(losses.values() if isinstance(losses, dict) else [None])]
    return all(is_dict(result, int | float) for result in results)


def is_hub_id(source: str) -> bool:
    """Whether a text has the form of a repository of somebody's, with or without `@revision`."""
    repo = source.partition("@")[0]
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return "/" in repo and not repo.startswith(".")


def download(source: str, files: Sequence[str]) -> Path:
    """Downloads files of a repository, unless they are in the cache.

    Args:
        source: A Hub id, with `@revision` if wanted.
        files: The names of the files.

    Returns:
        The local folder.

    Raises:
        OSError: Of requests, of huggingface_hub, or of a full disk.
    """
    repo, _, revision = source.partition("@")
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(files)))


def locate_saved(source: str, files: Sequence[str]) -> Path:
    """The folder of a saved adapter, which is downloaded if it is on the Hub.

    Args:
        source: A local folder or a Hub id, with `@revision` if wanted.
        files: The names of the files that are wanted.

    Returns:
        The local folder.

    Raises:
        ValueError: If it is neither.
        OSError: If the Hub does not give it.
    """
    if os.path.isdir(source):
        return Path(source)
    if not is_hub_id(source):
        raise ValueError(f"{source!r} is no local folder, and no Hub id either ('user/adapter').")
    try:
        return download(source, files)
    except OSError as error:
        raise OSError(f"{source!r} is no local folder, and the Hub did not give it: {hub_reason(error)}.") from error


def hub_reason(error: Exception) -> str:
    """Why the Hub did not do what it was asked for, and what helps.

    Args:
        error: What `huggingface_hub` raised.

    Returns:
        One line, without a full stop.
    """
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return f"it is not in the cache, and {hub_reason(error.__cause__)}"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # a file of the large ones
        return hub_reason(error.__cause__)
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its terms on the Hub and log in with `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "it does not exist or is private; check the name, or log in with `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return f"{constants.ENDPOINT} cannot be reached or broke off; try again"
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return STATUS.get(error.response.status_code, f"the Hub answers {_one_line(error)}")
    return _one_line(error)


STATUS = {
    401: "the token is missing or wrong; log in with `hf auth login`, or pass another token",
    403: "the token does not allow it; use one that may write there, or pass create_pr=True",
    409: "another push came between; push again",
    **{status: f"the Hub failed with {status}; try again" for status in (500, 502, 503, 504)},
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
