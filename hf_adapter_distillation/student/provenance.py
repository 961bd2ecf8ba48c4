"""Provenance of a student: its teachers, settings and training, on a model and in `adapter_config.json`."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from adapters import ModelAdaptersMixin

from .._compat import ADAPTER_CONFIG_NAME
from ..downloads import one_line
from ..method.distillation import Distillation
from .training_run import RUN_RESULTS, RUN_SETTINGS, TeacherSource, TrainingRun, typed

METHOD = "AdapterDistillation (Wang et al., EMNLP 2023 Industry, arXiv 2312.16261)"
PACKAGES = ("hf-adapter-distillation", "adapters", "transformers", "torch")


@dataclass
class Provenance:
    """Origin of a distilled student, which `save_adapter` writes under `"distillation"` into `adapter_config.json`.

    Args:
        teachers: The teachers.
        settings: The fields of `DistillationConfig` without the teachers, and the level that was chosen.
        versions: The versions of the libraries, by package.
        run: The training, with the same teachers; without settings and results before a training has ended.
        method: The method and its paper.
    """

    teachers: Sequence[TeacherSource]
    settings: dict[str, Any]
    versions: dict[str, str]
    run: TrainingRun
    method: str = METHOD

    @classmethod
    def of(cls, model: ModelAdaptersMixin, distillation: Distillation) -> "Provenance":
        """Return the provenance of a student on a model."""
        run: TrainingRun = distillation.run or TrainingRun(teacher_sources(model, distillation))
        settings = {name: value for name, value in asdict(distillation.config).items() if name != "teachers"}
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
        return cls(run.teachers, settings | {"level": distillation.level}, versions, run)

    @classmethod
    def from_dict(cls, saved: Any) -> "Provenance":
        """Read back what `to_dict` wrote, perhaps by another version; raise ValueError for another form."""
        if not isinstance(teachers := typed(saved, object).get("teachers"), list):
            raise ValueError(f"there is no list of teachers: {teachers!r}")
        sources = [TeacherSource.from_dict(teacher) for teacher in teachers]
        others = ("method", "teachers", "versions", *RUN_SETTINGS, *RUN_RESULTS)
        settings = {name: value for name, value in saved.items() if name not in others}
        versions, run = typed(saved.get("versions"), str), TrainingRun.from_dict(saved, sources)
        return cls(sources, settings, versions, run, saved.get("method", METHOD))

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        teachers = [asdict(teacher) for teacher in self.teachers]
        first = {"method": self.method, "teachers": teachers, **self.settings, "versions": self.versions}
        return first | self.run.to_dict()

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings of the distillation and of the training that have a value."""
        settings = self.settings | self.run.settings
        return {name: value for name, value in settings.items() if value is not None}


# Saved students


def read_provenance(folder: str | Path) -> Provenance:
    """Return the provenance of a student in a folder that `save_adapter` wrote.

    Raises:
        ValueError: If the folder holds no adapter or a plain one, or its provenance is damaged.
    """
    return provenance_of(read_saved(folder), folder)


def read_saved(folder: str | Path) -> dict[str, Any]:
    """Return the content of the `adapter_config.json` in a folder.

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
        raise ValueError(f"{path} is damaged ({one_line(error).rstrip('.')}); save the adapter anew.") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is no adapter config; save the adapter anew.")
    return saved


def provenance_of(saved: Mapping[str, Any], source: str | Path) -> Provenance:
    """Return the provenance in the config of a saved adapter.

    Args:
        saved: The config, from `read_saved`.
        source: Where it was read, for messages.

    Raises:
        ValueError: If the adapter was not distilled, or its provenance is damaged.
    """
    if "distillation" not in saved:
        raise ValueError(f"{source} holds an adapter that was not distilled; it names no teachers.")
    try:
        if not isinstance(saved.get("name"), str):
            raise ValueError(f"the adapter has no name: {saved.get('name')!r}")
        return Provenance.from_dict(saved["distillation"])
    except ValueError as error:
        raise ValueError(
            f'"distillation" in the {ADAPTER_CONFIG_NAME} of {source} is damaged; save the student anew.'
        ) from error


# Students on a model


def adapter_digest(model: ModelAdaptersMixin, name: str) -> str:
    """Return the SHA-256 digest of the weights of an adapter: their places in the base model, types, shapes, values.

    The digest is the same for an adapter under another name, on another copy of the base model, with or without heads.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for place, modules in sorted(model.get_adapter(name).items()):
        for location, module in sorted(modules.items()):
            for key, tensor in sorted(module.state_dict().items()):
                digest.update(f"{place}.{location}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def teacher_sources(model: ModelAdaptersMixin, distillation: Distillation) -> list[TeacherSource]:
    """Return the teachers of a student with the digests of their weights on the model."""
    named = [(name, distillation.sources[name]) for name in distillation.config.teachers]
    return [
        TeacherSource(name, str(origin["source"]), origin["revision"], adapter_digest(model, name))
        for name, origin in named
    ]
