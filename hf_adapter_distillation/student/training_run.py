"""Record of a finished training: its teachers, settings and results."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from numbers import Real
from types import UnionType
from typing import TYPE_CHECKING, Any

from ..configuration import DistillationArgumentsMixin
from ..method.weights import TeacherWeights

if TYPE_CHECKING:
    from transformers import TrainerState

RUN_SETTINGS = (
    "distillation_start", "distillation_weight", "distillation_share", "fusion_regularization", "learning_rate",
    "seed", "fusion_learning_rate", "ranking", "start_explained", "teacher_weights", "teacher_gain", "steps",
    "first_distillation_step", "epochs", "batch_size",
)  # fmt: skip
RUN_RESULTS = ("dataset", "losses", "evaluation", "attention")
LOSSES = ("loss", "task_loss", "distillation_loss", "fusion_regularization", "fused_task_loss")
SPEED = ("_runtime", "_per_second", "_preparation_time")


@dataclass
class TeacherSource:
    """Origin and weights of a teacher.

    Args:
        source: The name, folder or Hub id by which the teacher was given.
        revision: The commit on the Hub; None for a teacher from elsewhere.
        digest: The `adapter_digest` of the weights.
        conversion: The conversion of a method of PEFT to LoRA, with its error.
    """

    name: str
    source: str
    revision: str | None
    digest: str | None
    conversion: str | None = None

    @classmethod
    def from_dict(cls, saved: Any) -> "TeacherSource":
        """Read back a teacher; raise ValueError for another form."""
        typed(saved, str | None)
        if not {"revision", "digest"} <= saved.keys() or None in (saved.get("name"), saved.get("source")):
            raise ValueError(f"a teacher lacks its name, source, revision or digest: {saved!r}")
        return cls(saved["name"], saved["source"], saved["revision"], saved["digest"], saved.get("conversion"))

    def to_dict(self) -> dict[str, str | None]:
        """Return what JSON holds, without a conversion that there was not."""
        return {key: value for key, value in asdict(self).items() if key != "conversion" or value}


@dataclass
class TrainingRun:
    """Record of a finished training.

    Args:
        teachers: The teachers at the end of the training; the model may have lost them since.
        settings: The arguments and the numbers of steps, by the names of `RUN_SETTINGS`.
        dataset: The id of the training data on the Hub; None for data from elsewhere.
        losses: The last losses of each stage, `{stage: {term: loss}}`.
        evaluation: The last metrics of the weights that were kept, by their names with prefix.
        attention: The mean attention over the teachers at the end, `{layer: {teacher: weight}}`.
    """

    teachers: Sequence[TeacherSource]
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    attention: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        args: DistillationArgumentsMixin,
        state: "TrainerState",
        dataset: Any,
        teachers: Sequence[TeacherSource],
        derived: Mapping[str, Any],
    ) -> "TrainingRun":
        """Record a training at its end, without the attention.

        `derived` holds the settings that do not follow from the arguments and the state alone: `distillation_start`,
        `distillation_weight`, `distillation_share`, `first_distillation_step`, `batch_size`, and the `ranking`, the
        `teacher_weights` and their `teacher_gain`, and `start_explained` if there were any.
        """
        settings = {
            **derived,
            "fusion_regularization": args.fusion_regularization,
            "learning_rate": args.learning_rate,
            "seed": args.seed,
            "fusion_learning_rate": args.fusion_learning_rate,
            "steps": state.global_step,
            "epochs": round(state.epoch or 0, 2),
        }
        settings = {name: settings[name] for name in RUN_SETTINGS if name in settings}
        best = state.best_global_step if args.load_best_model_at_end else None
        losses, evaluation = _logged_results(state.log_history, best or state.global_step)
        return cls(teachers, settings, hub_dataset(dataset), losses, evaluation)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], teachers: Sequence[TeacherSource]) -> "TrainingRun":
        """Read back what `to_dict` wrote, among other keys; raise ValueError for another form."""
        numbers = int | float
        losses, attention = (
            {key: typed(row, numbers) for key, row in typed(saved.get(name, {}), dict).items()}
            for name in ("losses", "attention")
        )
        if len({frozenset(row) for row in attention.values()}) > 1:
            raise ValueError(f"the rows of the attention name different teachers: {attention!r}")
        settings = {name: saved[name] for name in RUN_SETTINGS if name in saved}
        evaluation = typed(saved.get("evaluation", {}), numbers)
        return cls(teachers, settings, saved.get("dataset"), losses, evaluation, attention)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds, without the teachers and without empty results."""
        return self.settings | {name: value for name in RUN_RESULTS if (value := vars(self)[name])}

    def mean_attention(self, teacher: str) -> float | None:
        """Return the mean attention to a teacher over the layers; None where it was not measured."""
        weights = [row[teacher] for row in self.attention.values() if teacher in row]
        return sum(weights) / len(weights) if weights else None


def start_settings(weights: TeacherWeights | None, explained: float | None) -> dict[str, Any]:
    """Return what is noted of a student's start: its teachers' weights, and how much of their mean it explains."""
    settings: dict[str, Any] = {} if explained is None else {"start_explained": round(explained, 4)}
    if weights is not None:
        rounded = {name: round(weight, 4) for name, weight in weights.mean().items()}
        settings |= {"teacher_weights": rounded, "teacher_gain": round(weights.gain, 4)}
    return settings


def finite_metrics(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of `Trainer.evaluate`, rounded, without its speed and without NaN and infinite values."""
    return {
        key: round(float(value), 6)
        for key, value in logged.items()
        if isinstance(value, Real) and isfinite(value) and "_" in key and not key.endswith(SPEED)
    }


def hub_dataset(dataset: Any) -> str | None:
    """Return the id of a data set from the Hub, by the addresses that `datasets.load_dataset` noted; else None."""
    import datasets  # takes a second, and a model without training does not need it

    checksums = dataset.info.download_checksums if isinstance(dataset, datasets.Dataset) else None
    ids = {match[1] for address in checksums or () if (match := re.match(r"hf://datasets/([^@]+)@", address))}
    return ids.pop() if len(ids) == 1 else None


def _logged_results(
    log_history: Sequence[Mapping[str, Any]], step: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return the last losses of each stage, and the metrics of the evaluations at a step."""
    losses: dict[str, dict[str, float]] = {}
    evaluation: dict[str, float] = {}
    for logged in log_history:
        if "stage" in logged:
            of_stage = losses.setdefault(str(logged["stage"]), {})
            of_stage |= {key: logged[key] for key in LOSSES if isfinite(logged.get(key, nan))}
        elif logged.get("step") == step and "loss" not in logged and "train_runtime" not in logged:
            evaluation |= finite_metrics({key: value for key, value in logged.items() if key not in ("step", "epoch")})
    return losses, evaluation


def typed(value: Any, of: type | UnionType) -> dict[str, Any]:
    """Return a JSON object whose values must all have a type."""
    if not isinstance(value, dict) or not all(isinstance(each, of) for each in value.values()):
        raise ValueError(f"not an object with values of type {of}: {value!r}")
    return value
