"""Add a distilled student to a model, with the teachers that are not on it yet."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapters import DEFAULT_ADAPTER_CONFIG, AdapterConfig, ModelAdaptersMixin

from ..composition import check_name, check_teachers
from ..configuration import DistillationConfig
from ..downloads import one_line
from ..method.distillation import Distillation, add_distillation
from ..teachers.compatibility import check_supported, check_weights, choose_level
from ..teachers.loading import (
    SavedAdapter,
    Source,
    add_saved_adapter,
    check_saved_adapter,
    locate_teacher,
    read_config,
)
from .warm_start import start_at_average


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
    saved: dict[str, SavedAdapter] = {}
    for teacher in distillation_config.teachers:
        name, folder, source = locate_teacher(model, teacher)
        if name in located or name == student:
            other = "the student" if name == student else f"teacher {located[name][0]!r}"
            raise ValueError(f"Teacher {teacher!r} would have the name of {other}, {name!r}; rename its folder.")
        located[name] = teacher, folder, source
        label, teacher_config = f"Teacher {teacher!r}", model.adapters_config.get(name)
        if folder:
            saved[name] = check_saved_adapter(model, folder, label)
            teacher_config = saved[name].config
        check_supported(label, read_config(label, teacher_config))

    loaded: list[str] = []
    active_head = getattr(model, "active_head", None)
    try:
        for name, (teacher, _, _) in located.items():
            if name in saved:
                loaded.append(name)
                add_saved_adapter(model, saved[name], name)
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
            f"Student {student!r} cannot be made from its config: {one_line(error)}; choose one that adapters can "
            f"add to a {type(model).__name__}."
        ) from error
