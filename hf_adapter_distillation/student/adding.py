"""Add a distilled student to a model, with the teachers that are not on it yet."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from adapters import DEFAULT_ADAPTER_CONFIG, AdapterConfig, ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from transformers.utils import logging

from .._compat import merged_without_bias
from ..composition import check_name, check_teachers
from ..configuration import DistillationConfig
from ..downloads import is_pool, one_line
from ..method.distillation import Distillation, add_distillation
from ..teachers.compatibility import check_supported, check_weights, choose_level, warn_of_masked_prefixes
from ..teachers.loading import Teacher, load_teacher, locate_teacher, read_config, remove_adapter
from ..teachers.pool import add_stand_in, read_pool
from ..teachers.projections import check_keys
from .digests import rounded_digests
from .warm_start import keep_own_start, start_at_average

logger = logging.get_logger(__name__)


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
    if not isinstance(distill_from, DistillationConfig):
        check_teachers(student, distill_from)
    settings = distill_from if isinstance(distill_from, DistillationConfig) else DistillationConfig(distill_from)
    check_name(student, "The student", "rename it")
    _check_layer_weights(model, settings)
    if isinstance(settings.teachers, str) and settings.teacher_selection == "all" and is_pool(settings.teachers):
        raise ValueError(
            f"teachers={settings.teachers!r} is a pool, of which the best become teachers; give their number as "
            "teacher_selection."
        )
    if isinstance(settings.teachers, str) and settings.teacher_selection != "all":
        return _add_student_of_pool(model, add_adapter, student, config, settings, settings.teachers)
    check_teachers(student, settings.teachers)
    student_config = read_config(f"Student {student!r}", config or DEFAULT_ADAPTER_CONFIG)
    check_supported(f"Student {student!r}", student_config)
    check_keys(model, f"Student {student!r}", student_config)
    teachers = _locate(model, student, settings.teachers)
    active_head = model.active_head if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) else None
    try:
        labels = {name: teacher.label for name, teacher in teachers.items()}
        check_weights(model, {name: labels[name] for name, teacher in teachers.items() if not teacher.saved})
        for teacher in [teacher for teacher in teachers.values() if teacher.saved]:
            load_teacher(model, teacher)
        level, reason = choose_level(model, settings.level, labels, student_config)
        _add(model, add_adapter, student)
        sources = {name: teacher.source for name, teacher in teachers.items()}
        _start(model, student, Distillation(replace(settings, teachers=list(teachers)), level, reason, sources))
    except BaseException:
        for name in [name for name, teacher in teachers.items() if teacher.saved]:
            remove_adapter(model, name)
        raise
    finally:
        if active_head is not None:
            model.active_head = active_head


def _check_layer_weights(model: ModelAdaptersMixin, settings: DistillationConfig) -> None:
    n_layers, weights = sum(1 for _ in model.base_model.iter_layers()), settings.layer_weights
    if weights is not None and len(weights) != n_layers:
        raise ValueError(
            f"layer_weights has {len(weights)} numbers, but the model has {n_layers} layers; give one for each layer."
        )


def _start(model: ModelAdaptersMixin, student: str, distillation: Distillation) -> None:
    """Make a new adapter a student, and set it to its start; delete it if that fails."""
    try:
        add_distillation(model.adapters_config, student, distillation)
        if distillation.config.student_start == "weighted":
            keep_own_start(model, student)
        if distillation.config.student_start != "random":
            start_at_average(model, student)
    except BaseException:
        model.delete_adapter(student)
        raise
    warn_of_masked_prefixes(model, [student, *distillation.config.teachers])


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


def _add_student_of_pool(
    model: ModelAdaptersMixin,
    add_adapter: Callable[[], None],
    student: str,
    config: str | dict | AdapterConfig | None,
    settings: DistillationConfig,
    folder: str,
) -> None:
    """Add a student whose teachers are chosen from a pool before its training; one adapter of it stands in until then.

    The student starts at its own initialisation, from which the choice moves it to its teachers.
    """
    student_config = read_config(f"Student {student!r}", config or DEFAULT_ADAPTER_CONFIG)
    check_supported(f"Student {student!r}", student_config)
    check_keys(model, f"Student {student!r}", student_config)
    assert isinstance(settings.teacher_selection, int)
    pool = read_pool(model, folder, student, settings.teacher_selection)
    _add(model, add_adapter, student)
    try:
        stand_in = add_stand_in(model, pool.values(), student, settings.level)
    except BaseException:
        model.delete_adapter(student)
        raise
    name = stand_in.name
    level, reason = choose_level(model, settings.level, {name: stand_in.label}, student_config)
    distillation = Distillation(replace(settings, teachers=[name]), level, reason, {name: stand_in.source})
    distillation.candidates, distillation.is_from_pool = pool, True
    add_distillation(model.adapters_config, student, distillation)
    if settings.student_start == "weighted":
        keep_own_start(model, student)
    if settings.student_start != "random":
        distillation.start_digests = rounded_digests(model, student)


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
    if model is model.base_model and student in model.shared_parameters:
        logger.warning(
            f"{student!r} cannot be saved whole: adapters leaves out the weights that its layers share where the "
            "model has no head. Add it to an AutoAdapterModel to keep it."
        )
    if path := merged_without_bias(model):
        logger.warning(
            f"{student!r} computes something else where adapters.init runs without this package, because it gives "
            f"{path} a random bias there; import hf_adapter_distillation first, where the student is loaded, too."
        )
