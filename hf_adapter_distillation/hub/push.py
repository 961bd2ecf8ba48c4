"""Pushes a student, and nothing but the student, to the Hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from shutil import copyfile, copytree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    create_branch,
    create_commit,
    create_repo,
    get_paths_info,
    get_token,
    whoami,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._compat import (
    ADAPTER_CONFIG_NAME,
    HEAD_CONFIG_NAME,
    HEAD_WEIGHTS_NAME,
    SAFE_HEAD_WEIGHTS_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)
from ..student.provenance import hub_reason, provenance_of, read_saved
from ..training.checkpoint import save_weights
from .card import ATTENTION_NAME, CARD_NAME, Described, save_card, static_head, write_card

WEIGHTS = ((SAFE_WEIGHTS_NAME, WEIGHTS_NAME), (SAFE_HEAD_WEIGHTS_NAME, HEAD_WEIGHTS_NAME))
OF_A_STUDENT = (*chain(*WEIGHTS), HEAD_CONFIG_NAME, ATTENTION_NAME)

Files = dict[str, bytes]


def student_files(
    model: ModelAdaptersMixin, student: str, repo_id: str, saved: str | Path | None = None, **card: Any
) -> Files:
    """All that a push uploads. Nothing else is read, and nothing is left on the disk.

    The weights stand in it twice: adapters reads a pickle unless it is told otherwise, and others want none.

    Args:
        model: The model.
        student: The name of the student.
        repo_id: The repository that it is pushed to.
        saved: The folder of the student in a checkpoint, if that is to be pushed.
        **card: What is known for the card, as for `save_card`.

    Returns:
        The contents of the files by their names.
    """
    with TemporaryDirectory() as made:
        folder = Path(made)
        if saved is None:
            save_weights(model, student, made)
        else:
            copytree(saved, folder, dirs_exist_ok=True)
        for safe_name, pickled_name in WEIGHTS:
            _write_both(folder / safe_name, folder / pickled_name, student)
        _forget_folders(folder / ADAPTER_CONFIG_NAME)
        save_card(model, student, folder, repo_id, **card)
        return _read(folder)


def _read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def saved_files(saved: str | Path, config: dict[str, Any], repo_id: str, **card: Any) -> Files:
    """All that a push of a saved student uploads: its files in the folder, and no others that lie there.

    Args:
        saved: The folder of the student.
        config: What `read_saved` returned for it.
        repo_id: The repository that it is pushed to.
        **card: What is known for the card, as for `write_card`. A card in the folder is kept.

    Returns:
        The contents of the files by their names.

    Raises:
        ValueError: If the folder holds no distilled student, or its files are damaged.
    """
    provenance_of(config, saved)
    student = config["name"]
    with TemporaryDirectory() as made:
        folder = Path(made)
        for name in (*OF_A_STUDENT, ADAPTER_CONFIG_NAME, CARD_NAME):
            if (path := Path(saved) / name).is_file():
                copyfile(path, folder / name)
        for safe_name, pickled_name in WEIGHTS:
            try:
                _write_both(folder / safe_name, folder / pickled_name, student)
            except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
                name = safe_name if (folder / safe_name).exists() else pickled_name
                raise ValueError(f"{Path(saved) / name} is damaged; save the student anew.") from error
        if not (folder / WEIGHTS_NAME).exists():
            raise ValueError(f"{saved} holds no weights of an adapter; save the student anew.")
        _forget_folders(folder / ADAPTER_CONFIG_NAME)
        if not (folder / CARD_NAME).exists():
            write_card(_described(config, folder), folder, repo_id, **card)
        return _read(folder)


def _described(config: dict[str, Any], folder: Path) -> Described:
    head: dict[str, Any] = {}
    if (path := folder / HEAD_CONFIG_NAME).exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
        head = saved["config"] or static_head(saved["model_class"])
    return Described(config["name"], config["model_type"], config["model_name"], head, config["distillation"])


def _write_both(safe: Path, pickled: Path, student: str) -> None:
    if safe.exists():
        state = load_file(safe)
    elif pickled.exists():
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        return
    # Adapters takes a head "bank2" for a part of the head "bank". The clones: tensors that safetensors 0.4.3 to 0.5.0
    # have read may share a storage, which torch would pickle with each of them.
    own = {
        key: value.clone()
        for key, value in state.items()
        if not key.startswith("heads.") or key.startswith(f"heads.{student}.")
    }
    if safe.exists():
        save_file(own, safe)
    torch.save(own, pickled)


def _forget_folders(path: Path) -> None:
    """Names the teachers that came from local folders without those."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for teacher in config["distillation"]["teachers"]:
        if teacher["revision"] is None:
            teacher["source"] = teacher["name"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def told(student: str, repo_id: str) -> Iterator[None]:
    """Makes an error of the Hub one line that says why, and what helps.

    Args:
        student: The name of the student.
        repo_id: The repository.

    Raises:
        OSError: In the place of what `huggingface_hub` raises, most of which is one, too.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{student!r} was not pushed to {repo_id!r}: {hub_reason(error)}.") from error


def check_push(student: str, repo_id: str, token: str | bool | None) -> str:
    """Refuses what cannot be pushed, before anything is created.

    Args:
        student: The name of the student.
        repo_id: The repository, with or without its owner.
        token: A token, or None or True for the one that is logged in.

    Returns:
        The repository with its owner.

    Raises:
        ValueError: If it is no valid name.
        OSError: If there is no token, or the Hub does not know it.
    """
    validate_repo_id(repo_id)
    if not (token if isinstance(token, str) else token is not False and get_token()):
        raise OSError(
            f"{student!r} was not pushed to {repo_id!r}: there is no token; log in with `hf auth login`, or pass one."
        )
    if "/" in repo_id:
        return repo_id
    with told(student, repo_id):
        return f"{whoami(token)['name']}/{repo_id}"


def commit(
    repo_id: str,
    files: Files,
    message: str,
    description: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> CommitInfo:
    """Makes the student what the repository holds, in one commit; other files of it stay.

    Args:
        repo_id: The repository, which exists.
        files: What `student_files` returned.
        message: The title of the commit.
        description: More about it.
        token: The token.
        create_pr: Whether to open a pull request instead.
        revision: The branch, which is created if it is missing; `main` by default.

    Returns:
        The address of the commit, with `oid` and `pr_url`.
    """
    if revision is not None and not revision.startswith("refs/pr"):
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    # What an earlier adapter had and this one has not would be loaded with it.
    stale = [name for name in OF_A_STUDENT if name not in files]
    left = get_paths_info(repo_id, stale, revision=revision, token=token) if stale else []
    return create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(info.path) for info in left),
        ],
        commit_message=message,
        commit_description=description,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )


def push_student(
    model: ModelAdaptersMixin,
    repo_id: str,
    student: str,
    datasets_tag: str | None = None,
    local_path: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    overwrite_adapter_card: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
    adapter_card_kwargs: dict | None = None,
) -> CommitInfo:
    """What `model.push_adapter_to_hub` does for a distilled student, with the same arguments.

    All files are made before the repository is, and go up in one commit.

    Args:
        model: The model.
        repo_id: The repository.
        student: The name of the student.
        datasets_tag: The id of its data set on the Hub.
        local_path: An existing folder that gets the files, too. A card that stands there is kept, here and on the Hub.
        commit_message: The title of the commit.
        private: Whether a repository that is created is private.
        token: A token, if not that of `hf auth login`.
        overwrite_adapter_card: Whether the card in `local_path` is written anew.
        create_pr: Whether to open a pull request instead of pushing.
        revision: The branch, which is created if it is missing.
        commit_description: More about the commit.
        adapter_card_kwargs: What the card says, as for `save_card`.

    Returns:
        The address of the commit, with `oid` and `pr_url`.

    Raises:
        ValueError: If `repo_id` is no valid name.
        OSError: If the Hub cannot be reached or refuses. The repository then holds what it held before, or all of the
            push if its answer was lost; the same push again does no harm.
    """
    full_name = check_push(student, repo_id, token)
    files = student_files(model, student, full_name, datasets_tag=datasets_tag, **(adapter_card_kwargs or {}))
    if local_path is not None and Path(local_path).is_dir():
        if (Path(local_path) / CARD_NAME).exists() and not overwrite_adapter_card:
            del files[CARD_NAME]
        for name, content in files.items():
            (Path(local_path) / name).write_bytes(content)
    return _push(student, full_name, files, private, commit_message, commit_description, token, create_pr, revision)


def _push(
    student: str,
    full_name: str,
    files: Files,
    private: bool | None,
    message: str | None,
    description: str | None,
    token: str | bool | None,
    create_pr: bool,
    revision: str | None,
) -> CommitInfo:
    """Creates the repository if it is missing, and commits."""
    with told(student, full_name):
        create_repo(full_name, token=token, private=private, exist_ok=True)
        return commit(full_name, files, message or f"Upload {student}", description, token, create_pr, revision)


def push_saved(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_description: str | None = None,
    adapter_card_kwargs: dict | None = None,
) -> CommitInfo:
    """Pushes a student from the folder that it was saved to, without the base model.

    Args:
        folder: A folder that `save_adapter` wrote for a distilled student. A card that stands there is pushed as it
            is; else one is made.
        repo_id: The repository.
        commit_message: The title of the commit.
        private: Whether a repository that is created is private.
        token: A token, if not that of `hf auth login`.
        create_pr: Whether to open a pull request instead of pushing.
        revision: The branch, which is created if it is missing.
        commit_description: More about the commit.
        adapter_card_kwargs: What the card says, as for `write_card`.

    Returns:
        The address of the commit, with `oid` and `pr_url`.

    Raises:
        ValueError: If the folder holds no distilled student, or `repo_id` is no valid name.
        OSError: If the Hub cannot be reached or refuses, as for `push_student`.
    """
    config = read_saved(folder)
    student = str(config.get("name"))
    full_name = check_push(student, repo_id, token)
    files = saved_files(folder, config, full_name, **(adapter_card_kwargs or {}))
    return _push(student, full_name, files, private, commit_message, commit_description, token, create_pr, revision)
