"""The teachers of a student from a pool of saved adapters: one stands in until the task's data choose the best."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from adapters import ModelAdaptersMixin, Stack
from torch import nn
from transformers.utils import logging

from .._compat import ADAPTER_CONFIG_NAME
from ..composition import AdapterDistillation
from ..method.distillation import active_block, distillation_of
from ..teachers.batches import Batches, Loss, check_steps, own_loss, read_batches
from ..teachers.compatibility import choose_level, warn_of_masked_prefixes
from ..teachers.loading import Teacher, load_teacher, locate_teacher, remove_adapter
from ..teachers.pool import Slot, add_stand_in, group_by_config, report_skipped
from ..teachers.relevance import measure_relevance
from ..teachers.weighing import STEPS
from .fusions import drop_fusion
from .preparing import train_again
from .provenance import read_provenance
from .warm_start import is_at_average, start_at_average

logger = logging.get_logger(__name__)


def choose_teachers(
    model: ModelAdaptersMixin, batches: Iterable[Any], loss: Loss | None = None, *, steps: int = STEPS
) -> dict[str, float]:
    """Choose the teachers of the active student from its pool, on some labelled batches, and load them.

    `DistillationTrainer` does this before the first step; a training loop of your own calls it. The score of an
    adapter is its relevance at first order (`teachers.relevance`): one forward and backward pass of the base model
    serves all adapters, whose weights are read one after the other. The best `teacher_selection` with a score above 0
    become the teachers.

    Args:
        model: A model on which `train_adapter` was called for an adapter whose teachers are a pool.
        batches: Labelled batches of the new task.
        loss: The task loss of a batch, a scalar, computed with `model`. Default: `model(**batch)["loss"]`.
        steps: The number of steps in which a new head is trained on the base model first; it is put back.

    Returns:
        The scores of all adapters of the pool that suit the model, the best first.

    Raises:
        ValueError: If no student with a pool is active, its teachers are chosen already, there are no batches, `steps`
            is no number of steps, the loss does not depend on the teachers, or no adapter of the pool can be loaded.
        TypeError: If `batches` is one batch.
    """
    block = active_block(model)
    if not distillation_of(model, block.student).candidates:
        raise ValueError(f"The teachers of {block.student!r} are chosen already; add it again to choose others.")
    check_steps(steps, 0)
    read = read_batches(batches, "choose teachers")
    return choose_from_pool(model, block, loss or own_loss(model), [lambda: read], steps=steps)


def choose_from_pool(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    loss: Loss,
    batches: Sequence[Batches],
    *,
    steps: int,
    accumulation: int = 1,
    beside: Sequence[nn.Parameter] = (),
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    loss_scale: float = 1.0,
) -> dict[str, float]:
    """Choose as `choose_teachers` does; the arguments are those of `learn_weights`."""
    distillation = distillation_of(model, block.student)
    pool = dict(distillation.candidates)
    groups, skipped = group_by_config(model, pool)
    scores: dict[str, float] = {}
    for folders in groups:
        try:
            stand_in = add_stand_in(model, folders.values(), block.student, distillation.config.level)
        except ValueError as error:
            skipped |= dict.fromkeys(folders, str(error))
            continue
        block = replace_teachers(model, block, [stand_in])
        relevance = measure_relevance(
            model,
            block,
            loss,
            lambda: chain.from_iterable(half() for half in batches),
            steps=steps,
            accumulation=accumulation,
            beside=beside,
            reduce=reduce,
            loss_scale=loss_scale,
        )
        scores |= _scores(model, folders, Slot(model, stand_in.name), relevance, skipped)
    report_skipped(_folder_of(pool), skipped, bool(scores))
    device = next(model.parameters()).device  # processes may round differently, and must not choose differently
    means = reduce(torch.tensor(list(scores.values()), device=device)).tolist()
    ranked = dict(sorted(zip(scores, means, strict=True), key=lambda pair: -pair[1]))
    kept = _load_best(model, block, ranked)
    distillation.ranking = {teacher.name: ranked[teacher.name] for teacher in kept}
    take_teachers(model, block, kept)
    return ranked


def _folder_of(pool: Mapping[str, str]) -> str:
    return str(Path(next(iter(pool.values()))).parent)


def _scores(
    model: ModelAdaptersMixin,
    folders: Mapping[str, str],
    slot: Slot,
    relevance: Callable[[], float],
    skipped: dict[str, str],
) -> dict[str, float]:
    """Return the relevance of each adapter of a config; note the damaged ones in `skipped`."""
    scores = {}
    for name, folder in folders.items():
        try:
            slot.fill(locate_teacher(model, folder))
            score = relevance()
            if not isfinite(score):
                raise ValueError(f"Teacher {folder!r} has updates that are not finite; train it again.")
            scores[name] = score
        except ValueError as error:
            skipped[name] = str(error)
    return scores


def _load_best(model: ModelAdaptersMixin, block: AdapterDistillation, ranked: Mapping[str, float]) -> list[Teacher]:
    """Load the best adapters of a pool, as many as there shall be teachers."""
    distillation = distillation_of(model, block.student)
    best = [name for name, score in ranked.items() if score > 0]
    if not best:
        logger.warning(
            f"No adapter of the pool of {block.student!r} lowers its task loss at first order (the best has "
            f"{max(ranked.values()):.4f}); the best are taken. Train a plain adapter instead to silence this."
        )
        best = list(ranked)
    kept: list[Teacher] = []
    skipped: dict[str, str] = {}
    for name in best:
        try:
            teacher = locate_teacher(model, distillation.candidates[name])
            load_teacher(model, teacher)
            kept.append(teacher)
        except ValueError as error:  # of the head, which was not read so far
            skipped[name] = str(error)
        if len(kept) == distillation.config.teacher_selection:
            break
    report_skipped(_folder_of(distillation.candidates), skipped, bool(kept))
    return kept


def take_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, teachers: Sequence[Teacher]) -> None:
    """Let loaded teachers be those of a student with a pool, which then starts at them if it was not trained."""
    distillation = distillation_of(model, block.student)
    at_start = is_at_average(model, block.student)
    try:
        replace_teachers(model, block, teachers)
    except BaseException:
        for teacher in teachers:
            remove_adapter(model, teacher.name)
        raise
    warn_of_masked_prefixes(model, [teacher.name for teacher in teachers])
    distillation.candidates = {}
    if at_start:
        distillation.start_digests = frozenset()
        start_at_average(model, block.student)


def choose_again(model: ModelAdaptersMixin, block: AdapterDistillation, checkpoint: str) -> None:
    """Load the teachers that a student has in a checkpoint from its pool, without another choice.

    Raises:
        ValueError: If the pool no longer has one of them, or the checkpoint is of another student.
    """
    pool = distillation_of(model, block.student).candidates
    names = [teacher.name for teacher in read_provenance(Path(checkpoint) / block.student).teachers]
    if missing := [name for name in names if not Path(pool.get(name, "")).joinpath(ADAPTER_CONFIG_NAME).is_file()]:
        raise ValueError(
            f"The checkpoint {checkpoint} was made with the teacher {missing[0]!r}, which the pool "
            f"{_folder_of(pool)!r} does not have; put it back, or start again without resume_from_checkpoint."
        )
    teachers: list[Teacher] = []
    try:
        for name in names:
            teacher = locate_teacher(model, pool[name])
            load_teacher(model, teacher)
            teachers.append(teacher)
    except BaseException:
        for teacher in teachers:
            remove_adapter(model, teacher.name)
        raise
    take_teachers(model, block, teachers)


def replace_teachers(
    model: ModelAdaptersMixin, block: AdapterDistillation, teachers: Sequence[Teacher]
) -> AdapterDistillation:
    """Make loaded teachers those of a student, remove the present ones from the model, and return the active block."""
    distillation, student = distillation_of(model, block.student), block.student
    labels = {teacher.name: teacher.label for teacher in teachers}
    config, before = distillation.config, distillation.config.teachers
    level, reason = choose_level(model, config.level, labels, model.adapters_config.get(student))
    distillation.level, distillation.level_reason = level, reason
    distillation.config = replace(config, teachers=list(labels))
    distillation.sources = {teacher.name: teacher.source for teacher in teachers}
    drop_fusion(model, student)
    train_again(model, AdapterDistillation(Stack(*block.children), list(labels)))
    for name in before:
        model.delete_adapter(name)
    return active_block(model)
