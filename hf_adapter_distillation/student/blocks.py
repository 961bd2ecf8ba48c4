"""The blocks with which users train or activate a student, checked against the model."""

from dataclasses import replace

from adapters import AdapterCompositionBlock, ModelAdaptersMixin, Stack

from ..composition import AdapterDistillation, block_of
from ..configuration import DistillationConfig
from ..method.distillation import Distillation, StageSettings, add_distillation, distillation_of, distillations
from ..teachers.compatibility import (
    check_devices,
    check_supported,
    check_weights,
    choose_level,
    warn_of_masked_prefixes,
)
from ..teachers.loading import Source
from .fusions import drop_fusion
from .warm_start import is_at_average, start_at_average


def block_to_train(model: ModelAdaptersMixin, setup: object) -> AdapterDistillation | None:
    """Return the block that `train_adapter(setup)` trains, or None if it trains no distilled student.

    A setup of a distillation is the name of a student (also in a list), or an `AdapterDistillation` (also on top of a
    `Stack`). A `Stack` of a student's name is plain training of the student.

    Raises:
        ValueError: If a block written by hand names a student or teachers that the model does not have or cannot fuse,
            or a teacher is on another device than the student.
    """
    setup = _as_setup(setup)
    if isinstance(setup, str):
        distillation = distillations(model.adapters_config).get(setup)
        teachers = distillation.config.teachers if distillation else []
        block = AdapterDistillation(setup, teachers) if teachers else None
    else:
        block = block_of(setup)
        if block is not None and not _is_known(model, block):
            _add_written_block(model, block)
    if block is not None:
        check_devices(model, block.student, block.teachers)
    return block


def live_block(model: ModelAdaptersMixin, block: AdapterDistillation) -> AdapterDistillation:
    """Return the block of a student with the teachers that it has by now.

    What is stacked below the student is that of the active block, if it is the student's.

    Raises:
        ValueError: If the student is not distilled any more, or has lost all its teachers.
    """
    active = block_of(model.active_adapters)
    if active is None or active.student != block.student:
        active = block
    return AdapterDistillation(Stack(*active.children), distillation_of(model, block.student).config.teachers)


def check_prepared(model: ModelAdaptersMixin, setup: object) -> None:
    """Refuse to activate a setup whose block is misplaced, or would silently distil nothing."""
    block = block_of(_as_setup(setup))
    if block is not None and not _is_known(model, block):
        raise ValueError(f"{block} is not prepared; call model.train_adapter with it, which makes it active.")


def _as_setup(setup: object) -> AdapterCompositionBlock | str | None:
    """Read a list of adapters as adapters does, as a `Stack`."""
    if isinstance(setup, list | tuple):
        setup = setup[0] if len(setup) == 1 and not isinstance(setup[0], Stack) else Stack(*setup)
    return setup if isinstance(setup, AdapterCompositionBlock | str) else None


def _is_known(model: ModelAdaptersMixin, block: AdapterDistillation) -> bool:
    """Return whether a block has the teachers of its student; check that all its adapters are on the model."""
    for name in (*block.children, *block.teachers):
        if name not in model.adapters_config:
            raise ValueError(f"{block} names {name!r}, which is not on the model; add or load it first.")
    distillation = distillations(model.adapters_config).get(block.student)
    return distillation is not None and tuple(distillation.config.teachers) == block.teachers


def _add_written_block(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Check a block that a user wrote, and add its distillation, or give the student's the teachers of the block."""
    before = distillations(model.adapters_config).get(block.student)
    if before is not None and set(before.config.teachers) == set(block.teachers):  # in another order
        before.config = replace(before.config, teachers=list(block.teachers))
        before.settings = _without_teachers(before.settings)
        return
    for name in (*block.children, *block.teachers):
        check_supported(repr(name), model.adapters_config.get(name))
    labels = {name: f"Teacher {name!r}" for name in block.teachers}
    check_weights(model, labels)
    new = DistillationConfig(teachers=list(block.teachers), student_start="random")
    config = new if before is None else replace(before.config, teachers=list(block.teachers))
    sources: dict[str, Source] = {name: {"source": name, "revision": None} for name in block.teachers}
    level, reason = choose_level(model, config.level, labels, model.adapters_config.get(block.student))
    distillation = Distillation(config, level, reason, sources)
    if before is None:
        add_distillation(model.adapters_config, block.student, distillation)
    else:
        _take_other_teachers(model, block.student, distillation)
    warn_of_masked_prefixes(model, [block.student, *block.teachers])


def _take_other_teachers(model: ModelAdaptersMixin, student: str, new: Distillation) -> None:
    """Give a student the teachers of another distillation.

    What does not depend on the former teachers is kept: the student's start, the heads, and the settings. A student
    that is still at their average moves to that of the new ones. The adapter that stands in for a pool is deleted.
    """
    before, at_start = distillation_of(model, student), is_at_average(model, student)
    drop_fusion(model, student)
    new.sources |= {name: source for name, source in before.sources.items() if name in new.sources}
    new.start_digests, new.own_start = before.start_digests, before.own_start
    new.frozen_heads, new.added_head, new.head_before = before.frozen_heads, before.added_head, before.head_before
    new.settings, new.pool, new.has_run = _without_teachers(before.settings), before.pool, before.has_run
    add_distillation(model.adapters_config, student, new)
    if before.candidates:
        for stand_in in before.config.teachers:
            model.delete_adapter(stand_in)
    if at_start:
        start_at_average(model, student)


def _without_teachers(settings: StageSettings) -> StageSettings:
    """Return settings without those of certain teachers."""
    if settings.calibration is None and settings.predictions is None:
        return settings
    return replace(settings, calibration=None, predictions=None)
