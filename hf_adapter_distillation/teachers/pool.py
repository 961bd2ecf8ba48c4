"""A pool: a folder of saved adapters, more than fit into memory, from which the teachers of a student are chosen."""

import json
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

import torch
from adapters import ModelAdaptersMixin
from safetensors.torch import load_file
from transformers.utils import logging

from .._compat import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS, AdapterLoader
from ..configuration import Level
from ..downloads import one_line
from ..method.parameters import owner
from .compatibility import check_supported, choose_level
from .loading import Teacher, check_formats, load_teacher, locate_teacher, read_config
from .peft_lora import PeftLoRA, fill_peft_lora

logger = logging.get_logger(__name__)

NAMED = 3  # of the skipped adapters in a warning


def read_pool(model: ModelAdaptersMixin, folder: str | Path, student: str, n_teachers: int) -> dict[str, str]:
    """Return the folders of the adapters in a pool by their names; a warning names those that do not suit the model.

    Only configs are read, and the weights of adapters that PEFT saved, one after the other.

    Raises:
        ValueError: If the folder is no pool, or has fewer suitable adapters than `n_teachers`.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"teachers={str(folder)!r} is not a folder; give the folder of a pool of saved adapters, or a list of "
            "teachers."
        )
    folders = sorted(path.parent for path in Path(folder).glob(f"*/{ADAPTER_CONFIG_NAME}"))
    if not folders:
        raise ValueError(
            f"teachers={str(folder)!r} holds no folders of saved adapters; save each in a folder of its own in it "
            "with save_adapter."
        )
    found: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for path in folders:
        try:
            if path.name == student:
                raise ValueError(f"Teacher {str(path)!r} has the name of the student; rename the folder.")
            _config_of(locate_teacher(model, str(path)))
            found[path.name] = str(path)
        except (ValueError, TypeError) as error:
            skipped[path.name] = str(error)
    report_skipped(str(folder), skipped, bool(found))
    if n_teachers > len(found):
        raise ValueError(
            f"teacher_selection={n_teachers} is more than the {len(found)} suitable adapters in {str(folder)!r}; "
            "lower it."
        )
    return found


def report_skipped(pool: str, skipped: Mapping[str, str], some_left: bool) -> None:
    """Warn of adapters of a pool that cannot be teachers, with the reasons of the first; an error if none is left."""
    if not skipped:
        return
    reasons = " ".join(reason if reason.endswith(".") else f"{reason}." for reason in [*skipped.values()][:NAMED])
    if not some_left:
        raise ValueError(f"No adapter of the pool {pool!r} can be a teacher: {reasons}")
    names = ", ".join(map(repr, skipped))
    logger.warning(
        f"The pool {pool!r} has {len(skipped)} adapters that cannot be teachers, and goes on without {names}: "
        f"{reasons} Move them out of the folder to silence this."
    )


def _config_of(teacher: Teacher) -> str:
    """Return the config of a saved adapter as a text; raise `ValueError` for a method that cannot be fused."""
    assert teacher.saved is not None
    config = read_config(teacher.label, teacher.saved.config)
    check_supported(teacher.label, config)
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def group_by_config(
    model: ModelAdaptersMixin, folders: Mapping[str, str]
) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Return the folders of the adapters of each config by their names, and the reasons for adapters left out."""
    groups: dict[str, dict[str, str]] = {}
    skipped: dict[str, str] = {}
    for name, folder in folders.items():
        try:
            groups.setdefault(_config_of(locate_teacher(model, folder)), {})[name] = folder
        except ValueError as error:
            skipped[name] = str(error)
    return list(groups.values()), skipped


def add_stand_in(model: ModelAdaptersMixin, folders: Iterable[str], student: str, level: Level) -> Teacher:
    """Load the first adapter that can be loaded, without its head, under a new name.

    Raises:
        ValueError: If none can be loaded. Nothing is then added to the model.
    """
    names = (f"{student}_pool_{number}" for number in count())
    name, reasons = next(name for name in names if name not in model.adapters_config), []
    for folder in folders:
        try:
            teacher = locate_teacher(model, folder)._replace(name=name)
            load_teacher(model, teacher, with_head=False)
            try:
                choose_level(model, level, {name: teacher.label}, model.adapters_config.get(student))
            except ValueError:
                model.delete_adapter(name)
                raise
            return teacher
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0])


class Slot:
    """Adapter on a model whose weights saved adapters of its config take in turn."""

    def __init__(self, model: ModelAdaptersMixin, name: str) -> None:
        self.model = model
        self.name = name
        state = model.base_model.state_dict(keep_vars=True)
        self.weights = {key: value.detach() for key, value in state.items() if owner(key, {name})}
        self.loader = AdapterLoader(model)

    @torch.no_grad()
    def fill(self, teacher: Teacher) -> None:
        """Give the slot the weights of a saved adapter.

        Raises:
            ValueError: If the file is damaged, or has other weights than the slot; the slot is then as it was.
        """
        assert teacher.saved is not None
        if teacher.saved.lora is not None:
            self._fill_lora(teacher.saved.lora)
            return
        try:
            check_formats(teacher.saved.folder)
            read = _read_weights(teacher.saved.folder)
            rename, prefix = (
                self.loader.rename_func(teacher.saved.saved_name, self.name),
                f"{self.model.base_model_prefix}.",
            )
            state = {rename(key).removeprefix(prefix): value for key, value in read.items()}
        except Exception as error:  # torch and safetensors raise anything on damaged files
            raise ValueError(f"{teacher.label} cannot be loaded: {one_line(error)}") from error
        shapes, wanted = ({key: v.shape for key, v in each.items()} for each in (state, self.weights))
        if wrong := {key for key, _ in shapes.items() ^ wanted.items()}:
            raise ValueError(
                f"{teacher.label} does not fit its config: {min(wrong)!r} is missing, unknown or of another shape; "
                "save it again."
            )
        if infinite := [key for key, value in state.items() if not value.isfinite().all()]:
            raise ValueError(f"{teacher.label} has weights that are NaN or infinite ({infinite[0]}); train it again.")
        for key, value in state.items():
            self.weights[key].copy_(value)

    def _fill_lora(self, lora: PeftLoRA) -> None:
        for key, weight in self.weights.items():
            if key.endswith("lora_B"):  # of projections without factors
                weight.zero_()
        fill_peft_lora(self.model, self.name, lora)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    safe, pickled = (folder / name for name in ADAPTER_WEIGHTS)
    return load_file(safe) if safe.is_file() else torch.load(pickled, map_location="cpu", weights_only=True)
