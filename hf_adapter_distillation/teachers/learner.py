"""What a few labels teach before the first step: weights of the teachers, and what has to be learned along."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn

from .._compat import heads_of
from ..composition import AdapterDistillation
from ..method.distillation import distillation_of
from ..method.fusion import fusions_of
from ..method.heads import are_alike, states_of_heads
from ..method.layer_pass import LayerPass, Place
from ..method.losses import at_least_float32
from ..method.nonfinite import find_overflow, start_message
from ..method.parameters import parameter_roles
from ..method.predictions import without_dropout
from .batches import Batches, Loss
from .class_head import ClassHead, Gather

# How far Adam can move a score, since a step moves it by the learning rate at most: to a ratio of exp(2 * 2.25) = 90
# between two weights. The rate has a limit, since the signs of very few gradients are mostly noise.
SCORE_RANGE, MAXIMAL_RATE = 2.25, 0.5
SCALE_RANGE = 0.6  # the same for the logarithm of the scale: a factor of 1.8
# The same for the parameters of a head. A logit sums up its inputs, so those with more than so many move less.
HEAD_RANGE, HEAD_INPUTS = 0.1, 384


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


class Learner:
    """Weights that are learned, and what is trained along: a new head, or the loss's own parameters.

    A new head for classes is not trained. It is fitted before the first step, and again before losses are compared.
    """

    def __init__(
        self,
        model: ModelAdaptersMixin,
        block: AdapterDistillation,
        loss: Loss,
        per_layer: bool,
        accumulation: int,
        beside: Sequence[nn.Parameter],
        reduce: Callable[[torch.Tensor], torch.Tensor],
        loss_scale: float,
        gather: Gather = lambda part: [part],
    ) -> None:
        self.model, self.loss, self.reduce, self.loss_scale = model, loss, reduce, loss_scale
        self.accumulation, self.gather = accumulation, gather
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
        self.new_head, self.beside = [*([] if self.heads else self.head), *static], list(beside)
        self.class_head = ClassHead.of(model, block.student, self.new_head)
        self.learned_from: Batches | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        """Return what is trained along."""
        return [*([] if self.class_head else self.new_head), *self.beside]

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
        learned = (*self.head, *self.new_head, *self.beside)
        values = [(parameter, parameter.detach().clone()) for parameter in learned]
        with_gradients = [p for p in (*self.model.parameters(), *learned) if p.requires_grad]
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
            Whether any step had finite gradients; the others change nothing. True where nothing is trained.
        """
        self.learned_from = batches
        if self.pass_.scores is None and not self.trained:
            return True
        self._fit_head()
        rate = min(MAXIMAL_RATE, 2 * SCORE_RANGE / (steps + 1))  # falls to 0: half of it on average
        ranges = {self.scores: SCORE_RANGE, self.log_scales: SCALE_RANGE}
        ranges |= {parameter: _head_range(parameter) for parameter in self.trained}
        # In half precision Adam would divide by zero.
        exact = [p.detach().to(at_least_float32(p.dtype), copy=True) for p in ranges]
        optimizer = torch.optim.Adam(
            [{"params": [p], "lr": rate * of_p / SCORE_RANGE} for p, of_p in zip(exact, ranges.values(), strict=True)]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(1, steps))
        passes = chain.from_iterable(_grouped(batch(), self.accumulation) for batch in repeat(batches))
        learns = False
        for _, group in zip(range(steps), passes, strict=False):
            for batch in group:
                self._backward(batch, self.loss_scale / len(group))
            gradients = []
            for parameter in ranges:  # of every process, whatever its loss depends on
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(self.reduce(own))
                parameter.grad = None
            is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            learns = learns or is_finite
            for copy, gradient in zip(exact, gradients, strict=True):
                copy.grad = gradient.to(copy) if is_finite else None  # left out, as by a GradScaler
            optimizer.step()
            schedule.step()
            for parameter, copy in zip(ranges, exact, strict=True):
                parameter.data.copy_(copy)
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

    def _backward(self, batch: Any, factor: float) -> None:
        """Compute the gradients of the loss of a batch, times a factor."""
        mixed, value = self._mix_heads(), self.loss(batch)
        with_teachers = self.pass_.scores is not None
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            what = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"The loss of a batch is {what}; it must be a tensor with one number.")
        if value.requires_grad:
            (factor * value).backward()
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
        """Return the losses of some batches, (n_batches,), with a new head fitted to the present weights."""
        self._mix_heads()
        self._fit_head()
        losses = torch.stack([self.loss(batch).reshape(()) for batch in batches])
        return losses.to(at_least_float32(losses.dtype))

    def _fit_head(self) -> None:
        """Fit a new head for classes to the states that it gets now; one that cannot be fitted is trained."""
        if self.class_head is None or self.learned_from is None:
            return
        if not self.class_head.fit(self.loss, self.learned_from(), self.gather):
            self.class_head = None

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


def _head_range(parameter: nn.Parameter) -> float:
    inputs = parameter[0].numel() if parameter.dim() > 1 else 1
    return HEAD_RANGE * min(1.0, HEAD_INPUTS / inputs)


def _grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield the batches of a pass in groups, the last of which may be smaller."""
    remaining = iter(batches)
    while group := list(islice(remaining, size)):
        yield group
