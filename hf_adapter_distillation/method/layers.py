"""The layers that hold adapters: the student runs in them, and its teachers beside it."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from .._compat import (
    Adapter,
    AdapterLayerBase,
    BottleneckLayer,
    BottleneckState,
    LoRA,
    LoRALinear,
    LoRAMergedLinear,
    LoRAState,
    ParallelAdapter,
)
from ..composition import AdapterDistillation
from .chunked_attention import Chunk
from .fusion import fusions_at
from .layer_pass import Fused, LowRankFused, Place, Weigh, current_pass, warn_outside_of_passes
from .losses import at_least_float32
from .low_rank import LowRankUpdates, is_cheaper, keeps_digits
from .stacking import (
    can_be_stacked,
    coefficients,
    ends_in_up_projection,
    group_alike,
    input_kind,
    mix_stacked,
    number_of_columns,
    split_group,
    stack,
    stack_frozen,
)

FusedLayer: TypeAlias = BottleneckLayer | LoRALinear  # the layers that can hold teachers and a student, and fuse them
Holder: TypeAlias = FusedLayer | LoRAMergedLinear


def adapter_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, FusedLayer]]:
    """Return the layers of the base model that hold an adapter and can fuse it, with their names."""
    layers: dict[FusedLayer, str] = {}  # a layer that stands in several places has the name of the first
    for name, layer in _holders(model.base_model):
        if isinstance(layer, FusedLayer) and adapter in layer.adapter_modules:
            layers.setdefault(layer, name)
    return [(name, layer) for layer, name in layers.items()]


def with_merged_lora(model: ModelAdaptersMixin) -> set[str]:
    """Return the adapters with LoRA in projections that compute query, key and value at once, which are not fused."""
    projections = (layer for _, layer in _holders(model.base_model) if isinstance(layer, LoRAMergedLinear))
    return {name for projection in projections for name in projection.adapter_modules}


def _holders(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Holder]]:
    """Yield the layers that hold adapters; the walk leaves out the adapters, which may be hundreds in each."""
    adapters = module.adapter_modules if isinstance(module, Holder) else None
    for name, child in module.named_children():
        if child is adapters:
            continue
        if isinstance(child, Holder):
            yield prefix + name, child
        yield from _holders(child, f"{prefix}{name}.")


def adapters_of(model: ModelAdaptersMixin, names: Iterable[str]) -> dict[str, dict[int, dict[str, nn.Module]]]:
    """Return what `model.get_adapter` returns, for several adapters by one walk over the model.

    The result of each adapter has its modules by the number of the layer, -1 for those outside, and their location.
    """
    base = model.base_model
    layers = [
        (number, module)
        for number, (_, layer) in enumerate(base.iter_layers())
        for module in layer.modules()
        if isinstance(module, AdapterLayerBase)
    ]
    found: dict[str, dict[int, dict[str, nn.Module]]] = {}
    invertible = getattr(base, "invertible_adapters", {})
    for name in names:
        prompt = base.prompt_tuning.get_adapter(name) if hasattr(base, "prompt_tuning") else None
        outside = {"shared": base.shared_parameters[name]} if name in base.shared_parameters else {}
        outside |= {"invertible": invertible[name]} if name in invertible else {}
        outside |= {} if prompt is None else {"prompt": prompt}
        modules = found[name] = {-1: outside} if outside else {}
        for number, layer in layers:
            if (module := layer.get_adapter(name)) is not None:
                of_layer = modules.setdefault(number, {})
                other = of_layer.get(layer.location_key)  # such as that of another projection
                others = other if isinstance(other, nn.ModuleList) else [] if other is None else [other]
                of_layer[layer.location_key] = nn.ModuleList([*others, module]) if others else module
    return found


def compose_distillation(
    layer: FusedLayer, block: AdapterDistillation, state: BottleneckState | LoRAState, lvl: int = 0
) -> BottleneckState | LoRAState:
    """Run the student, and offer the layer to the current pass, which may run the teachers beside it.

    The state has `hidden_states` (batch, seq_len, hidden); `lvl` is the depth of the block in the setup.
    """
    current, fusions = current_pass(), fusions_at(layer)
    if current is None and block.student in fusions:
        warn_outside_of_passes(block.student, layer)
    if current is None or block.student not in fusions or not current.visit(fusions[block.student]):
        return layer.compose_stack(block, state, lvl)

    for below in block.children[:-1]:
        if below in layer.adapter_modules:
            state = layer.compose_single(below, layer.pre_block(below, state), lvl + 1)
    prepared = layer.pre_block(block.student, state)
    student_input = _input_of(layer.adapter_modules[block.student], prepared)
    student_state = layer.compose_single(block.student, prepared, lvl + 1)
    place = AdapterPlace(layer, block, state, student_input, student_state, in_graph=current.keeps_graph)
    passed_on = current.run_layer(place)  # (B, T, d)
    return student_state if passed_on is None else student_state._replace(hidden_states=passed_on)


class AdapterInput(NamedTuple):
    """Input of an adapter, and what its update is added to, (batch, seq_len, hidden) each; 0 where that is later."""

    hidden_states: torch.Tensor
    residual: torch.Tensor | float

    def detach(self) -> "AdapterInput":
        """Return the input without a graph."""
        residual = self.residual.detach() if isinstance(self.residual, torch.Tensor) else self.residual
        return AdapterInput(self.hidden_states.detach(), residual)


def _input_of(adapter: Adapter | LoRA, state: BottleneckState | LoRAState) -> AdapterInput:
    """Return the input of an adapter in a state that its layer has prepared for it (`pre_block`)."""
    if isinstance(state, LoRAState):
        return AdapterInput(state.layer_input if state.hidden_states is None else state.hidden_states, 0.0)
    # A parallel adapter's update is added to the block's output later, with the other residual.
    return AdapterInput(state.hidden_states, 0.0 if isinstance(adapter, ParallelAdapter) else state.adapter_residual)


class AdapterPlace(Place):
    """Bottleneck layer, or projection with LoRA, in which the student has just run."""

    def __init__(
        self,
        layer: FusedLayer,
        block: AdapterDistillation,
        state: BottleneckState | LoRAState,
        student_input: AdapterInput,
        student_state: BottleneckState | LoRAState,
        in_graph: bool,
    ) -> None:
        self.layer = layer
        self.block = block
        self.state = state  # before the student, from which adapters of another kind take their input
        self.student = layer.adapter_modules[block.student]
        self.student_state, self.graph_input = student_state, student_input
        self.student_input = student_input if in_graph else student_input.detach()
        super().__init__(
            fusions_at(layer)[block.student],
            self.student_input.hidden_states,
            self.student_input.residual,
            student_state.hidden_states,
        )

    def student_update(self) -> torch.Tensor:
        """Return the student's update without its dropout; where there is none, the layer has computed it already."""
        student, after = self.student, self.student_state
        if isinstance(after, LoRAState):
            has_dropout = isinstance(student.lora_dropout, nn.Dropout)
            return adapter_update(student, *self.graph_input) if has_dropout else after.hidden_states
        if ends_in_up_projection(student) and not hasattr(student, "DropPath"):
            return after.bottleneck_up
        return adapter_update(student, *self.graph_input)

    def _adapters(self, with_student: bool) -> dict[str, Adapter | LoRA]:
        modules = self.layer.adapter_modules
        teachers = {name: modules[name] for name in self.block.teachers if name in modules}
        return teachers | {self.block.student: self.student} if with_student else teachers

    def adapter_input(self, name: str) -> AdapterInput:
        """Return the student's input, or what an adapter of another kind reads of the state."""
        adapter = self.layer.adapter_modules[name]
        if input_kind(adapter) == input_kind(self.student):
            return self.student_input
        adapter_input = _input_of(adapter, self.layer.pre_block(name, self.state))
        return adapter_input if self.query_states.requires_grad else adapter_input.detach()

    def updates(self, with_student: bool = False) -> dict[str, torch.Tensor]:
        """Compute the updates one by one, (batch, seq_len, hidden) each."""
        adapters = self._adapters(with_student).items()
        return {name: adapter_update(adapter, *self.adapter_input(name)) for name, adapter in adapters}

    @property
    def _dtype(self) -> torch.dtype:
        device = self.query_states.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.query_states.dtype

    def _input_of(self, adapters: Iterable[str]) -> torch.Tensor:
        """Return what adapters that are alike read, (batch, seq_len, hidden)."""
        return self.adapter_input(next(iter(adapters))).hidden_states

    def mix(self, weigh: Weigh) -> torch.Tensor:
        """Sum from the bottleneck features of stacked adapters, or with one update in memory at a time.

        The backward pass of many adapters computes their features again, a few at a time.
        """
        adapters, dtype = self._adapters(False), self.query_states.dtype
        weights = weigh(tuple(adapters)).to(self.query_states.device, at_least_float32(dtype))  # (n,)
        of_names = dict(zip(adapters, weights, strict=True))
        mixed = torch.zeros((), dtype=weights.dtype, device=weights.device)
        groups = group_alike(adapters, self.layer.adapters_config)
        if groups is None:
            for name, adapter in adapters.items():
                mixed = mixed + of_names[name] * adapter_update(adapter, *self.adapter_input(name)).to(mixed.dtype)
            return mixed.to(dtype)
        chunks = [chunk for group in groups for chunk in split_group(group)]
        for chunk in chunks:
            mix_chunk = partial(mix_stacked, chunk, self._dtype)
            if len(chunks) > len(groups):  # many teachers, whose features would take most of the memory
                mix_chunk = partial(checkpoint, mix_chunk, use_reentrant=False, preserve_rng_state=False)
            mixed = mixed + mix_chunk(self._input_of(chunk), torch.stack([of_names[name] for name in chunk]))
        return mixed.to(dtype)

    def low_rank(self) -> LowRankFused | None:
        """Take the up-projections of stacked adapters as columns.

        A value matrix is trained, so that its products with them would cost more in the backward pass than they save.
        """
        if self.fusion.value is not None or not can_be_stacked(self.student):
            return None
        groups = group_alike(self._adapters(False), self.layer.adapters_config)
        own = {self.block.student: self.student}
        batch, seq_len, input_size = self.query_states.shape
        sizes = input_size, self.fusion.key.weight.shape[1], batch * seq_len
        if not groups or not is_cheaper(sum(map(number_of_columns, groups)), number_of_columns(own), *sizes):
            return None
        if not keeps_digits(self.query_states.device):
            return None
        stacks, student = [stack_frozen(group, self._dtype) for group in groups], stack(own)
        features = [stacked.features(self._input_of(stacked.names)) for stacked in stacks]
        attention = self.fusion.attend_stacked(self.query_states, stacks, features)
        student_features = student.features(self.graph_input.hidden_states)
        updates = LowRankUpdates(
            student_columns=student.up,
            student_coefficients=coefficients(torch.ones_like(student_features[..., 0]), student_features),
            # A single stack is not copied.
            teacher_columns=stacks[0].up if len(stacks) == 1 else torch.cat([each.up for each in stacks], dim=-1),
            fused_coefficients=self.fusion.coefficients_of(attention, stacks, features),
        )
        return LowRankFused(tuple(name for each in stacks for name in each.names), updates, attention.detach())

    def fuse(self, with_student: bool = False) -> Fused:
        """Fuse from the bottleneck features of stacked adapters, or one by one where an adapter cannot be stacked."""
        groups = group_alike(self._adapters(False), self.layer.adapters_config)
        if not groups or (with_student and not can_be_stacked(self.student)):
            return super().fuse(with_student)
        chunks: list[Chunk] = [chunk for group in groups for chunk in split_group(group)]
        is_detached = not (with_student or self.query_states.requires_grad or torch.compiler.is_compiling())
        if is_detached and len(chunks) > len(groups):  # many teachers
            names = tuple(name for chunk in chunks for name in chunk)
            inputs = [self._input_of(chunk) for chunk in chunks]
            return Fused(names, *self.fusion.fuse_chunks(self.query_states, chunks, inputs, self._dtype))
        stacks = [stack_frozen(group, self._dtype) for group in groups]
        if with_student:
            stacks.append(stack({self.block.student: self.student}))
        names = tuple(name for stacked in stacks for name in stacked.names)
        features = [stacked.features(self._input_of(stacked.names)) for stacked in stacks]
        return Fused(names, *self.fusion.fuse_stacked(self.query_states, stacks, features))


def adapter_update(
    adapter: Adapter | LoRA, hidden_states: torch.Tensor, residual: torch.Tensor | float
) -> torch.Tensor:
    """Compute the addition of an adapter to the residual, or of LoRA to the output of a projection, without dropout.

    An adapter may normalise its update together with the residual. Input, residual and update are (batch, seq_len,
    hidden), the update in the data type of the input.
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
