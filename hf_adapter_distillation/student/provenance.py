"""Provenance of a student: its teachers, settings and training, on a model and in `adapter_config.json`.

The module imports no torch, so that `adapter-distill inspect` is there at once.
"""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..downloads import ADAPTER_CONFIG_NAME, read_adapter_config
from .training_run import RUN_RESULTS, RUN_SETTINGS, TeacherSource, TrainingRun, start_settings, typed

if TYPE_CHECKING:
    from adapters import ModelAdaptersMixin

    from ..method.distillation import Distillation

METHOD = "AdapterDistillation (Wang et al., EMNLP 2023 Industry, arXiv 2312.16261)"
PROVENANCE_NAME = "distillation.json"  # beside the files of PEFT, which drops the keys that it does not know
PACKAGES = ("hf-adapter-distillation", "adapters", "transformers", "torch")


@dataclass
class Provenance:
    """Origin of a distilled student, which `save_adapter` writes under `"distillation"` into `adapter_config.json`.

    Args:
        settings: The fields of `DistillationConfig` without the teachers, and the level that was chosen.
        versions: The versions of the libraries, by package.
        run: The training, with the same teachers; before a training has ended, only the start of the student.
    """

    teachers: Sequence[TeacherSource]
    settings: dict[str, Any]
    versions: dict[str, str]
    run: TrainingRun
    method: str = METHOD

    @classmethod
    def of(cls, model: "ModelAdaptersMixin", distillation: "Distillation") -> "Provenance":
        """Return the provenance of a student on a model."""
        from .digests import teacher_digests  # imports torch

        run: TrainingRun = distillation.run or TrainingRun(
            teacher_sources(distillation, teacher_digests(model, distillation.config.teachers)),
            start_settings(distillation.weights, distillation.explained),
        )
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
        teachers = [teacher.to_dict() for teacher in self.teachers]
        first = {"method": self.method, "teachers": teachers, **self.settings, "versions": self.versions}
        return first | self.run.to_dict()

    @property
    def known_settings(self) -> dict[str, Any]:
        """The settings of the distillation and of the training that have a value."""
        return {name: value for name, value in (self.settings | self.run.settings).items() if value is not None}


def read_provenance(folder: str | Path) -> Provenance:
    """Return the provenance of a student in a folder that `save_adapter` or `save_adapter_as_peft` wrote.

    Raises:
        ValueError: If the folder holds no adapter or a plain one, or its provenance is damaged.
    """
    return provenance_of(read_student(folder, folder), folder)


def read_student(folder: str | Path, source: str | Path) -> dict[str, Any]:
    """Return the config of a saved adapter; for one of PEFT, which has no name, with the provenance beside it.

    Args:
        source: The folder or the Hub id that names the adapter.
    """
    saved, path = read_adapter_config(folder), Path(folder) / PROVENANCE_NAME
    if "peft_type" not in saved or not path.is_file():
        return saved
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        provenance = None  # which `provenance_of` refuses
    names = {"name": Path(source).name, "model_name": saved.get("base_model_name_or_path")}
    return saved | names | {"distillation": provenance}


def note_loaded(distillation: "Distillation", folder: str | Path | None) -> None:
    """Note that the weights of a student were loaded, with its training if they are from a folder of this student.

    Until its next `train_adapter` the student is saved like the plain adapter that was loaded.
    """
    try:
        saved = None if folder is None else read_provenance(folder)
    except ValueError:
        saved = None
    teachers = list(distillation.config.teachers)
    if saved is None or [teacher.name for teacher in saved.teachers] != teachers:
        distillation.run, distillation.is_loaded, distillation.has_run = None, True, False
    else:
        distillation.run, distillation.is_loaded = saved.run if "steps" in saved.run.settings else None, False


def provenance_of(saved: Mapping[str, Any], source: str | Path) -> Provenance:
    """Return the provenance in the config of a saved adapter; `source` is its folder or Hub id, for messages.

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
        place = PROVENANCE_NAME if "peft_type" in saved else f'"distillation" in the {ADAPTER_CONFIG_NAME}'
        raise ValueError(f"{place} of {source} is damaged; save the student again.") from error


def teacher_sources(distillation: "Distillation", digests: Mapping[str, str]) -> list[TeacherSource]:
    """Return the teachers of a student, with the digests of their weights; none before they are chosen from a pool."""
    teachers: list[TeacherSource] = []
    if distillation.candidates:
        return teachers
    for name in distillation.config.teachers:
        source = distillation.sources[name]
        digest, conversion = digests[name], source.get("conversion")
        teachers.append(TeacherSource(name, str(source["source"]), source["revision"], digest, conversion))
    return teachers
