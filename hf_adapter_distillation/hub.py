"""What a saved student says about its origin, and what the Hub says when it refuses."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import requests
import torch
from adapters import ModelAdaptersMixin
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ._compat import ADAPTER_CONFIG_NAME
from .state import Distillation


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
        ValueError: If the folder holds a plain adapter.
    """
    saved = json.loads((Path(folder) / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    if "distillation" not in saved:
        raise ValueError(f"{folder} holds an adapter that was not distilled; it names no teachers.")
    return saved["distillation"]


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
