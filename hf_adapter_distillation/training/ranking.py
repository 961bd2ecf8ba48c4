"""Which teachers suit a new task: what they are worth on its training data, before the first step."""

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch.nn.functional import cosine_similarity
from tqdm.auto import tqdm
from transformers.utils import logging

from ..composition import AdapterDistillation
from ..method.heads import is_binary, is_of_sequences, shares_labels
from ..method.losses import token_weights
from ..method.parameters import active_block
from ..method.predictions import of_each_teacher, scores, without_dropout
from ..student.adding import keep_teachers
from ..teachers.calibration import fit_platt
from .data import batches, drawn

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

RANKED_EXAMPLES = 256  # of the training data


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """The probability that a positive example has a higher score than a negative one, ties counting half.

    Args:
        scores: The scores, (n_examples,).
        labels: 0 or 1, (n_examples,).

    Returns:
        The area under the ROC curve, from 0 to 1; 0.5 where one of the labels is missing.
    """
    positive, negative = scores[labels == 1].unsqueeze(1), scores[labels == 0]
    above = (positive > negative).double() + 0.5 * (positive == negative).double()  # (n_positive, n_negative)
    return above.mean().item() if above.numel() else 0.5


class Ranking(NamedTuple):
    """What teachers are worth for a task.

    Args:
        scores: The score of each teacher, the higher the better.
        what: What the scores are: `"AUC"`, `"accuracy"`, `"-loss"` or `"cosine"`.
        chance: What a teacher that knows nothing hardly ever exceeds; -inf where there is no such level.
    """

    scores: dict[str, float]
    what: str
    chance: float


def own_logits(
    model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What teachers with the labels of the student predict for sequences.

    Args:
        model: The model.
        block: The distillation block.
        inputs: The examples, batch by batch, with their labels.

    Returns:
        The logits, (n_teachers, n_examples, n_labels), and the labels, (n_examples,).
    """
    logits = [torch.cat(batches) for batches in of_each_teacher(model, block, inputs, "logits")]
    return torch.stack(logits), torch.cat([batch["labels"].reshape(-1) for batch in inputs])


def rank_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]) -> Ranking:
    """Scores the teachers by what each of them is worth for a new task without any training.

    Where the teachers' heads predict the student's labels, each is scored with its own head: by the area under the
    ROC curve for two classes, the accuracy for several, else the loss. Where they do not, by the cosine between what
    it changes in the last hidden states and what the others change on average: a teacher that agrees with none has
    nothing to add. The level of chance is two standard errors above that of a guess (Mann and Whitney, 1947, for the
    area).

    Args:
        model: The model.
        block: The distillation block.
        inputs: Examples of the new task, batch by batch.

    Returns:
        The ranking.

    Raises:
        ValueError: If there is neither a common label space nor hidden states in the outputs of the model.
    """
    student, teachers = block.student, block.teachers
    if not all("labels" in batch for batch in inputs) or not all(shares_labels(model, student, t) for t in teachers):
        found, what, chance = _agreement(model, block, inputs), "cosine", float("-inf")
    elif not is_of_sequences(model, student):
        losses = torch.stack([torch.stack(batches) for batches in of_each_teacher(model, block, inputs, "loss")])
        sizes = torch.tensor([len(batch["labels"]) for batch in inputs]).to(losses)  # (n_batches,)
        found, what, chance = (-losses @ sizes / sizes.sum()).tolist(), "-loss", float("-inf")
    else:
        logits, labels = own_logits(model, block, inputs)
        if is_binary(model, student):
            found, what = [area_under_curve(scores(one), labels) for one in logits], "AUC"
            n_positive = max(1, int((labels == 1).sum()))
            n_negative = max(1, len(labels) - n_positive)
            chance = 0.5 + 2 * sqrt((len(labels) + 1) / (12 * n_positive * n_negative))
        else:
            found, what = (logits.argmax(dim=-1) == labels).double().mean(dim=1).tolist(), "accuracy"
            guess = labels.bincount().max().item() / len(labels)
            chance = guess + 2 * sqrt(guess * (1 - guess) / len(labels))
    return Ranking(dict(zip(teachers, found, strict=True)), what, chance)


def _agreement(model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]) -> list[float]:
    """The cosine of each teacher's update of the last hidden states with the mean of the others' updates."""
    below = block.children[:-1]
    setups = [AdapterSetup(Stack(*below) if below else None)]
    setups += [AdapterSetup(Stack(*below, name)) for name in block.teachers]
    totals, n_examples = torch.zeros(len(block.teachers)), 0
    with without_dropout(model), torch.no_grad():
        for batch in inputs:
            states = []
            for setup in setups:
                with setup:
                    states.append(_last_states(model(**batch, output_hidden_states=True)))
            updates = torch.stack(states[1:]).float() - states[0].float()  # (N, B, T, d)
            others = (updates.sum(dim=0) - updates) / (len(updates) - 1)  # (N, B, T, d)
            mask = batch.get("attention_mask")
            shape = updates.shape[1:3]
            mask = torch.ones(shape) if mask is None or mask.shape != shape else mask
            weights = token_weights((mask != 0).to(updates.device))  # (B, T)
            totals += (weights * cosine_similarity(updates, others, dim=-1)).sum(dim=(1, 2)).cpu()
            n_examples += len(weights)
    return (totals / n_examples).tolist()


def _last_states(output: Any) -> torch.Tensor:
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    if not states:
        raise ValueError(
            f"teacher_selection needs hidden states, but {type(output).__name__} has none; leave it out, or give the "
            "teachers heads with the labels of the student."
        )
    return states[-1]


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
