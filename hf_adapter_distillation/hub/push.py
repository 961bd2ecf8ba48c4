"""Push a student to the Hub: its adapter, head and card, without teachers and base model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from shutil import copyfile, copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import Any, Literal

from adapters import ModelAdaptersMixin
from huggingface_hub import CommitInfo, create_branch, create_repo, get_token, upload_folder, whoami
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from .._compat import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS, HEAD_CONFIG_NAME, HEAD_WEIGHTS
from ..downloads import hub_reason, read_adapter_config
from ..method.heads import number_of_labels
from ..student.peft_export import PEFT_FILES, check_folder, save_adapter_as_peft
from ..student.provenance import PROVENANCE_NAME, provenance_of
from ..student.saving import DIGESTS_NAME, file_digest, read_weights, save_weights, write_weights
from ..teachers.loading import check_formats
from ..teachers.peft_lora import is_peft
from ..teachers.projections import check_known_to_adapters
from .card import ATTENTION_NAME, CARD_NAME, CardFacts, CardOptions, write_card

STUDENT_FILES = (
    *ADAPTER_WEIGHTS,
    *HEAD_WEIGHTS,
    HEAD_CONFIG_NAME,
    ATTENTION_NAME,
    *PEFT_FILES,
)  # not every student has all of them


@dataclass(kw_only=True)
class PushOptions:
    """Options of a push.

    Args:
        commit_message: The title of the commit; by default `Upload` and the name of the student.
        private: Visibility of a repository that the push creates.
        token: By default the token of `hf auth login`.
        create_pr: Open a pull request instead of pushing.
        revision: A branch, which is created if it is missing; by default `main`.
    """

    commit_message: str | None = None
    commit_description: str | None = None
    private: bool | None = None
    token: bool | str | None = None
    create_pr: bool = False
    revision: str | None = None


@contextmanager
def student_folder(model: ModelAdaptersMixin, student: str, repo_id: str, card: CardOptions) -> Iterator[Path]:
    """Write the files of a push to a temporary folder, from the student on a model."""
    check_known_to_adapters(student, model.adapters_config.get(student))
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_weights(model, student, name)
        write_all_formats(folder, folder, student)
        _drop_folders(folder / ADAPTER_CONFIG_NAME)
        write_card(CardFacts.of_model(model, student), folder, repo_id, card)
        yield folder


@contextmanager
def peft_folder(model: ModelAdaptersMixin, student: str, repo_id: str, card: CardOptions) -> Iterator[Path]:
    """Write the files of a push in the format of PEFT to a temporary folder, from the student on a model."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_adapter_as_peft(model, student, folder)
        if (path := folder / PROVENANCE_NAME).exists():
            _drop_folders(path)
        config = read_adapter_config(folder)
        facts = CardFacts.of_model(model, student)._replace(
            peft_class=config["auto_mapping"]["base_model_class"], num_labels=number_of_labels(model, student)
        )
        write_card(facts, folder, repo_id, card)
        yield folder


@contextmanager
def saved_student_folder(saved: str | Path, repo_id: str, card: CardOptions) -> Iterator[Path]:
    """Write the files of a push to a temporary folder, from a saved student; its own card wins over `card`."""
    config = read_adapter_config(saved)
    provenance_of(config, saved)
    check_known_to_adapters(config["name"], config["config"])
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file in (HEAD_CONFIG_NAME, ATTENTION_NAME, ADAPTER_CONFIG_NAME, CARD_NAME):
            if (path := Path(saved) / file).is_file():
                copyfile(path, folder / file)
        write_all_formats(Path(saved), folder, config["name"])
        try:
            check_formats(Path(saved))
        except (UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"A pickle in {saved} is damaged; save the student again.") from error
        if not (folder / ADAPTER_WEIGHTS[1]).exists():
            raise ValueError(f"{saved} holds no weights of an adapter; save the student again.")
        _drop_folders(folder / ADAPTER_CONFIG_NAME)
        if not (folder / CARD_NAME).exists():
            write_card(CardFacts.of_saved(config, folder), folder, repo_id, card)
        yield folder


def write_all_formats(saved: Path, folder: Path, student: str) -> None:
    """Write the saved weights without other heads, as a pickle, which adapters reads by default, and as they were."""
    for safe_name, pickled_name in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        is_safe = (saved / safe_name).is_file()
        path = saved / (safe_name if is_safe else pickled_name)
        if not path.is_file():
            continue
        try:
            weights = read_weights(path, student)
        except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged; save the student again.") from error
        for name in (safe_name, pickled_name) if is_safe else (pickled_name,):
            write_weights(weights, folder / name)


@contextmanager
def checkpoint_to_share(checkpoint: str | Path, student: str) -> Iterator[Path]:
    """Write the files of a checkpoint to a temporary folder, without the paths of this machine that are in them.

    The training arguments are left out, which no training that is resumed reads. The state of the trainer forgets the
    folder of the best checkpoint.

    Yields:
        The folder.
    """
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        copytree(checkpoint, folder, ignore=ignore_patterns(TRAINING_ARGS_NAME))
        _drop_folders(config := folder / student / ADAPTER_CONFIG_NAME)
        if (path := folder / TRAINER_STATE_NAME).is_file():
            state = json.loads(path.read_text(encoding="utf-8")) | {"best_model_checkpoint": None}
            path.write_text(json.dumps(state, indent=2), encoding="utf-8")
        if (path := folder / DIGESTS_NAME).is_file():
            digests = json.loads(path.read_text(encoding="utf-8"))
            digests.pop(TRAINING_ARGS_NAME, None)
            digests[config.relative_to(folder).as_posix()] = file_digest(config)
            path.write_text(json.dumps(digests, indent=2), encoding="utf-8")
        yield folder


def _drop_folders(path: Path) -> None:
    """Replace the teachers' local folders in an adapter config, or in a provenance alone, by their names."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for teacher in config.get("distillation", config).get("teachers", ()):
        if teacher["revision"] is None:
            teacher["source"] = teacher["name"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def push_errors(student: str, repo_id: str) -> Iterator[None]:
    """Turn the errors of a push into an OSError with one line: the reason and the fix."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"{student!r} was not pushed to {repo_id!r}: {hub_reason(error)}.") from error


def check_push(student: str, repo_id: str, token: str | bool | None) -> str:
    """Return the repository with its owner; raise ValueError for a wrong name, OSError without a valid token."""
    validate_repo_id(repo_id)
    if not (token if isinstance(token, str) else token is not False and get_token()):
        reason = "there is no token; log in with `hf auth login`, or pass one"
        raise OSError(f"{student!r} was not pushed to {repo_id!r}: {reason}.")
    if "/" in repo_id:
        return repo_id
    with push_errors(student, repo_id):
        return f"{whoami(token)['name']}/{repo_id}"


def upload(folder: Path, student: str, repo_id: str, options: PushOptions) -> CommitInfo:
    """Replace the student of an existing repository in one commit; keep all other files."""
    revision = options.revision
    if revision is not None and not revision.startswith("refs/pr"):
        create_branch(repo_id, branch=revision, token=options.token, exist_ok=True)
    return upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        # Files that only an earlier adapter had would be loaded with this one. Files in the folder are not deleted.
        delete_patterns=list(STUDENT_FILES),
        commit_message=options.commit_message or f"Upload {student}",
        commit_description=options.commit_description,
        token=options.token,
        create_pr=options.create_pr,
        revision=revision,
    )


def _push(folder: Path, student: str, repo_id: str, options: PushOptions) -> CommitInfo:
    with push_errors(student, repo_id):
        create_repo(repo_id, token=options.token, private=options.private, exist_ok=True)
        return upload(folder, student, repo_id, options)


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
    format: Literal["adapters", "peft"] = "adapters",
) -> CommitInfo:
    """Push a distilled student from its model, with the arguments of adapters' `push_adapter_to_hub`.

    All files are written before the repository is created, and go up in one commit. An existing folder `local_path`
    gets them, too; a card in it is kept, there and on the Hub, unless `overwrite_adapter_card` is set. `datasets_tag`
    and `adapter_card_kwargs` are arguments of `CardOptions`, the others are arguments of `PushOptions`.
    `format="peft"` pushes the files of `save_adapter_as_peft`.

    Raises:
        ValueError: If `repo_id` is not a valid name, the student has no form in the format, or `local_path` holds an
            adapter in the other one.
        OSError: If the Hub cannot be reached or refuses. The repository then holds what it held before, or the whole
            push if the Hub's answer was lost; the same push again does no harm.
    """
    folders = {"adapters": student_folder, "peft": peft_folder}
    if format not in folders:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, folders))}.")
    local = Path(local_path) if local_path is not None and Path(local_path).is_dir() else None
    if local is not None:
        _check_local(local, format)
    options = PushOptions(
        commit_message=commit_message,
        commit_description=commit_description,
        private=private,
        token=token,
        create_pr=create_pr,
        revision=revision,
    )
    repo_id = check_push(student, repo_id, token)
    card = CardOptions(datasets_tag=datasets_tag, **(adapter_card_kwargs or {}))
    with folders[format](model, student, repo_id, card) as folder:
        if local is not None:
            if (local / CARD_NAME).exists() and not overwrite_adapter_card:
                (folder / CARD_NAME).unlink()
            for path in folder.iterdir():
                copyfile(path, local / path.name)
        return _push(folder, student, repo_id, options)


def _check_local(folder: Path, format: str) -> None:
    """Refuse a folder with an adapter in the other format, which the files of a push would spoil."""
    if format == "peft":
        check_folder(folder)
    elif (folder / ADAPTER_CONFIG_NAME).is_file() and is_peft(read_adapter_config(folder)):
        raise ValueError(f"{folder} holds an adapter of PEFT; give another folder.")


def push_saved(
    folder: str | Path, repo_id: str, *, adapter_card_kwargs: dict | None = None, **options: Any
) -> CommitInfo:
    """Push a student from the folder that `save_adapter` wrote, without the base model.

    A card in the folder is pushed unchanged; without one, `adapter_card_kwargs` are arguments of `CardOptions`. The
    other options are those of `PushOptions`.

    Raises:
        ValueError: If the folder holds no distilled student, or `repo_id` is not a valid name.
        OSError: If the Hub cannot be reached or refuses, as for `push_student`.
    """
    push = PushOptions(**options)
    saved = read_adapter_config(folder)
    if is_peft(saved):
        raise ValueError(
            f"{folder} is an adapter of PEFT; push it with `hf upload`, or give the folder that save_adapter wrote."
        )
    student = str(saved.get("name"))
    repo_id = check_push(student, repo_id, push.token)
    card = CardOptions(**(adapter_card_kwargs or {}))
    with saved_student_folder(folder, repo_id, card) as files:
        return _push(files, student, repo_id, push)
