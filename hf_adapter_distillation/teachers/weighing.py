"""One weight for each teacher, learned from a few labels of the new task before the first step."""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from transformers.trainer_pt_utils import find_batch_size

from ..composition import AdapterDistillation
from ..method.distillation import active_block, distillation_of
from ..method.weights import TeacherWeights
from .batches import Batches, Loss, check_steps, mean_over_examples, own_loss, read_batches
from .class_head import Gather
from .learner import Learner

STEPS = 16
# Few labels mislead. Where others do not confirm the learned scores, they choose how much of them is kept; with none
# the weights are equal.
KEPT_SHARES = (1.0, 0.5, 0.0)


def weigh_teachers(
    model: ModelAdaptersMixin,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    steps: int = STEPS,
    per_layer: bool | None = None,
) -> TeacherWeights:
    """Learn one weight for each teacher of the active student from a few labelled batches, in place of the student.

    In each layer the weighted sum of the teachers' updates stands for the student's update, and the task loss trains
    the weights and their scale, the only parameters. A head that the teachers do not have is fitted where it predicts
    classes, else learned along, and put back. One half of the batches learns weights that the other half judges, and
    the reverse; the result is the mean of both. If they do not help, the best of these weights, equal weights and
    those halfway between is returned. Nothing on the model changes. `DistillationTrainer` does this for
    `student_start="weighted"`.

    After LoraHub (https://arxiv.org/abs/2307.13269) and learned merging (https://arxiv.org/abs/2402.15414), which
    learn weights of LoRAs from few examples; the null teacher, the mixture of updates, and the judgement by the other
    half are ours.

    Args:
        model: A model on which `train_adapter` was called for an adapter that has `distill_from`.
        batches: Labelled batches of the new task; of a single one, the two halves are the same.
        loss: The task loss of a batch, a scalar, computed with `model`. Default: `model(**batch)["loss"]`.
        steps: The number of optimizer steps, both halves together.
        per_layer: Whether each place of the model has weights of its own. Default: `weights_per_layer` of the student.

    Raises:
        ValueError: If no distilled student is active, its teachers are still to be chosen from a pool, there are no
            batches or steps, or the loss does not depend on the teachers, never has finite gradients, or is not above
            0 without them. Nothing on the model has changed then, too.
        FloatingPointError: If the updates of a teacher are the reason for the latter.
        TypeError: If `batches` is one batch.
    """
    block, read = active_block(model), read_batches(batches, "weigh the teachers")
    check_steps(steps, 2)
    halves: list[Batches] = [lambda: read[::2], lambda: read[1::2] or read]
    distillation = distillation_of(model, block.student)
    if distillation.candidates:
        raise ValueError(f"The teachers of {block.student!r} are not chosen yet; call had.choose_teachers first.")
    per_layer = distillation.config.weights_per_layer if per_layer is None else per_layer
    weights = learn_weights(model, block, loss or own_loss(model), halves, steps=steps, per_layer=per_layer)
    if weights is None:
        raise ValueError(
            f"The teachers of {block.student!r} cannot be weighed: half of the batches have no labels, or the loss "
            "without teachers, of which the gain is a share, is not above 0."
        )
    return weights


def learn_weights(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    loss: Loss,
    halves: Sequence[Batches],
    *,
    steps: int,
    per_layer: bool = False,
    accumulation: int = 1,
    beside: Sequence[nn.Parameter] = (),
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    loss_scale: float = 1.0,
    gather: Gather = lambda part: [part],
) -> TeacherWeights | None:
    """Learn the weights as `weigh_teachers` does.

    None where a half has no batch in a process, or no label in all, and where the loss without teachers is not above
    0, so that no gain can be told.

    Args:
        halves: Two halves of the labelled batches.
        accumulation: The batches of a step.
        beside: Parameters outside the model that the loss trains.
        reduce: Averages a tensor over the processes, which hold different examples.
        loss_scale: The factor of the loss in backward passes, which keeps gradients in float16 above zero.
        gather: Returns a list of what each process has given.
    """
    settings = (per_layer, accumulation, beside, reduce, loss_scale, gather)
    learners = [Learner(model, block, loss, *settings) for _ in halves]
    judging = [list(half()) for half in halves]  # a new pass may put other examples together
    if reduce(torch.tensor(float(all(judging)), device=learners[0].scores.device)) < 1:
        return None
    with_teachers = dict.fromkeys(KEPT_SHARES, 0.0)
    weights = dict.fromkeys(KEPT_SHARES, torch.zeros((), dtype=torch.float64))
    without = 0.0
    for number, learner in enumerate(learners):
        other, losses = judging[1 - number], {}
        with learner.running():
            if not learner.learn(halves[number], steps // 2):
                raise learner.nonfinite_error(halves[number])
            for share in KEPT_SHARES:
                with learner.shrunk(share):
                    losses[share] = learner.losses(other)
                    weights[share] = weights[share] + learner.weights() / len(learners)
        with learner.without_teachers(), learner.running():
            learner.learn(halves[number], steps // 2)
            base_losses = learner.losses(other)
        sizes = torch.tensor([find_batch_size(batch) or 1 for batch in other]).to(base_losses)
        sizes = torch.where(base_losses.isfinite(), sizes, 0)  # not those without labels, whose mean is NaN
        if reduce(sizes.sum()) == 0:
            return None
        without += mean_over_examples(base_losses, sizes, reduce)
        for share in KEPT_SHARES:
            with_teachers[share] += mean_over_examples(losses[share], sizes, reduce)
    if without <= 0:
        return None
    gains, places = {share: 1 - with_teachers[share] / without for share in KEPT_SHARES}, learners[0].places
    found = [_found(weights[share], gains[share], places, block.teachers) for share in KEPT_SHARES]
    return found[0] if found[0].help else max(found, key=lambda each: each.gain)


def _found(weights: torch.Tensor, gain: float, places: dict[str, int], teachers: Sequence[str]) -> TeacherWeights:
    """Return weights, (n_places or 1, n_teachers + 1), by the names of places and teachers."""
    rows = weights.tolist()
    by_place = {name: dict(zip(teachers, rows[row][:-1], strict=True)) for name, row in places.items()}
    return TeacherWeights(by_place, gain if isfinite(gain) else 0.0)
