"""Adds a distilled student to a model, prepares it for training, and removes what belongs to it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapters import DEFAULT_ADAPTER_CONFIG, AdapterCompositionBlock, AdapterConfig, ModelAdaptersMixin, Stack
from transformers.utils import logging

from ..composition import AdapterDistillation, check_name, check_teachers, join_block
from ..configuration import DistillationConfig
from ..method.distillation import Distillation, add_distillation, distillations
from ..teachers.compatibility import check_devices, check_supported, check_weights, choose_level
from ..teachers.loading import Source, check_folder, first_line, load_teacher, locate_teacher, read_config
from .fusions import drop_fusion, fusions_of
from .provenance import adapter_digest
from .warm_start import start_at_average, start_head

logger = logging.get_logger(__name__)


def add_student(
    model: ModelAdaptersMixin,
    add_adapter: Callable[[], None],
    student: str,
    config: str | dict | AdapterConfig | None,
    distill_from: Sequence[str] | DistillationConfig,
) -> None:
    """Adds a student adapter and its distillation; loads the teachers that are not on the model.

    Args:
        model: The model, with or without heads.
        add_adapter: Adds the plain adapter, with adapters' own code.
        student: The name of the student.
        config: The student's adapter config, as for `add_adapter`.
        distill_from: The teachers, or the whole config.

    Raises:
        TypeError: If `distill_from`, an entry of it or a name has the wrong type.
        ValueError: If teachers and student do not fit, or a name or a config makes no adapter. The model is then what
            it was, but that a student which was to be replaced may be gone.
    """
    distillation_config = (
        distill_from if isinstance(distill_from, DistillationConfig) else DistillationConfig(teachers=distill_from)
    )
    check_name(student, "The student", "call it something")
    check_teachers(student, distillation_config.teachers)
    student_config = read_config(f"Student {student!r}", config or DEFAULT_ADAPTER_CONFIG)
    check_supported(f"Student {student!r}", student_config)

    located: dict[str, tuple[str, Path | None, Source]] = {}
    configs: dict[str, dict | AdapterConfig] = {}
    for teacher in distillation_config.teachers:
        name, folder, source = locate_teacher(model, teacher)
        if name in located or name == student:
            other = "the student" if name == student else f"teacher {located[name][0]!r}"
            raise ValueError(f"Teacher {teacher!r} would have the name of {other}, {name!r}; rename its folder.")
        located[name] = teacher, folder, source
        configs[name] = check_folder(model, teacher, folder) if folder else model.adapters_config.get(name)
        check_supported(f"Teacher {teacher!r}", read_config(f"Teacher {teacher!r}", configs[name]))

    loaded: list[str] = []
    active_head = getattr(model, "active_head", None)
    try:
        for name, (teacher, folder, _) in located.items():
            if folder:
                loaded.append(name)
                load_teacher(model, teacher, name, folder, configs[name])
                model.apply_to_adapter_layers(lambda i, layer, name=name: layer.freeze_adapter(name))
            check_weights(model, teacher, name)
        called = {name: f"Teacher {teacher!r}" for name, (teacher, _, _) in located.items()}
        level, reason = choose_level(model, distillation_config.level, called, student_config)
        _add(model, add_adapter, student)
    except BaseException:
        for name in loaded:
            model.delete_adapter(name)
            if name in getattr(model, "heads", {}):
                model.delete_head(name)
        raise
    finally:
        if active_head is not None:
            model.active_head = active_head

    distillation = Distillation(
        config=replace(distillation_config, teachers=list(located)),
        level=level,
        level_reason=reason,
        sources={name: source for name, (_, _, source) in located.items()},
    )
    add_distillation(model.adapters_config, student, distillation)
    if distillation_config.student_start != "random":
        start_at_average(model, student, distillation)


def _add(model: ModelAdaptersMixin, add_adapter: Callable[[], None], student: str) -> None:
    try:
        add_adapter()
    except Exception as error:  # adapters leaves it to torch to find out that a config makes no module
        if student in model.adapters_config:
            model.delete_adapter(student)
        raise ValueError(
            f"Student {student!r} cannot be made from its config: {first_line(error)}; choose one that adapters can "
            f"add to a {type(model).__name__}."
        ) from error


def distillation_block(model: ModelAdaptersMixin, setup: object) -> AdapterDistillation | None:
    """The block that `train_adapter(setup)` trains, or None if it trains no distilled student.

    Args:
        model: The model.
        setup: What the user passed: the name of a student (also in a list of its own), or an `AdapterDistillation`
            (also on top of a `Stack`). A `Stack` of a student's name is plain training of the student.

    Returns:
        The block, whose teachers are on the model.

    Raises:
        ValueError: If a block written by hand names a student or teachers that the model does not have or cannot fuse,
            or a teacher is on another device than the student.
    """
    if isinstance(setup, list | tuple):  # adapters reads it as a Stack
        setup = setup[0] if len(setup) == 1 else Stack(*setup)
    if isinstance(setup, AdapterCompositionBlock) and (block := join_block(setup)) is not None:
        _check_block(model, block)
        check_devices(model, block.student, block.teachers)
        return block
    if not isinstance(setup, str):
        return None
    distillation = distillations(model.adapters_config).get(setup)
    if distillation is None or not distillation.config.teachers:
        return None
    check_devices(model, setup, distillation.config.teachers)
    return AdapterDistillation(setup, distillation.config.teachers)


def check_prepared(model: ModelAdaptersMixin, setup: object) -> None:
    """Refuses to activate a block that would not distil: at the wrong place of a setup, or unknown to its student.

    Args:
        model: The model.
        setup: What is to be active.

    Raises:
        ValueError: With the block, and what to do about it.
    """
    block = join_block(Stack(*setup) if isinstance(setup, list | tuple) else setup)
    if block is None:
        return
    _check_names(model, block)
    if not _is_known(model, block):
        raise ValueError(f"{block} is not prepared; call model.train_adapter with it, which makes it active.")


def _check_names(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    for name in (*block.children, *block.teachers):
        if name not in model.adapters_config:
            raise ValueError(f"{block} names {name!r}, which is not on the model; add or load it first.")


def _is_known(model: ModelAdaptersMixin, block: AdapterDistillation) -> bool:
    known = distillations(model.adapters_config).get(block.student)
    return known is not None and tuple(known.config.teachers) == block.teachers


def _check_block(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    _check_names(model, block)
    if _is_known(model, block):
        return
    known = distillations(model.adapters_config).get(block.student)
    for name in (*block.children, *block.teachers):
        check_supported(repr(name), model.adapters_config.get(name))
    for name in block.teachers:
        check_weights(model, name, name)
    config = DistillationConfig(teachers=list(block.teachers), student_start="random")
    if known is not None:
        drop_fusion(model, block.student)
        config = replace(known.config, teachers=list(block.teachers))
    called = {name: f"Teacher {name!r}" for name in block.teachers}
    level, reason = choose_level(model, config.level, called, model.adapters_config.get(block.student))
    sources: dict[str, Source] = {name: {"source": name, "revision": None} for name in block.teachers}
    if known is not None:
        sources.update({name: source for name, source in known.sources.items() if name in sources})
    distillation = Distillation(config=config, level=level, level_reason=reason, sources=sources)
    add_distillation(model.adapters_config, block.student, distillation)


def keep_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, names: Sequence[str]) -> None:
    """Goes on with some of the teachers, and makes the student with them active.

    A student that still stands at the average of its teachers, and its head, start anew at that of those that are
    kept. The others stay on the model.

    Args:
        model: The model.
        block: The active distillation block.
        names: The teachers to keep.
    """
    student, distillation = block.student, distillations(model.adapters_config)[block.student]
    at_start = distillation.start_digest == adapter_digest(model, student)
    kept = [name for name in block.teachers if name in names]
    distillation.config = replace(distillation.config, teachers=kept)
    if at_start:
        distillation.head_started = False
        start_at_average(model, student, distillation)
    drop_fusion(model, student)
    model.train_adapter(AdapterDistillation(Stack(*block.children), kept))


def prepare_head(model: ModelAdaptersMixin, student: str, train_embeddings: bool) -> None:
    """Puts the whole model into training mode, activates the student's head and freezes all other heads.

    A model with one static head keeps it trainable.

    Args:
        model: The model that holds the heads.
        student: The name of the student.
        train_embeddings: Whether the embeddings, which a language modelling head may share, are trained.
    """
    model.train()  # adapters puts the base model alone into training mode
    if not hasattr(model, "heads"):
        return
    distillation = distillations(model.adapters_config)[student]
    start_head(model, student, distillation)
    for name, head in model.heads.items():
        head.requires_grad_(name == student)
    if student in model.heads:
        model.active_head = student
    if not train_embeddings:
        model.freeze_embeddings()


def forget_adapter(model: ModelAdaptersMixin, name: str) -> None:
    """Takes an adapter that is about to be deleted out of all distillations and out of the active setup.

    Its students keep their other teachers: the fusion has no weights of a single teacher. A student whose last
    teacher goes is a plain adapter from then on.

    Args:
        model: The model.
        name: The adapter.
    """
    active = join_block(model.active_adapters)
    if name in distillations(model.adapters_config):
        drop_fusion(model, name)
        del distillations(model.adapters_config)[name]
    if active is not None and name in active.children:
        model.set_active_adapters(None)
    for student, distillation in distillations(model.adapters_config).items():
        if name not in distillation.config.teachers:
            continue
        left = [teacher for teacher in distillation.config.teachers if teacher != name]
        distillation.config = replace(distillation.config, teachers=left)
        if distillation.training is None:
            warnings.warn(
                f"{name!r} was a teacher of {student!r}, which is not trained yet and keeps {len(left)} others; "
                f"delete teachers after the training to silence this warning.",
                stacklevel=4,
            )
        for fusion in fusions_of(model, student):
            fusion.cache.clear()
        if not left:
            drop_fusion(model, student)
        if active is not None and active.student == student:
            remaining = Stack(*active.children)
            model.set_active_adapters(AdapterDistillation(remaining, left) if left else remaining)
