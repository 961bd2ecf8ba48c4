"""Add a distilled student to a model, with the teachers that are not on it yet."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from adapters import DEFAULT_ADAPTER_CONFIG, AdapterConfig, ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin

from .._compat import heads_of
from ..composition import check_name, check_teachers
from ..configuration import DistillationConfig
from ..downloads import one_line
from ..method.distillation import Distillation, add_distillation
from ..teachers.compatibility import check_supported, check_weights, choose_level
from ..teachers.loading import Teacher, add_saved_adapter, locate_teacher, read_config
from .warm_start import start_at_average


def add_student(
    model: ModelAdaptersMixin,
    add_adapter: Callable[[], None],
    student: str,
    config: str | dict | AdapterConfig | None,
    distill_from: Sequence[str] | DistillationConfig,
) -> None:
    """Add a student adapter and its distillation; load the teachers that are not on the model.

    `add_adapter` adds the plain adapter, with adapters' own code.

    Raises:
        TypeError: If `distill_from`, an entry of it or a name has the wrong type.
        ValueError: If teachers and student do not fit, or a name or a config makes no adapter. The model is then what
            it was, but a student that was to be replaced may be gone.
    """
    settings = distill_from if isinstance(distill_from, DistillationConfig) else DistillationConfig(distill_from)
    check_name(student, "The student", "call it something")
    check_teachers(student, settings.teachers)
    student_config = read_config(f"Student {student!r}", config or DEFAULT_ADAPTER_CONFIG)
    check_supported(f"Student {student!r}", student_config)
    teachers = _locate(model, student, settings.teachers)
    active_head = model.active_head if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) else None
    try:
        for teacher in teachers.values():
            _load(model, teacher)
        labels = {name: teacher.label for name, teacher in teachers.items()}
        level, reason = choose_level(model, settings.level, labels, student_config)
        _add(model, add_adapter, student)
    except BaseException:
        for name in [name for name, teacher in teachers.items() if teacher.saved]:
            model.delete_adapter(name)
            if name in heads_of(model):
                model.delete_head(name)
        raise
    finally:
        if active_head is not None:
            model.active_head = active_head
    sources = {name: teacher.source for name, teacher in teachers.items()}
    distillation = Distillation(replace(settings, teachers=list(teachers)), level, reason, sources)
    add_distillation(model.adapters_config, student, distillation)
    if settings.student_start != "random":
        start_at_average(model, student)


def _locate(model: ModelAdaptersMixin, student: str, entries: Sequence[str]) -> dict[str, Teacher]:
    """Locate and check the teachers, by their names on the model, without loading them."""
    teachers: dict[str, Teacher] = {}
    for entry in entries:
        teacher = locate_teacher(model, entry)
        name, label = teacher.name, teacher.label
        if name in teachers or name == student:
            other = "the student" if name == student else f"teacher {teachers[name].source['source']!r}"
            raise ValueError(f"{label} would have the name of {other}, {name!r}; rename its folder.")
        config = teacher.saved.config if teacher.saved else model.adapters_config.get(name)
        check_supported(label, read_config(label, config))
        teachers[name] = teacher
    return teachers


def _load(model: ModelAdaptersMixin, teacher: Teacher) -> None:
    """Load and freeze a teacher that is not on the model, and check its weights."""
    if teacher.saved:
        add_saved_adapter(model, teacher.saved, teacher.name)
        model.apply_to_adapter_layers(lambda i, layer: layer.freeze_adapter(teacher.name))
    check_weights(model, teacher.label, teacher.name)


def _add(model: ModelAdaptersMixin, add_adapter: Callable[[], None], student: str) -> None:
    try:
        add_adapter()
    except Exception as error:  # adapters builds modules from unchecked values, on which torch raises anything
        if student in model.adapters_config:
            model.delete_adapter(student)
        raise ValueError(
            f"Student {student!r} cannot be made from its config: {one_line(error)}; choose one that adapters can "
            f"add to a {type(model).__name__}."
        ) from error
