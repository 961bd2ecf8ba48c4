"""Examples that a training reads beside its batches: before the first step, and without labels in stage 2."""

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Put the random states of torch, numpy and Python back, so that the training goes on as without this."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def number_of_examples(dataset: Any) -> int | None:
    """Return the number of examples of one or more data sets; None for a stream."""
    if isinstance(dataset, dict):
        numbers = [number_of_examples(part) for part in dataset.values()]
        return None if None in numbers else sum(filter(None, numbers))
    return len(dataset) if has_length(dataset) else None


def halves(dataset: Any, seed: int) -> tuple[Any, ...] | None:
    """Split one or more data sets, by their names, into halves at random; None for a stream, or a single example.

    A data set with a single example among several is in both halves.
    """
    if isinstance(dataset, dict):
        parts = {name: halves(part, seed) for name, part in dataset.items()}
        if not any(parts.values()):
            return None
        return tuple({name: (parts[name] or (dataset[name],) * 2)[i] for name in parts} for i in range(2))
    if dataset is None or number_of_examples(dataset) is None or isinstance(dataset, IterableDataset):
        return None
    if len(dataset) < 2:
        return None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    both, of_hub = (order[::2], order[1::2]), isinstance(dataset, datasets.Dataset)
    return tuple(dataset.select(half) if of_hub else Subset(dataset, half) for half in both)


def draw_examples(dataset: Any, number: int, seed: int) -> Any:
    """Draw examples, the first ones of a `datasets.IterableDataset`; None for other streams, which are read once.

    From several data sets, by their names, each gives a share by its size.
    """
    if isinstance(dataset, dict):
        total = number_of_examples(dataset)
        if total is None:
            return None
        sizes = {name: max(1, number * len(part) // total) for name, part in dataset.items() if len(part)}
        return {name: draw_examples(dataset[name], size, seed) for name, size in sizes.items()}
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(number)
    if dataset is None or isinstance(dataset, IterableDataset):
        return None
    size = len(dataset)
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist()
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)


class Examples(NamedTuple):
    """Access to the examples of a training.

    All processes read all batches: with a share for each, padding would count some examples twice.
    """

    train: Any  # a data set, several by their names, or None
    unlabelled: "UnlabelledBatches | None"
    seed: int  # of draws
    batches: Callable[[Dataset], Iterable[dict[str, Any]]]  # inputs of the model, on its device
    batches_of_loader: Callable[[], Iterable[dict[str, Any]]] | None  # of a training without `train`
    model_inputs: Callable[[dict[str, Any]], dict[str, Any]]  # leaves out labels that the model does not get
    autocast: Callable[[], AbstractContextManager]  # the precision of the training
    labelled: Callable[[], "Labelled | None"]  # what the teachers are weighed with; None where it is not read twice

    def draw(self, number: int) -> Callable[[], Iterable[dict[str, Any]]] | None:
        """Return a function that reads batches of some examples, the first ones of a loader.

        None for streams that are read once.
        """
        if self.train is not None:
            drawn = draw_examples(self.train, number, self.seed)
            return None if drawn is None else partial(self.batches, drawn)
        return None if self.batches_of_loader is None else partial(_first_examples, self.batches_of_loader, number)


def _first_examples(batches: Callable[[], Iterable[dict[str, Any]]], number: int) -> Iterator[dict[str, Any]]:
    """Yield batches until they have so many examples."""
    n_examples = 0
    for inputs in batches():
        yield inputs
        n_examples += find_batch_size(inputs)
        if n_examples >= number:
            return


class Labelled(NamedTuple):
    """Training data with its loss, in two halves."""

    halves: Sequence[Callable[[], Iterable[dict[str, Any]]]]  # new passes over the batches of this process
    loss: Callable[[dict[str, Any]], torch.Tensor]  # of a batch, with its gradient
    steps: int  # in which the teachers are weighed
    accumulation: int  # the batches of a step
    beside: Sequence[nn.Parameter]  # what is trained outside the model with adapters


class UnlabelledBatch(dict[str, Any]):
    """Inputs of a batch without labels, in which only the distillation terms count."""


@dataclass(eq=False)
class UnlabelledBatches:
    """Batches of examples without labels that stage 2 reads beside the training batches.

    The numbers of step and micro-batch determine a batch, so that a resumed training continues where it stopped. Each
    pass over the examples has its own order. Several data sets, a stream, or one without examples, is a `ValueError`.
    """

    dataset: Dataset  # without the columns that the model does not take
    collator: Callable[[list[Any]], dict[str, Any]]
    label_names: Collection[str]  # the columns to leave out
    seed: int  # of the orders
    process_index: int
    n_processes: int  # which read different batches

    def __post_init__(self) -> None:
        if isinstance(self.dataset, dict):
            names = ", ".join(map(str, self.dataset))
            raise ValueError(
                f"distillation_dataset must be one data set, not several by their names ({names}); concatenate them."
            )
        if not has_length(self.dataset) or isinstance(self.dataset, IterableDataset | datasets.IterableDataset):
            raise ValueError(
                "distillation_dataset is a stream, but its examples are drawn in any order; pass one with a length."
            )
        self.size = len(self.dataset)  # type: ignore[arg-type]
        if self.size == 0:
            raise ValueError("distillation_dataset has no examples; leave it out.")
        self._order: tuple[int, list[int]] = (-1, [])  # the number of a pass over the examples, and its order
        self.begin()

    def begin(self) -> None:
        """Begin a training, whose first micro-batch may be one that an earlier training has read."""
        self._micro_batch = (-1, 0)  # the number of a step, and of the micro-batch in it

    def next(self, step: int, batch_size: int, accumulation: int) -> UnlabelledBatch:
        """Return the next batch of this process in a step of stage 2, from 0, with `accumulation` micro-batches."""
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        number = step * accumulation + self._micro_batch[1]
        first = (number * self.n_processes + self.process_index) * batch_size
        inputs = self.collator([self.dataset[self._index(place)] for place in range(first, first + batch_size)])
        return self.without_labels(inputs)

    def without_labels(self, inputs: dict[str, Any]) -> UnlabelledBatch:
        """Return a batch without the labels that its data set or its collator has added."""
        return UnlabelledBatch({name: value for name, value in inputs.items() if name not in self.label_names})

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[1][offset]
