"""Place, find and drop the fusions of a student in a model."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from adapters import ModelAdaptersMixin
from torch import nn
from transformers import EncoderDecoderModel
from transformers.utils import logging

from .._compat import Adapter, LoRA, LoRALinear
from ..composition import AdapterDistillation
from ..method.calls import begin_call, end_call
from ..method.distillation import Distillation, distillation_of, distillations
from ..method.forward import begin_halves, join_halves
from ..method.fusion import TeacherFusion, fusions_at, fusions_of
from ..method.heads import kind_of_labels, number_of_labels
from ..method.layers import adapter_layers, adapters_of
from ..method.losses import TaskSpecificLoss
from ..method.parameters import owner
from ..method.stacking import says_nothing, update_sizes
from ..method.whole_layers import distill_layer, hidden_size, holds, whole_layers

logger = logging.get_logger(__name__)


def prepare_fusion(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Add the missing fusions, and leave only them and the student trainable.

    Adapters' `train_adapter` has frozen all but the adapters of the block before.
    """
    student, distillation = block.student, distillation_of(model, block.student)
    decoder = set(model.base_model.get_decoder().modules()) if model.config.is_encoder_decoder else set()
    dtype = next(p.dtype for name, p in model.base_model.named_parameters() if owner(name, {student}))
    distillation.is_loaded = False
    _remove_hooks(distillation)
    for name, layer, sizes in drop_unused_fusions(model, block):
        if not fusions_at(layer):
            layer.distillation_fusion = nn.ModuleDict()
        fusions = fusions_at(layer)
        if student not in fusions:
            in_decoder = layer in decoder and not _reads_encoder(name, layer)
            device = next(layer.parameters()).device  # layers may be on several
            rank = distillation.config.fusion_rank
            fusions[student] = TeacherFusion(*sizes, name, in_decoder, device, dtype, rank)
            distillation.has_new_fusion = True
        fusion = fusions[student]
        if distillation.config.layer_weights is not None:
            fusion.layer_weight = _layer_weight(model, distillation.config.layer_weights, name)
        fusion.requires_grad_(True).train(layer.training)
        if distillation.level == "layer":
            hook = layer.register_forward_hook(partial(distill_layer, student), with_kwargs=True)
            distillation.hooks.append(hook)
    _add_hooks(model, student, distillation)
    for below in block.children[:-1]:
        model.apply_to_adapter_layers(lambda i, layer, below=below: layer.freeze_adapter(below))
        model.apply_to_basemodel_childs(lambda i, child, below=below: child.freeze_adapter(below))
        for modules in (getattr(model.base_model, "invertible_adapters", {}), model.base_model.shared_parameters):
            if below in modules:
                modules[below].requires_grad_(False)


def prepare_probes(model: ModelAdaptersMixin, student: str) -> None:
    """Give each fusion the probe of the objective `task_specific`, once the student has a head."""
    n_labels = number_of_labels(model, student)
    config = distillation_of(model, student).config
    if "task_specific" not in config.objectives or n_labels is None:  # the trainer refuses a student without a head
        return
    kind = kind_of_labels(model, student)
    for fusion in fusions_of(model, student):
        probe = fusion.task_specific
        if probe is None or (probe.kind, probe.classifier.out_features) != (kind, n_labels):
            weight = fusion.key.weight  # (rank or output, output)
            size = weight.shape[1]
            fusion.task_specific = TaskSpecificLoss(size, n_labels, weight.device, weight.dtype, kind)
            fusion.task_specific.train(fusion.training)


def _layer_weight(model: ModelAdaptersMixin, weights: Sequence[float], location: str) -> float:
    """Return the weight of the layer that a place is in, relative to the mean over all layers."""
    module = model.base_model.get_submodule(location)
    layers = enumerate(layer for _, layer in model.base_model.iter_layers())
    number = next(i for i, layer in layers if any(part is module for part in layer.modules()))
    return weights[number] * len(weights) / sum(weights)


def _places(
    model: ModelAdaptersMixin, block: AdapterDistillation, distillation: Distillation
) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """Yield the modules that hold the student and a teacher, with their names and the widths of input and update.

    Inside the layers a place is left out where the updates of all its teachers are zero. It is kept if they are zero
    everywhere, or if the teacher only stands in for a pool.
    """
    if distillation.level == "layer":
        for name, layer in whole_layers(model, block.student):
            if any(holds(layer, teacher) for teacher in block.teachers):
                yield name, layer, (hidden_size(layer), hidden_size(layer))
    else:
        held = []
        for name, layer in adapter_layers(model, block.student):
            if teachers := [
                layer.adapter_modules[teacher] for teacher in block.teachers if teacher in layer.adapter_modules
            ]:
                place = (name, layer, update_sizes(layer.adapter_modules[block.student]))
                held.append((place, not distillation.candidates and all(map(says_nothing, teachers))))
        for place, is_silent in held:
            if not is_silent or all(silent for _, silent in held):
                yield place


def _reads_encoder(name: str, layer: nn.Module) -> bool:
    """Return whether a projection of a decoder reads the encoder's states, with the encoder's mask."""
    in_cross_attention = any(part in name for part in ("EncDecAttention", "encoder_attn", "crossattention"))
    return in_cross_attention and isinstance(layer, LoRALinear) and layer.attn_key in ("k", "v")


def warn_of_silent_teachers(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Name the teachers whose update is zero in all layers, to which the match would pull the student."""

    def is_silent(places: Mapping[int, Mapping[str, nn.Module]]) -> bool:
        held = [module for place in places.values() for module in place.values()]
        lists = [module if isinstance(module, nn.ModuleList) else [module] for module in held]  # projections in lists
        modules = [module for modules in lists for module in modules]
        return all(isinstance(module, Adapter | LoRA) and says_nothing(module) for module in modules)

    silent = [name for name, places in adapters_of(model, block.teachers).items() if is_silent(places)]
    if silent:
        logger.warning(
            f"The teachers {', '.join(map(repr, silent))} of {block.student!r} add nothing anywhere (all weights of "
            "their up-projections are zero), and the distillation pulls the student there; train them first, or leave "
            "them out."
        )


def _add_hooks(model: ModelAdaptersMixin, student: str, distillation: Distillation) -> None:
    """Add the hooks on the base model, and on an `EncoderDecoderModel`."""
    base_model, begin = model.base_model, partial(begin_call, student)
    distillation.hooks.append(base_model.register_forward_pre_hook(begin, with_kwargs=True))
    distillation.hooks.append(base_model.register_forward_hook(end_call))
    if isinstance(model, EncoderDecoderModel):
        distillation.hooks.append(model.register_forward_pre_hook(partial(begin_halves, student)))
        distillation.hooks.append(model.register_forward_hook(partial(join_halves, student)))


def _remove_hooks(distillation: Distillation) -> None:
    while distillation.hooks:
        distillation.hooks.pop().remove()


def drop_unused_fusions(
    model: ModelAdaptersMixin, block: AdapterDistillation
) -> list[tuple[str, nn.Module, tuple[int, int]]]:
    """Remove the fusions of a student from the layers that hold none of its teachers; return its places."""
    places = list(_places(model, block, distillation_of(model, block.student)))
    used = {id(layer) for _, layer, _ in places}
    for module in list(model.base_model.modules()):
        if id(module) not in used:
            _drop_from(module, block.student)
    return places


def drop_fusion(model: ModelAdaptersMixin, student: str) -> None:
    """Remove the fusion of a student from all layers."""
    if distillation := distillations(model.adapters_config).get(student):
        _remove_hooks(distillation)
    for module in list(model.base_model.modules()):
        _drop_from(module, student)


def _drop_from(module: nn.Module, student: str) -> None:
    if student in (fusions := fusions_at(module)):
        del fusions[student]
        if not fusions:
            del module.distillation_fusion
