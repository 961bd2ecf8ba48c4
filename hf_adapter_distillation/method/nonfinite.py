"""Diagnosis of a NaN or infinite loss. It runs only after one occurs, so normal steps cost nothing."""

from collections.abc import Callable

import torch

from .distillation import Distillation, DistillationRecord
from .layer_pass import LayerPass, Place

TAKE_MORE_RANGE = "train in bf16 or float32, leave this teacher out"


class OverflowPass(LayerPass):
    """A pass that notes the teachers whose updates are not finite, though the states that they read are.

    Args:
        joins_student: Whether the layers pass the fused output on, as in the step that failed.
    """

    def __init__(self, joins_student: bool) -> None:
        self.joins_student = joins_student
        self.overflows: dict[str, list[str]] = {}

    def run_layer(self, place: Place) -> torch.Tensor | None:
        """Compute the updates one by one, and check them."""
        updates = place.updates()
        if place.is_finite_without_teachers():
            names = [name for name, update in updates.items() if not update.isfinite().all()]
            if names:
                self.overflows.setdefault(place.fusion.location, names)
        return place.base + place.fuse(with_student=True).output if self.joins_student else None


def find_overflow(distillation: Distillation, forward_passes: Callable[[], object], joins_student: bool) -> str:
    """Name the teachers whose updates are not finite.

    Teachers with large weights overflow in float16, whose largest number is 65504.

    Args:
        distillation: The student's distillation.
        forward_passes: Runs the model again on the data that has shown the fault.
        joins_student: Whether the layers pass the fused output on.

    Returns:
        The teachers and the first layer concerned; an empty text if no update overflows.
    """
    overflow_pass = OverflowPass(joins_student)
    with distillation.inspected_by(overflow_pass):
        forward_passes()
    for location, names in overflow_pass.overflows.items():
        return f"the update of teacher {' and '.join(map(repr, names))} is not finite in {location}"
    return ""


def nonfinite_term(record: DistillationRecord) -> str:
    """Name the term that makes a loss NaN or infinite, and the first layer concerned."""
    if record.distillation_loss is None or record.fusion_regularization is None:
        return "task_loss, in stage 1"
    finite, names = [], list(record.attention)
    if record.layer_losses is not None:
        finite = record.layer_losses.isfinite().tolist()
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
    """Return the error that names the cause of a NaN or infinite loss.

    Args:
        step: The number of the step, counted from 1.
        loss: The loss.
        record: What the forward pass added to it.
        find: `find_overflow` with the batch of the step; not called in stage 1, where no teacher runs.
    """
    cause, remedy = nonfinite_term(record), "lower the learning rate"
    if record.distillation_loss is not None and (overflow := find()):
        cause, remedy = overflow, TAKE_MORE_RANGE
    return FloatingPointError(
        f"The loss of step {step} is {loss.item()}: {cause}. "
        f"No weight has changed in this step; {remedy}, or pass stop_on_nan=False to go on."
    )
