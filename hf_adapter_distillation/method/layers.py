"""What an adapter layer computes for an `AdapterDistillation` block: the student, and its teachers beside it."""

from typing import NamedTuple, TypeAlias

import torch
from adapters import ModelAdaptersMixin
from torch import nn

from .._compat import Adapter, BottleneckLayer, BottleneckState, LoRA, LoRALinear, LoRAState, ParallelAdapter
from ..composition import AdapterDistillation
from ..student.least_squares import UpProjectionFit
from .fusion import TeacherFusion, fusions_at
from .layer_pass import DistillationPass, Fused, current_pass
from .stacking import can_be_stacked, ends_in_up_projection, input_kind, stack

FusedLayer: TypeAlias = BottleneckLayer | LoRALinear  # what can hold teachers and a student, and fuse them


def adapter_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, FusedLayer]]:
    """The layers of the base model that hold an adapter and can fuse it, with their names."""
    modules = model.base_model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, FusedLayer) and adapter in m.adapter_modules]


class _Input(NamedTuple):
    """What an adapter reads, and what its update is added to, (batch, seq_len, hidden) each; 0 where that is later."""

    hidden_states: torch.Tensor
    residual: torch.Tensor | float

    def detach(self) -> "_Input":
        residual = self.residual.detach() if isinstance(self.residual, torch.Tensor) else self.residual
        return _Input(self.hidden_states.detach(), residual)


def _input_of(adapter: Adapter | LoRA, state: BottleneckState | LoRAState) -> _Input:
    """The input of an adapter in a state that its layer has prepared for it (`pre_block`)."""
    if isinstance(state, LoRAState):
        return _Input(state.layer_input if state.hidden_states is None else state.hidden_states, 0.0)
    # A parallel adapter's update is added to the block's output later, with the other residual.
    return _Input(state.hidden_states, 0.0 if isinstance(adapter, ParallelAdapter) else state.adapter_residual)


def compose_distillation(
    layer: FusedLayer, block: AdapterDistillation, state: BottleneckState | LoRAState, lvl: int = 0
) -> BottleneckState | LoRAState:
    """Runs the student, and in stage 2 the teachers beside it.

    Args:
        layer: The bottleneck layer, or the projection with LoRA.
        block: The distillation block.
        state: The layer's state, `hidden_states` (batch, seq_len, hidden).
        lvl: The depth of the block in the setup.

    Returns:
        The state after the student, or after the fused output, as the carrier says.
    """
    current = current_pass()
    fusions = fusions_at(layer)
    if current is None or block.student not in fusions:
        return layer.compose_stack(block, state, lvl)
    fusion = fusions[block.student]
    current.fusions[fusion.location] = fusion
    distillation = current.distillation
    if not distillation.fuses:
        return layer.compose_stack(block, state, lvl)

    for below in block.children[:-1]:
        if below in layer.adapter_modules:
            state = layer.compose_single(below, layer.pre_block(below, state), lvl + 1)
    student = layer.adapter_modules[block.student]
    prepared = layer.pre_block(block.student, state)
    student_input = _input_of(student, prepared)
    student_state = layer.compose_single(block.student, prepared, lvl + 1)
    student_output = _student_output(student, student_input, student_state)  # (B, T, d)
    if distillation.fits is not None:
        teachers = [layer.adapter_modules[name] for name in block.teachers]  # of the student's config
        updates = [adapter_update(teacher, *student_input) for teacher in teachers]
        update = torch.stack(updates).mean(dim=0)  # (B, T, d)
        fit = distillation.fits.setdefault(fusion.location, UpProjectionFit())
        sequence_weights, _ = current.weights(fusion, student_output)
        fit.add(student.adapter_down(student_input.hidden_states), update / student.scaling, sequence_weights)
        return student_state._replace(hidden_states=student_input.residual + update)
    if current.part == "student":
        current.gather(fusion, student_output, None)
        return student_state

    if current.matched_only:
        student_input = student_input.detach()
    fused = _fuse(current, layer, fusion, state, student_input)
    current.gather(fusion, student_output, fused)
    if current.passes_student_on:
        return student_state
    passed_on = current.passed_on(student_state.hidden_states, student_input.residual + fused.output)  # (B, T, d)
    return student_state._replace(hidden_states=passed_on)


def _student_output(student: Adapter | LoRA, own: _Input, after: BottleneckState | LoRAState) -> torch.Tensor:
    """The student's update without its dropout; what it computed already, where that is the same."""
    if isinstance(after, LoRAState):
        return adapter_update(student, *own) if isinstance(student.lora_dropout, nn.Dropout) else after.hidden_states
    if ends_in_up_projection(student) and not hasattr(student, "DropPath"):
        return after.bottleneck_up
    return adapter_update(student, *own)


def _fuse(
    current: DistillationPass,
    layer: FusedLayer,
    fusion: TeacherFusion,
    state: BottleneckState | LoRAState,
    student_input: _Input,
) -> Fused:
    """Fuses the teachers of a layer, and the student with them where the fused output is passed on."""
    block, modules, hidden_states = current.block, layer.adapter_modules, student_input.hidden_states
    student = modules[block.student]
    teachers = {name: modules[name] for name in block.teachers if name in modules}
    joining = {} if current.matched_only else {block.student: student}
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    looked_at = current.distillation.overflows is not None
    stacks = None if looked_at else fusion.cache.get(teachers, layer.adapters_config, dtype)

    def own_input(name: str) -> _Input:
        """The student's input, or what an adapter of another kind makes of the state in its own way."""
        if input_kind(modules[name]) == input_kind(student):
            return student_input
        own = _input_of(modules[name], layer.pre_block(name, state))
        return own if hidden_states.requires_grad else own.detach()

    if stacks is None or not all(can_be_stacked(adapter) for adapter in joining.values()):
        adapters = (teachers | joining).items()
        updates = {name: adapter_update(adapter, *own_input(name)) for name, adapter in adapters}
        return current.fuse(fusion, hidden_states, updates, without=hidden_states)
    if joining:
        stacks = [*stacks, stack(joining)]
    features = [stacked.features(own_input(stacked.names[0]).hidden_states) for stacked in stacks]
    names = tuple(name for stacked in stacks for name in stacked.names)
    return Fused(names, *fusion.fuse_stacked(hidden_states, stacks, features))


def adapter_update(
    adapter: Adapter | LoRA, hidden_states: torch.Tensor, residual: torch.Tensor | float
) -> torch.Tensor:
    """What an adapter adds to the residual, or LoRA to the output of a projection, without its dropout.

    Args:
        adapter: The adapter's module.
        hidden_states: Its input, (batch, seq_len, hidden).
        residual: The residual, which an adapter may normalise together with its update, (batch, seq_len, hidden).

    Returns:
        The update, (batch, seq_len, hidden), in the data type of the input.
    """
    dtype = hidden_states.dtype
    hidden_states = hidden_states.to(next(adapter.parameters()).dtype)
    if isinstance(adapter, LoRA):
        return (hidden_states @ adapter.lora_A.T @ adapter.lora_B.T * adapter.scaling).to(dtype)
    update = adapter.adapter_up(adapter.adapter_down(hidden_states)) * adapter.scaling  # (B, T, d)
    if adapter.use_gating:
        update = update * adapter.gate(hidden_states).sigmoid().mean(dim=1, keepdim=True)
    if adapter.add_layer_norm_after:
        if adapter.adapter_residual_before_ln and not isinstance(adapter, ParallelAdapter):
            update = adapter.adapter_norm_after(update + residual) - residual
        else:
            update = adapter.adapter_norm_after(update)
    return update.to(dtype)
