r"""Relevance of adapters for a new task at first order, without a forward pass for each adapter.

One forward and backward pass of the task loss L through the base model, without any adapter, gives the inputs of the
adapters and the gradients of the loss by the updates there. The relevance of an adapter with the updates u is the
cosine of the direction in which it moves the hidden states with the direction in which the loss falls,

.. math::
    r = -\frac{\sum_{s, t} \langle \partial L / \partial h_{st}, u_{st} \rangle}
              {\lVert \partial L / \partial h \rVert \, \lVert u \rVert},

over the places s and the tokens t. Its numerator is the derivative of the loss by the weight of the adapter, at 0. The
norm of the update takes out how large an adapter is.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from adapters import ModelAdaptersMixin
from torch import nn

from .._compat import Adapter, LoRA
from ..composition import AdapterDistillation
from ..method.distillation import Distillation, distillation_of
from ..method.layer_pass import LayerPass, Place
from ..method.layers import AdapterInput, AdapterPlace, adapter_update
from ..method.predictions import without_dropout
from .batches import Batches, Loss
from .learner import Learner

BATCHES = 16  # of which the gradients are taken
TOKENS = 128  # of each place, all batches together: those with the largest gradients


class TappingPass(LayerPass):
    """Pass without any update, which collects the places with taps for the gradients by the updates."""

    keeps_graph = True

    def __init__(self) -> None:
        self.taps: list[tuple[Place, torch.Tensor]] = []

    def run_layer(self, place: Place) -> torch.Tensor:
        """Pass the states on to which the update would be added."""
        tap = torch.zeros_like(place.student_output.detach(), requires_grad=True)  # (B, T, d)
        self.taps.append((place, tap))
        return place.base + tap


class Products:
    """Sums over places and tokens for the cosine of a relevance."""

    def __init__(self) -> None:
        self.product = self.updates = self.gradients = 0.0

    def add(self, update: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one place, (batch, seq_len, hidden) each; tokens without a gradient do not count."""
        update = update.float() * gradient.any(dim=-1, keepdim=True)
        self.product -= (update * gradient).sum().item()
        self.updates += update.square().sum().item()
        self.gradients += gradient.square().sum().item()

    def cosine(self) -> float:
        """Return the relevance; 0 for an adapter without an update."""
        size = (self.updates * self.gradients) ** 0.5
        return self.product / size if size else 0.0


class Site(NamedTuple):
    """Place inside a layer, with some of its tokens."""

    adapter: Adapter | LoRA
    adapter_input: AdapterInput  # (1, n_tokens, hidden) each
    gradient: torch.Tensor  # (1, n_tokens, hidden)

    def shortened(self) -> "Site":
        """Return the site with the tokens that have the largest gradients."""
        norms = self.gradient[0].norm(dim=-1)
        kept = norms.topk(min(TOKENS, len(norms))).indices
        hidden_states, residual = self.adapter_input
        residual = residual[:, kept] if isinstance(residual, torch.Tensor) else residual
        return Site(self.adapter, AdapterInput(hidden_states[:, kept], residual), self.gradient[:, kept])

    def joined(self, other: "Site") -> "Site":
        """Return the site with the tokens of other batches as well."""
        states = torch.cat([self.adapter_input.hidden_states, other.adapter_input.hidden_states], dim=1)
        residual = self.adapter_input.residual
        if isinstance(residual, torch.Tensor) and isinstance(other.adapter_input.residual, torch.Tensor):
            residual = torch.cat([residual, other.adapter_input.residual], dim=1)
        gradient = torch.cat([self.gradient, other.gradient], dim=1)
        return Site(self.adapter, AdapterInput(states, residual), gradient).shortened()


def measure_relevance(
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    loss: Loss,
    batches: Batches,
    *,
    steps: int,
    accumulation: int = 1,
    beside: Sequence[nn.Parameter] = (),
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    loss_scale: float = 1.0,
) -> Callable[[], float]:
    """Take the gradients of the task at the places of the only teacher of a student.

    A head that is new says nothing, so it is trained on the states of the base model first, and put back. The
    arguments are those of `learn_weights`; `steps` are for the head.

    Returns:
        A function that returns the relevance of the teacher with the weights that it has when it is called.

    Raises:
        ValueError: If the loss does not depend on the places, or its gradients are not finite.
    """
    learner = Learner(model, block, loss, False, accumulation, beside, reduce, loss_scale)
    distillation, read = distillation_of(model, block.student), list(islice(batches(), BATCHES))
    sites: dict[nn.Module, Site] = {}
    gradients: list[list[torch.Tensor | None]] = []
    learner.class_head = None  # fitted to the examples of which the gradients are taken, it would leave none
    with learner.without_teachers(), learner.running():
        learner.learn(batches, steps)
        for batch in read:
            tapping = TappingPass()
            with distillation.inspected_by(tapping):
                value = loss(batch)
                if value.requires_grad:
                    (loss_scale * value).backward()
            taps = [(place, tap.grad) for place, tap in tapping.taps if tap.grad is not None]
            if distillation.level == "adapter":
                for place, gradient in taps:
                    site = _site(place, gradient, block.teachers[0])
                    sites[site.adapter] = site.joined(sites[site.adapter]) if site.adapter in sites else site
            gradients.append([tap.grad for _, tap in tapping.taps])
    found = [gradient for of_batch in gradients for gradient in of_batch if gradient is not None]
    if not found:
        raise ValueError(
            "The loss of a batch does not depend on the teachers; compute it from the output of the model, with "
            "gradients, and with the distilled student active."
        )
    if not all(gradient.isfinite().all() for gradient in found):
        raise ValueError("The gradients of the task are not finite without any adapter; train in bfloat16 or float32.")
    if distillation.level == "adapter":
        return lambda: _relevance_inside(list(sites.values()))
    return lambda: _relevance_of_layers(model, distillation, block.teachers[0], loss, read, gradients)


def _site(place: Place, gradient: torch.Tensor, teacher: str) -> Site:
    """Return the tokens of a place of a teacher with the largest gradients."""
    assert isinstance(place, AdapterPlace)

    def in_a_row(states: torch.Tensor | float) -> torch.Tensor | float:
        return states.detach().reshape(1, -1, states.shape[-1]) if isinstance(states, torch.Tensor) else states

    hidden_states, residual = map(in_a_row, place.adapter_input(teacher))
    assert isinstance(hidden_states, torch.Tensor)
    adapter = place.layer.adapter_modules[teacher]
    row = gradient.reshape(1, -1, gradient.shape[-1]).float()
    return Site(adapter, AdapterInput(hidden_states, residual), row).shortened()


@torch.no_grad()
def _relevance_inside(sites: Sequence[Site]) -> float:
    """Return the relevance of an adapter from its updates of some tokens."""
    products = Products()
    for site in sites:
        products.add(adapter_update(site.adapter, *site.adapter_input), site.gradient)
    return products.cosine()


class ComparingPass(LayerPass):
    """Pass without any update, which compares the teacher's updates of whole layers with the gradients there."""

    def __init__(self, teacher: str, gradients: Sequence[torch.Tensor | None], products: Products) -> None:
        self.teacher = teacher
        self.gradients = iter(gradients)
        self.products = products

    def run_layer(self, place: Place) -> torch.Tensor:
        """Add the products of one layer."""
        if (gradient := next(self.gradients)) is not None:  # else the loss does not depend on this layer
            self.products.add(place.updates()[self.teacher], gradient.float())
        return torch.zeros_like(place.student_output) + place.base


@torch.no_grad()
def _relevance_of_layers(
    model: ModelAdaptersMixin,
    distillation: Distillation,
    teacher: str,
    loss: Loss,
    batches: Sequence[Any],
    gradients: Sequence[Sequence[torch.Tensor | None]],
) -> float:
    """Return the relevance of an adapter of any method: its layers run again on all tokens."""
    products = Products()
    with without_dropout(model):
        for batch, of_batch in zip(batches, gradients, strict=True):
            with distillation.inspected_by(ComparingPass(teacher, of_batch, products)):
                loss(batch)
    return products.cosine()
