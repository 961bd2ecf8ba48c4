"""Labelled batches of a user, and their losses."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from adapters import ModelAdaptersMixin

Batches: TypeAlias = Callable[[], Iterable[Any]]  # a new pass over some labelled batches
Loss: TypeAlias = Callable[[Any], torch.Tensor]  # of a batch, with the model as it is


def read_batches(batches: Iterable[Any], purpose: str) -> list[Any]:
    """Read labelled batches of a user.

    Raises:
        TypeError: If it is one batch.
        ValueError: If there is none.
    """
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one batch, a {type(batches).__name__}; put it into a list: [batch].")
    read = list(batches)
    if not read:
        raise ValueError(f"There are no batches to {purpose} with; give at least one, with labels.")
    return read


def check_steps(steps: object, least: int) -> None:
    """Check a number of steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"steps={steps} is out of range; it must be a number of steps, at least {least}.")


def own_loss(model: ModelAdaptersMixin) -> Loss:
    """Return the model's own loss of a batch, which must be there."""

    def loss(batch: Any) -> torch.Tensor:
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"A batch is a {type(batch).__name__}, not a dict of inputs; pass a loss=... that reads it."
            )
        output, kind = model(**batch), type(model).__name__
        if not isinstance(output, Mapping):
            raise ValueError(f"{kind} puts out a tuple; leave out return_dict=False, or pass loss=...")
        if output.get("loss") is None:
            raise ValueError(f"{kind} puts out no loss; give the batches labels, or pass loss=...")
        return output["loss"]

    return loss


def mean_over_examples(
    losses: torch.Tensor, sizes: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Return the mean over the examples of batches, in all processes; those of size 0 do not count."""
    total, size = reduce(torch.stack([torch.where(sizes > 0, losses, 0) @ sizes, sizes.sum()]))
    return (total / size).item()
