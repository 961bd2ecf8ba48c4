"""The stage in the progress bar."""

from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


class StageCallback(TrainerCallback):
    """Writes the stage in front of Trainer's progress bar, where there is one.

    `disable_tqdm`, processes other than the first and notebooks, whose table is no bar of tqdm, have none.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self.trainer = trainer
        self.stage = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the bar of an earlier training."""
        self.stage = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes the stage of the step that begins, if it is another one than that of the step before."""
        stage = 2 if state.global_step >= self.trainer.first_distillation_step else 1
        if stage == self.stage:
            return
        self.stage = stage
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and isinstance(callback.training_bar, tqdm):
                callback.training_bar.set_description(f"stage {stage}")
