"""The interface between the layers and a forward pass: `Place` is the layers' side, `LayerPass` the other.

A layer runs the student and offers itself as a `Place`. A `LayerPass` decides what is done there: whether the teachers
run, what is compared, and which states the layer passes on. So no layer knows why it is run: for the training
(`training_pass`), the fit of the start, the analysis, or the search for overflows.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from adapters import AdapterSetup
from torch import nn
from transformers.utils import logging

from .._compat import ForwardContext
from ..composition import AdapterDistillation
from .fusion import TeacherFusion
from .losses import at_least_float32, token_weights
from .low_rank import LowRankUpdates

logger = logging.get_logger(__name__)

Weigh: TypeAlias = Callable[[tuple[str, ...]], torch.Tensor]  # the weights (n,) of the n teachers that a place has


class Fused(NamedTuple):
    """Output of the fusion of n adapters at one place: the teachers, and the student if the pass joins it."""

    names: tuple[str, ...]
    output: torch.Tensor  # (B, T, d)
    attention: torch.Tensor  # (B, T, n), detached


class LowRankFused(NamedTuple):
    """Low-rank updates of the student and of the fusion of n teachers at one place."""

    names: tuple[str, ...]
    updates: LowRankUpdates
    attention: torch.Tensor  # (B, T, n), detached


@dataclass(eq=False)
class Place:
    """Place of the model where the student has just added its update, and where the teachers can run beside it."""

    fusion: TeacherFusion
    query_states: torch.Tensor  # (B, T, d), the input of the fusion's query
    base: torch.Tensor | float  # (B, T, d), the states before any update is added; 0 where they are added later
    student_states: torch.Tensor  # (B, T, d), the states with the student's update, as the layer would pass them on

    _student_output = None

    @property
    def student_output(self) -> torch.Tensor:
        """Return the student's update, (batch, seq_len, hidden), computed when it is first asked for."""
        if self._student_output is None:
            self._student_output = self.student_update()
        return self._student_output

    def student_update(self) -> torch.Tensor:
        """Compute the student's update, (batch, seq_len, hidden)."""
        raise NotImplementedError

    def updates(self, with_student: bool = False) -> dict[str, torch.Tensor]:
        """Run the teachers one by one; return their updates, (batch, seq_len, hidden) each, and the student's last."""
        raise NotImplementedError

    def mix(self, weigh: Weigh) -> torch.Tensor:
        """Run the teachers, and return the sum of their updates, each times its weight, (batch, seq_len, hidden)."""
        updates = self.updates()
        weights = weigh(tuple(updates)).to(self.query_states)  # (n,)
        return torch.einsum("n,nbtd->btd", weights, torch.stack(list(updates.values())))

    def low_rank(self) -> LowRankFused | None:
        """Run the teachers, and return low-rank updates, which match the same; None where they are not cheaper.

        The student's has the graph of the states that it reads, also where the teachers read detached states.
        """
        return None

    def fuse(self, with_student: bool = False) -> Fused:
        """Run the teachers, and fuse their updates, and the student's with them if wanted."""
        updates = self.updates(with_student)
        if not updates:  # the only teacher of this place is left out
            update = torch.zeros_like(self.student_output)
            return Fused((), update, update[..., :0])
        log_weights = self.fusion.log_weights_of(tuple(updates))
        stacked = torch.stack(list(updates.values()), dim=2)  # (B, T, n, d)
        return Fused(tuple(updates), *self.fusion(self.query_states, stacked, log_weights))


class Rerun(NamedTuple):
    """Adapters and forward context in which a whole layer runs again."""

    setup: AdapterSetup
    context: ForwardContext


class PassInputs(NamedTuple):
    """Inputs of a forward pass that its layers need."""

    block: AdapterDistillation
    masks: dict[bool, torch.Tensor | None]  # (B, T), by `TeacherFusion.in_decoder`; None where all tokens count
    labels: torch.Tensor | None
    reruns: dict[str | None, Rerun]  # for each adapter, and None for no adapter; empty where no layer runs again


class LayerPass:
    """One or more forward passes, seen from the layers."""

    # Whether the teachers read the states with their graph, so that gradients flow back through them. Else they read
    # detached states.
    keeps_graph = False
    runs_teachers = True
    inputs: PassInputs

    def begin(self, inputs: PassInputs) -> None:
        """Begin a forward pass."""
        self.inputs = inputs
        self.calls: list[int] = []  # the number of sequences in each call of the base model
        self._token_weights: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}

    def for_call(self, masks: dict[bool, torch.Tensor | None]) -> "LayerPass":
        """Return this pass with the masks of another call of the base model, which collects into the same lists."""
        other = copy(self)
        other.inputs, other._token_weights = self.inputs._replace(masks=masks), {}
        return other

    def visit(self, fusion: TeacherFusion) -> bool:
        """Return whether the layer of a fusion shall call `run_layer`; else the student runs there alone."""
        return self.runs_teachers

    def run_layer(self, place: Place) -> torch.Tensor | None:
        """Run at one place; return the states that the layer passes on, (B, T, d), or None for the student's."""
        raise NotImplementedError

    def token_weights(self, fusion: TeacherFusion, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of tokens in the mean over each sequence, and over the batch, (batch, seq_len) each.

        Both ignore padding, and are computed once per stack of layers. The values are (batch, seq_len, ...).
        """
        batch, seq_len = values.shape[:2]
        weights = self._token_weights.get(fusion.in_decoder)
        if weights is None or weights[0].shape != (batch, seq_len) or weights[0].device != values.device:
            mask = self.inputs.masks[fusion.in_decoder]
            if mask is not None and mask.dim() == 3:  # multiple choice: (B, C, T)
                mask = mask.reshape(-1, mask.shape[-1])
            if mask is None or mask.shape != (batch, seq_len):  # (B, 1, T, T) says who sees whom, not what is padding
                mask = torch.ones(batch, seq_len)
            mask = (mask != 0).to(values.device, at_least_float32(values.dtype))
            weights = self._token_weights[fusion.in_decoder] = token_weights(mask), mask / mask.sum().clamp(min=1)
        return weights


def current_pass() -> LayerPass | None:
    """Return the pass that the running forward belongs to, or None if it does not distil."""
    context = ForwardContext.get_context()
    return None if context is None else vars(context).get("distillation_pass")


def warn_outside_of_passes(student: str, layer: nn.Module) -> None:
    """Say once that a layer trains a student alone, since the model does not run, or not in training mode."""
    if layer.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(  # type: ignore[attr-defined]
            f"{student!r} is not distilled here: the model is in evaluation mode, or its layers run outside of its "
            "forward, as in get_text_features. Call model.train(), and the model itself."
        )
