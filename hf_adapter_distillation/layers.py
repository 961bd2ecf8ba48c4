"""What a bottleneck layer computes for an `AdapterDistillation` block, and how a forward pass gathers its losses."""

from collections.abc import Callable
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin

from ._compat import Adapter, BottleneckLayer, BottleneckState, ForwardContext
from .composition import AdapterDistillation, find_block
from .fusion import TeacherFusion
from .losses import feature_matching_loss, value_regularization
from .state import Distillation, DistillationRecord, distillations


class DistillationPass:
    """Gathers the terms of one forward pass; hangs on adapters' `ForwardContext` while it runs.

    Args:
        distillation: The student's distillation.
        masks: The attention mask of the encoder (or the only stack of layers) and that of the decoder, (batch,
            seq_len) each, None where all tokens count.
        training: Whether the losses are wanted, or the attention alone.
    """

    def __init__(self, distillation: Distillation, masks: dict[bool, torch.Tensor | None], training: bool) -> None:
        self.distillation = distillation
        self.masks = masks
        self.training = training
        self.fusions: dict[str, TeacherFusion] = {}
        self.losses: list[torch.Tensor] = []
        self.attention: dict[str, dict[str, torch.Tensor]] = {}

    def draw_carrier(self) -> str:
        """What a layer passes on, "student" or "fused"; for the carrier `mixed` each layer draws anew."""
        carrier = self.distillation.config.carrier if self.training else "student"
        if carrier == "mixed":
            return "fused" if torch.rand(()) < self.distillation.fused_probability else "student"
        return carrier

    def mask(self, fusion: TeacherFusion, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The mask of the tokens that count, (batch, seq_len), or None if all do."""
        mask = self.masks[fusion.in_decoder]
        if mask is None:
            return None
        mask = mask.reshape(-1, mask.shape[-1])  # multiple choice: (B, C, T)
        return mask if mask.shape == hidden_states.shape[:2] else None

    def add(self, fusion: TeacherFusion, loss: torch.Tensor, attention: dict[str, torch.Tensor]) -> None:
        """Takes the terms of one location. What gradient checkpointing adds again in backward comes after the sum."""
        self.losses.append(loss)
        self.attention[fusion.location] = attention


def bottleneck_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, BottleneckLayer]]:
    """The bottleneck layers of the base model that hold an adapter, with their names."""
    modules = model.base_model.named_modules()
    return [(name, m) for name, m in modules if isinstance(m, BottleneckLayer) and adapter in m.adapters]


def current_pass() -> DistillationPass | None:
    """The pass that the running forward belongs to, or None if it does not distil."""
    context = ForwardContext.get_context()
    return None if context is None else vars(context).get("distillation_pass")


def compose_distillation(
    layer: BottleneckLayer, block: AdapterDistillation, state: BottleneckState, lvl: int = 0
) -> BottleneckState:
    """Runs the student, and in stage 2 the teachers beside it.

    Args:
        layer: The bottleneck layer.
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
    if not (current.distillation.enabled or current.distillation.observing):
        return layer.compose_stack(block, state, lvl)

    for below in block.children[:-1]:
        if below in layer.adapters:
            state = layer.compose_single(below, layer.pre_block(below, state), lvl + 1)
    student_input = layer.pre_block(block.student, state)
    student_state = layer.compose_single(block.student, student_input, lvl + 1)
    student_output = student_state.bottleneck_up  # (B, T, d), what the adapter adds to the residual

    carrier = current.draw_carrier()
    # The carrier "student" leaves the task loss to the student: its fusion explains the student and steers nothing.
    matched_only = current.distillation.config.carrier == "student" or not current.training
    hidden_states = student_input.hidden_states.detach() if matched_only else student_input.hidden_states  # (B, T, d)
    names = [teacher for teacher in block.teachers if teacher in layer.adapters]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not matched_only):
        updates = [
            teacher_update(layer.adapters[name], layer.adapters[block.student], state, hidden_states) for name in names
        ]
    if not matched_only:
        names, updates = [*names, block.student], [*updates, student_output]
    fused_output, attention = fusion(hidden_states, torch.stack(updates, dim=2))  # (B, T, d), (B, T, N)

    mask = current.mask(fusion, hidden_states)
    target = fused_output if matched_only else fused_output.detach()
    loss = feature_matching_loss(student_output, target, mask)
    current.add(fusion, loss, dict(zip(names, _token_mean(attention, mask), strict=True)))
    if carrier == "student":
        return student_state
    return student_state._replace(hidden_states=student_input.adapter_residual + fused_output)


def _token_mean(attention: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return attention.mean(dim=(0, 1))  # (N,)
    mask = mask.to(attention.dtype).unsqueeze(-1)  # (B, T, 1)
    return (attention * mask).sum(dim=(0, 1)) / mask.sum().clamp(min=1)  # (N,)


def teacher_update(
    teacher: Adapter, student: Adapter, state: BottleneckState, hidden_states: torch.Tensor
) -> torch.Tensor:
    """What a frozen teacher adds to the residual at this location.

    Args:
        teacher: The teacher's module.
        student: The student's module.
        state: The state before the student, which a teacher of another kind prepares in its own way.
        hidden_states: The student's prepared input, (batch, seq_len, hidden).

    Returns:
        The update, (batch, seq_len, hidden), without the teacher's dropout.
    """
    if teacher.original_ln_before != student.original_ln_before:
        hidden_states, _, _ = teacher.pre_forward(state.hidden_states, state.input_tensor, state.layer_norm)
    return teacher.adapter_up(teacher.adapter_down(hidden_states)) * teacher.scaling  # (B, T, d)


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
    if distillation is None or not (training or distillation.observing):
        return original(context, model, forward, *args, **kwargs)

    current = DistillationPass(distillation, _masks(args, kwargs), training)
    vars(context)["distillation_pass"] = current
    output = original(context, model, forward, *args, **kwargs)
    distillation.record = _fold(current, output)
    return output


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
        return DistillationRecord(torch.zeros(()), False, None, None, current.attention)
    distillation, fusions = current.distillation, current.fusions.values()
    added = torch.zeros(())
    if not current.losses or distillation.config.carrier == "mixed":
        # Each parameter of the fusion stays in the graph of each step, or DistributedDataParallel waits for it.
        added = sum((parameter.sum() * 0.0 for fusion in fusions for parameter in fusion.parameters()), added)
    distillation_loss = regularization = None
    if current.losses:
        distillation_loss = torch.stack(current.losses).mean()
        regularization = distillation.regularization * value_regularization(f.value.weight for f in fusions)
        added = added + distillation.scale * (distillation.weight * distillation_loss + regularization)
        distillation_loss, regularization = distillation_loss.detach(), regularization.detach()
    in_loss = isinstance(output, dict) and output.get("loss") is not None
    if in_loss:
        output["loss"] = output["loss"] + added
        added = added.detach()
    return DistillationRecord(added, in_loss, distillation_loss, regularization, current.attention)
