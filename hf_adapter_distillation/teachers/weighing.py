"""One weight for each teacher, learned from a few labels of the new task before the first step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from math import isfinite
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from transformers.trainer_pt_utils import find_batch_size

from .._compat import heads_of
from ..composition import AdapterDistillation
from ..method.distillation import active_block, distillation_of
from ..method.fusion import fusions_of
from ..method.heads import are_alike, states_of_heads
from ..method.layer_pass import LayerPass, Place
from ..method.losses import at_least_float32
from ..method.nonfinite import find_overflow, start_message
from ..method.parameters import parameter_roles
from ..method.predictions import without_dropout
from ..method.weights import TeacherWeights
from .batches import Batches, Loss, check_steps, mean_over_examples, own_loss, read_batches

STEPS = 16
# How far Adam can move a score, since a step moves it by the learning rate at most: to a ratio of exp(2 * 2.25) = 90
# between two weights. The rate has a limit, since the signs of very few gradients are mostly noise.
SCORE_RANGE, MAXIMAL_RATE = 2.25, 0.5
SCALE_RANGE = 0.6  # the same for the logarithm of the scale: a factor of 1.8
HEAD_RANGE = 0.01  # the same for a head's parameters
# Few labels mislead. Where others do not confirm the learned scores, they choose how much of them is kept; with none
# the weights are equal.
KEPT_SHARES = (1.0, 0.5, 0.0)


class WeighingPass(LayerPass):
    """Pass in which each layer passes on the weighted sum of its teachers' updates, in the place of the student's.

    Args:
        scores: The score of each teacher and of the null teacher, (n_places or 1, n_teachers + 1). The weights are
            their softmax over those that a place has, times the scale; None for no teacher at all.
        log_scales: The logarithm of the scale, (n_places or 1, 1).
        places: The number of the row of each place.
        names: The teachers, in the order of the scores.
    """

    keeps_graph = True

    def __init__(
        self, scores: torch.Tensor | None, log_scales: torch.Tensor, places: dict[str, int], names: Sequence[str]
    ) -> None:
        self.scores, self.log_scales = scores, log_scales
        self.places = places
        self.numbers = {name: number for number, name in enumerate(names)}

    def run_layer(self, place: Place) -> torch.Tensor:
        """Pass the weighted sum on."""
        if self.scores is None:
            return torch.zeros_like(place.student_output) + place.base
        number = self.places[place.fusion.location]
        row, scale = self.scores[number], self.log_scales[number].exp()

        def weigh(names: tuple[str, ...]) -> torch.Tensor:
            return scale * row[[*(self.numbers[name] for name in names), -1]].softmax(dim=0)[:-1]

        return place.base + place.mix(weigh)


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
    the weights and their scale, the only parameters (beside a head that the teachers do not have, which is put back).
    One half of the batches learns weights that the other half judges, and the reverse; the result is the mean of both.
    If they do not help, the best of these weights, equal weights and those halfway between is returned.
    Nothing on the model changes. `DistillationTrainer` does this for `student_start="weighted"`.

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
            batches or steps, or the loss does not depend on the teachers or never has finite gradients. Nothing on the
            model has changed then, too.
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
        raise ValueError(f"The teachers of {block.student!r} cannot be weighed: half of the batches have no labels.")
    return weights


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
) -> TeacherWeights | None:
    """Learn the weights as `weigh_teachers` does; None where a half has no batch in a process, or no label in all.

    Args:
        halves: Two halves of the labelled batches.
        beside: Parameters outside the model that the loss trains.
        reduce: Averages a tensor over the processes, which hold different examples.
        loss_scale: The factor of the loss in backward passes, which keeps gradients in float16 above zero.
    """
    learners = [Learner(model, block, loss, per_layer, beside, reduce, loss_scale) for _ in halves]
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
            if learner.trained:
                learner.learn(halves[number], steps // 2)
            base_losses = learner.losses(other)
        sizes = torch.tensor([find_batch_size(batch) or 1 for batch in other]).to(base_losses)
        sizes = torch.where(base_losses.isfinite(), sizes, 0)  # not those without labels, whose mean is NaN
        if reduce(sizes.sum()) == 0:
            return None
        without += mean_over_examples(base_losses, sizes, reduce)
        for share in KEPT_SHARES:
            with_teachers[share] += mean_over_examples(losses[share], sizes, reduce)
    found, places = [], learners[0].places
    for share in KEPT_SHARES:
        rows, gain = weights[share].tolist(), 1 - with_teachers[share] / without if without > 0 else 0.0
        by_place = {name: dict(zip(block.teachers, rows[row][:-1], strict=True)) for name, row in places.items()}
        found.append(TeacherWeights(by_place, gain if isfinite(gain) else 0.0))
    return found[0] if found[0].help else max(found, key=lambda each: each.gain)


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
        self.student, self.distillation = block.student, distillation_of(model, block.student)
        fusions = fusions_of(model, block.student)
        self.places = {fusion.location: number if per_layer else 0 for number, fusion in enumerate(fusions)}
        weight, size = fusions[0].key.weight, (max(self.places.values()) + 1, len(block.teachers) + 1)
        dtype = at_least_float32(weight.dtype)
        self.scores = torch.zeros(size, dtype=dtype, device=weight.device, requires_grad=True)
        self.log_scales = torch.zeros((size[0], 1), dtype=dtype, device=weight.device, requires_grad=True)
        self.pass_ = WeighingPass(self.scores, self.log_scales, self.places, block.teachers)
        heads = dict(heads_of(model).items())
        named = dict(heads[block.student].named_parameters()) if block.student in heads else {}
        names = [name for name, parameter in named.items() if parameter.requires_grad]
        self.head = [named[name] for name in names]
        alike = are_alike([heads.get(name) for name in (block.student, *block.teachers)])
        states = states_of_heads(heads[block.student], [heads[name] for name in block.teachers]) if alike else []
        self.heads = [torch.stack([state[name] for state in states]) for name in names] if alike else []
        roles = parameter_roles(model, block)
        static = [p for name, p in model.named_parameters() if p.requires_grad and roles[name] == "head"]
        self.trained = [*([] if self.heads else self.head), *static, *beside]

    def weights(self) -> torch.Tensor:
        """Return the weights, (n_places or 1, n_teachers + 1), detached."""
        return (self.log_scales.exp() * self.scores.softmax(dim=1)).detach().cpu()

    @contextmanager
    def shrunk(self, share: float) -> Iterator[None]:
        """Run with a share of the scores and scales, which moves the weights towards equal ones."""
        values = [(parameter, parameter.detach().clone()) for parameter in (self.scores, self.log_scales)]
        for parameter, value in values:
            parameter.data.copy_(share * value)
        try:
            yield
        finally:
            for parameter, value in values:
                parameter.data.copy_(value)

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
        """Run the model with the weights, and put back all that was trained along, and all gradients."""
        values = [(parameter, parameter.detach().clone()) for parameter in (*self.head, *self.trained)]
        with_gradients = [p for p in (*self.model.parameters(), *self.trained) if p.requires_grad]
        gradients = [(parameter, parameter.grad) for parameter in with_gradients]
        for parameter in with_gradients:
            parameter.grad = None
        try:
            with without_dropout(self.model), self.distillation.inspected_by(self.pass_):
                yield
        finally:
            for parameter, value in values:
                parameter.data.copy_(value)
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def learn(self, batches: Batches, steps: int) -> bool:
        """Train for some steps, over the batches again and again; fewer steps are larger ones, up to a limit.

        Returns:
            Whether any step had finite gradients; the others change nothing.
        """
        rate = min(MAXIMAL_RATE, 2 * SCORE_RANGE / (steps + 1))  # falls to 0: half of it on average
        rates = {self.scores: rate, self.log_scales: rate * SCALE_RANGE / SCORE_RANGE}
        rates |= dict.fromkeys(self.trained, rate * HEAD_RANGE / SCORE_RANGE)
        optimizer = torch.optim.Adam([{"params": [parameter], "lr": of_one} for parameter, of_one in rates.items()])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        passes = chain.from_iterable(batch() for batch in repeat(batches))
        learns = False
        for _, batch in zip(range(steps), passes, strict=False):
            self._backward(batch)
            gradients = []
            for parameter in rates:  # of every process, whatever its loss depends on
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.reduce(own)
                gradients.append(parameter.grad)
            is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            learns = learns or is_finite
            if not is_finite:
                optimizer.zero_grad()  # as a GradScaler leaves a step out
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return learns

    @torch.no_grad()
    def nonfinite_error(self, batches: Batches) -> Exception:
        """Return the error of steps that all had gradients that are not finite, with the teacher that is the cause."""

        def forward_passes() -> None:
            for batch in batches():
                self.loss(batch)

        if overflow := find_overflow(self.distillation, forward_passes, passes_fused_on=False):
            return FloatingPointError(start_message(self.student, overflow))
        return ValueError(
            f"The teachers of {self.student!r} cannot be weighed: no step has finite gradients; check the loss and "
            "the labels, or train in bfloat16 or float32."
        )

    def _backward(self, batch: Any) -> None:
        """Compute the gradients of the loss of a batch."""
        mixed, value = self._mix_heads(), self.loss(batch)
        with_teachers = self.pass_.scores is not None
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"The loss of a batch is {what}; it must be a tensor with one number.")
        if value.requires_grad:
            (self.loss_scale * value).backward()
            used = [(mean, p.grad) for mean, p in zip(mixed, self.head, strict=False) if p.grad is not None]
            if used:
                torch.autograd.backward([mean for mean, _ in used], [gradient for _, gradient in used])
        if with_teachers and self.scores.grad is None:
            raise ValueError(
                "The loss of a batch does not depend on the teachers; compute it from the output of the model, with "
                "gradients, and with the distilled student active."
            )

    @torch.no_grad()
    def losses(self, batches: Sequence[Any]) -> torch.Tensor:
        """Return the losses of some batches, (n_batches,)."""
        self._mix_heads()
        losses = torch.stack([self.loss(batch).reshape(()) for batch in batches])
        return losses.to(at_least_float32(losses.dtype))

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
