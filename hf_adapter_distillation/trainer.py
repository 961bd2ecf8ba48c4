"""The two-stage training of a distilled student."""

import os
from collections import defaultdict
from functools import partial
from math import ceil
from typing import Any

import torch
from adapters import AdapterTrainer, ModelAdaptersMixin, Stack
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ._compat import (
    ADAPTER_CONFIG_NAME,
    HEAD_WEIGHTS_NAME,
    SAFE_HEAD_WEIGHTS_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    loss_counts_items,
)
from .callback import FrozenTeachersCallback
from .composition import AdapterDistillation, join_block
from .configuration import DistillationTrainingArguments
from .hub import adapter_digest, read_provenance
from .parts import check_trainable, is_fusion, parameter_table
from .placement import drop_fusion
from .start import can_be_fitted, fit_start, start_examples
from .state import Distillation, DistillationRecord, distillations

logger = logging.get_logger(__name__)

FUSION_WEIGHTS_NAME = "distillation_fusion.safetensors"
PRIOR_EXAMPLES = 200  # as many of a task's own examples outweigh its teachers, by default


class DistillationTrainer(AdapterTrainer):
    """Trains a student adapter in two stages in one `train()`.

    A student that starts at its teachers' average is first moved to the average of their updates (`start.fit_start`).
    Stage 1 trains the student and its head on the task alone; stage 2, from the step
    `ceil(distillation_start * max_steps)` on, adds the distillation loss (`losses.feature_matching_loss`, the mean
    over layers times `distillation_weight`) and trains the fusion with it. Evaluation runs the student alone. There is
    one optimizer and one schedule; the stage follows from the step, so that resuming needs no more than a checkpoint.

    A checkpoint holds the student with its head, as `save_adapter` writes them, and the fusion; no teacher. At the end
    the fusion is dropped (unless `keep_fusion` is set) and the student is the active adapter.

    Args:
        model: A model on which `train_adapter` was called for an adapter that has `distill_from`.
        args: The arguments of both stages.
        **kwargs: The other arguments of `transformers.Trainer`: datasets, `data_collator` and so on.

    Raises:
        TypeError: If `args` are no `DistillationTrainingArguments`.
        ValueError: If no distilled student is active, or something else is left trainable.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationTrainingArguments | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DistillationTrainingArguments("tmp_trainer")
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(
                f"args must be DistillationTrainingArguments, not {type(args).__name__}; they take the same arguments."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; start with accelerate launch."
            )
        if model is not None:
            _active_block(model)
        super().__init__(model, args, **kwargs)
        self.block = _active_block(self.model)
        check_trainable(self.model, self.block)
        # Adapters hides the signature by which Trainer decides this; a wrong answer scales the gradients.
        self.model_accepts_loss_kwargs = self.label_smoother is None and loss_counts_items(self.model)
        if self.args.torch_compile and self.distillation.level == "layer":
            raise ValueError(
                "torch_compile=True is not supported where whole layers are fused (level='layer'); leave it out."
            )
        if self.distillation.config.carrier == "dual" and (self.label_smoother or self.compute_loss_func):
            raise ValueError(
                "The carrier 'dual' needs the model's own loss in both of its passes; leave out "
                "label_smoothing_factor and compute_loss_func, or choose the carrier 'mixed'."
            )
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._attention: dict[tuple[str, ...], torch.Tensor] = {}
        self._record: DistillationRecord
        self._teacher_modules: list[nn.Module] = []
        self._fusion_parameters: list[nn.Parameter] = []
        self.add_callback(FrozenTeachersCallback(self))

    @property
    def distillation(self) -> Distillation:
        """The live state of the student's distillation."""
        return distillations(self.model.adapters_config)[self.block.student]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Runs both stages.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last one in `output_dir`.
            **kwargs: As for `transformers.Trainer.train`.

        Returns:
            The `TrainOutput` of Trainer.

        Raises:
            ValueError: If the student has no head, or a checkpoint was made with other teachers or lacks weights.
            RuntimeError: If a teacher's weights have changed at the end.
        """
        self.model.train_adapter(self.block)
        if self.model_init is None and self.compute_loss_func is None:
            self._check_head()
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
        examples = start_examples(self.train_dataset, self.args.seed)
        if examples is None:
            logger.warning(
                f"{student!r} starts at the average of its teachers' weights: a stream of examples is not read twice. "
                "Pass DistillationConfig(student_start='average') to silence this."
            )
            return

        def forward_passes() -> None:
            with torch.random.fork_rng():  # the order of the training data stays what it is
                for inputs in self.get_test_dataloader(examples):
                    inputs = self._prepare_inputs(inputs)
                    if self.label_smoother is not None or self.compute_loss_func is not None:
                        inputs.pop("labels", None)
                    with self.compute_loss_context_manager():
                        self.model(**inputs)

        explained = fit_start(self.model, student, forward_passes, partial(self.accelerator.reduce, reduction="sum"))
        logger.info(f"{student!r} starts at the teachers' mean update, {explained:.1%} of which it explains.")

    # The stages

    @property
    def distillation_start(self) -> float:
        """The fraction of all steps in stage 1: the argument of that name, or what its default is for this student."""
        if self.args.distillation_start is not None:
            return self.args.distillation_start
        return 0.5 if self.distillation.start_digest is None else 0.0

    @property
    def distillation_weight(self) -> float:
        """The weight of the distillation loss: the argument of that name, or what its default is for this data.

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
        distillation.scale = self._loss_scale(num_items_in_batch)
        for module in self._teacher_modules:  # Trainer puts the whole model into training mode at each step
            module.eval()

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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass; in stage 1 the optimizer does not see the fusion.

        Returns:
            The loss of the micro-batch, detached.
        """
        loss = super().training_step(*args, **kwargs)
        if not self.distillation.enabled:
            # Zero gradients would age the optimizer's moments and let weight decay act before stage 2.
            for parameter in self._fusion_parameters:
                parameter.grad = None
        self._note(loss, self._record)
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
        os.makedirs(output_dir, exist_ok=True)
        student = self.block.student
        # Adapters cannot write prefixes as safetensors: several layers share them.
        has_prefix = any(f".prefix_tunings.{student}." in name for name, _ in self.model.named_parameters())
        self.model.save_adapter(os.path.join(output_dir, student), student, use_safetensors=not has_prefix)
        if fusion := {key: value for key, value in self.model.state_dict().items() if is_fusion(key, student)}:
            save_file(fusion, os.path.join(output_dir, FUSION_WEIGHTS_NAME))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = os.path.join(resume_from_checkpoint, self.block.student)
        self._check_teachers_of(folder)
        fusion = os.path.join(resume_from_checkpoint, FUSION_WEIGHTS_NAME)
        if not os.path.isfile(fusion):
            raise ValueError(f"{fusion} does not exist; resume from a checkpoint-* folder of a distillation.")
        state = load_file(fusion)
        for name in (SAFE_WEIGHTS_NAME, SAFE_HEAD_WEIGHTS_NAME):
            if os.path.exists(path := os.path.join(folder, name)):
                state.update(load_file(path))
        for name in (WEIGHTS_NAME, HEAD_WEIGHTS_NAME):
            if os.path.exists(path := os.path.join(folder, name)):
                state.update(torch.load(path, map_location="cpu", weights_only=True))
        own = self.model.state_dict()
        wrong = {name for name, value in state.items() if name not in own or own[name].shape != value.shape}
        wrong |= {name for name, p in self.model.named_parameters() if p.requires_grad and name not in state}
        if wrong:
            raise ValueError(
                f"The checkpoint {resume_from_checkpoint} does not fit {self.block.student!r}: {len(wrong)} weights "
                f"are missing, unknown or of another shape, {min(wrong)} the first; use the configs of that training."
            )
        # Straight into the parameters: adapters would put a new head in the place of the one that is trained.
        self.model.load_state_dict(state, strict=False)
        # Adapters lays out the bases of ReFT anew where it saves, and rounding follows the layout.
        self.model.apply_to_adapter_layers(lambda i, layer: layer.pre_save_adapters())

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best student from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _check_teachers_of(self, folder: str) -> None:
        if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_NAME)):
            raise ValueError(
                f"{folder} does not exist, so there is no checkpoint of {self.block.student!r} to resume."
            )
        saved = {teacher["name"]: teacher["digest"] for teacher in read_provenance(folder)["teachers"]}
        here = {teacher: adapter_digest(self.model, teacher) for teacher in self.block.teachers}
        if different := sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name)):
            raise ValueError(
                f"The checkpoint {folder} was made with other teachers than the model has now; different or missing: "
                f"{', '.join(different)}. Load the same teachers, or start anew without resume_from_checkpoint."
            )

    # Logging

    def _note(self, loss: torch.Tensor, record: DistillationRecord) -> None:
        """Adds the terms of one micro-batch to the sums that the next log divides by the number of steps."""
        step = 1 / self.current_gradient_accumulation_steps
        self._sums["steps"] += step
        if record.distillation_loss is None or record.fusion_regularization is None:  # stage 1
            self._sums["task_loss"] += loss
            return
        added = self.distillation.weight * record.distillation_loss + record.fusion_regularization
        if record.fused_task_loss is not None:
            fused_task_loss = record.fused_task_loss / self.distillation.scale  # normalised as the task loss is
            added = added + fused_task_loss
            self._sums["fused_task_loss"] += step * fused_task_loss
        self._sums["task_loss"] += loss - step * added
        self._sums["stage_2_steps"] += step
        self._sums["distillation_loss"] += step * record.distillation_loss
        self._sums["fusion_regularization"] += step * record.fusion_regularization
        for names, weights in record.attention.values():
            self._attention[names] = self._attention.get(names, 0.0) + step * weights / len(record.attention)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the loss terms one by one beside Trainer's values.

        `task_loss` is the mean over all steps since the last log; `distillation_loss` (unweighted),
        `fusion_regularization` (weighted) and `attention/<teacher>` are means over those steps that were in stage 2.

        Args:
            logs: What Trainer logs.
            start_time: The start of the training, in seconds.
        """
        if "loss" in logs and self._sums:
            sums = {name: self.accelerator.gather(total).mean().item() for name, total in self._sums.items()}
            self._sums.clear()
            stage_2_steps = sums.pop("stage_2_steps", 0)
            for names, total in self._attention.items():
                for name, weight in zip(names, self.accelerator.reduce(total, "mean").tolist(), strict=True):
                    sums[f"attention/{name}"] = sums.get(f"attention/{name}", 0.0) + weight
            self._attention.clear()
            logs["task_loss"] = round(sums.pop("task_loss") / sums.pop("steps"), 6)
            logs |= {name: round(total / stage_2_steps, 6) for name, total in sums.items()}
            logs["stage"] = 2 if stage_2_steps else 1
        super().log(logs, start_time)

    def parameter_table(self) -> str:
        """What is trained and what is frozen.

        Returns:
            A table with a row for the base model, the student, its head, the fusion, and the teachers.
        """
        return parameter_table(self.model, self.block)

    def _check_head(self) -> None:
        student = self.block.student
        if hasattr(self.model, "heads") and student not in self.model.heads:
            raise ValueError(
                f"{student!r} has no head; add one of that name, "
                f"for instance model.add_classification_head({student!r}, num_labels=2)."
            )


def _active_block(model: PreTrainedModel) -> AdapterDistillation:
    if not isinstance(model, ModelAdaptersMixin):
        raise TypeError(f"{type(model).__name__} has no adapters; call adapters.init(model) first.")
    block = join_block(model.active_adapters)
    if block is None or block.student not in distillations(model.adapters_config):
        setup, known = model.active_adapters, distillations(model.adapters_config)
        last = setup.children[-1] if setup is not None else None
        if isinstance(last, str) and last in known and known[last].config.teachers:
            raise ValueError(
                f"No distilled student is active: {setup} runs {last!r} without its teachers; call "
                f"model.train_adapter({last!r}) last, and to put a frozen adapter below it, set "
                "model.active_adapters = Stack(name, model.active_adapters) then."
            )
        raise ValueError(
            f"No distilled student is active (the active setup is {setup}); add one with "
            "model.add_adapter(name, distill_from=[...]) and call model.train_adapter(name). "
            "A student whose teachers were all deleted has nothing to learn from."
        )
    return block


AdapterDistillationTrainer = DistillationTrainer
