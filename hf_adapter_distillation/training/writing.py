"""What a trainer writes and reads: checkpoints, and the student at the end."""

from copy import copy
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from . import checkpoint as checkpoints
from .reading import ReadingTrainer

logger = logging.get_logger(__name__)


class WritingTrainer(ReadingTrainer):
    """Trainer whose checkpoints hold the student, its fusion, and what is trained outside the model with adapters."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        first = self.first_distillation_step if self.state.global_step > self.first_distillation_step else None
        explained = None if self._prepared is None else self._prepared.explained
        checkpoints.save_student(
            self.model_with_adapters, self.block.student, output_dir, first, self.args.save_safetensors, explained
        )
        checkpoints.save_beside(self._beside, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        args = copy(self.args)
        args.hub_token = args.push_to_hub_token = None  # the folder may be pushed
        torch.save(args, Path(output_dir) / TRAINING_ARGS_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the last that each process writes
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.write_digests(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student with its head and the fusion, as in a checkpoint."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.save_only_model and output_dir is not None and self.args.should_save:
            checkpoints.write_digests(output_dir)  # a checkpoint that gets no other files

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            whole = checkpoints.newest_whole_checkpoint(self.args.output_dir)
            raise RuntimeError(
                f"The checkpoint of step {self.state.global_step} could not be written "
                f"({str(error).strip().splitlines()[0]}); the newest whole one is {whole or 'none'}. "
                "Make room on the disk and resume."
            ) from error

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best student from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        checkpoints.load_student(self.model_with_adapters, self.block, self.state.best_model_checkpoint)
        checkpoints.load_beside(self._beside, self.state.best_model_checkpoint)

    def compare_trainer_and_checkpoint_args(
        self, training_args: TrainingArguments, trainer_state: TrainerState
    ) -> None:
        """Warn where the arguments differ from those of a checkpoint, which holds whole steps instead of shares."""
        whole = copy(training_args)
        for name in ("logging_steps", "eval_steps", "save_steps"):
            if 0 < (value := vars(whole)[name] or 0) < 1:
                vars(whole)[name] = ceil(value * trainer_state.max_steps)
        super().compare_trainer_and_checkpoint_args(whole, trainer_state)

    @property
    def _beside(self) -> dict[str, torch.Tensor]:
        """The trained parameters and the buffers outside the model with adapters, as they are on the model."""
        return checkpoints.state_beside(self.model, self.model_with_adapters, self._losses)
