"""Both ends of a distillation: the start of the student, and the proof that the teachers are what they were."""

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..method.parameters import check_trainable
from ..student.provenance import adapter_digest, provenance
from ..student.summary import measured, summary
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
        trainer.distillation.training = None  # what an earlier training left for the provenance
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
        teachers = provenance(trainer.model, trainer.distillation)["teachers"]
        for teacher in teachers:
            if teacher["digest"] != self.digests[teacher["name"]]:
                raise RuntimeError(
                    f"The weights of teacher {teacher['name']!r} changed in training; reload it before you use it."
                )
        settings = ("fusion_regularization", "learning_rate", "seed", "fusion_learning_rate")
        best = state.best_global_step if args.load_best_model_at_end else None
        trainer.distillation.training = {
            "teachers": teachers,
            "distillation_start": trainer.distillation_start,
            "distillation_weight": trainer.distillation_weight,
            **{name: getattr(args, name) for name in settings},
            **({} if trainer.distillation.ranking is None else {"ranking": trainer.distillation.ranking}),
            "steps": state.global_step,
            "first_distillation_step": trainer.first_distillation_step,
            "epochs": round(state.epoch or 0, 2),
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            **summary(trainer.train_dataset, state.log_history, best or state.global_step),
        }
        if args.push_to_hub or trainer.args.analysis:
            if state.global_step > trainer.first_distillation_step:
                trainer.distillation.training |= trainer._observe_attention()
            elif trainer.args.analysis:
                logger.warning("There is no analysis: the training ended before stage 2; lower distillation_start.")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the metrics of a trained student for its provenance."""
        if (training := self.trainer.distillation.training) is not None:
            training["evaluation"] = training.get("evaluation", {}) | measured(kwargs["metrics"])
