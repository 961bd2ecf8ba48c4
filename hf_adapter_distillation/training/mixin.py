"""The two-stage training of a distilled student."""

from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from adapters import Stack
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers.utils import logging

from .._compat import loss_counts_items
from ..analysis.observe import AttentionTable, teacher_attention, write_analysis
from ..composition import AdapterDistillation
from ..configuration import DistillationArgumentsMixin
from ..method.distillation import StageSettings, active_block
from ..method.heads import label_names, text_head
from ..method.parameters import check_trainable, parameter_table
from ..method.wrappers import model_with_adapters
from ..student.blocks import live_block
from ..student.digests import check_teachers_unchanged
from ..student.fusions import drop_fusion
from ..student.provenance import teacher_sources
from ..student.summary import as_table, summary_rows
from ..student.training_run import TrainingRun, finite_metrics, start_settings
from . import checkpoint as checkpoints
from .callbacks import SigtermCallback, StageCallback
from .checks import check_arguments, check_combinations, check_data_types, check_loss
from .construction import shown_to_trainer
from .data import UnlabelledBatches, keeping_random_state, number_of_examples
from .loss_log import LoggedTerms
from .optimizer import check_optimized, fusion_parameters, group_fusion, unprepared
from .preparation import prepare_training
from .sharding import is_sharded
from .writing import WritingTrainer

logger = logging.get_logger(__name__)

ANALYSED_EXAMPLES = 256


class DistillationMixin(WritingTrainer):
    """Train a student adapter in two stages in one `train()`, with any trainer.

    `class MyTrainer(DistillationMixin, TheirTrainer)` adds both stages to a subclass of `transformers.Trainer`, whose
    own loss, data and evaluation stay. Its arguments are a dataclass with `DistillationArgumentsMixin`. The model may
    wrap the model with adapters (`model_with_adapters`), as a `SentenceTransformer` does.

    A student that starts at its teachers is first moved to the (weighted) mean of their updates (`fit_start`).
    Stage 1 trains the student and its head on the task alone. Stage 2, from the step `ceil(distillation_start *
    max_steps)` on, adds the distillation loss and trains the fusion with it. Evaluation runs the student alone. There
    is one optimizer and one schedule. The stage follows from the step, so a checkpoint is enough to resume.

    A checkpoint holds the student with its head, as `save_adapter` writes them, the fusion, and what is trained
    outside the model with adapters; no teacher. At the end the fusion is dropped (unless `keep_fusion` is set) and the
    student is the active adapter.

    Args:
        model: A model on which `train_adapter` was called for an adapter that has `distill_from`, or a wrapper of it.
        distillation_dataset: Examples of the task without labels (columns of labels are left out). In stage 2 each
            batch of the training data comes with one of these, and the distillation loss is the mean of both.
        *others: Positional arguments of the other base.
        **kwargs: The other arguments of `transformers.Trainer`, or of the other base: datasets, `data_collator` and
            so on.

    Raises:
        TypeError: If `args` lack `DistillationArgumentsMixin`, or the model has no adapters.
        ImportError: If `analysis=True` and matplotlib is not installed.
        ValueError: If no distilled student is active, something else in the model with adapters is trainable, the
            model has no loss, or settings exclude one another.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArgumentsMixin | None = None,
        *others: Any,
        distillation_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationArgumentsMixin):
            raise TypeError(
                "args must be DistillationTrainingArguments, or a dataclass of your own with "
                f"DistillationArgumentsMixin, not {type(args).__name__}; they take the same arguments."
            )
        check_arguments(args)
        if model is not None:
            active_block(model_with_adapters(model))
            self.model = model
        gives_inputs = model is not None and self._gives_inputs_to_inner
        with shown_to_trainer(model, loss_counts_items(self.model_with_adapters) if gives_inputs else None):
            if others:
                super().__init__(model, args, *others, **kwargs)
            elif "model" in signature(super().__init__).parameters:  # maybe not as the first, or not beside args
                super().__init__(model=model, args=args, **kwargs)
            else:
                super().__init__(model, args=args, **kwargs)
        inner = self.model_with_adapters
        check_trainable(inner, active_block(inner))
        if self._gives_inputs_to_inner:
            counts = loss_counts_items(inner) if model is None else self.model_accepts_loss_kwargs
            self.model_accepts_loss_kwargs = self.label_smoother is None and counts
            if args.label_names is None and not self.can_return_loss:  # else a trainer may do without
                self.label_names = self.label_names or label_names(inner, active_block(inner).student)
        if args.analysis and is_sharded(inner):
            raise ValueError(
                "analysis=True runs the model in one process, but its base model lies in shards; leave it out."
            )
        self._take(active_block(inner), has_unlabelled=distillation_dataset is not None)
        self._unlabelled = None
        if distillation_dataset is not None:
            dataset, collator = self._without_unused_columns(distillation_dataset)
            world = (args.process_index, args.world_size)
            self._unlabelled = UnlabelledBatches(dataset, collator, self.label_names, args.seed, *world)
        self._prepared = None
        self._checkpoint: str | None = None
        self._terms = LoggedTerms(lambda: self.accelerator)
        self._fusion_parameters = fusion_parameters(inner, self.block.student)
        self._created_optimizer: torch.optim.Optimizer | None = None
        self.add_callback(StageCallback(lambda: self.first_distillation_step, self.callback_handler))
        self._sigterm = SigtermCallback(lambda: self.accelerator) if args.save_on_sigterm else None
        if self._sigterm is not None:
            self.add_callback(self._sigterm)
        self._allow_pushing()

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Run both stages, and return the `TrainOutput` of Trainer.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the last whole one in `output_dir`.
            **kwargs: As for `transformers.Trainer.train`.

        Raises:
            ValueError: If the student has no head, there are no examples, or a checkpoint is not whole, was made with
                other teachers or lacks weights.
            FloatingPointError: If the loss is NaN or infinite, unless `stop_on_nan` is unset.
            RuntimeError: If a checkpoint cannot be written, or a teacher's weights have changed at the end.
        """
        if number_of_examples(self.train_dataset) == 0:
            raise ValueError(
                "train_dataset has no examples; give it some (trl drops those whose answer max_length cuts off)."
            )
        self._prepared = self._checkpoint = self._stage_2_start = None
        resume_from_checkpoint = checkpoints.checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        try:
            with self._sigterm or nullcontext():
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.distillation.settings = StageSettings()
            self.distillation.is_weighed = False
        self._note_training()
        if not self.args.disable_tqdm and self.is_world_process_zero():
            self._show_summary()
        if not self.args.keep_fusion:
            drop_fusion(self.model_with_adapters, self.block.student)
        config = self.model_with_adapters.adapters_config
        self.model_with_adapters.set_active_adapters(Stack(*self.block.children), config.skip_layers)
        return output

    # Before the first step

    def _take(self, block: AdapterDistillation, *, has_unlabelled: bool) -> None:
        """Take a block as the one to train, after a check that its settings suit the training."""
        self.block, inner = block, self.model_with_adapters
        config, is_wrapped = self.distillation.config, inner is not self.model
        check_data_types(inner, block, self.accelerator.mixed_precision)
        check_loss(inner, config, has_other_loss=self._loss_is_outside, is_wrapped=is_wrapped)
        check_combinations(
            self.args,
            self.distillation,
            self.accelerator.distributed_type,
            predicts_text=text_head(inner, block.student) is not None,
            model_has_labels=not self._takes_labels_away,
            has_unlabelled=has_unlabelled,
        )

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Prepare the student, then create optimizer and scheduler for the steps of both stages.

        Trainer calls this before the first step, once it knows the model that is trained.

        Raises:
            ValueError: If `distillation_share` leaves less than one step with teachers.
        """
        inner = self.model_with_adapters
        block = live_block(inner, self.block) if self.model_init is None else active_block(inner)
        self._take(block, has_unlabelled=self._unlabelled is not None)
        left = num_training_steps - self._first_of_stage_2(num_training_steps)
        share = self.args.distillation_share
        if share is not None and 0 < left * share < 1:
            raise ValueError(
                f"distillation_share={share:g} runs the teachers in less than one of the "
                f"{left} steps of stage 2; raise it to 1/{left} or more."
            )
        self._prepared = prepare_training(
            inner,
            self.block,
            self._examples(),
            self.accelerator,
            checkpoint=self._checkpoint,
            n_read=self._examples_per_step * left,
            needs_head=not self._loss_is_outside and inner is self.model,
            show=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        self.block = self._prepared.block
        if self._prepared.explained is None:
            self._prepared = self._prepared._replace(explained=self.distillation.explained)
        self.distillation.explained = None
        if self._checkpoint is not None:
            checkpoints.load_beside(self._beside, self._checkpoint)
        self._terms.begin(inner, self.block)
        if self._unlabelled is not None:
            self._unlabelled.begin()
        if self._created_optimizer is not None and unprepared(self.optimizer) is self._created_optimizer:
            self.optimizer = None  # type: ignore[assignment]  # it belongs to an earlier training
        creates = self.optimizer is None
        self.create_optimizer()
        self._group_fusion()  # an overridden create_optimizer need not know it
        if creates:
            self._created_optimizer = self.optimizer
        check_optimized(self.optimizer, self.model)
        self.create_scheduler(num_training_steps, self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._checkpoint = resume_from_checkpoint  # loaded once the teachers are chosen
        self._stage_2_start = checkpoints.stage_2_start(resume_from_checkpoint)

    # Optimizer

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Create Trainer's optimizer, unless there is one, and give the fusion a group of its own.

        The group has its own learning rate and no weight decay.
        """
        super().create_optimizer()
        self._group_fusion()
        return self.optimizer

    def _group_fusion(self) -> None:
        fusion = fusion_parameters(self.model_with_adapters, self.block.student)
        rate = self.args.fusion_learning_rate
        if rate is None:
            rate = (self.optimizer.defaults.get("lr") or self.args.learning_rate) / 2
        has_scheduler = self.lr_scheduler is not None
        group_fusion(self.optimizer, fusion, self._fusion_parameters, rate, has_scheduler=has_scheduler)
        self._fusion_parameters = fusion

    # After the last step

    def _note_training(self) -> None:
        """Check that the teachers are unchanged, and note the training for the provenance of the student."""
        assert self._prepared is not None
        check_trainable(self.model_with_adapters, self.block)
        check_teachers_unchanged(self.model_with_adapters, self._prepared.digests)
        args, state, distillation = self.args, self.state, self.distillation
        derived: dict[str, Any] = {
            "batch_size": self._examples_per_step,
            "distillation_start": self.distillation_start,
            "distillation_weight": self.distillation_weight,
            "distillation_share": self.distillation_share,
            "first_distillation_step": self.first_distillation_step,
            **start_settings(distillation.weights, self._prepared.explained),
        }
        if distillation.ranking is not None:
            derived["ranking"] = distillation.ranking
        sources = teacher_sources(distillation, self._prepared.digests)  # which have just been checked
        distillation.run = TrainingRun.of(args, state, self.train_dataset, sources, derived)
        if args.push_to_hub or args.analysis:
            distillation.run.attention = self._observe_attention()

    def _show_summary(self) -> None:
        """Print a short table of the training."""
        assert self.distillation.run is not None
        tqdm.write(as_table(summary_rows(self.block.student, self.distillation.run)))

    def _observe_attention(self) -> dict[str, dict[str, float]]:
        """Measure the attention over the teachers, by layer, on evaluation data if possible; write the analysis."""
        args = self.args
        one_set = self.eval_dataset is not None and not isinstance(self.eval_dataset, dict)
        one_set = one_set and number_of_examples(self.eval_dataset) != 0
        examples = self._examples()._replace(train=self.eval_dataset if one_set else self.train_dataset)
        ended_early = self.state.global_step <= self.first_distillation_step
        drawn = None if ended_early else examples.draw(ANALYSED_EXAMPLES)
        if drawn is None:
            reason = "a stream of examples is not read twice; pass an eval_dataset"
            if ended_early:
                reason = "the training ended before stage 2; lower distillation_start"
            if args.analysis:
                logger.warning(f"There is no analysis: {reason}.")
            return {}
        table: AttentionTable = {}
        try:
            with keeping_random_state(), self._autocast():
                batches, inner = [self._model_inputs(inputs) for inputs in drawn()], self.model_with_adapters
                loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
                table = teacher_attention(inner, loader)
                if args.analysis and self.is_world_process_zero():
                    write_analysis(inner, loader, Path(args.output_dir) / "analysis")
        except (OSError, ValueError) as error:  # at the end of a training nothing may be lost
            logger.warning(f"The analysis could not be written: {str(error).rstrip('.')}.")
        return {layer: {name: round(cell.mean, 4) for name, cell in row.items()} for layer, row in table.items()}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the student, also if another adapter is active, and note the metrics for its provenance."""
        with self._active_student():
            metrics = super().evaluate(*args, **kwargs)
        if (run := self.distillation.run) is not None:
            run.evaluation |= finite_metrics(metrics)
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict with the student, also if another adapter is active."""
        with self._active_student():
            return super().predict(*args, **kwargs)

    def parameter_table(self) -> str:
        """Return a table of what is trained and what is frozen: base model, student, head, fusion and teachers."""
        return parameter_table(self.model_with_adapters, self.block)
