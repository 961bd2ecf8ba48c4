"""A student that learns the task away from its teachers, seen in the logs of its training."""

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

LEAST_LOGS = 8  # of stage 2: two in each quarter
RISEN, FALLEN = 2.0, 0.75
APART = 0.1  # of the variance of what the teachers put out, in which the distillation loss is measured


def drift(log_history: list[dict[str, Any]]) -> tuple[float, float, float, float] | None:
    """Compares the first and the last quarter of the logs of stage 2.

    Means of quarters are not moved by single batches. No drift is a distillation loss that rises for a while and falls
    again, as it may where a student leaves its start, or one that rises from next to nothing to little.

    Args:
        log_history: What Trainer has logged; a checkpoint holds it, so that a resumed training is judged as a whole.

    Returns:
        The means of `distillation_loss` in both quarters, and those of `task_loss`, if the first has doubled, to at
        least 0.1, and the second has lost a quarter; else None, also for fewer than 8 logs.
    """
    logs = [log for log in log_history if "distillation_loss" in log]
    if len(logs) < LEAST_LOGS:
        return None

    def mean(term: str, part: list[dict[str, Any]]) -> float:
        return sum(log[term] for log in part) / len(part)

    quarter = len(logs) // 4
    first, last = logs[:quarter], logs[-quarter:]
    before, after = mean("distillation_loss", first), mean("distillation_loss", last)
    task_before, task_after = mean("task_loss", first), mean("task_loss", last)
    has_risen = after >= max(RISEN * before, APART)
    has_fallen = task_before - task_after >= (1 - FALLEN) * abs(task_before)
    return (before, after, task_before, task_after) if has_risen and has_fallen else None


class DriftCallback(TrainerCallback):
    """Warns at the end of a training whose student has drifted away from its teachers.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self.trainer = trainer

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says what has risen and fallen, and what to change."""
        if not state.is_world_process_zero or (drifted := drift(state.log_history)) is None:
            return
        before, after, task_before, task_after = drifted
        weight = self.trainer.distillation_weight
        logger.warning(
            f"In stage 2 the distillation loss rose from {before:.3g} to {after:.3g} while the task loss fell from "
            f"{task_before:.3g} to {task_after:.3g}: {self.trainer.block.student!r} learns the task away from its "
            f"teachers. To hold it to them, raise distillation_weight (it was {weight:.3g}); if it evaluates "
            "well as it is, they know little of this task, and distillation_start=1.0 trains it without them."
        )
