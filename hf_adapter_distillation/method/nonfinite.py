"""Why a loss is no number: asked once it is NaN or infinite, so that all steps before pay nothing for the answer."""

from collections.abc import Callable

import torch

from .distillation import Distillation, DistillationRecord

TAKE_MORE_RANGE = "train in bf16 or float32, leave this teacher out"


def find_overflow(distillation: Distillation, forward_passes: Callable[[], object]) -> str:
    """Names the teachers whose updates are not finite, though what they read is.

    Teachers with large numbers in their weights put out infinite ones in float16, whose largest is 65504.

    Args:
        distillation: The student's distillation.
        forward_passes: Runs the model once more on the data that has shown the fault; the teachers' updates, which are
            fused without being computed otherwise, are then computed one by one.

    Returns:
        The teachers and the first layer where it is so; an empty text if there is none.
    """
    overflows = distillation.overflows = {}
    try:
        forward_passes()
    finally:
        distillation.overflows = distillation.record = None
    for location, names in overflows.items():
        return f"the update of teacher {' and '.join(map(repr, names))} is not finite in {location}"
    return ""


def loss_error(
    step: int, loss: torch.Tensor, record: DistillationRecord, find: Callable[[], str]
) -> FloatingPointError:
    """The error that names the cause of a loss that is NaN or infinite.

    Args:
        step: The number of the step, counted from 1.
        loss: The loss.
        record: What the forward pass added to it.
        find: `find_overflow` with the batch of the step; not called in stage 1, where no teacher runs.

    Returns:
        The error.
    """
    cause, remedy = record.not_finite(), "lower the learning rate"
    if record.distillation_loss is not None and (overflow := find()):
        cause, remedy = overflow, TAKE_MORE_RANGE
    return FloatingPointError(
        f"The loss of step {step} is {loss.item()}: {cause}. "
        f"No weight has changed in this step; {remedy}, or pass stop_on_nan=False to go on."
    )
