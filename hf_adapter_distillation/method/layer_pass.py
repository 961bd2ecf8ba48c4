"""A forward pass of a distilled student: what its layers gather, and how it joins the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack

from .._compat import ForwardContext, forward_arguments
from ..composition import AdapterDistillation, join_block
from .distillation import Distillation, Observation, TeacherAttention, distillations
from .forward import fold, match_passes, match_predictions
from .fusion import TeacherFusion
from .heads import check_objectives
from .losses import CosineLoss, FeatureLoss, token_weights
from .predictions import teacher_logits

LAYER_LOSSES = {"features": FeatureLoss(), "cosine": CosineLoss()}  # those without weights of their own


class Fused(NamedTuple):
    """What the fusion of a layer puts out.

    Args:
        names: What was fused: the teachers, and with the carriers that pass it on the student.
        output: The fused update, (batch, seq_len, hidden).
        attention: The attention over them, detached, (batch, seq_len, n).
    """

    names: tuple[str, ...]
    output: torch.Tensor
    attention: torch.Tensor


class Rerun(NamedTuple):
    """The setup and the context in which a layer is run again.

    Args:
        setup: The adapters that are active then.
        context: A forward context made for them.
    """

    setup: AdapterSetup
    context: ForwardContext


class DistillationPass:
    """Gathers the terms of one forward pass; hangs on adapters' `ForwardContext` while it runs.

    Args:
        block: The active distillation block.
        distillation: The student's distillation.
        masks: The attention mask of the encoder (or the only stack of layers) and that of the decoder, (batch,
            seq_len) each, None where all tokens count.
        training: Whether the losses are wanted, or the attention alone.
        part: `"fused"` or `"student"` in the two passes of the carrier `dual`, which are matched after the second.
        labels: The labels of the batch, if there are any.
        reruns: Where whole layers are fused, how they are run again: by the name of each adapter, and of none.
    """

    def __init__(
        self,
        block: AdapterDistillation,
        distillation: Distillation,
        masks: dict[bool, torch.Tensor | None],
        training: bool,
        part: str = "",
        labels: torch.Tensor | None = None,
        reruns: dict[str | None, Rerun] | None = None,
    ) -> None:
        self.block = block
        self.distillation = distillation
        self.masks = masks
        self.training = training
        self.part = part
        self.labels = labels
        self.reruns = reruns or {}
        self.fusions: dict[str, TeacherFusion] = {}
        self.losses: list[dict[str, torch.Tensor]] = []
        self.outputs: list[tuple[TeacherFusion, torch.Tensor]] = []
        self.output_losses: dict[str, torch.Tensor] = {}
        self.probe_losses: list[torch.Tensor] = []
        self.ratios: list[torch.Tensor] = []
        self.attention: dict[str, TeacherAttention] = {}
        self.observed: dict[str, Observation] = {}
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
            if mask is not None and mask.dim() == 3:  # multiple choice: (B, C, T)
                mask = mask.reshape(-1, mask.shape[-1])
            if mask is None or mask.shape != (batch, seq_len):  # (B, 1, T, T) says who sees whom, not what is padding
                mask = torch.ones(batch, seq_len)
            mask = (mask != 0).to(hidden_states.device, torch.promote_types(hidden_states.dtype, torch.float32))
            made = self._weights[fusion.in_decoder] = token_weights(mask), mask / mask.sum().clamp(min=1)
        return made

    @property
    def matched_only(self) -> bool:
        """Whether the fused output is matched and never passed on.

        The carrier `student` leaves the task loss to the student: its fusion explains the student and steers nothing.
        """
        return self.distillation.config.carrier == "student" or not self.training

    @property
    def passes_student_on(self) -> bool:
        """Whether each layer passes on the student's output, whatever is fused beside it."""
        return self.matched_only and (self.training or self.distillation.observing != "fused")

    def fuse(
        self,
        fusion: TeacherFusion,
        hidden_states: torch.Tensor,
        updates: dict[str, torch.Tensor],
        without: torch.Tensor,
    ) -> Fused:
        """Fuses updates that were computed one by one, and notes which are not finite where that is asked.

        Args:
            fusion: The fusion of the layer.
            hidden_states: What the fusion asks with, (batch, seq_len, hidden).
            updates: The update of each adapter, (batch, seq_len, hidden).
            without: What is there without them; if that is not finite, it is no fault of theirs.

        Returns:
            The fused output with its attention.
        """
        if self.distillation.overflows is not None and without.isfinite().all():
            names = [name for name in self.block.teachers if name in updates and not updates[name].isfinite().all()]
            if names:
                self.distillation.overflows.setdefault(fusion.location, names)
        return Fused(tuple(updates), *fusion(hidden_states, torch.stack(list(updates.values()), dim=2)))

    def gather(self, fusion: TeacherFusion, student_output: torch.Tensor, fused: Fused | None) -> None:
        """Takes in what is matched in one layer.

        Args:
            fusion: The fusion of the layer.
            student_output: The student's update, (batch, seq_len, hidden).
            fused: The teachers' fused update; None in the student's pass of the carrier `dual`.
        """
        # What gradient checkpointing appends again in backward comes after the sum.
        if fused is None:
            self.outputs.append((fusion, student_output))
            return
        sequence_weights, batch_weights = self.weights(fusion, student_output)
        if self.distillation.observing:
            counted = sequence_weights.any(dim=1)  # (B,)
            attention = torch.einsum("bt,btn->bn", sequence_weights, fused.attention.to(sequence_weights.dtype))
            distance = FeatureLoss.of_sequences(student_output, fused.output, sequence_weights)  # (B,)
            self.observed[fusion.location] = Observation(fused.names, attention[counted], distance[counted])
            return
        mean_attention = torch.einsum("bt,btn->n", batch_weights, fused.attention.to(batch_weights.dtype))
        self.attention[fusion.location] = TeacherAttention(fused.names, mean_attention)
        target = fused.output if self.matched_only else fused.output.detach()
        if self.part == "fused":
            self.outputs.append((fusion, target))
        else:
            self.match(fusion, student_output, target)

    def match(self, fusion: TeacherFusion, student_output: torch.Tensor, target: torch.Tensor) -> None:
        """Computes the objectives of one layer.

        Args:
            fusion: The fusion of the layer.
            student_output: The student's update, (batch, seq_len, hidden).
            target: The teachers' fused update, (batch, seq_len, hidden).

        Raises:
            ValueError: If an objective has no probe, since the head came later.
        """
        weights, _ = self.weights(fusion, student_output)
        losses = {}
        for name in self.distillation.config.layer_objectives:
            loss = LAYER_LOSSES.get(name, fusion.task_specific)
            if loss is None:
                raise ValueError(
                    f"The objective {name!r} needs the head of {self.block.student!r} in train_adapter; add one for "
                    f"classes, labels or values, and call model.train_adapter({self.block.student!r}) again."
                )
            losses[name] = loss(student_output, target, weights) * fusion.layer_weight
        self.losses.append(losses)
        if (probe := fusion.task_specific) is not None and self.training:
            self.ratios.append(probe.ratio(target, weights))
            if self.labels is not None:
                self.probe_losses.append(probe.probe_loss(target, weights, self.labels))

    def passed_on(self, student_states: torch.Tensor, fused_states: torch.Tensor) -> torch.Tensor:
        """What a layer passes on, as the carrier says.

        Args:
            student_states: The states with the student's update, (batch, seq_len, hidden).
            fused_states: The states with the fused update, (batch, seq_len, hidden).

        Returns:
            One of the two.
        """
        fused = self.draw(student_states.device)
        if isinstance(fused, torch.Tensor):
            return torch.where(fused, fused_states, student_states)
        return fused_states if fused else student_states

    def draw(self, device: torch.device) -> bool | torch.Tensor:
        """Whether a layer passes on the fused output; for the carrier `mixed` each layer draws anew.

        Compiled code cannot branch on what was drawn: there the draw is a tensor, and both outputs are computed.
        """
        carrier = self.part or self.distillation.config.carrier
        if not self.training:
            return not self.passes_student_on
        if carrier != "mixed":
            return carrier == "fused"
        if torch.compiler.is_compiling():
            return torch.rand((), device=device) < self.distillation.fused_probability
        return bool(torch.rand(()) < self.distillation.fused_probability)


def current_pass() -> DistillationPass | None:
    """The pass that the running forward belongs to, or None if it does not distil."""
    context = ForwardContext.get_context()
    return None if context is None else vars(context).get("distillation_pass")


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

    Raises:
        ValueError: If the heads do not meet the needs of an objective.
    """
    block = join_block(AdapterSetup.get_context_adapter_setup() or model.adapters_config.active_setup)
    distillation = distillations(model.adapters_config).get(block.student) if block is not None else None
    training = model.training and torch.is_grad_enabled()
    if block is None or distillation is None or not (training or distillation.in_evaluation):
        return original(context, model, forward, *args, **kwargs)

    masks = _masks(model, args, kwargs, is_half=distillation.halves is not None)
    labels = _named(model, args, kwargs).get("labels")
    reruns = {}
    if distillation.level == "layer" and distillation.fuses:
        reruns = _reruns(type(context), model, block, args, kwargs)

    def run(context: ForwardContext, part: str) -> tuple[DistillationPass, Any]:
        current = DistillationPass(block, distillation, masks, training, part, labels, reruns)
        vars(context)["distillation_pass"] = current
        _share_parameters(context, model)
        return current, original(context, model, forward, *args, **kwargs)

    if training and distillation.enabled and distillation.config.carrier == "dual":
        with type(context)(model, *args, **kwargs) as fused_context:
            fused, fused_output = run(fused_context, "fused")
        # The head for question answering of adapters 1.3.0 clamps them in place, in the graph of the first pass.
        positions = ("start_positions", "end_positions")
        kwargs |= {name: kwargs[name].clone() for name in positions if kwargs.get(name) is not None}
        current, output = run(context, "student")
        match_passes(current, output, fused, fused_output, model.config.is_encoder_decoder)
    else:
        current, output = run(context, "")
    if training and distillation.enabled and distillation.config.output_objectives:
        check_objectives(model, block)

        def run_teacher(context: ForwardContext) -> Any:
            _share_parameters(context, model)
            return original(context, model, forward, *args, **kwargs)

        cache = distillation.predictions
        known = None if cache is None else cache.get(_named(model, args, kwargs))
        if known is None:
            predicted = teacher_logits(type(context), run_teacher, model, block, args, kwargs)
        else:
            predicted = {"logits": known}
        match_predictions(current, model, output, predicted)
    if distillation.halves is None:
        distillation.record = fold(current, output)
    else:
        distillation.halves.append(current)
    return output


def begin_halves(student: str, model: ModelAdaptersMixin, args: tuple) -> None:
    """A hook before the forward of an `EncoderDecoderModel`, which adapters gives no context of its own.

    Its encoder and its decoder are models with one pass each; what they gather waits for `fold_halves`.
    """
    distillations(model.adapters_config)[student].halves = []


def fold_halves(student: str, model: ModelAdaptersMixin, args: tuple, output: Any) -> None:
    """A hook behind the forward of an `EncoderDecoderModel`: folds what both halves gathered into the loss."""
    distillation = distillations(model.adapters_config)[student]
    halves, distillation.halves = distillation.halves, None
    if not halves:
        return
    whole, *others = halves
    for half in others:
        whole.losses += half.losses
        whole.fusions |= half.fusions
        whole.attention |= half.attention
        whole.observed |= half.observed
    distillation.record = fold(whole, output)


def _share_parameters(context: ForwardContext, model: ModelAdaptersMixin) -> None:
    """Gives a context the shared parameters of all adapters; adapters gives it those of the active ones alone."""
    if shared := model.base_model.shared_parameters:
        vars(context)["shared_parameters"] = dict(shared)


def _reruns(
    context_type: type[ForwardContext],
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    args: tuple,
    kwargs: dict,
) -> dict[str | None, Rerun]:
    """How the layers of a pass are run again with the student, with each teacher, and with neither (None).

    Contexts hold what adapters computes once a pass: the states of prefixes and the positions of ReFT. They are made
    before the layers run, since gradient checkpointing would miss them when it runs a layer again.
    """
    made = {}
    for name in (None, block.student, *block.teachers):
        names = [*block.children[:-1], *([] if name is None else [name])]
        setup = AdapterSetup(Stack(*names) if names else None)
        with setup, torch.set_grad_enabled(torch.is_grad_enabled() and name == block.student):
            context = context_type(model, *args, **kwargs)
        _share_parameters(context, model)
        made[name] = Rerun(setup, context)
    return made


def _named(model: ModelAdaptersMixin, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of forward by their names."""
    return dict(zip(forward_arguments(model), args, strict=False)) | kwargs if args else kwargs


def _masks(
    model: ModelAdaptersMixin, args: tuple, kwargs: dict[str, Any], is_half: bool
) -> dict[bool, torch.Tensor | None]:
    """The padding masks by `TeacherFusion.in_decoder`."""
    kwargs = _named(model, args, kwargs)
    encoder, decoder, labels = (kwargs.get(name) for name in ("attention_mask", "decoder_attention_mask", "labels"))
    if is_half:
        return {False: kwargs.get("encoder_attention_mask", encoder), True: encoder}
    if decoder is not None or not model.config.is_encoder_decoder:
        return {False: encoder, True: decoder}
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        decoder = labels != -100  # the decoder's inputs are the shifted labels
    elif encoder is not None and all(kwargs.get(f"decoder_{name}") is None for name in ("input_ids", "inputs_embeds")):
        decoder = encoder  # ... the shifted inputs of the encoder, whose last token is cut off in the longest row
    return {False: encoder, True: decoder}
