"""One weight for each teacher, learned from a few labels of the new task before the first step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn

from .._compat import heads_of
from ..composition import AdapterDistillation
from ..method.distillation import active_block, distillation_of
from ..method.fusion import TeacherFusion, fusions_at
from ..method.layer_pass import LayerPass, Place
from ..method.predictions import without_dropout
from ..method.weights import TeacherWeights

STEPS = 40
LEARNING_RATE = 0.2  # of the scores, whose softmax the weights are
HEAD_LEARNING_RATE = 1e-3

Batches = Callable[[], Iterable[Any]]  # a new pass over some labelled batches
Loss = Callable[[Any], torch.Tensor]  # of a batch, with the model as it is


class WeighingPass(LayerPass):
    """Pass in which each layer passes on the weighted sum of its teachers' updates, in the place of the student's.

    Args:
        scores: The score of each teacher and of the null teacher, (n_places or 1, n_teachers + 1). The weights are
            their softmax over those that a place has; None for no teacher at all.
        places: The number of the row of each place.
        names: The teachers, in the order of the scores.
    """

    joins_student = True

    def __init__(self, scores: torch.Tensor | None, places: dict[str, int], names: Sequence[str]) -> None:
        self.scores = scores
        self.places = places
        self.numbers = {name: number for number, name in enumerate(names)}

    def run_layer(self, place: Place) -> torch.Tensor:
        """Pass the weighted sum on."""
        if self.scores is None:
            return torch.zeros_like(place.student_output) + place.base
        row = self.scores[self.places[place.fusion.location]]

        def weigh(names: tuple[str, ...]) -> torch.Tensor:
            return row[[*(self.numbers[name] for name in names), -1]].softmax(dim=0)[:-1]

        return place.base + place.mix(weigh)


def weigh_teachers(
    model: ModelAdaptersMixin,
    batches: Sequence[Any],
    loss: Loss | None = None,
    *,
    steps: int = STEPS,
    per_layer: bool = False,
) -> TeacherWeights:
    """Learn one weight for each teacher of the active student from a few labelled batches, in place of the student.

    In each layer the weighted sum of the teachers' updates stands for the student's update, and the task loss trains
    the weights, which are the only parameters (beside a head that the teachers do not have, which is put back). One
    half of the batches learns weights that the other half judges, and the reverse; the result is the mean of both.
    Nothing on the model changes. `DistillationTrainer` does this for `student_start="weighted"`.

    After LoraHub (https://arxiv.org/abs/2307.13269) and learned merging (https://arxiv.org/abs/2402.15414), which
    learn weights of LoRAs from few examples; the null teacher, the mixture of updates, and the judgement by the other
    half are ours.

    Args:
        model: A model on which `train_adapter` was called for an adapter that has `distill_from`.
        batches: Labelled batches of the new task; of a single one, the two halves are the same.
        loss: The task loss of a batch, a scalar, computed with `model`. Default: `model(**batch)["loss"]`.
        steps: The number of optimizer steps, both halves together.
        per_layer: Whether each place of the model has weights of its own.

    Raises:
        ValueError: If no distilled student is active, there are no batches, or the loss does not depend on the model.
    """
    block = active_block(model)
    halves: list[Batches] = [lambda: batches[::2], lambda: batches[1::2] or batches]
    of_batch = loss or (lambda batch: model(**batch)["loss"])
    return learn_weights(model, block, of_batch, halves, steps=steps, per_layer=per_layer)


def learn_weights(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    loss: Loss,
    halves: Sequence[Batches],
    *,
    steps: int,
    per_layer: bool = False,
    beside: Sequence[nn.Parameter] = (),
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    loss_scale: float = 1.0,
) -> TeacherWeights:
    """Learn the weights as `weigh_teachers` does.

    Args:
        halves: Two halves of the labelled batches.
        beside: Parameters outside the model that the loss trains.
        reduce: Averages a tensor over the processes, which hold different examples.
        loss_scale: The factor of the loss in backward passes, which keeps gradients in float16 above zero.
    """
    learners = [Learner(model, block, loss, per_layer, beside, reduce, loss_scale) for _ in halves]
    with_teachers, without, total = 0.0, 0.0, torch.zeros(())
    for number, learner in enumerate(learners):
        other = halves[1 - number]
        with learner.running():
            learner.learn(halves[number], steps // 2)
            with_teachers += learner.evaluate(other)
            total = total + learner.weights()
        with learner.without_teachers(), learner.running():
            if learner.trained:
                learner.learn(halves[number], steps // 2)
            without += learner.evaluate(other)
    weights = (total / len(learners)).tolist()
    places = learners[0].places
    by_place = {name: dict(zip(block.teachers, weights[row], strict=False)) for name, row in places.items()}
    return TeacherWeights(by_place, 1 - with_teachers / without if without > 0 else 0.0)


class Learner:
    """Weights that are learned, and what is trained along: a head, or the loss's own parameters."""

    def __init__(
        self,
        model: ModelAdaptersMixin,
        block: AdapterDistillation,
        loss: Loss,
        per_layer: bool,
        beside: Sequence[nn.Parameter],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        loss_scale: float,
    ) -> None:
        self.model, self.loss, self.reduce, self.loss_scale = model, loss, reduce, loss_scale
        self.distillation = distillation_of(model, block.student)
        fusions = [fusions_at(m)[block.student] for m in model.base_model.modules() if block.student in fusions_at(m)]
        self.places = {fusion.location: number * per_layer for number, fusion in enumerate(fusions)}
        device = _device(fusions)
        self.scores = torch.zeros(max(self.places.values()) + 1, len(block.teachers) + 1, device=device)
        self.scores.requires_grad_()
        self.pass_ = WeighingPass(self.scores, self.places, block.teachers)
        heads = dict(heads_of(model).items())
        head = heads.get(block.student)
        self.head = [] if head is None else [p for p in head.parameters() if p.requires_grad]
        self.heads = _alike(head, [heads.get(name) for name in block.teachers])
        self.trained = [*([] if self.heads else self.head), *beside]

    def weights(self) -> torch.Tensor:
        """Return the weights, (n_places or 1, n_teachers + 1), detached."""
        return self.scores.detach().softmax(dim=1).cpu()

    @contextmanager
    def without_teachers(self) -> Iterator[None]:
        """Run without any teacher."""
        self.pass_.scores = None
        try:
            yield
        finally:
            self.pass_.scores = self.scores

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model with the weights, and put back all that was trained along."""
        kept = [parameter.detach().clone() for parameter in (*self.head, *self.trained)]
        try:
            with without_dropout(self.model), self.distillation.inspected_by(self.pass_):
                yield
        finally:
            for parameter, value in zip((*self.head, *self.trained), kept, strict=True):
                parameter.data.copy_(value)
                parameter.grad = None

    def learn(self, batches: Batches, steps: int) -> None:
        """Train for some steps, over the batches again and again."""
        groups = [{"params": [self.scores], "lr": LEARNING_RATE}]
        groups += [{"params": self.trained, "lr": HEAD_LEARNING_RATE}] if self.trained else []
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        passes = chain.from_iterable(batch() for batch in repeat(batches))
        for _, batch in zip(range(steps), passes, strict=False):
            mixed = self._mix_heads()
            (self.loss_scale * self.loss(batch)).backward()
            if mixed:
                torch.autograd.backward(mixed, [p.grad for p in self.head])
            for parameter in (self.scores, *self.trained):
                if parameter.grad is not None:
                    parameter.grad = self.reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> float:
        """Return the mean loss over some batches."""
        self._mix_heads()
        losses = [self.loss(batch).float() for batch in batches()]
        return self.reduce(torch.stack(losses).mean()).item()

    def _mix_heads(self) -> list[torch.Tensor]:
        """Set the student's head to the weighted mean of the teachers' heads, and return it with its graph."""
        if not self.heads:
            return []
        scores = self.scores.mean(dim=0)[:-1]  # (n_teachers,)
        weights = (scores if self.pass_.scores is not None else torch.zeros_like(scores)).softmax(dim=0)
        mixed = [torch.tensordot(weights.to(values), values, dims=1) for values in self.heads]
        for parameter, value in zip(self.head, mixed, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        return mixed if mixed[0].requires_grad else []


def _device(fusions: Sequence[TeacherFusion]) -> torch.device:
    return fusions[0].value.weight.device


def _alike(head: nn.Module | None, others: Sequence[nn.Module | None]) -> list[torch.Tensor]:
    """Return the teachers' values of each trained parameter of a head, stacked; empty where the heads differ."""
    if head is None or any(type(other) is not type(head) for other in others):
        return []
    names = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    rows = [[dict(other.named_parameters()).get(name) for name in names] for other in others if other is not None]
    shapes = [parameter.shape for parameter in head.parameters() if parameter.requires_grad]
    if any([None if p is None else p.shape for p in row] != shapes for row in rows):
        return []
    return [torch.stack([row[i].detach() for row in rows]) for i in range(len(names))]  # type: ignore[union-attr]
