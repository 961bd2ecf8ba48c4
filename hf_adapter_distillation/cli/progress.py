"""The progress of a command: a training in short lines, and nothing that a user cannot act on."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "loss": "loss",
    "task_loss": "task loss",
    "distillation_loss": "distance",
    "learning_rate": "learning rate",
}


def log_line(logs: Mapping[str, Any], step: int) -> str:
    """Return a line of the log with four digits for each number; empty for a log of speed alone."""
    shown = {SHOWN[name]: value for name, value in logs.items() if name in SHOWN}
    is_speed = ("_runtime", "_per_second", "_preparation_time")
    shown |= {k: v for k, v in logs.items() if k.startswith("eval_") and not k.endswith(is_speed)}
    facts = [f"{name} {value:.4g}" for name, value in shown.items() if isinstance(value, int | float)]
    stage = [f"stage {logs['stage']}"] if "stage" in logs else []
    return "  ".join([f"step {step}", *stage, *facts]) if facts else ""


@contextmanager
def without_noise() -> Iterator[None]:
    """Silence the warnings of adapters and of the loader of transformers, and the log and progress of `datasets`.

    They tell of unused heads of base models, of our own passes without an adapter, and of layers on one device. The
    readers of `datasets` log the errors that they raise.
    """
    quiet = {
        "adapters": logging.ERROR,
        "transformers.modeling_utils": logging.ERROR,
        "transformers.integrations.tensor_parallel": logging.ERROR,
        "datasets.packaged_modules": logging.CRITICAL,
    }
    loggers = [logging.getLogger(name) for name in quiet]
    levels, had_bars = [logger.level for logger in loggers], not are_progress_bars_disabled()
    for logger, level in zip(loggers, quiet.values(), strict=True):
        logger.setLevel(level)
    disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            enable_progress_bars()


class SilentMixin:
    """Mixin for a trainer whose summary is printed once, with the evaluation and the folder of the student."""

    def _show_summary(self) -> None:
        pass


class ShortProgress(ProgressCallback):
    """Progress bar of Trainer with short lines."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line above the bar."""
        if (
            state.is_world_process_zero
            and self.training_bar is not None
            and (line := log_line(logs, state.global_step))
        ):
            self.training_bar.write(line)


class ShortPrinter(PrinterCallback):
    """Log of Trainer without a progress bar, in short lines."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write a line."""
        if state.is_local_process_zero and (line := log_line(logs, state.global_step)):
            print(line, flush=True)  # noqa: T201  (the standard output is redirected)


def shorten(trainer: Trainer) -> None:
    """Let a trainer write short lines."""
    for cls, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(cls) is not None:
            trainer.add_callback(short)
