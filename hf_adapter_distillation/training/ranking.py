"""Choice and calibration of the teachers on the training data, before the first step."""

from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..method.parameters import active_block
from ..method.predictions import scores
from ..student.adding import keep_teachers
from ..teachers.ranking import fit_platt, own_logits, rank_teachers
from .data import batches, drawn

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

RANKED_EXAMPLES = 256  # of the training data


def _examples(trainer: "DistillationTrainer", what: str) -> list[dict[str, Any]]:
    examples = None
    if trainer.train_dataset is not None:
        examples = drawn(trainer.train_dataset, RANKED_EXAMPLES, trainer.args.seed)
    if examples is None:
        raise ValueError(f"{what} reads examples before the training; pass a train_dataset that can be read twice.")
    return list(batches(trainer, examples))


def select_teachers(trainer: "DistillationTrainer") -> None:
    """Goes on with the best teachers alone, if `DistillationConfig.teacher_selection` is a number.

    A teacher that is not above chance is not among them, unless none is. A student that still is where its teachers'
    average was starts anew at that of the best.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If the training data cannot be read before the training.
    """
    distillation, block = trainer.distillation, trainer.block
    k = distillation.config.teacher_selection
    if k == "all":
        return
    with torch.random.fork_rng():  # the order of the training data stays what it is
        ranking = rank_teachers(trainer.model, block, _examples(trainer, f"teacher_selection={k}"))
    # Processes may round differently, and must not choose differently.
    values = torch.tensor([ranking.scores[name] for name in block.teachers], device=trainer.args.device)
    means = trainer.accelerator.reduce(values, "mean").tolist()
    found = dict(sorted(zip(block.teachers, means, strict=True), key=lambda pair: -pair[1]))
    best = [name for name, score in found.items() if score > ranking.chance][:k]
    if not best:
        logger.warning(
            f"No teacher of {block.student!r} is above chance on its training data ({ranking.what} {means[0]:.3f} and "
            "the like); the best are kept. Pass teacher_selection='all' to silence this."
        )
        best = list(found)[:k]
    if len(best) < len(block.teachers):
        keep_teachers(trainer.model, block, best)
        trainer.block = active_block(trainer.model)
    distillation.ranking = found
    lines = [f"{'teacher':<32}{ranking.what:>10}"]
    lines += [f"{name:<32}{score:>10.4f}{'  kept' if name in best else ''}" for name, score in found.items()]
    table = "\n".join(lines)
    logger.info(table)
    if not trainer.args.disable_tqdm and trainer.is_world_process_zero():
        tqdm.write(table)


def calibrate(trainer: "DistillationTrainer") -> None:
    """Fits the calibration of the teachers' scores on the training data, if the objective `cross_task` asks for it.

    Args:
        trainer: The trainer.

    Raises:
        ValueError: If the training data cannot be read before the training.
    """
    distillation = trainer.distillation
    if "cross_task" not in distillation.config.objectives:
        return
    with torch.random.fork_rng():
        inputs = _examples(trainer, "The objective 'cross_task'")
        logits, labels = own_logits(trainer.model, trainer.block, inputs)
    calibration = fit_platt(scores(logits), labels)
    distillation.calibration = trainer.accelerator.reduce(calibration, "mean")
