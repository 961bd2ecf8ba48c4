"""Adds a distilled student to a model, prepares it for training, and removes what belongs to it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapters import DEFAULT_ADAPTER_CONFIG, AdapterConfig, ModelAdaptersMixin, Stack
from torch import nn
from transformers.utils import logging

from .composition import AdapterDistillation, check_teachers, find_block
from .configuration import DistillationConfig
from .fusion import TeacherFusion
from .layers import FusedLayer, adapter_layers
from .stacked import update_sizes
from .start import start_at_average, start_head
from .state import Distillation, add_distillation, distillations
from .teachers import (
    Source,
    check_devices,
    check_folder,
    check_fusable,
    check_supported,
    check_weights,
    load_teacher,
    locate_teacher,
)

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
        TypeError: If `distill_from` or an entry of it has the wrong type.
        ValueError: If teachers and student do not fit. The model is then what it was.
    """
    distillation_config = (
        distill_from if isinstance(distill_from, DistillationConfig) else DistillationConfig(teachers=distill_from)
    )
    check_teachers(student, distillation_config.teachers)
    student_config = AdapterConfig.load(config or DEFAULT_ADAPTER_CONFIG)
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
        check_fusable(f"Teacher {teacher!r}", AdapterConfig.load(configs[name]), student_config)

    loaded: list[str] = []
    active_head = getattr(model, "active_head", None)
    try:
        for name, (teacher, folder, _) in located.items():
            if folder:
                loaded.append(name)
                load_teacher(model, teacher, name, folder, configs[name])
                model.apply_to_adapter_layers(lambda i, layer, name=name: layer.freeze_adapter(name))
            check_weights(model, teacher, name, student_config)
        add_adapter()
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
        sources={name: source for name, (_, _, source) in located.items()},
    )
    add_distillation(model.adapters_config, student, distillation)
    if distillation_config.student_start != "random":
        start_at_average(model, student, distillation)


def distillation_block(model: ModelAdaptersMixin, setup: object) -> AdapterDistillation | None:
    """The block that `train_adapter(setup)` trains, or None if it trains no distilled student.

    Args:
        model: The model.
        setup: What the user passed: the name of a student (also in a list of its own), or an `AdapterDistillation`.
            A `Stack` of a student's name is plain training of the student.

    Returns:
        The block, whose teachers are on the model.

    Raises:
        ValueError: If a block written by hand names a student or teachers that the model does not have or cannot fuse,
            or a teacher is on another device than the student.
    """
    if isinstance(setup, AdapterDistillation):
        _check_block(model, setup)
        check_devices(model, setup.student, setup.teachers)
        return setup
    if isinstance(setup, list) and len(setup) == 1:
        setup = setup[0]
    if not isinstance(setup, str):
        return None
    distillation = distillations(model.adapters_config).get(setup)
    if distillation is None or not distillation.config.teachers:
        return None
    check_devices(model, setup, distillation.config.teachers)
    return AdapterDistillation(setup, distillation.config.teachers)


def _check_block(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    known = distillations(model.adapters_config).get(block.student)
    if known is not None and tuple(known.config.teachers) == block.teachers:
        return
    for name in (*block.children, *block.teachers):
        if name not in model.adapters_config:
            raise ValueError(f"{block} names {name!r}, which is not on the model; add or load it first.")
        check_supported(repr(name), model.adapters_config.get(name))
    student_config = model.adapters_config.get(block.student)
    for name in block.teachers:
        check_fusable(f"Teacher {name!r}", model.adapters_config.get(name), student_config)
        check_weights(model, name, name, student_config)
    config = DistillationConfig(teachers=list(block.teachers), student_start="random")
    if known is not None:
        config = replace(known.config, teachers=list(block.teachers))
    sources: dict[str, Source] = {name: {"source": name, "revision": None} for name in block.teachers}
    if known is not None:
        sources.update({name: source for name, source in known.sources.items() if name in sources})
    add_distillation(model.adapters_config, block.student, Distillation(config=config, sources=sources))


def _reads_encoder(name: str, layer: FusedLayer) -> bool:
    """Whether a projection of a decoder makes keys or values of the encoder's states, with the encoder's mask."""
    in_cross_attention = any(part in name for part in ("EncDecAttention", "encoder_attn", "crossattention"))
    return in_cross_attention and getattr(layer, "attn_key", None) in ("k", "v")


def prepare_fusion(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Makes the fusion of each layer where it is missing, and leaves it and the student trainable, nothing else.

    Args:
        model: The model, frozen but for the adapters of the block (what adapters' `train_adapter` does).
        block: The distillation block.
    """
    decoder = set(model.base_model.get_decoder().modules()) if model.config.is_encoder_decoder else set()
    for name, layer in adapter_layers(model, block.student):
        if not any(teacher in layer.adapter_modules for teacher in block.teachers):
            continue
        student = layer.adapter_modules[block.student]
        if "distillation_fusion" not in layer._modules:
            layer.distillation_fusion = nn.ModuleDict()
        if block.student not in layer.distillation_fusion:
            weight = next(student.parameters())
            in_size, out_size = update_sizes(student)
            in_decoder = layer in decoder and not _reads_encoder(name, layer)
            layer.distillation_fusion[block.student] = TeacherFusion(
                in_size, out_size, name, in_decoder, weight.device, weight.dtype
            )
        fusion = layer.distillation_fusion[block.student]
        fusion.requires_grad_(True).train(layer.training)
        fusion.cache.clear()
    base = model.base_model
    for below in block.children[:-1]:
        model.apply_to_adapter_layers(lambda i, layer, below=below: layer.freeze_adapter(below))
        model.apply_to_basemodel_childs(lambda i, child, below=below: child.freeze_adapter(below))
        for held in (getattr(base, "invertible_adapters", {}), base.shared_parameters):
            if below in held:
                held[below].requires_grad_(False)


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


def drop_fusion(model: ModelAdaptersMixin, student: str) -> None:
    """Removes the fusion of a student from all layers."""
    for _, layer in adapter_layers(model, student):
        fusions = layer._modules.get("distillation_fusion", {})
        if student in fusions:
            del fusions[student]
            if not fusions:
                del layer.distillation_fusion


def forget_adapter(model: ModelAdaptersMixin, name: str) -> None:
    """Takes an adapter that is about to be deleted out of all distillations and out of the active setup.

    Its students keep their other teachers: the fusion has no weights of a single teacher. A student whose last
    teacher goes is a plain adapter from then on.

    Args:
        model: The model.
        name: The adapter.
    """
    active = find_block(model.active_adapters)
    if distillations(model.adapters_config).pop(name, None) is not None:
        drop_fusion(model, name)
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
        for _, layer in adapter_layers(model, student):
            if student in (fusions := layer._modules.get("distillation_fusion", {})):
                fusions[student].cache.clear()
        if not left:
            drop_fusion(model, student)
        if active is not None and active.student == student:
            remaining = Stack(*active.children)
            model.set_active_adapters(AdapterDistillation(remaining, left) if left else remaining)
