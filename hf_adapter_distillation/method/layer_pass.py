"""The interface between the layers and a forward pass: `Place` is the layers' side, `LayerPass` the other.

A layer runs the student and offers itself as a `Place`. A `LayerPass` decides what is done there: whether the teachers
run, what is compared, and which states the layer passes on. So no layer knows why it is run: for the training
(`training_pass`), the fit of the start, the analysis, or the search for overflows.
"""

from typing import NamedTuple

import torch
from adapters import AdapterSetup, ModelAdaptersMixin

from .._compat import ForwardContext
from ..composition import AdapterDistillation
from .fusion import TeacherFusion
from .losses import token_weights


class Fused(NamedTuple):
    """Output of the fusion at one place.

    Args:
        names: The adapters that were fused: the teachers, and the student where its carrier passes the output on.
        output: The fused update, (batch, seq_len, hidden).
        attention: The attention over them, detached, (batch, seq_len, n).
    """

    names: tuple[str, ...]
    output: torch.Tensor
    attention: torch.Tensor


class Place:
    """A place of the model where the student has just added its update, and where the teachers can run beside it.

    Args:
        fusion: The fusion at this place.
        query_states: The hidden states that the fusion queries with, (batch, seq_len, hidden).
        base: The states before any update is added, (batch, seq_len, hidden); 0 where they are added later.
        student_output: The student's update, (batch, seq_len, hidden).
        student_states: The states with it, as the layer would pass them on, (batch, seq_len, hidden).
    """

    def __init__(
        self,
        fusion: TeacherFusion,
        query_states: torch.Tensor,
        base: torch.Tensor | float,
        student_output: torch.Tensor,
        student_states: torch.Tensor,
    ) -> None:
        self.fusion = fusion
        self.query_states = query_states
        self.base = base
        self.student_output = student_output
        self.student_states = student_states

    def updates(self, with_student: bool = False) -> dict[str, torch.Tensor]:
        """Run the teachers one by one; return their updates, (batch, seq_len, hidden) each, and the student's last."""
        raise NotImplementedError

    def fuse(self, with_student: bool = False) -> Fused:
        """Run the teachers, and fuse their updates, and the student's with them if wanted."""
        updates = self.updates(with_student)
        return Fused(tuple(updates), *self.fusion(self.query_states, torch.stack(list(updates.values()), dim=2)))

    def is_finite_without_teachers(self) -> bool:
        """Return whether the states are finite without the teachers, so that a NaN in an update is the teacher's."""
        raise NotImplementedError


class Rerun(NamedTuple):
    """How a whole layer runs again: with which adapters active, and in which forward context."""

    setup: AdapterSetup
    context: ForwardContext


class PassInputs(NamedTuple):
    """Inputs of a forward pass that its layers need.

    Args:
        block: The active distillation block.
        masks: By `TeacherFusion.in_decoder` the attention mask, (batch, seq_len), or None where all tokens count.
        labels: The labels of the batch, if it has any.
        reruns: By the name of each adapter, and None for no adapter, how a whole layer runs again.
    """

    block: AdapterDistillation
    masks: dict[bool, torch.Tensor | None]
    labels: torch.Tensor | None
    reruns: dict[str | None, Rerun]


class LayerPass:
    """One or more forward passes, seen from the layers.

    `joins_student` says whether a layer may pass the fused output on while gradients are computed. Then the student is
    fused with its teachers, and gradients flow through them; else the teachers read detached states. `runs_teachers`
    says whether the teachers run at all.
    """

    joins_student = False
    runs_teachers = True
    inputs: PassInputs

    def begin(self, inputs: PassInputs) -> None:
        """Begin a forward pass."""
        self.inputs = inputs
        self._token_weights: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def visit(self, fusion: TeacherFusion) -> bool:
        """Return whether the layer of a fusion shall call `run_layer`; else the student runs there alone."""
        return self.runs_teachers

    def run_layer(self, place: Place) -> torch.Tensor | None:
        """Do what the pass is for at one place.

        Returns:
            The states that the layer passes on, (batch, seq_len, hidden), or None for those with the student's update.
        """
        raise NotImplementedError

    def token_weights(self, fusion: TeacherFusion, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of tokens in means that ignore padding, computed once per stack of layers.

        Args:
            fusion: The fusion of the layer.
            hidden_states: The states of the layer, (batch, seq_len, hidden).

        Returns:
            The weights in the mean over each sequence, and in the mean over the batch, (batch, seq_len) each.
        """
        batch, seq_len = hidden_states.shape[:2]
        weights = self._token_weights.get(fusion.in_decoder)
        if weights is None or weights[0].shape != (batch, seq_len) or weights[0].device != hidden_states.device:
            mask = self.inputs.masks[fusion.in_decoder]
            if mask is not None and mask.dim() == 3:  # multiple choice: (B, C, T)
                mask = mask.reshape(-1, mask.shape[-1])
            if mask is None or mask.shape != (batch, seq_len):  # (B, 1, T, T) says who sees whom, not what is padding
                mask = torch.ones(batch, seq_len)
            mask = (mask != 0).to(hidden_states.device, torch.promote_types(hidden_states.dtype, torch.float32))
            weights = self._token_weights[fusion.in_decoder] = token_weights(mask), mask / mask.sum().clamp(min=1)
        return weights


def current_pass() -> LayerPass | None:
    """Return the pass that the running forward belongs to, or None if it does not distil."""
    context = ForwardContext.get_context()
    return None if context is None else vars(context).get("distillation_pass")


def share_parameters(context: ForwardContext, model: ModelAdaptersMixin) -> None:
    """Give a context the shared parameters of all adapters; adapters gives it those of the active ones only."""
    if shared := model.base_model.shared_parameters:
        vars(context)["shared_parameters"] = dict(shared)
