"""Callbacks of the trainer: the stage in the progress bar, and a checkpoint at SIGTERM."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

logger = logging.get_logger(__name__)


class StageCallback(TrainerCallback):
    """Write the stage in front of Trainer's progress bar, a callback of the handler; notebooks show a table."""

    def __init__(self, first_distillation_step: Callable[[], int], handler: CallbackHandler) -> None:
        self.first_distillation_step = first_distillation_step
        self.handler = handler
        self.stage = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the progress bar of an earlier training."""
        self.stage = 0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write the stage if it has changed."""
        stage = 2 if state.global_step >= self.first_distillation_step() else 1
        if stage == self.stage:
            return
        self.stage = stage
        for callback in self.handler.callbacks:
            if isinstance(callback, ProgressCallback) and isinstance(callback.training_bar, tqdm):
                callback.training_bar.set_description(f"stage {stage}")


class SigtermCallback(TrainerCallback):
    """Finish the running step at SIGTERM, write a checkpoint, and exit with status 143.

    Schedulers and spot machines send SIGTERM before they kill. The callback catches it while it is entered as a
    context, and stops all processes of the accelerator, which a function returns, at the same step.
    """

    def __init__(self, accelerator: Callable[[], Accelerator]) -> None:
        self.accelerator = accelerator
        self.received = False
        self._before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "save_on_sigterm=True catches a signal, which Python allows in the main thread only; leave it out, or "
                "call train() in the main thread."
            )
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _receive(self, *args: object) -> None:
        self.received = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint, in all processes at the same step."""
        if args.world_size > 1:
            received = torch.tensor(float(self.received), device=args.device)
            self.received = bool(self.accelerator().reduce(received) > 0)
        if self.received:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Exit with the status of a process that SIGTERM has ended, as soon as the checkpoint is written."""
        if self.received:
            self.accelerator().wait_for_everyone()
            logger.warning(f"Stopped by SIGTERM after step {state.global_step}; resume_from_checkpoint=True goes on.")
            raise SystemExit(128 + signal.SIGTERM)
