"""The two-stage training of a distilled student."""

from contextlib import nullcontext
from functools import partial
from math import ceil
from typing import Any

import torch
from adapters import Stack
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.utils import logging

from .._compat import loss_counts_items
from ..configuration import DistillationTrainingArguments
from ..hub.trainer_mixin import StudentPushingTrainer
from ..method.distillation import Distillation, DistillationRecord, distillations
from ..method.heads import check_head, check_objectives
from ..method.nonfinite import find_overflow, loss_error
from ..method.parameters import active_block, check_trainable, is_fusion, parameter_table
from ..student.fusions import drop_fusion
from ..student.provenance import adapter_digest
from ..student.warm_start import START_EXAMPLES, can_be_fitted, fit_start
from .callback import FrozenTeachersCallback
from .checkpoint import checkpoint_to_resume, load_student, newest_whole_checkpoint, save_student, write_digests
from .checks import check_arguments, check_combinations
from .data import UnlabelledBatches, drawn
from .drift import DriftCallback
from .loss_log import LoggedTerms
from .prediction_cache import cached_predictions
from .progress import StageCallback
from .ranking import select_teachers
from .sigterm import SigtermCallback

logger = logging.get_logger(__name__)

PRIOR_EXAMPLES = 200  # as many of a task's own examples outweigh its teachers, by default


class DistillationTrainer(StudentPushingTrainer):
    """Trains a student adapter in two stages in one `train()`.

    A student that starts at its teachers' average is first moved to the average of their updates (`start.fit_start`).
    Stage 1 trains the student and its head on the task alone; stage 2, from the step
    `ceil(distillation_start * max_steps)` on, adds the distillation loss (by default `losses.FeatureLoss`, the mean
    over layers times `distillation_weight`) and trains the fusion with it. Evaluation runs the student alone. There is
    one optimizer and one schedule; the stage follows from the step, so that resuming needs no more than a checkpoint.

    A checkpoint holds the student with its head, as `save_adapter` writes them, and the fusion; no teacher. At the end
    the fusion is dropped (unless `keep_fusion` is set) and the student is the active adapter.

    Args:
        model: A model on which `train_adapter` was called for an adapter that has `distill_from`.
        args: The arguments of both stages.
        distillation_dataset: Examples of the task without labels (columns of labels are left out). In stage 2 each
            batch of the training data comes with one of these, and the distillation loss is the mean of both.
        **kwargs: The other arguments of `transformers.Trainer`: datasets, `data_collator` and so on.

    Raises:
        TypeError: If `args` are no `DistillationTrainingArguments`.
        ImportError: If `analysis=True` and matplotlib is not installed.
        ValueError: If no distilled student is active, or something else is left trainable, or settings exclude one
            another.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationTrainingArguments | None = None,
        distillation_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DistillationTrainingArguments("tmp_trainer")
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(
                f"args must be DistillationTrainingArguments, not {type(args).__name__}; they take the same arguments."
            )
        check_arguments(args)
        if model is not None:
            active_block(model)
        super().__init__(model, args, **kwargs)
        self.block = active_block(self.model)
        check_trainable(self.model, self.block)
        # Adapters hides the signature by which Trainer decides this; a wrong answer scales the gradients.
        self.model_accepts_loss_kwargs = self.label_smoother is None and loss_counts_items(self.model)
        check_combinations(self, distillation_dataset)
        self._unlabelled = None if distillation_dataset is None else UnlabelledBatches(self, distillation_dataset)
        self._without_labels = False  # whether the running step is one of those
        self._terms = LoggedTerms(self.accelerator)
        self._record: DistillationRecord
        self._teacher_modules: list[nn.Module] = []
        self._fusion_parameters: list[nn.Parameter] = []
        self.add_callback(FrozenTeachersCallback(self))
        self.add_callback(DriftCallback(self))
        self.add_callback(StageCallback(self))
        self._sigterm = SigtermCallback(self)
        if self.args.save_on_sigterm:
            self.add_callback(self._sigterm)
        self._allow_pushing()

    @property
    def distillation(self) -> Distillation:
        """The live state of the student's distillation."""
        return distillations(self.model.adapters_config)[self.block.student]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Runs both stages.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last whole one in `output_dir`.
            **kwargs: As for `transformers.Trainer.train`.

        Returns:
            The `TrainOutput` of Trainer.

        Raises:
            ValueError: If the student has no head, or a checkpoint is not whole, was made with other teachers or lacks
                weights.
            FloatingPointError: If the loss is NaN or infinite, unless `stop_on_nan` is unset.
            RuntimeError: If a checkpoint cannot be written, or a teacher's weights have changed at the end.
        """
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        self.model.train_adapter(self.block)
        if self.model_init is None and self.compute_loss_func is None:
            check_head(self.model, self.block.student)
        check_objectives(self.model, self.block)
        select_teachers(self)
        with self._sigterm if self.args.save_on_sigterm else nullcontext(), cached_predictions(self.distillation):
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.distillation.enabled, self.distillation.scale = True, 1.0
        if not self.args.keep_fusion:
            drop_fusion(self.model, self.block.student)
        self.model.set_active_adapters(Stack(*self.block.children))
        return output

    def fit_start(self) -> None:
        """Moves a student that still is the average of its teachers' weights to the average of their updates.

        `train` does it before the first step; a student that was trained, loaded or resumed stays what it is, and so
        does one with a gate or a norm behind its up-projections.
        """
        student, distillation = self.block.student, self.distillation
        if distillation.config.student_start != "teachers":
            return
        if distillation.start_digest != adapter_digest(self.model, student) or not can_be_fitted(self.model, student):
            return
        examples = drawn(self.train_dataset, START_EXAMPLES, self.args.seed)
        if examples is None:
            logger.warning(
                f"{student!r} starts at the average of its teachers' weights: a stream of examples is not read twice. "
                "Pass DistillationConfig(student_start='average') to silence this."
            )
            return

        def forward_passes() -> None:
            for inputs in self.input_batches(examples):
                with self.compute_loss_context_manager():
                    self.model(**inputs)

        with torch.random.fork_rng():  # the order of the training data stays what it is
            mean = partial(self.accelerator.reduce, reduction="mean")
            explained = fit_start(self.model, student, forward_passes, mean)
        logger.info(f"{student!r} starts at the teachers' mean update, {explained:.1%} of which it explains.")

    # The stages

    @property
    def distillation_start(self) -> float:
        """The fraction of all steps in stage 1, by the argument of that name or its default for this student."""
        if self.args.distillation_start is not None:
            return self.args.distillation_start
        return 0.5 if self.distillation.start_digest is None else 0.0

    @property
    def distillation_weight(self) -> float:
        """The weight of the distillation loss, by the argument of that name or its default for this data.

        The teachers are a prior of a fixed strength. Beside a loss that is a mean over n examples, its weight falls
        with n.
        """
        if self.args.distillation_weight is not None:
            return self.args.distillation_weight
        if has_length(self.train_dataset):
            n_examples = len(self.train_dataset)
        else:  # a stream: what the training reads of it
            batch = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            n_examples = self.state.max_steps * batch
        return min(1.0, PRIOR_EXAMPLES / max(1, n_examples))

    @property
    def first_distillation_step(self) -> int:
        """The number of the first step of stage 2, counted from 0."""
        return ceil(self.distillation_start * self.state.max_steps)

    def _enter_stage(self, num_items_in_batch: torch.Tensor | None) -> None:
        distillation, step, first = self.distillation, self.state.global_step, self.first_distillation_step
        distillation.enabled = step >= first
        distillation.weight = self.distillation_weight
        distillation.regularization = self.args.fusion_regularization
        distillation.fused_probability = torch.tensor(1 - (step - first) / max(1, self.state.max_steps - 1 - first))
        distillation.scale = self._share * self._loss_scale(num_items_in_batch)
        for module in self._teacher_modules:  # Trainer puts the whole model into training mode at each step
            module.eval()

    @property
    def _share(self) -> float:
        """The share of a batch in the distillation loss of its step."""
        return 1.0 if self._unlabelled is None else 0.5

    def _loss_scale(self, num_items_in_batch: torch.Tensor | None) -> float:
        """The factor that the terms need where Trainer does not divide the loss by the micro-batches of a step."""
        if self.compute_loss_func is not None:
            return 1 / self.current_gradient_accumulation_steps
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return 1.0
        # Trainer multiplies this loss by the number of processes, over which the gradients are averaged.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return 1 / (self.current_gradient_accumulation_steps * processes)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The task loss, in stage 2 with the distillation terms.

        Args:
            model: The model, perhaps wrapped.
            inputs: The batch.
            return_outputs: Whether to return the model's output, too.
            num_items_in_batch: The number of labels in all micro-batches of the step.

        Returns:
            The loss, or the loss and the output.

        Raises:
            ValueError: If a training batch has no labels.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._without_labels:
            self._enter_stage(num_items_in_batch)
            outputs = model(**inputs)
            self._record = self.distillation.take_record()
            # What no gradient reaches in this pass (the head) stays in the graph of each process.
            rest = sum(value.sum() * 0.0 for value in outputs.values() if isinstance(value, torch.Tensor))
            return (self._record.added + rest, outputs) if return_outputs else self._record.added + rest
        if self.label_names and not any(inputs.get(name) is not None for name in self.label_names):
            raise ValueError(
                f"The training batches have no labels ({', '.join(self.label_names)}), only {', '.join(inputs)}; "
                "add a column of labels to train_dataset, or name the columns that hold them in label_names."
            )
        self._enter_stage(num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        record = self._record = self.distillation.take_record()
        if not record.in_loss:  # label smoothing and compute_loss_func take the labels away from the model
            loss = loss + record.added
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One forward and backward pass, in stage 2 another one without labels if there are such examples.

        In stage 1 the optimizer does not see the fusion.

        Args:
            model: The model, perhaps wrapped.
            inputs: The batch.
            num_items_in_batch: The number of labels in all micro-batches of the step.

        Returns:
            The loss of the micro-batch, detached.

        Raises:
            FloatingPointError: If it is NaN or infinite, unless `stop_on_nan` is unset.
        """
        loss = self._micro_step(model, inputs, num_items_in_batch)
        step = 1 / self.current_gradient_accumulation_steps
        self._terms.note(loss, self._record, self.distillation, step, self._share)
        if self._unlabelled is not None and self.distillation.enabled:
            stage_2_step = self.state.global_step - self.first_distillation_step
            self._without_labels = True
            try:
                loss = loss + self._micro_step(model, self._unlabelled.next(stage_2_step), num_items_in_batch)
            finally:
                self._without_labels = False
            self._terms.note_distillation(self._record, step * self._share)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self._terms.note_gradients()
        return loss

    def _micro_step(self, model: nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.distillation.enabled:
            # Zero gradients would age the optimizer's moments and let weight decay act before stage 2.
            for parameter in self._fusion_parameters:
                parameter.grad = None
        if self.args.stop_on_nan and not torch.isfinite(loss):

            def once_more() -> None:
                with self.compute_loss_context_manager():  # on the model itself: other processes may be well
                    self.compute_loss(self.model, self._prepare_inputs(inputs), False, num_items_in_batch)

            find = partial(find_overflow, self.distillation, once_more)
            raise loss_error(self.state.global_step + 1, loss, self._record, find)
        return loss

    # Optimizer

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Trainer's optimizer, with the fusion in a group of its own: own learning rate, no weight decay.

        Returns:
            The optimizer.
        """
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer()
        named = self.model.named_parameters()
        fusion = self._fusion_parameters = [p for name, p in named if is_fusion(name, self.block.student)]
        chosen = {id(parameter) for parameter in fusion}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        rate = self.args.fusion_learning_rate
        rate = self.args.learning_rate / 2 if rate is None else rate
        optimizer.add_param_group({"params": fusion, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        save_student(self.model, self.block.student, output_dir)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        self._save_arguments(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # the last that each process writes
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_digests(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own
            whole = newest_whole_checkpoint(self.args.output_dir)
            raise RuntimeError(
                f"The checkpoint of step {self.state.global_step} could not be written "
                f"({str(error).strip().splitlines()[0]}); the newest whole one is {whole or 'none'}. "
                "Make room on the disk and resume."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_student(self.model, self.block, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best student from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        load_student(self.model, self.block, self.state.best_model_checkpoint)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the loss terms one by one beside Trainer's values.

        `task_loss` is the mean over all steps since the last log; `distillation_loss` (unweighted),
        `fusion_regularization` (weighted) and `attention/<teacher>` are means over those steps that were in stage 2,
        and so are `distillation_loss/<objective>` (unweighted) where there are several, and of `task_specific` the
        `probe_loss` and the `task_specific_ratio`. `grad_norm/student`, `grad_norm/head` and in stage 2
        `grad_norm/fusion` are those of the last step before clipping, as Trainer's `grad_norm` of all three is. All
        stand in whatever `report_to` names, such as TensorBoard, W&B and Trackio.

        Args:
            logs: What Trainer logs.
            start_time: The start of the training, in seconds.
        """
        if "loss" in logs:
            logs |= self._terms.means()
        super().log(logs, start_time)

    def parameter_table(self) -> str:
        """What is trained and what is frozen.

        Returns:
            A table with a row for the base model, the student, its head, the fusion, and the teachers.
        """
        return parameter_table(self.model, self.block)


AdapterDistillationTrainer = DistillationTrainer
