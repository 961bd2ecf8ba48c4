"""The live state of a distillation: what a model knows about one of its students."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from adapters import ModelAdaptersConfig
from torch.utils.hooks import RemovableHandle

from ..configuration import DistillationConfig, DistillationTrainingArguments
from ..student.least_squares import UpProjectionFit

if TYPE_CHECKING:
    from ..training.prediction_cache import PredictionCache


class TeacherAttention(NamedTuple):
    """The attention at one location.

    Args:
        names: What was fused: the teachers, and with the carriers `fused` and `mixed` the student.
        weights: The mean attention to each of them over non-padding tokens, (n,), detached.
    """

    names: tuple[str, ...]
    weights: torch.Tensor


class Observation(NamedTuple):
    """What one location shows of a batch in evaluation mode, sequence by sequence, those of padding only left out.

    Args:
        names: The teachers.
        attention: The mean attention to each of them over the tokens of a sequence, (n_sequences, n_teachers).
        distance: That of the student's update to the fused one, as `losses.FeatureLoss` has it, (n_sequences,).
    """

    names: tuple[str, ...]
    attention: torch.Tensor
    distance: torch.Tensor


@dataclass
class DistillationRecord:
    """What one training forward pass added to the task loss.

    Args:
        added: The sum that stands, or belongs, in the loss: (weighted distillation loss + regularisation) x scale.
        in_loss: Whether it was added to the loss of the model's output. False where the output has no loss; then
            `added` still carries its graph and the caller adds it.
        distillation_loss: Mean over layers, unweighted, detached; None in stage 1.
        fusion_regularization: Weighted, detached; None in stage 1.
        fused_task_loss: The task loss of the fused pass of the carrier `dual`, detached; None for the others.
        attention: The attention at each location.
        layer_losses: The parts of `distillation_loss`, in the order of the layers, detached; None in stage 1, and
            where no objective matches layers.
        terms: What else is logged, detached: the objectives one by one where there are several, and of
            `task_specific` the loss of its probes and its ratio.
        observed: While `Distillation.observing` is set, what each location shows, in the place of all the others.
    """

    added: torch.Tensor
    in_loss: bool
    distillation_loss: torch.Tensor | None
    fusion_regularization: torch.Tensor | None
    fused_task_loss: torch.Tensor | None
    attention: dict[str, TeacherAttention]
    layer_losses: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    observed: dict[str, Observation] = field(default_factory=dict)

    def not_finite(self) -> str:
        """Names the term by which a loss is NaN or infinite, and the first layer concerned."""
        if self.distillation_loss is None or self.fusion_regularization is None:
            return "task_loss, in stage 1"
        finite, names = [], list(self.attention)
        if self.layer_losses is not None:
            finite = self.layer_losses.isfinite().tolist()
        if not all(finite):
            return f"distillation_loss, first in {names[finite.index(False) % len(names)]}"
        if not self.distillation_loss.isfinite():
            return "distillation_loss, in the logits"
        if not self.fusion_regularization.isfinite():
            return "fusion_regularization"
        return "task_loss, while distillation_loss is finite in all layers"


@dataclass
class Distillation:
    """The distillation of one student on one model.

    The trainer derives `enabled`, `weight`, `scale` and the others anew before each forward pass from its arguments
    and the number of the step; nothing here needs to be saved for a training to be resumed. In a training loop of
    one's own they keep these defaults until they are set.

    Args:
        config: What is distilled; `config.teachers` holds the names on the model.
        level: What `config.level` came to.
        level_reason: Why it came to "layer" where it was "auto".
        sources: Where each teacher came from: `{"source": name, folder or Hub id, "revision": commit or None}`.
        start_digest: The digest of the average of the teachers' weights where the student started; else None.
        head_started: Whether the head had its chance to start at the average of the teachers' heads.
        run: The record of a finished training, a `student.training_run.TrainingRun`; None before one has ended.
        enabled: Whether forward passes in training mode distil (stage 2) or not (stage 1).
        weight: The weight of the distillation loss.
        regularization: The weight of the value matrices' regularisation.
        scale: A factor on both, for losses that are summed, not averaged, over micro-batches.
        fused_probability: The probability with which a layer passes on the fused output (carrier `mixed`); a tensor
            where it changes from step to step, or compiled code would be compiled anew.
        calibration: The slope and the offset of each teacher's scores, (n_teachers, 2), for `cross_task`.
        predictions: What the teachers predict for the training examples, while they are trained on and an objective
            asks for it.
        ranking: The scores by which the teachers were chosen (`ranking.rank_teachers`), the best first.
        fits: What the layers gather for `start.fit_start`, by location, while it runs.
        overflows: While `overflow.find_overflow` runs: the teachers whose updates are not finite, by location.
        hooks: The handles of the hooks on layers that are fused as wholes, and on an `EncoderDecoderModel`.
        halves: While an `EncoderDecoderModel` runs, the passes of its encoder and decoder.
        observing: Where forward passes in evaluation mode run the fusion, to be looked at: what each layer passes on,
            the student's output (as in production) or the fused one.
        record: What the last training forward pass added, until the trainer has read it.
    """

    config: DistillationConfig
    level: Literal["adapter", "layer"] = "adapter"
    level_reason: str = ""
    sources: dict[str, dict[str, str | None]] = field(default_factory=dict)
    start_digest: str | None = None
    head_started: bool = False
    run: Any = None
    enabled: bool = True
    weight: float = 1.0
    regularization: float = DistillationTrainingArguments.fusion_regularization
    scale: float = 1.0
    fused_probability: float | torch.Tensor = 1.0
    calibration: torch.Tensor | None = None
    predictions: "PredictionCache | None" = None
    ranking: dict[str, float] | None = None
    fits: dict[str, UpProjectionFit] | None = None
    overflows: dict[str, list[str]] | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    halves: list[Any] | None = None
    observing: Literal["student", "fused"] | None = None
    record: DistillationRecord | None = None

    @property
    def in_evaluation(self) -> bool:
        """Whether forward passes in evaluation mode run the teachers, too."""
        return self.observing is not None or self.fits is not None or self.overflows is not None

    @property
    def fuses(self) -> bool:
        """Whether the teachers run in the layers: in stage 2, and where their attention or their mean is asked for.

        With the carrier `student` nothing but the objectives of layers needs what they put out.
        """
        needed = self.config.carrier != "student" or bool(self.config.layer_objectives)
        return (self.enabled and needed) or self.in_evaluation

    def take_record(self) -> DistillationRecord:
        """The record of the last forward pass, which is then forgotten together with its graph."""
        assert self.record is not None, "no forward pass of the student went before"
        record, self.record = self.record, None
        return record


def distillations(adapters_config: ModelAdaptersConfig) -> dict[str, Distillation]:
    """The distillations of a model by the names of their students.

    Args:
        adapters_config: `model.adapters_config`, which the model shares with its layers.

    Returns:
        The live dict; for a model without any an empty one, which is kept only by `add_distillation`.
    """
    return vars(adapters_config).get("distillations", {})


def add_distillation(adapters_config: ModelAdaptersConfig, student: str, distillation: Distillation) -> None:
    """Makes a distillation known to the model and its layers."""
    vars(adapters_config).setdefault("distillations", {})[student] = distillation
