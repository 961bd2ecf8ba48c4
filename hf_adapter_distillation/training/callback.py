"""Both ends of a distillation: the start of the student, and the proof that the teachers are what they were."""

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..method.parameters import check_trainable
from ..student.provenance import adapter_digest, teacher_sources
from ..student.training_run import TrainingRun, finite_metrics
from .prediction_cache import predict
from .ranking import calibrate

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)


class FrozenTeachersCallback(TrainerCallback):
    """Shows what is trained, starts the student at its teachers, and holds those to being frozen.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: "DistillationTrainer") -> None:
        self.trainer = trainer
        self.digests: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the teachers' digests, fits the start, and writes the table of parameters."""
        trainer = self.trainer
        check_trainable(trainer.model, trainer.block)
        names = trainer.block.teachers
        of_teachers = [trainer.model.get_adapter(name).values() for name in names]
        trainer._teacher_modules = [m for places in of_teachers for place in places for m in place.values()]
        trainer._terms.begin(trainer.model, trainer.block)
        trainer.distillation.run = None  # that of an earlier training
        self.digests = {name: adapter_digest(trainer.model, name) for name in names}
        trainer.fit_start()
        calibrate(trainer)
        predict(trainer)
        table = trainer.parameter_table()
        logger.info(table)
        if not args.disable_tqdm and state.is_world_process_zero:
            tqdm.write(table)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compares the digests and notes the run for the provenance of the saved student."""
        trainer = self.trainer
        check_trainable(trainer.model, trainer.block)
        teachers = teacher_sources(trainer.model, trainer.distillation)
        for teacher in teachers:
            if teacher.digest != self.digests[teacher.name]:
                raise RuntimeError(
                    f"The weights of teacher {teacher.name!r} changed in training; reload it before you use it."
                )
        derived: dict[str, Any] = {
            "distillation_start": trainer.distillation_start,
            "distillation_weight": trainer.distillation_weight,
            "first_distillation_step": trainer.first_distillation_step,
        }
        if trainer.distillation.ranking is not None:
            derived["ranking"] = trainer.distillation.ranking
        run = trainer.distillation.run = TrainingRun.of(trainer.args, state, trainer.train_dataset, teachers, derived)
        if args.push_to_hub or trainer.args.analysis:
            if state.global_step > trainer.first_distillation_step:
                run.attention = trainer._observe_attention()
            elif trainer.args.analysis:
                logger.warning("There is no analysis: the training ended before stage 2; lower distillation_start.")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the metrics of a trained student for its provenance."""
        if (run := self.trainer.distillation.run) is not None:
            run.evaluation |= finite_metrics(kwargs["metrics"])
