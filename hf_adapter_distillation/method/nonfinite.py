"""Diagnosis of a NaN or infinite loss. It runs only after one occurs, so normal steps cost nothing."""

from collections.abc import Callable

import torch

from .distillation import Distillation, DistillationRecord
from .layer_pass import LayerPass, Place

TAKE_MORE_RANGE = "train in bf16 or float32, leave this teacher out"


class OverflowPass(LayerPass):
    """Pass that looks for the first layer with teachers whose updates are not finite, though the states they read are.

    It passes the fused output on if the step that failed did so (`passes_fused_on`).
    """

    def __init__(self, passes_fused_on: bool) -> None:
        self.passes_fused_on = passes_fused_on
        self.overflows: list[str] = []

    def run_layer(self, place: Place) -> torch.Tensor | None:
        """Compute the updates one by one, and check them."""
        states = (place.query_states, torch.as_tensor(place.base))
        if not self.overflows and all(tensor.isfinite().all() for tensor in states):
            names = [repr(name) for name, update in place.updates().items() if not update.isfinite().all()]
            if names:
                teachers = " and ".join(names)
                self.overflows.append(f"the update of teacher {teachers} is not finite in {place.fusion.location}")
        return place.base + place.fuse(with_student=True).output if self.passes_fused_on else None


def find_overflow(distillation: Distillation, forward_passes: Callable[[], object], passes_fused_on: bool) -> str:
    """Name the teachers whose updates are not finite, and the first layer concerned; "" if no update overflows.

    Teachers with large weights overflow in float16, whose largest number is 65504. The forward passes run the model
    again on the data that has shown the fault.
    """
    overflow_pass = OverflowPass(passes_fused_on)
    with distillation.inspected_by(overflow_pass):
        forward_passes()
    return next(iter(overflow_pass.overflows), "")


def start_message(student: str, cause: str) -> str:
    """Return the message of an error: a student cannot start at its teachers, whose updates are not finite."""
    return f"{student!r} cannot start at its teachers: {cause}; {TAKE_MORE_RANGE}."


def nonfinite_term(record: DistillationRecord) -> str:
    """Name the term that makes a loss NaN or infinite, and the first layer concerned."""
    if record.distillation_loss is None or record.fusion_regularization is None:
        return "task_loss, in stage 1"
    names = list(record.attention)
    finite = [] if record.layer_losses is None else record.layer_losses.isfinite().tolist()
    if not all(finite):
        return f"distillation_loss, first in {names[finite.index(False) % len(names)]}"
    if not record.distillation_loss.isfinite():
        return "distillation_loss, in the logits"
    if not record.fusion_regularization.isfinite():
        return "fusion_regularization"
    return "task_loss, while distillation_loss is finite in all layers"


def loss_error(
    step: int, loss: torch.Tensor, record: DistillationRecord, find: Callable[[], str]
) -> FloatingPointError:
    """Return the error that names the cause of a NaN or infinite loss in a step, counted from 1.

    `find` is `find_overflow` with the batch of the step; it is not called in stage 1, where no teacher runs.
    """
    cause, remedy = nonfinite_term(record), "lower the learning rate"
    if loss.isnan() and cause.startswith("task_loss"):
        remedy = "check that the batch has labels other than -100, lower the learning rate"
    if record.distillation_loss is not None and (overflow := find()):
        cause, remedy = overflow, TAKE_MORE_RANGE
    return FloatingPointError(
        f"The loss of step {step} is {loss.item()}: {cause}. "
        f"No weight has changed in this step; {remedy}, or pass stop_on_nan=False to go on."
    )
