"""Checks of what a user gives: numbers, a device, a model, folders, texts, JSON. Each error is one line with a fix."""

import json
import tempfile
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

SEEDS = 2**32  # NumPy takes no greater ones


def check_at_least(args: Any, least: Mapping[str, float]) -> None:
    """Check that arguments are not below their least values; None stands for a default.

    Raises:
        ValueError: If one is, or is NaN.
    """
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"--{name} {value} is out of range; it must be at least {lowest}.")


def check_rates(args: Any, *names: str) -> None:
    """Check learning rates, each of them a number or a list.

    Raises:
        ValueError: If one is not above 0, or not finite.
    """
    for name in names:
        value = getattr(args, name)
        for rate in value if isinstance(value, list) else [value]:
            if not (rate > 0 and isfinite(rate)):
                raise ValueError(f"--{name} {rate} is out of range; it must be above 0 and finite.")


def check_seed(name: str, seed: int) -> None:
    """Check that all libraries take a seed.

    Raises:
        ValueError: If it is out of their range.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"--{name} {seed} is out of range; it must be from 0 to {SEEDS - 1}.")


def check_device(device: str) -> None:
    """Check that a device is here.

    Raises:
        ValueError: If it is not.
    """
    import torch  # most of what this module is for needs no torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} is unknown; choose cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda finds no GPU; leave it out to run on the CPU.")


def load_model(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Load a tokenizer or a model by its folder or Hub id.

    Raises:
        ValueError: If it cannot be loaded, with the first line of the reason.
    """
    try:
        return load(model, **options)
    except Exception as error:  # the readers raise anything on missing and damaged files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"--model {model} cannot be loaded ({reason}); give the folder or Hub id of another."
        ) from error


def open_folder(option: str, folder: str | Path) -> Path:
    """Create a folder, if it is not there, and check that files can be written into it.

    Raises:
        ValueError: If they cannot.
    """
    if not str(folder):
        raise ValueError(f"{option} is empty; give a folder.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"{option} {folder} cannot be written ({why}); choose another folder.") from error


def is_unicode(text: str) -> bool:
    r"""Return whether UTF-8 can encode a text: JSON allows half a character (`"\ud800"`), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """Read a JSON file whose outermost value is of a kind, `dict` or `list`.

    Args:
        path: The file.
        kind: The type that the content must have.
        remedy: What to do about a file that is damaged, for its error.

    Raises:
        ValueError: If it is no JSON, or of another kind.
        OSError: If it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin files with a mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); {remedy}.") from error
    if not isinstance(content, kind):
        wanted = {dict: "object", list: "list"}[kind]
        raise ValueError(f"{path} holds no JSON {wanted}; {remedy}.")
    return content
