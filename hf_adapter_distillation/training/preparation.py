"""The steps between `train()` and the first training step; `prepare_training` reads in their order."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from adapters import ModelAdaptersMixin
from torch import nn
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..composition import AdapterDistillation
from ..method.distillation import active_block, distillation_of
from ..method.fusion import fusions_of
from ..method.heads import check_head, check_objectives, text_head
from ..method.layers import adapters_of
from ..method.parameters import check_trainable, parameter_table
from ..method.predictions import PredictionCache, example_keys, of_each_teacher, scores
from ..student.choosing import choose_again, choose_from_pool
from ..student.digests import teacher_digests
from ..student.fusions import warn_of_silent_teachers
from ..student.preparing import forget_weights, keep_teachers, start_at_weights, train_again
from ..student.summary import weights_table
from ..student.warm_start import START_EXAMPLES, can_be_fitted, fit_start, is_at_average
from ..teachers.ranking import fit_platt, own_logits, predict_labels, rank_teachers
from ..teachers.weighing import learn_weights
from .checkpoint import load_student, saved_explained, saved_weights
from .data import Examples, Labelled, keeping_random_state
from .sharding import is_sharded

logger = logging.get_logger(__name__)

RANKED_EXAMPLES = 256  # of the training data
FLOAT16_SCALE = 2.0**10  # of losses in backward passes without a GradScaler
MAX_BYTES = 10**9  # of main memory for predictions, in each process


class Preparation(NamedTuple):
    """Result of `prepare_training`."""

    block: AdapterDistillation  # with the selected teachers
    teacher_modules: list[nn.Module]  # which stay in evaluation mode
    digests: dict[str, str]  # of the teachers' weights
    calibration: torch.Tensor | None  # slope and offset of each teacher's scores, (n_teachers, 2), for `cross_task`
    predictions: PredictionCache | None
    explained: float | None = None  # the share of the teachers' mean update that the student starts with


def prepare_training(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    examples: Examples,
    accelerator: Accelerator,
    *,
    checkpoint: str | None,
    n_read: int,
    needs_head: bool,
    show: bool,
) -> Preparation:
    """Prepare a student for the first step of its training, on the model that is trained, not wrapped.

    Args:
        accelerator: The accelerator, over whose processes results are averaged.
        checkpoint: The folder of the checkpoint to resume from, if any.
        n_read: The number of examples that stage 2 reads.
        needs_head: Whether the loss comes from the student's head.
        show: Whether to print the tables.

    Raises:
        ValueError: If a head, an objective, the data or the checkpoint does not fit.
    """
    train_again(model, block)
    if needs_head:
        check_head(model, block.student)
    block = choose(model, block, examples, accelerator, checkpoint, show)
    check_objectives(model, block)
    block = select_teachers(model, block, examples, accelerator, show)
    if checkpoint is not None:
        block = weigh_again(model, block, checkpoint)
        load_student(model, block, checkpoint)
    else:
        block = weigh(model, block, examples, accelerator, show)
    check_trainable(model, block)
    warn_of_silent_teachers(model, block)
    places = (place for held in adapters_of(model, block.teachers).values() for place in held.values())
    teacher_modules = [module for place in places for module in place.values()]
    digests = teacher_digests(model, block.teachers)
    distillation_of(model, block.student).run = None  # the record of an earlier training
    explained = saved_explained(checkpoint) if checkpoint else fit_student(model, block.student, examples, accelerator)
    calibration = calibrate(model, block, examples, accelerator)
    predictions = predict(model, block, examples, accelerator, n_read)
    _show(parameter_table(model, block), show)
    return Preparation(block, teacher_modules, digests, calibration, predictions, explained)


def _show(table: str, show: bool) -> None:
    logger.info(table)
    if show:
        tqdm.write(table)


def _learning(labelled: Labelled, accelerator: Accelerator) -> dict[str, Any]:
    """Return how a choice or weights are learned from the labels."""
    return {
        "steps": labelled.steps,
        "accumulation": labelled.accumulation,
        "beside": labelled.beside,
        "reduce": partial(accelerator.reduce, reduction="mean"),
        "loss_scale": 1.0 if accelerator.scaler is None else FLOAT16_SCALE,
    }


def _drawn_batches(examples: Examples, reason: str) -> list[dict[str, Any]]:
    drawn = examples.draw(RANKED_EXAMPLES)
    if drawn is None:
        raise ValueError(f"{reason} reads examples before the training; pass a train_dataset that can be read twice.")
    return list(drawn())


def choose(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    examples: Examples,
    accelerator: Accelerator,
    checkpoint: str | None,
    show: bool,
) -> AdapterDistillation:
    """Choose the teachers from their pool, unless they are, or take those of a checkpoint; return the block."""
    distillation = distillation_of(model, block.student)
    if not distillation.candidates:
        return block
    with keeping_random_state():  # the order of the training data stays the same
        if checkpoint is not None:
            choose_again(model, block, checkpoint)
            return active_block(model)
        labelled = examples.labelled()
        if labelled is None:
            raise ValueError(
                f"The teachers of {block.student!r} are chosen from a pool by labelled examples; pass a train_dataset "
                "with two or more, which can be read twice, or call had.choose_teachers before the training."
            )
        ranked = choose_from_pool(model, block, labelled.loss, labelled.halves, **_learning(labelled, accelerator))
    block = active_block(model)
    lines = [f"{f'best of {len(ranked)} adapters':<32}{'relevance':>10}"]
    lines += [f"{name:<32}{ranked[name]:>10.4f}" for name in block.teachers]
    _show("\n".join(lines), show)
    return block


def select_teachers(
    model: ModelAdaptersMixin, block: AdapterDistillation, examples: Examples, accelerator: Accelerator, show: bool
) -> AdapterDistillation:
    """Keep only the best teachers if `DistillationConfig.teacher_selection` is a number; return the active block.

    A teacher that is not above chance is dropped, unless none is. A student that is still at its teachers' average is
    set to the average of the kept ones. Where the heads do not predict the labels, `weigh` keeps the heaviest.
    """
    distillation = distillation_of(model, block.student)
    k = distillation.config.teacher_selection
    if k == "all" or distillation.is_from_pool:
        return block
    with keeping_random_state():  # the order of the training data stays the same
        batches = _drawn_batches(examples, f"teacher_selection={k}")
        by_labels = predict_labels(model, block, batches)
        if not by_labels and _starts_at_weights(model, block) and examples.labelled() is not None:
            return block
        ranking = rank_teachers(model, block, batches)
    # Processes may round differently, and must not choose differently.
    values = torch.tensor([ranking.scores[name] for name in block.teachers], device=accelerator.device)
    means = accelerator.reduce(values, "mean").tolist()
    ranked = dict(sorted(zip(block.teachers, means, strict=True), key=lambda pair: -pair[1]))
    best = [name for name, score in ranked.items() if score > ranking.chance][:k]
    if not best:
        logger.warning(
            f"No teacher of {block.student!r} is above chance on its training data ({ranking.what} {means[0]:.3f} and "
            "the like); the best are kept. Pass teacher_selection='all' to silence this."
        )
        best = list(ranked)[:k]
    if len(best) < len(block.teachers):
        keep_teachers(model, block, best)
        block = active_block(model)
    distillation.ranking = ranked
    lines = [f"{'teacher':<32}{ranking.what:>10}"]
    lines += [f"{name:<32}{score:>10.4f}{'  kept' if name in best else ''}" for name, score in ranked.items()]
    _show("\n".join(lines), show)
    return block


def _starts_at_weights(model: ModelAdaptersMixin, block: AdapterDistillation) -> bool:
    is_weighted = distillation_of(model, block.student).config.student_start == "weighted"
    return is_weighted and bool(fusions_of(model, block.student))


def weigh(
    model: ModelAdaptersMixin, block: AdapterDistillation, examples: Examples, accelerator: Accelerator, show: bool
) -> AdapterDistillation:
    """Learn the weights of the teachers if the student starts at them; return the active block."""
    distillation = distillation_of(model, block.student)
    if distillation.is_weighed or not _starts_at_weights(model, block):
        return block
    forget_weights(model, block.student)
    with keeping_random_state():  # the order of the training data stays the same
        labelled, weights = examples.labelled(), None
        if labelled is not None:
            learning = {"gather": lambda part: gather_object([part]), **_learning(labelled, accelerator)}
            learning["per_layer"] = distillation.config.weights_per_layer
            weights = learn_weights(model, block, labelled.loss, labelled.halves, **learning)
    if weights is None:
        logger.warning(
            f"The teachers of {block.student!r} get equal weights: too few training examples or labels, a stream or "
            "a loader of yours, or no loss above 0. Pass DistillationConfig(student_start='teachers') to silence this."
        )
        return block
    start_at_weights(model, block, weights)
    _show(weights_table(weights, active_block(model).teachers), show)
    if not weights.help:
        logger.warning(
            f"{block.student!r} does not start at its teachers' mean, and its default distillation_weight is 0: its "
            f"teachers do not help on held-out labels (gain {weights.gain:.1%}). Choose others, or train a plain "
            "adapter."
        )
    return active_block(model)


def weigh_again(model: ModelAdaptersMixin, block: AdapterDistillation, checkpoint: str) -> AdapterDistillation:
    """Give the teachers the weights that they have in a checkpoint; return the active block."""
    weights = saved_weights(checkpoint)
    if weights is not None and set(block.teachers) <= weights.mean().keys():  # `load_student` names other teachers
        start_at_weights(model, block, weights)
    return active_block(model)


def fit_student(model: ModelAdaptersMixin, student: str, examples: Examples, accelerator: Accelerator) -> float | None:
    """Move a student that was neither trained nor loaded from its teachers' mean weights to their mean update.

    Returns:
        The share of the mean update that the student then explains; None if it was not moved.
    """
    distillation = distillation_of(model, student)
    if distillation.config.student_start not in ("weighted", "teachers"):
        return None
    if not is_at_average(model, student) or not can_be_fitted(model, student):
        return None
    drawn = examples.draw(START_EXAMPLES)
    if drawn is None:
        logger.warning(
            f"{student!r} starts at the average of its teachers' weights: a stream of examples is not read twice. "
            "Pass DistillationConfig(student_start='average') to silence this."
        )
        return None

    def forward_passes() -> None:
        for inputs in drawn():
            with examples.autocast():
                model(**examples.model_inputs(inputs))

    with keeping_random_state():  # the order of the training data stays the same
        explained = fit_start(model, student, forward_passes, partial(accelerator.reduce, reduction="mean"))
    logger.info(f"{student!r} starts at the teachers' mean update, {explained:.1%} of which it explains.")
    return explained


def calibrate(
    model: ModelAdaptersMixin, block: AdapterDistillation, examples: Examples, accelerator: Accelerator
) -> torch.Tensor | None:
    """Fit slope and offset of each teacher's scores to the training data, (n_teachers, 2), for `cross_task`."""
    if "cross_task" not in distillation_of(model, block.student).config.objectives:
        return None
    with keeping_random_state():
        logits, labels = own_logits(model, block, _drawn_batches(examples, "The objective 'cross_task'"))
    return accelerator.reduce(fit_platt(scores(logits), labels), "mean")


def predict(
    model: ModelAdaptersMixin, block: AdapterDistillation, examples: Examples, accelerator: Accelerator, n_read: int
) -> PredictionCache | None:
    """Let each teacher predict the examples that stage 2 reads more than once, if an objective needs predictions.

    A run of each teacher beside each training batch would cost more than the training. They run in one order before
    the training, so that a resumed training finds the same predictions. None if they cannot be stored.
    """
    config = distillation_of(model, block.student).config
    if not config.head_objectives or text_head(model, block.student) is not None:  # too large to keep
        return None
    if is_sharded(model):  # all processes must run it equally often, and may have different numbers of batches
        return None
    parts: list[tuple[list[bytes], torch.Tensor]] = []
    datasets: list[tuple[Any, Callable]] = [(examples.train, examples.model_inputs)]
    if examples.unlabelled is not None:
        datasets.append((examples.unlabelled.dataset, examples.unlabelled.without_labels))
    for dataset, model_inputs in datasets:
        if has_length(dataset) and not isinstance(dataset, IterableDataset) and len(dataset) < n_read:
            with keeping_random_state(), examples.autocast():
                batches = map(model_inputs, examples.batches(dataset))
                parts += _predictions(model, block, dataset, batches, accelerator)
    if not parts:
        return None
    logits = torch.cat([logits for _, logits in parts])
    keys = [key for keys, _ in parts for key in keys]
    logger.info(f"The teachers have predicted {len(keys)} examples ({logits.nbytes / 1e6:.1f} MB).")
    return PredictionCache(logits, keys)


def _predictions(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    dataset: Any,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
) -> list[tuple[list[bytes], torch.Tensor]]:
    """Return the keys of each batch of a data set with its logits, (batch, n_teachers, n_labels).

    Each process computes a share. Empty where the heads predict for tokens, or the logits would be too large to keep.
    """
    parts, can_be_stored = [], True
    for number, inputs in enumerate(batches):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        logits = torch.stack([one[0] for one in of_each_teacher(model, block, [inputs], "logits")], dim=1)
        can_be_stored = logits.dim() == 3 and logits[0].nbytes * len(dataset) <= MAX_BYTES  # (B, N, n_labels)
        if not can_be_stored:
            break
        parts.append((example_keys(inputs), logits.cpu()))
    shares = gather_object([(parts, can_be_stored)])  # by all processes: one without a batch must not wait alone
    return [part for parts, _ in shares for part in parts] if all(ok for _, ok in shares) else []
