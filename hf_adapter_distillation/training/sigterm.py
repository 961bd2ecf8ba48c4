"""SIGTERM, which schedulers and spot machines send before they kill, as the end of a training."""

import signal
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)


class SigtermCallback(TrainerCallback):
    """At SIGTERM the running step is finished, a checkpoint is written, and the process exits with status 143.

    Signals are caught while the callback is entered as a context.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self.trainer = trainer
        self.received = False
        self._before: Any = None

    def __enter__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, *args: object) -> None:
        self.received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Asks for a checkpoint, in all processes at the same step."""
        if args.world_size > 1:
            received = torch.tensor(float(self.received), device=args.device)
            self.received = bool(self.trainer.accelerator.reduce(received) > 0)
        if self.received:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Exits as soon as the checkpoint is written.

        Raises:
            SystemExit: With the status of a process that SIGTERM has ended.
        """
        if self.received:
            self.trainer.accelerator.wait_for_everyone()
            logger.warning(f"Stopped by SIGTERM after step {state.global_step}; resume_from_checkpoint=True goes on.")
            raise SystemExit(128 + signal.SIGTERM)
