"""Prepare a student for its training, and keep a model's distillations true when adapters change."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin, Stack
from torch import nn
from transformers.utils import logging

from .._compat import heads_of
from ..composition import AdapterDistillation, block_of
from ..method.distillation import Distillation, distillation_of, distillations
from ..method.fusion import fusions_of
from ..method.parameters import owner
from ..method.weights import TeacherWeights
from .fusions import drop_fusion, drop_unused_fusions
from .provenance import Provenance
from .warm_start import is_at_average, is_head_at_average, start_as_new, start_at_average, start_head

logger = logging.get_logger(__name__)


def keep_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, names: Sequence[str]) -> None:
    """Keep only the given teachers, and make the student with them active. The others stay on the model.

    A student that is still at the average of its teachers is set to the average of the kept ones, and so is its head.
    """
    at_start = is_at_average(model, block.student)
    _fuse_only(model, block, names)
    if at_start:
        start_at_average(model, block.student)


def forget_weights(model: ModelAdaptersMixin, student: str) -> None:
    """Let the teachers that a student still has weigh the same, as before an earlier training."""
    distillation = distillation_of(model, student)
    if distillation.weights is not None and distillation.run is None:
        kept = ", ".join(map(repr, distillation.config.teachers))
        logger.warning(
            f"{student!r} goes on from its present weights, with the teachers that it still has ({kept}): its last "
            "training did not end, or was loaded over. Add it again with overwrite_ok=True to start anew."
        )
    distillation.weights, distillation.is_weighed = None, False
    for fusion in fusions_of(model, student):
        fusion.set_equal_weights()


def start_at_weights(model: ModelAdaptersMixin, block: AdapterDistillation, weights: TeacherWeights) -> None:
    """Keep the heavy teachers, or the heaviest for a selection, and let the fusions start at their weights.

    A student that is still at the average of its teachers is set to their weighted mean, and so is its head; or both
    to their own start, as those of a new adapter, where the teachers do not help. The next training keeps the weights.
    """
    student, at_start = block.student, is_at_average(model, block.student)
    distillation = distillation_of(model, student)
    k = distillation.config.teacher_selection
    best = weights.heavy() if k == "all" else weights.heaviest(k)
    kept = [name for name in block.teachers if name in best]
    if len(kept) < len(block.teachers):
        if k != "all":
            mean = weights.mean()
            distillation.ranking = {name: mean[name] for name in weights.heaviest(len(mean))}
        _fuse_only(model, block, kept)
    for fusion in fusions_of(model, student):
        fusion.set_weights(weights.at(fusion.location, kept))
    distillation.weights, distillation.is_weighed = weights, True
    if at_start and not weights.help:
        start_as_new(model, student)
    elif at_start:
        start_at_average(model, student, lambda module: weights.at(module, kept))
        if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
            start_head(model, student, weights.at("", kept))


def _fuse_only(model: ModelAdaptersMixin, block: AdapterDistillation, names: Sequence[str]) -> None:
    """Give the student new fusions of the given teachers alone, and make it active with them.

    Its weights stay as they are; its head starts at the mean of theirs if the student is still at its start.
    """
    distillation = distillation_of(model, block.student)
    kept = [name for name in block.teachers if name in names]
    distillation.config = replace(distillation.config, teachers=kept)
    drop_fusion(model, block.student)
    train_again(model, AdapterDistillation(Stack(*block.children), kept))


def train_again(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Call `train_adapter` for a block whose layers may be skipped, and skip the same layers afterwards.

    What the user has frozen since the last call of the student and its head stays frozen.
    """
    skip_layers, frozen = model.adapters_config.skip_layers, _frozen_parts(model, block.student)
    model.train_adapter(block)
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.set_active_adapters(block, skip_layers)


def _frozen_parts(model: ModelAdaptersMixin, student: str) -> list[nn.Parameter]:
    """Return the frozen parameters of a student and its head; none if the student is not prepared for training."""
    active = block_of(model.active_adapters)
    of_student = [p for name, p in model.base_model.named_parameters() if owner(name, {student})]
    if active is None or active.student != student or not any(p.requires_grad for p in of_student):
        return []
    of_head = heads_of(model)[student].parameters() if student in heads_of(model) else ()
    return [p for p in (*of_student, *of_head) if not p.requires_grad]


def keep_active(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Make a block and its head active again after a callback has activated another setup.

    The layers that the callback wants to skip (AdapterDrop, https://arxiv.org/abs/2010.11918) stay skipped.
    """
    has_head = isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) and block.student in model.heads
    if model.active_adapters != block or (has_head and model.active_head != block.student):
        model.set_active_adapters(block, model.adapters_config.skip_layers)


def prepare_head(model: ModelAdaptersMixin, student: str, train_embeddings: bool, is_first: bool) -> None:
    """Put the whole model into training mode, activate the student's head and freeze all other heads.

    A model with one static head keeps it trainable. A language modelling head may share its weights with the
    embeddings. `is_first` says that the student had no fusion before, so its head may start at its teachers' heads.
    """
    model.train()  # adapters puts only the base model into training mode
    if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        return
    if is_first:
        start_head(model, student)
    base = set(map(id, model.base_model.parameters()))
    distillation_of(model, student).frozen_heads = frozenset(
        f"{name}.{key}"
        for name, head in model.heads.items()
        for key, parameter in head.named_parameters()
        if name != student and parameter.requires_grad and id(parameter) not in base
    )
    for name, head in model.heads.items():
        head.requires_grad_(name == student)
    if student in model.heads:
        model.active_head = student
    if not train_embeddings:
        model.freeze_embeddings()


def release_heads(model: ModelAdaptersMixin, students: Iterable[Distillation]) -> None:
    """Make the heads trainable again that the last `train_adapter` of students has frozen."""
    for distillation in students:
        for name, head in heads_of(model).items():
            for key, parameter in head.named_parameters():
                if f"{name}.{key}" in distillation.frozen_heads:
                    parameter.requires_grad_(True)
        distillation.frozen_heads = frozenset()


def forget_adapter(model: ModelAdaptersMixin, name: str) -> None:
    """Remove an adapter that is about to be deleted from all distillations and from the active setup.

    Its students keep their other teachers: the fusion has no weights of a single teacher. A student that is still at
    the average of its teachers is set to the average of the others, and so is its head. A student that loses its last
    teacher is a plain adapter from then on.
    """
    active, by_student = block_of(model.active_adapters), distillations(model.adapters_config)
    learners = [student for student, distillation in by_student.items() if name in distillation.config.teachers]
    for student in learners:  # before any change, since a warning may be an error
        _warn_if_untrained(model, student, name)
    if name in by_student:
        drop_fusion(model, name)
        forgotten = by_student.pop(name)
        release_heads(model, [forgotten])
        if forgotten.added_head:
            _delete_head(model, name, forgotten.head_before)
        if forgotten.candidates:  # for which one adapter stands in
            for stand_in in forgotten.config.teachers:
                model.delete_adapter(stand_in)
    if active is not None and name in active.children:
        model.base_model.set_active_adapters(None)
    for student in learners:
        _forget_teacher(model, student, name)


def _delete_head(model: ModelAdaptersMixin, name: str, before: str | list[str] | None) -> None:
    """Delete a head, and make the one active again that was active before, if it is still there."""
    if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) or name not in model.heads:
        return
    was_active, names = model.active_head == name, [before] if isinstance(before, str) else before or []
    model.delete_head(name)
    if was_active and all(other in model.heads for other in names):
        model.active_head = before


def _is_trained(model: ModelAdaptersMixin, student: str) -> bool:
    """Return whether a student was trained by a trainer, which keeps a record, or by a loop of one's own."""
    distillation = distillation_of(model, student)
    return distillation.run is not None or (distillation.has_run and not is_at_average(model, student))


def _warn_if_untrained(model: ModelAdaptersMixin, student: str, teacher: str) -> None:
    if not _is_trained(model, student):
        warnings.warn(
            f"{teacher!r} was a teacher of {student!r}, which is not trained yet and keeps "
            f"{len(distillation_of(model, student).config.teachers) - 1} others; "
            f"delete teachers after the training to silence this warning.",
            stacklevel=5,
        )


def _forget_teacher(model: ModelAdaptersMixin, student: str, name: str) -> None:
    """Take a teacher from a student, and out of the average at which student and head may still be."""
    distillation, active = distillation_of(model, student), block_of(model.active_adapters)
    weights = distillation.weights if distillation.is_weighed else None  # at which the next training starts
    of_head = None if weights is None else weights.at("", distillation.config.teachers)
    at_start, head_at_start = is_at_average(model, student), is_head_at_average(model, student, of_head)
    if distillation.run is None and _is_trained(model, student):
        distillation.run = Provenance.of(model, distillation).run
    left = [teacher for teacher in distillation.config.teachers if teacher != name]
    distillation.config = replace(distillation.config, teachers=left)
    if left:
        drop_unused_fusions(model, AdapterDistillation(student, left))
    else:
        drop_fusion(model, student)
    if left and at_start:
        start_at_average(model, student, None if weights is None else lambda place: weights.at(place, left))
        if head_at_start:
            start_head(model, student, None if weights is None else weights.at("", left))
    if active is not None and active.student == student:
        remaining = Stack(*active.children)
        setup = AdapterDistillation(remaining, left) if left else remaining
        model.base_model.set_active_adapters(setup, model.adapters_config.skip_layers)
