"""Hub ids, downloads and configs of saved adapters, and messages of one line for what goes wrong."""

import difflib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import requests
from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import validate_repo_id

ADAPTER_CONFIG_NAME = "adapter_config.json"  # of `adapters.utils`, whose import takes seconds

STATUS = {
    401: "the token is missing or wrong; log in with `hf auth login`, or pass another token",
    403: "the token does not allow it; use one that may write there, or pass create_pr=True",
    409: "another push came between; push again",
    **{status: f"the Hub failed with {status}; try again" for status in (500, 502, 503, 504)},
}
REASONS: dict[type[Exception], str] = {
    errors.GatedRepoError: "it is gated; accept its terms on the Hub and log in with `hf auth login`",
    errors.RevisionNotFoundError: "it has no such revision",
    errors.RepositoryNotFoundError: "it does not exist or is private; check the name, or log in with `hf auth login`",
    errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set",
}


def is_repo_id(name: object) -> bool:
    """Check whether a name is a text that has the form of a repository, with or without an owner."""
    try:
        validate_repo_id(name)  # type: ignore[arg-type]
    except errors.HFValidationError:
        return False
    return True


def is_hub_id(source: str) -> bool:
    """Check whether a text has the form `owner/repository` or `owner/repository@revision`."""
    repo = source.partition("@")[0]
    return is_repo_id(repo) and "/" in repo and not repo.startswith(".")


def download(source: str, files: Sequence[str]) -> Path:
    """Download the named files of a Hub id, and return their folder, whose name is the commit.

    Raises:
        OSError: From requests or huggingface_hub, or because the disk is full.
    """
    repo, _, revision = source.partition("@")
    return Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(files)))


def find_cached(source: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Return the folder of a repository in the cache, which `load_adapter` has downloaded; None without one."""
    try:
        return Path(snapshot_download(source, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):
        return None


def locate_saved(source: str, files: Sequence[str]) -> Path:
    """Return the folder of a saved adapter, given as a folder or a Hub id; download the named files if need be.

    Raises:
        ValueError: If the source has neither form.
        OSError: If the Hub does not give the files.
    """
    if os.path.isdir(source):
        return Path(source)
    if not is_hub_id(source):
        raise ValueError(f"{source!r} is no local folder, and no Hub id either ('user/adapter').")
    try:
        return download(source, files)
    except OSError as error:
        raise OSError(f"{source!r} is no local folder, and the Hub did not give it: {hub_reason(error)}.") from error


def is_pool(folder: str | Path) -> bool:
    """Return whether a folder holds folders of saved adapters, and is none itself."""
    path = Path(folder)
    return not (path / ADAPTER_CONFIG_NAME).is_file() and any(path.glob(f"*/{ADAPTER_CONFIG_NAME}"))


def read_adapter_config(folder: str | Path, label: str | None = None) -> dict[str, Any]:
    """Read the `adapter_config.json` of a folder; `label` (by default the folder) is the adapter in messages."""
    path = Path(folder) / ADAPTER_CONFIG_NAME
    if not path.is_file():
        nested = sorted(Path(folder).glob(f"*/{ADAPTER_CONFIG_NAME}"))
        hint = f"did you mean {nested[0].parent}?" if nested else "give a folder made by save_adapter."
        raise ValueError(f"{label or folder} holds no {ADAPTER_CONFIG_NAME}; {hint}")
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a JSON file of a saved adapter."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({one_line(error).rstrip('.')}); save the adapter again.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is no adapter config (it holds no object); save the adapter again.")
    return saved


def hub_reason(error: Exception) -> str:
    """Return why the Hub refused and what helps, from an error of `huggingface_hub`, without a full stop."""
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return f"it is not in the cache, and {hub_reason(error.__cause__)}"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # from the upload of a large file
        return hub_reason(error.__cause__)
    for kind, reason in REASONS.items():
        if isinstance(error, kind):
            return reason
    if isinstance(error, requests.ConnectionError | requests.Timeout):
        return f"{constants.ENDPOINT} cannot be reached or broke off; try again"
    reason = one_line(error).rstrip(".")
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return STATUS.get(error.response.status_code, f"the Hub answers {reason}")
    return reason


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line, with the type of the error where that tells more."""
    text, kind = " ".join(str(error).split()), type(error).__name__
    if not text:
        return kind
    return text if isinstance(error, OSError | RuntimeError | ValueError) else f"{kind}: {text}"


def suggestion(name: str, candidates: Iterable[str]) -> str:
    """Return `did you mean 'bank'?` with the candidate closest to a name; an empty text if none is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1)
    return f"did you mean {close[0]!r}?" if close else ""
