"""What a layer of adapters computes for an `AdapterDistillation` block, and how a pass gathers its losses."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from adapters import AdapterSetup, ModelAdaptersMixin
from torch import nn

from ._compat import (
    Adapter,
    BottleneckLayer,
    BottleneckState,
    ForwardContext,
    LoRA,
    LoRALinear,
    LoRAState,
    ParallelAdapter,
)
from .composition import AdapterDistillation, find_block
from .fusion import TeacherFusion
from .losses import feature_matching_loss, logit_matching_loss, token_weights, value_regularization
from .regression import UpProjectionFit
from .stacked import can_be_stacked, ends_in_up_projection, input_kind, stack
from .state import Distillation, DistillationRecord, TeacherAttention, distillations


class DistillationPass:
    """Gathers the terms of one forward pass; hangs on adapters' `ForwardContext` while it runs.

    Args:
        distillation: The student's distillation.
        masks: The attention mask of the encoder (or the only stack of layers) and that of the decoder, (batch,
            seq_len) each, None where all tokens count.
        training: Whether the losses are wanted, or the attention alone.
        part: `"fused"` or `"student"` in the two passes of the carrier `dual`, which are matched after the second.
    """

    def __init__(
        self, distillation: Distillation, masks: dict[bool, torch.Tensor | None], training: bool, part: str = ""
    ) -> None:
        self.distillation = distillation
        self.masks = masks
        self.training = training
        self.part = part
        self.fusions: dict[str, TeacherFusion] = {}
        self.losses: list[torch.Tensor] = []
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.attention: dict[str, TeacherAttention] = {}
        self.logit_loss: torch.Tensor | float = 0.0
        self.fused_task_loss: torch.Tensor | None = None
        self._weights: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def weights(self, fusion: TeacherFusion, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of the tokens in means that leave out padding, made once for all layers of a stack.

        Args:
            fusion: The fusion of the layer.
            hidden_states: The states of the layer, (batch, seq_len, hidden).

        Returns:
            The weights in the mean over each sequence, and in the mean over the batch, (batch, seq_len) each.
        """
        batch, seq_len = hidden_states.shape[:2]
        made = self._weights.get(fusion.in_decoder)
        if made is None or made[0].shape != (batch, seq_len) or made[0].device != hidden_states.device:
            mask = self.masks[fusion.in_decoder]
            if mask is not None:
                mask = mask.reshape(-1, mask.shape[-1])  # multiple choice: (B, C, T)
            if mask is None or mask.shape != (batch, seq_len):
                mask = torch.ones(batch, seq_len)
            mask = mask.to(hidden_states.device, torch.promote_types(hidden_states.dtype, torch.float32))
            made = self._weights[fusion.in_decoder] = token_weights(mask), mask / mask.sum().clamp(min=1)
        return made

    def draw(self, device: torch.device) -> bool | torch.Tensor:
        """Whether a layer passes on the fused output; for the carrier `mixed` each layer draws anew.

        Compiled code cannot branch on what was drawn: there the draw is a tensor, and both outputs are computed.
        """
        carrier = self.part or self.distillation.config.carrier
        if not self.training or carrier != "mixed":
            return self.training and carrier == "fused"
        if torch.compiler.is_compiling():
            return torch.rand((), device=device) < self.distillation.fused_probability
        return bool(torch.rand(()) < self.distillation.fused_probability)


FusedLayer: TypeAlias = BottleneckLayer | LoRALinear  # what can hold teachers and a student, and fuse them


def adapter_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, FusedLayer]]:
    """The layers of the base model that hold an adapter and can fuse it, with their names."""
    modules = model.base_model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, FusedLayer) and adapter in m.adapter_modules]


def current_pass() -> DistillationPass | None:
    """The pass that the running forward belongs to, or None if it does not distil."""
    context = ForwardContext.get_context()
    return None if context is None else vars(context).get("distillation_pass")


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
    fusions = layer._modules.get("distillation_fusion", {})
    if current is None or block.student not in fusions:
        return layer.compose_stack(block, state, lvl)
    fusion = fusions[block.student]
    current.fusions[fusion.location] = fusion
    distillation = current.distillation
    if not (distillation.enabled or distillation.in_evaluation):
        return layer.compose_stack(block, state, lvl)

    for below in block.children[:-1]:
        if below in layer.adapter_modules:
            state = layer.compose_single(below, layer.pre_block(below, state), lvl + 1)
    student = layer.adapter_modules[block.student]
    prepared = layer.pre_block(block.student, state)
    student_input = _input_of(student, prepared)
    student_state = layer.compose_single(block.student, prepared, lvl + 1)
    student_output = _student_output(student, student_input, student_state)  # (B, T, d)
    sequence_weights, batch_weights = current.weights(fusion, student_output)
    if distillation.fits is not None:
        teachers = [layer.adapter_modules[name] for name in block.teachers]  # of the student's config
        updates = [adapter_update(teacher, *student_input) for teacher in teachers]
        update = torch.stack(updates).mean(dim=0)  # (B, T, d)
        fit = distillation.fits.setdefault(fusion.location, UpProjectionFit())
        fit.add(student.adapter_down(student_input.hidden_states), update / student.scaling, sequence_weights)
        return student_state._replace(hidden_states=student_input.residual + update)
    # What gradient checkpointing appends again in backward, here and below, comes after the sum.
    if current.part == "student":
        current.outputs.append((student_output, sequence_weights))
        return student_state

    passes_fused = current.draw(student_output.device)
    # The carrier "student" leaves the task loss to the student: its fusion explains the student and steers nothing.
    matched_only = distillation.config.carrier == "student" or not current.training
    if matched_only:
        student_input = student_input.detach()
    names, fused_output, attention = _fuse(layer, block, fusion, state, student_input, without_student=matched_only)

    mean_attention = torch.einsum("bt,btn->n", batch_weights, attention.to(batch_weights.dtype))
    current.attention[fusion.location] = TeacherAttention(names, mean_attention)
    target = fused_output if matched_only else fused_output.detach()
    if current.part == "fused":
        current.outputs.append((target, sequence_weights))
    else:
        current.losses.append(feature_matching_loss(student_output, target, sequence_weights))
    if passes_fused is False:
        return student_state
    passed_on = student_input.residual + fused_output  # (B, T, d)
    if passes_fused is not True:
        passed_on = torch.where(passes_fused, passed_on, student_state.hidden_states)
    return student_state._replace(hidden_states=passed_on)


def _student_output(student: Adapter | LoRA, own: _Input, after: BottleneckState | LoRAState) -> torch.Tensor:
    """The student's update without its dropout; what it computed already, where that is the same."""
    if isinstance(after, LoRAState):
        return adapter_update(student, *own) if isinstance(student.lora_dropout, nn.Dropout) else after.hidden_states
    if ends_in_up_projection(student) and not hasattr(student, "DropPath"):
        return after.bottleneck_up
    return adapter_update(student, *own)


def _fuse(
    layer: FusedLayer,
    block: AdapterDistillation,
    fusion: TeacherFusion,
    state: BottleneckState | LoRAState,
    student_input: _Input,
    without_student: bool,
) -> tuple[tuple[str, ...], torch.Tensor, torch.Tensor]:
    """Fuses the teachers of a layer, and the student with them if asked for.

    Returns:
        The names of what is fused, the fused output, (batch, seq_len, hidden), and the attention, (batch, seq_len, n).
    """
    modules, hidden_states = layer.adapter_modules, student_input.hidden_states
    student = modules[block.student]
    teachers = {name: modules[name] for name in block.teachers if name in modules}
    joining = {} if without_student else {block.student: student}
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    stacks = fusion.cache.get(teachers, layer.adapters_config, dtype)

    def own_input(name: str) -> _Input:
        """The student's input, or what an adapter of another kind makes of the state in its own way."""
        if input_kind(modules[name]) == input_kind(student):
            return student_input
        own = _input_of(modules[name], layer.pre_block(name, state))
        return own if hidden_states.requires_grad else own.detach()

    if stacks is None or not all(can_be_stacked(adapter) for adapter in joining.values()):
        adapters = teachers | joining
        updates = [adapter_update(adapter, *own_input(name)) for name, adapter in adapters.items()]
        return tuple(adapters), *fusion(hidden_states, torch.stack(updates, dim=2))
    if joining:
        stacks = [*stacks, stack(joining)]
    features = [stacked.features(own_input(stacked.names[0]).hidden_states) for stacked in stacks]
    return tuple(name for s in stacks for name in s.names), *fusion.fuse_stacked(hidden_states, stacks, features)


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


def call_with_distillation(
    context: ForwardContext,
    original: Callable,
    model: ModelAdaptersMixin,
    forward: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs a model's forward and folds what the layers gathered into the loss of its output.

    Evaluation, and training of anything but a distillation block, runs the original and nothing else.

    Args:
        context: The forward context of adapters.
        original: adapters' own `ForwardContext._call_forward`.
        model: The model that is called.
        forward: Its forward function.
        *args: The arguments of forward.
        **kwargs: The keyword arguments of forward.

    Returns:
        The output of the model; its loss, if it has one, includes the distillation terms.
    """
    block = find_block(AdapterSetup.get_context_adapter_setup() or model.adapters_config.active_setup)
    distillation = distillations(model.adapters_config).get(block.student) if block is not None else None
    training = model.training and torch.is_grad_enabled()
    if distillation is None or not (training or distillation.in_evaluation):
        return original(context, model, forward, *args, **kwargs)

    masks = _masks(args, kwargs)

    def run(context: ForwardContext, part: str) -> tuple[DistillationPass, Any]:
        current = vars(context)["distillation_pass"] = DistillationPass(distillation, masks, training, part)
        if shared := model.base_model.shared_parameters:
            vars(context)["shared_parameters"] = dict(shared)  # the teachers', too
        return current, original(context, model, forward, *args, **kwargs)

    if training and distillation.enabled and distillation.config.carrier == "dual":
        with type(context)(model, *args, **kwargs) as fused_context:
            fused, fused_output = run(fused_context, "fused")
        current, output = run(context, "student")
        _match(current, output, fused, fused_output)
    else:
        current, output = run(context, "")
    distillation.record = _fold(current, output)
    return output


def _match(current: DistillationPass, output: Any, fused: DistillationPass, fused_output: Any) -> None:
    """Gathers the terms of the carrier `dual` in the student's pass: each layer's output, logits and both task losses.

    Raises:
        ValueError: If the outputs have no loss, which the fusion would have to learn from.
    """
    if not isinstance(output, dict) or output.get("loss") is None:
        raise ValueError(
            "The carrier 'dual' needs the loss of the model's output; pass labels, or choose the carrier 'mixed'."
        )
    pairs = zip(current.outputs, fused.outputs, strict=True)
    current.losses = [feature_matching_loss(student, target, weights) for (student, weights), (target, _) in pairs]
    logits = [name for name in output if name.endswith("logits")]
    current.logit_loss = sum(logit_matching_loss(output[name], fused_output[name]) for name in logits)
    current.fused_task_loss = fused_output["loss"]
    current.fusions, current.attention = fused.fusions, fused.attention


def _masks(args: tuple, kwargs: dict[str, Any]) -> dict[bool, torch.Tensor | None]:
    """The padding masks by `TeacherFusion.in_decoder`."""
    decoder = kwargs.get("decoder_attention_mask")
    labels = kwargs.get("labels")
    if decoder is None and labels is not None and labels.dim() == 2:
        decoder = labels != -100  # the decoder's inputs are the shifted labels
    return {False: kwargs.get("attention_mask", args[1] if len(args) > 1 else None), True: decoder}


def _fold(current: DistillationPass, output: Any) -> DistillationRecord:
    """Adds the gathered terms to the loss of the output, if it has one."""
    if not current.training:
        return DistillationRecord(torch.zeros(()), False, None, None, None, current.attention)
    distillation, fusions = current.distillation, current.fusions.values()
    added = torch.zeros(())
    if not current.losses or distillation.config.carrier == "mixed":
        # Each parameter of the fusion stays in the graph of each step, or DistributedDataParallel waits for it.
        added = sum((parameter.sum() * 0.0 for fusion in fusions for parameter in fusion.parameters()), added)
    distillation_loss = regularization = layer_losses = None
    if current.losses:
        layer_losses = torch.stack(current.losses)
        distillation_loss, layer_losses = layer_losses.mean() + current.logit_loss, layer_losses.detach()
        regularization = distillation.regularization * value_regularization(f.value.weight for f in fusions)
        added = added + distillation.scale * (distillation.weight * distillation_loss + regularization)
        distillation_loss, regularization = distillation_loss.detach(), regularization.detach()
    fused_task_loss = current.fused_task_loss
    if fused_task_loss is not None:
        added = added + fused_task_loss
        fused_task_loss = fused_task_loss.detach()
    in_loss = isinstance(output, dict) and output.get("loss") is not None
    if in_loss:
        output["loss"] = output["loss"] + added
        added = added.detach()
    elif isinstance(output, dict):
        # DistributedDataParallel takes parameters that no output depends on for unused.
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                output[name] = value + 0.0 * added
                break
    terms = (distillation_loss, regularization, fused_task_loss)
    return DistillationRecord(added, in_loss, *terms, current.attention, layer_losses)
