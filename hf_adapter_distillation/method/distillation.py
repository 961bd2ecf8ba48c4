"""Distilled students on a model: their identity, the settings of a step, and the record of a pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from adapters import ModelAdaptersConfig, ModelAdaptersMixin, Stack
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..composition import AdapterDistillation, block_of, shown
from ..configuration import DistillationArgumentsMixin, DistillationConfig
from .embeddings import Pool, mean_pooling
from .layer_pass import LayerPass
from .predictions import PredictionCache
from .weights import TeacherWeights


class TeacherAttention(NamedTuple):
    """Mean attention over non-padding tokens to the adapters that were fused at one place."""

    names: tuple[str, ...]  # the teachers, and with the carriers `fused` and `mixed` the student
    weights: torch.Tensor  # (n,), detached


@dataclass(frozen=True, eq=False)
class StageSettings:
    """Settings of a training forward pass. `DistillationTrainer` replaces them before each step.

    Args:
        enabled: Whether the pass distils (stage 2) or not (stage 1).
        weight: The weight of the distillation loss.
        regularization: The weight of the value matrices' regularisation.
        scale: The gradient of both in a step, whatever the training's loss is and however often the model is called.
            None where it is not known: it is that of the model's own loss, if the training uses this, and else 1.
        sequences: The number of sequences in all forward passes of a step, for gradient caches, which run backward
            passes between them. By default they are counted until the backward pass.
        fused_probability: The probability with which a layer passes on the fused output (carrier `mixed`); a tensor
            where it changes from step to step, since compiled code would be compiled again for each number.
        calibration: The slope and the offset of each teacher's scores, (n_teachers, 2), for `cross_task`.
        predictions: The teachers' predictions for the training examples; without them the teachers run.
    """

    enabled: bool = True
    weight: float = 1.0
    regularization: float = DistillationArgumentsMixin.fusion_regularization
    scale: float | torch.Tensor | None = None
    sequences: int = 0
    fused_probability: float | torch.Tensor = 1.0
    calibration: torch.Tensor | None = None
    predictions: PredictionCache | None = None


DEFAULTS = StageSettings()  # of a student whose settings were never set


@dataclass
class DistillationRecord:
    """Terms of the training forward passes of a step, averaged over their sequences; detached, and None in stage 1.

    Args:
        added: The sum of all terms as they are trained: weighted distillation loss + regularisation + probes' loss.
        attention: The attention at each place, by its name.
        distillation_loss: The mean over layers, unweighted.
        fusion_regularization: The regularisation, weighted.
        fused_task_loss: The task loss of the fused pass of the carrier `dual`, which is part of the model's loss.
        layer_losses: The parts of `distillation_loss` in the order of the layers, if an objective matches layers.
        terms: Other logged values: each objective where there are several, and for `task_specific` the loss of its
            probes and its ratio.
    """

    added: torch.Tensor
    attention: dict[str, TeacherAttention]
    distillation_loss: torch.Tensor | None = None
    fusion_regularization: torch.Tensor | None = None
    fused_task_loss: torch.Tensor | None = None
    layer_losses: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] = field(default_factory=dict)

    def joined(self, other: "DistillationRecord", share: float) -> "DistillationRecord":
        """Return the mean with another record, which has a share of the sequences."""

        def mean(ours: Any, others: Any) -> Any:
            if ours is None or others is None:
                return others if ours is None else ours
            if isinstance(ours, dict):
                return {name: mean(ours.get(name), others.get(name)) for name in ours | others}
            if isinstance(ours, TeacherAttention):
                return TeacherAttention(ours.names, mean(ours.weights, others.weights))
            return (1 - share) * ours + share * others

        return DistillationRecord(**{name: mean(value, vars(other)[name]) for name, value in vars(self).items()})


@dataclass(eq=False)
class TrainingStep:
    """The training forward passes of a step, or of its micro-batch: what their terms share.

    Args:
        sequences: The number of sequences so far.
        total: The number by which the terms are divided in the backward pass, a tensor.
        ended: Whether a backward pass has reached the terms, so that the next forward pass begins another step, unless
            more sequences of this one are to come (`StageSettings.sequences`).
    """

    record: DistillationRecord | None = None
    sequences: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    ended: bool = False

    def add(self, record: DistillationRecord, sequences: int, expected: int) -> None:
        """Add a forward pass with a number of sequences; `expected` is that of the step, if it is known."""
        self.sequences += sequences
        self.total.fill_(max(self.sequences, expected))
        self.record = record if self.record is None else self.record.joined(record, sequences / self.sequences)

    def end(self, _: torch.Tensor) -> None:
        """End the step; a hook on the gradient of its terms."""
        self.ended = True


@dataclass(slots=True)  # so that setting a field of `settings` here is an error
class Distillation:
    """Distillation of one student on one model.

    In a training loop of your own `settings` keeps its defaults until you replace it, and `take_record` returns the
    terms of the forward passes since the last step.

    Args:
        config: The configuration; `config.teachers` holds the names on the model.
        level: The level that `config.level` led to.
        level_reason: The reason for "layer" where `config.level` is "auto".
        sources: The origin of each teacher: `{"source": name, folder or Hub id, "revision": commit or None}`.
        start_digests: The digests of the student's weights if they started at the average of its teachers, one for
            each data type to which the model may be cast since.
        own_start: The weights of the student and its head before that, by their places.
        ranking: The scores by which the teachers were chosen, the best first: of all by `rank_teachers`, or their
            weights, or of those that were chosen from a pool by `choose_teachers`.
        weights: The weights of the teachers for the task, with `student_start="weighted"`.
        is_weighed: Whether the next training keeps the weights, as those that `fit_start` has learned for it.
        explained: The share of the teachers' mean update to which `fit_start` has moved the student for the next
            training, which notes it.
        candidates: The folders, by name, of the saved adapters of a pool from which the teachers are still to be
            chosen; until then one of them stands in. Empty once they are chosen.
        is_from_pool: Whether the teachers are, or will be, chosen from a pool.
        is_loaded: Whether other weights were loaded over the student since its last `train_adapter`.
        has_run: Whether the teachers have run in a training pass since the student was added, or loaded over.
        has_new_fusion: Whether `train_adapter` has added a fusion by which no training pass has fused teachers yet.
        frozen_heads: The parameters of other heads that its `train_adapter` has frozen, by their names.
        added_head: Whether `train_adapter` added the student's head, which is deleted with the student.
        head_before: The active head before.
        run: The record of a finished training, a `student.training_run.TrainingRun`.
        inspection: The pass that runs instead of a training pass while a feature looks into the layers.
        pool: Pools the last hidden states to embeddings, for the objective `similarity`.
        hooks: The handles of the hooks on layers that are fused as wholes, and on an `EncoderDecoderModel`, the passes
            of whose encoder and decoder are its `halves`.
    """

    config: DistillationConfig
    level: Literal["adapter", "layer"] = "adapter"
    level_reason: str = ""
    sources: dict[str, dict[str, str | None]] = field(default_factory=dict)
    start_digests: frozenset[str] = frozenset()
    own_start: dict[str, torch.Tensor] = field(default_factory=dict)
    ranking: dict[str, float] | None = None
    weights: TeacherWeights | None = None
    is_weighed: bool = False
    explained: float | None = None
    candidates: dict[str, str] = field(default_factory=dict)
    is_from_pool: bool = False
    is_loaded: bool = False
    has_run: bool = False
    has_new_fusion: bool = False
    frozen_heads: frozenset[str] = frozenset()
    added_head: bool = False
    head_before: str | list[str] | None = None
    run: Any = None
    settings: StageSettings = DEFAULTS
    step: TrainingStep = field(default_factory=TrainingStep)
    inspection: LayerPass | None = None
    halves: list[Any] | None = None
    pool: Pool = mean_pooling
    hooks: list[RemovableHandle] = field(default_factory=list)

    @property
    def record(self) -> DistillationRecord | None:
        """The terms of the forward passes since the step began, or None before the first one."""
        return self.step.record

    def shares(self, teachers: Sequence[str]) -> list[float]:
        """Return the shares of teachers in their mean prediction: their weights for the task, or equal ones."""
        return [1 / len(teachers)] * len(teachers) if self.weights is None else self.weights.shares(teachers)

    def begin_step(self) -> None:
        """Begin a step. A loop need not do this: the first forward pass after a backward pass does."""
        self.step = TrainingStep()

    def take_record(self) -> DistillationRecord:
        """Return the terms of the forward passes since the step began, and begin another one.

        Raises:
            RuntimeError: If there was no training forward pass of the student.
        """
        record = self.record
        if record is None:
            raise RuntimeError(
                "No forward pass with the teachers went before, so nothing was distilled; run the student's model in "
                "training mode, with gradients, and with the distilled student active."
            )
        self.begin_step()
        return record

    @contextmanager
    def inspected_by(self, layer_pass: LayerPass) -> Iterator[None]:
        """Let a pass run in all forward passes of the student, in training and in evaluation mode."""
        before, self.inspection = self.inspection, layer_pass
        try:
            yield
        finally:
            self.inspection = before


def distillations(adapters_config: ModelAdaptersConfig) -> dict[str, Distillation]:
    """Return the live dict of a model's distillations by student, which the model shares with its layers.

    For a model without any it is an empty one, which only `add_distillation` keeps.
    """
    return vars(adapters_config).get("distillations", {})


def add_distillation(adapters_config: ModelAdaptersConfig, student: str, distillation: Distillation) -> None:
    """Make a distillation known to the model and its layers."""
    vars(adapters_config).setdefault("distillations", {})[student] = distillation


def distillation_of(model: ModelAdaptersMixin, student: str | None = None) -> Distillation:
    """Return the live distillation of a student, by default of the active one.

    Raises:
        TypeError: If the model has no adapters, or wraps the model that has them.
        ValueError: If the adapter is not distilled, or no distilled student is active.
    """
    if student is None:
        student = active_block(model).student
    try:
        students = distillations(model.adapters_config)
    except AttributeError:
        raise TypeError(_advice_for(model)) from None
    if student not in students:
        names = ", ".join(map(repr, students)) or "none"
        raise ValueError(f"{student!r} is not distilled from teachers; distilled students on the model: {names}.")
    return students[student]


def active_block(model: nn.Module) -> AdapterDistillation:
    """Return the active distillation block: from `train_adapter`, or of a student on top of a `Stack`."""
    if not isinstance(model, ModelAdaptersMixin):
        raise TypeError(_advice_for(model))
    setup, students = model.active_adapters, distillations(model.adapters_config)
    block = block_of(setup)
    if type(setup) is Stack and len(setup) > 1 and all(isinstance(name, str) for name in setup):
        # How adapters puts a task adapter on a language adapter; a Stack of the student alone is plain training.
        distillation = students.get(setup.last())
        if distillation is not None and distillation.config.teachers:
            block = AdapterDistillation(setup, distillation.config.teachers)
    if block is None or block.student not in students:
        raise ValueError(
            f"No distilled student is active (the active setup is {shown(setup)}); add one with "
            "model.add_adapter(name, distill_from=[...]) and call model.train_adapter(name). "
            "A student whose teachers were all deleted has nothing to learn from."
        )
    return block


def _advice_for(model: object) -> str:
    """Return how to get from an object without adapters to a model with them, which the object may wrap."""
    kind, modules = type(model).__name__, dict(model.named_modules() if isinstance(model, nn.Module) else ())
    for name, module in modules.items():
        if isinstance(module, ModelAdaptersMixin):
            return f"{kind} is a wrapper; pass the model with adapters itself, its submodule {name!r}."
    wrapped = next((name for name, module in modules.items() if isinstance(module, PreTrainedModel)), "")
    if wrapped:
        return f"{kind} is a wrapper; call adapters.init with its submodule {wrapped!r}, and pass that."
    return f"{kind} has no adapters; call adapters.init(model) first."
