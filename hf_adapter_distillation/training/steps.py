"""The training steps of both stages: their settings, their loss, and the terms that are logged."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil, floor
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..hub.trainer_mixin import StudentPushingTrainer
from ..method.distillation import Distillation, DistillationRecord, StageSettings, distillation_of
from ..method.heads import name_of_head, predicts_next
from ..method.nonfinite import find_overflow, loss_error
from ..student.preparing import keep_active
from .data import UnlabelledBatches, number_of_examples
from .loss_log import LoggedTerms
from .preparation import Preparation
from .sharding import is_sharded

DISTILLED_SHARE = 0.25  # of the steps of stage 2, by default; a short one has at least so many steps with teachers:
DISTILLED_STEPS = 16
PRIOR_EXAMPLES = 200  # the number of a task's own examples that outweigh its teachers, by default


class TwoStageTrainer(StudentPushingTrainer):
    """Trainer whose steps belong to stage 1, the task alone, or to stage 2, with the distillation terms."""

    _prepared: Preparation | None
    _unlabelled: UnlabelledBatches | None
    _fusion_parameters: list[nn.Parameter]
    _stage_2_start: int | None = None  # in the training that is resumed
    _terms: LoggedTerms

    @property
    def distillation(self) -> Distillation:
        """The distillation of the student, with the settings of the running step."""
        return distillation_of(self.model_with_adapters, self.block.student)

    @property
    def distillation_start(self) -> float:
        """The fraction of all steps in stage 1, by the argument or the default for this student."""
        if self.args.distillation_start is not None:
            return self.args.distillation_start
        return 0.0 if self.distillation.start_digests else 0.5

    @property
    def distillation_weight(self) -> float:
        """The weight of the distillation loss in the first step of stage 2, by the argument or the default.

        The teachers are a prior of a fixed strength, whose weight beside a mean over n examples falls with n. Where
        they were weighed, the strength follows what they are worth: their gain on labels of the task, or 0 where that
        is no more than noise. By default it falls linearly then, to 0 in the last step: the student starts at their
        weighted mean, and learns what they do not know.
        """
        if self.args.distillation_weight is not None:
            return self.args.distillation_weight
        n_examples = number_of_examples(self.train_dataset)
        if n_examples is None:  # a stream, or a loader of the user's own: what the training reads of it
            n_examples = self.state.max_steps * self._examples_per_step
        weights = self.distillation.weights
        strength = 1.0 if weights is None else weights.strength
        return strength * min(1.0, PRIOR_EXAMPLES / max(1, n_examples))

    @property
    def _weight_falls(self) -> bool:
        """Whether the weight of the distillation loss falls over stage 2."""
        return self.args.distillation_weight is None and self.distillation.weights is not None

    @property
    def distillation_share(self) -> float:
        """The share of the steps of stage 2 in which the teachers run, by the argument or the default.

        By default all steps, and with weighted teachers a quarter, since the student starts at their mean already.
        Examples without labels are read in steps with teachers, so these are all with them.
        """
        if self.args.distillation_share is not None:
            return self.args.distillation_share
        is_exact = self.distillation.weights is None or self._unlabelled is not None
        if is_exact or self.distillation.config.carrier != "student":
            return 1.0
        left = self.state.max_steps - self.first_distillation_step
        return min(1.0, max(DISTILLED_SHARE, DISTILLED_STEPS / max(1, left)))

    @property
    def first_distillation_step(self) -> int:
        """The number of the first step of stage 2, counted from 0; a training resumed in stage 2 keeps it."""
        return self._first_of_stage_2(self.state.max_steps)

    def _first_of_stage_2(self, max_steps: int) -> int:
        first = ceil(self.distillation_start * max_steps)
        return first if self._stage_2_start is None else min(first, self._stage_2_start)

    def _runs_teachers(self, step: int) -> bool:
        """Whether a step belongs to stage 2 and to the share of its steps in which the teachers run.

        Systematic sampling: from a start between 0 and 1 that the seed draws, each step adds the share, and the steps
        in which the sum passes a whole number are taken. It depends on nothing else, so that all processes take the
        same steps, and a resumed training the ones that it would have taken.
        """
        number, share = step - self.first_distillation_step, self.distillation_share
        start = Random(self.args.seed).random()
        return number >= 0 and floor((number + 1) * share + start) > floor(number * share + start)

    @property
    def _examples_per_step(self) -> int:
        """The number of examples of an optimizer step, in all processes."""
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _enter_stage(self) -> None:
        """Set the settings of the step on the model."""
        if self._prepared is None:
            raise RuntimeError(
                "The training was not prepared; an overridden create_optimizer_and_scheduler must call super()."
            )
        step, first, scale = self.state.global_step, self.first_distillation_step, self._terms_factor
        scaler = self.accelerator.scaler  # of float16, by which accelerate multiplies the loss
        left = 1 - (step - first) / max(1, self.state.max_steps - 1 - first)  # of stage 2, from 1 to 0
        # Else the other carriers would pass on fused outputs that the student does not learn.
        counts = self.distillation_weight > 0 or not self._weight_falls
        self.distillation.begin_step()
        self.distillation.settings = StageSettings(
            enabled=self._runs_teachers(step) and (counts or self.distillation.config.carrier == "student"),
            weight=self.distillation_weight * (left if self._weight_falls else 1.0),
            regularization=self.args.fusion_regularization,
            scale=scale if scaler is None else scaler.scale(torch.tensor(scale, device=self.accelerator.device)),
            fused_probability=torch.tensor(left),
            calibration=self._prepared.calibration,
            predictions=self._prepared.predictions,
        )

    @property
    def _share(self) -> float:
        """The share of a batch in the distillation loss of its step."""
        return 1.0 if self._unlabelled is None else 0.5

    @property
    def _terms_factor(self) -> float:
        """The factor of the distillation terms of a micro-batch in the loss of its step."""
        return self._share / self.current_gradient_accumulation_steps / self.distillation_share

    def _loss_factor(self, num_items_in_batch: torch.Tensor | None) -> float:
        """Return the factor of the model's loss in the loss of a step, as Trainer reports it."""
        if self.compute_loss_func is None and (not self.model_accepts_loss_kwargs or num_items_in_batch is None):
            return 1 / self.current_gradient_accumulation_steps
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def compute_loss_context_manager(self) -> ExitStack:
        """Return Trainer's context of a loss, with the teachers in evaluation mode.

        Trainer puts the whole model into training mode just before it enters the context.
        """
        if self._prepared is not None and self.model.training:
            for module in self._prepared.teacher_modules:
                module.eval()
        return super().compute_loss_context_manager()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Compute the task loss, whose gradient the distillation terms join; the arguments are those of Trainer.

        Raises:
            ValueError: If a training batch has no labels.
        """
        if model.training:
            self._check_labels(inputs)
        with self._shifting_labels():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @contextmanager
    def _shifting_labels(self) -> Iterator[None]:
        """Let the label smoother compare a token's logits with the next token, where the head predicts it.

        Trainer does so for the class names of transformers, which neither flexible heads nor wrappers have.
        """
        smoother, inner = self.label_smoother, self.model_with_adapters
        is_own = smoother is None or self._base_computes_loss or not self._passes_inputs_on
        if not is_own and predicts_next(inner, name_of_head(inner, self.block.student)):
            self.label_smoother = partial(smoother, shift_labels=True)  # type: ignore[assignment]
        try:
            yield
        finally:
            self.label_smoother = smoother

    def _check_labels(self, inputs: dict[str, Any]) -> None:
        has_labels = any(inputs.get(name) is not None for name in self.label_names)
        if self.label_names and not has_labels and not self._computes_own_loss:
            raise ValueError(
                f"The training batches have no labels ({', '.join(self.label_names)}), only {', '.join(inputs)}; "
                "add a column of labels to train_dataset, or name the columns that hold them in label_names."
            )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the micro-batches of a step, as Trainer does; none behind the last step.

        Trainer takes one step too many if it resumes after the last one, within an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a forward and a backward pass, in stage 2 also on examples without labels, and return the detached loss.

        The returned loss includes the distillation terms. In steps without teachers the optimizer does not see the
        fusion. The arguments are those of Trainer. A loss that is NaN or infinite is a `FloatingPointError`, unless
        `stop_on_nan` is unset.
        """
        part = 1 / self.current_gradient_accumulation_steps
        keep_active(self.model_with_adapters, self.block)
        self._enter_stage()
        task_loss = super().training_step(model, inputs, num_items_in_batch)
        runs_teachers = self.distillation.settings.enabled
        if not runs_teachers:
            # Zero gradients would age the optimizer's moments and let weight decay act without the teachers.
            for parameter in self._fusion_parameters:
                parameter.grad = None

        def run_again() -> None:
            self.compute_loss(self.model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)

        record = self._take_record(task_loss, run_again)
        self._terms.stage = 1 if self.state.global_step < self.first_distillation_step else 2
        self._terms.note(task_loss, record, part, self._share, self._loss_factor(num_items_in_batch))
        loss = task_loss + self._terms_factor * record.added
        if self._unlabelled is not None and runs_teachers:
            loss = loss + self._terms_factor * self._distil_unlabelled(model, self._unlabelled, part)
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            self._terms.note_gradients()
        return loss

    def _distil_unlabelled(self, model: nn.Module, unlabelled: UnlabelledBatches, part: float) -> torch.Tensor:
        """Run a forward and a backward pass on examples without labels, and return the terms."""
        number = self.state.global_step - self.first_distillation_step
        batch = unlabelled.next(number, self._train_batch_size, self.args.gradient_accumulation_steps)
        inputs = self._prepare_inputs(batch)
        self._enter_stage()
        with self.compute_loss_context_manager():
            # The terms ride on each output; so does the head, which no gradient reaches in this pass.
            parts = [value.sum() for value in self._outputs(model, inputs) if isinstance(value, torch.Tensor)]
            zero = 0.0 * torch.stack(parts).sum()
        self.accelerator.backward(zero)
        # An output may be infinite, as masked logits are: its gradient is 0, but not its part of the sum.
        record = self._take_record(torch.zeros_like(zero), lambda: self._outputs(self.model, inputs))
        self._terms.note_distillation(record, part * self._share)
        return record.added

    def _outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Collection[Any]:
        """Run the model on a batch without labels, and return its outputs."""
        outputs = model(**inputs)
        return outputs.values() if isinstance(outputs, dict) else outputs

    def _take_record(self, task_loss: torch.Tensor, run_again: Callable[[], object]) -> DistillationRecord:
        """Return the terms of a backward pass, after a check that they and the task loss are finite."""
        distillation = self.distillation
        record = distillation.take_record()
        loss = task_loss + record.added.to(task_loss)
        if not self.args.stop_on_nan or torch.isfinite(loss):
            return record

        def once_more() -> None:
            with self.compute_loss_context_manager():  # on the model itself: in other processes all may be finite
                run_again()

        if is_sharded(self.model_with_adapters):  # which one process cannot run alone
            raise loss_error(self.state.global_step + 1, loss, record, lambda: "")
        find = partial(find_overflow, distillation, once_more, distillation.config.carrier != "student")
        raise loss_error(self.state.global_step + 1, loss, record, find)

    @property
    def _gives_inputs_to_inner(self) -> bool:
        """Whether a batch is the input of the model with adapters, or of a wrapper that passes on whatever it gets."""
        return self.model_with_adapters is self.model or (self._passes_inputs_on and not self._computes_own_loss)

    @property
    def _passes_inputs_on(self) -> bool:
        """Whether the model has the adapters itself, or passes on whatever it gets."""
        if self.model_with_adapters is self.model:
            return True
        parameters = inspect.signature(self.model.forward).parameters.values()
        return all(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters)

    @property
    def _computes_own_loss(self) -> bool:
        """Whether a subclass, or the other base of it, has a `compute_loss` of its own."""
        return self._base_computes_loss or type(self).compute_loss is not TwoStageTrainer.compute_loss

    @property
    def _base_computes_loss(self) -> bool:
        """Whether the other base has a `compute_loss` of its own; a subclass may add to that of Trainer."""
        return super().compute_loss.__func__ is not Trainer.compute_loss  # type: ignore[attr-defined]

    @property
    def _loss_is_outside(self) -> bool:
        """Whether the loss is not the model's own."""
        return self._takes_labels_away or self._computes_own_loss

    @property
    def _takes_labels_away(self) -> bool:
        """Whether the loss is computed outside the model, which then gets no labels."""
        return self.label_smoother is not None or self.compute_loss_func is not None

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch as the model gets it."""
        return {name: v for name, v in inputs.items() if name != "labels" or not self._takes_labels_away}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the loss terms one by one beside Trainer's values, wherever `report_to` sends them.

        `task_loss` is the mean over all steps since the last log. The means over the steps with teachers are:
        `distillation_loss` (unweighted), `fusion_regularization` (weighted), `attention/<teacher>`,
        `distillation_loss/<objective>` where there are several, and for `task_specific` the `probe_loss` and the
        `task_specific_ratio`. `grad_norm/student`, `grad_norm/head` and in stage 2 `grad_norm/fusion` are the norms
        of the last step before clipping. The first log has `teacher_gain` and `teacher_weight/<teacher>`, if learned.
        """
        if "loss" in logs:
            logs |= self._terms.take_means()
        super().log(logs, start_time)
