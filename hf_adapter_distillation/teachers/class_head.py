"""A new head for classes that takes no steps: its last layer is fitted to the states of a few examples.

A head that says nothing yet cannot tell good teachers from bad ones, and a few steps teach it little. Ridge regression
on the classes takes one pass. Its predictions of examples that are left out one by one are exact, and choose how much
is held back (Hastie et al., The Elements of Statistical Learning, 4.2 and 7.10).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from ..method.heads import kind_of_labels, label_names, number_of_labels
from .batches import Loss

RIDGES = [10.0**power for power in range(-3, 4)]  # relative to the mean square of a state
SHARPNESS = [2.0**power for power in range(8)]  # the factor of the predictions, which are near 0 and 1
MAXIMAL_ROWS = 1024  # examples, or tokens

Gather = Callable[[Any], list[Any]]  # what each process has


class ClassHead:
    """The last layer of a new head for classes of sequences or tokens.

    Args:
        layer: The layer, with a row for each class.
        label_name: The name of the labels in a batch.
    """

    def __init__(self, layer: nn.Linear, label_name: str) -> None:
        self.layer, self.label_name = layer, label_name

    @classmethod
    def of(cls, model: ModelAdaptersMixin, student: str, parameters: Sequence[nn.Parameter]) -> "ClassHead | None":
        """Return the last layer among the parameters of a new head; None if it does not predict classes."""
        n_classes, new = number_of_labels(model, student), {id(parameter) for parameter in parameters}
        if n_classes is None or n_classes < 2 or kind_of_labels(model, student) not in ("classes", "tokens"):
            return None
        layers = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear)
            and module.bias is not None
            and all(id(parameter) in new for parameter in module.parameters())
            and type(module.weight.data) is torch.Tensor  # not a shard
            and module.weight.shape == (n_classes, module.in_features)
        ]
        return cls(layers[-1], label_names(model, student)[0]) if layers else None

    @torch.no_grad()
    def fit(self, loss: Loss, batches: Iterable[Any], gather: Gather) -> bool:
        """Fit the layer to the states that it gets now, in all processes.

        Args:
            loss: The task loss of a batch, which runs the model.
            batches: Labelled batches.
            gather: Returns what all processes have given.

        Returns:
            Whether the batches have labels that fit to the states, and all states are finite; else nothing has
            changed.
        """
        found = gather(self._rows(loss, batches))
        if any(rows is None for rows in found):
            return False
        states, labels = (torch.cat(parts)[:MAXIMAL_ROWS] for parts in zip(*found, strict=True))
        if not len(states) or not states.isfinite().all():
            return False
        fitted = fit_ridge(states, labels, self.layer.out_features)
        self.layer.weight.copy_(fitted.weight)
        self.layer.bias.copy_(fitted.bias)
        return True

    def _rows(self, loss: Loss, batches: Iterable[Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return states before the layer, (n, d), in float64 on the CPU, and their classes, (n,); None without."""
        seen: list[torch.Tensor] = []
        handle = self.layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
        rows: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        try:
            for batch in batches:  # all of them, as the other processes run theirs
                seen.clear()
                loss(batch)
                rows.append(self._rows_of(batch, seen))
        finally:
            handle.remove()
        found = [row for row in rows if row is not None]
        if not found or len(found) < len(rows):
            return None
        states, labels = (torch.cat(parts)[:MAXIMAL_ROWS] for parts in zip(*found, strict=True))
        return states, labels

    def _rows_of(self, batch: Any, seen: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the states and classes of a batch whose loss has run the layer once, with a state for each label."""
        labels = batch.get(self.label_name) if isinstance(batch, Mapping) else None
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or len(seen) != 1:
            return None
        if seen[0].shape[:-1] != labels.shape:
            return None
        labels = labels.cpu().long()
        counts = (labels >= 0) & (labels < self.layer.out_features)
        return seen[0].detach().cpu().double()[counts], labels[counts]


class Ridge(NamedTuple):
    """A linear layer that predicts classes.

    Args:
        weight: (n_classes, d).
        bias: (n_classes,).
        loss: The mean cross-entropy of examples that are left out one by one.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    loss: float


def fit_ridge(states: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Ridge:
    """Fit ridge regression to one-hot classes, times the sharpness that suits a softmax.

    Ridge and sharpness are the best pair for examples that are left out one by one.

    Args:
        states: (n, d).
        labels: (n,).
        n_classes: The number of classes.
    """
    n = len(states)
    center, targets = states.mean(dim=0), one_hot(labels, n_classes).to(states)
    prior = targets.mean(dim=0)
    targets = targets - prior
    left, sizes, right = torch.linalg.svd(states - center, full_matrices=False)  # (n, k), (k,), (k, d)
    mean = (sizes.square().sum() / n).clamp(min=1e-12)
    tried = []
    for ridge in RIDGES:
        kept = sizes.square() / (sizes.square() + ridge * mean)
        predicted = left @ (kept[:, None] * (left.T @ targets))  # (n, n_classes)
        own = (left.square() @ kept + 1 / n).clamp(max=1 - 1e-6)[:, None]  # what an example adds to its prediction
        left_out = (predicted - own * targets) / (1 - own)
        for sharpness in SHARPNESS:
            tried.append((cross_entropy(sharpness * (left_out + prior), labels).item(), ridge, sharpness))
    loss, ridge, sharpness = min(tried)
    weight = sharpness * (targets.T @ left * (sizes / (sizes.square() + ridge * mean))) @ right
    return Ridge(weight, sharpness * prior - weight @ center, loss)
