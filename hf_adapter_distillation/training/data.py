"""Examples that the trainer reads beside its training batches: before the first step, and without labels."""

from collections.abc import Callable, Collection
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length


def draw_examples(dataset: Dataset, number: int, seed: int) -> Dataset | None:
    """Draw examples of a data set.

    Args:
        dataset: The data set.
        number: The number of examples, at most.
        seed: The seed of the draw.

    Returns:
        The examples; the first ones of a `datasets.IterableDataset`; None for other streams, which cannot be read
        twice.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(number)
    if isinstance(dataset, IterableDataset):
        return None
    size = len(dataset)  # type: ignore[arg-type]
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist()
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)


class UnlabelledBatch(dict[str, Any]):
    """Inputs of a batch without labels, in which only the distillation terms count."""


class UnlabelledBatches:
    """Batches of examples without labels that stage 2 reads beside the training batches.

    The numbers of step and micro-batch determine a batch, so that a resumed training continues where it stopped. Each
    pass over the examples has its own order.

    Args:
        dataset: The examples, without the columns that the model does not take.
        collator: Makes a batch of a list of examples.
        label_names: The columns of labels, which are left out.
        seed: The seed of the orders.
        process_index: The number of this process.
        n_processes: The number of processes, which read different batches.

    Raises:
        ValueError: If the examples are a stream, or there are none.
    """

    def __init__(
        self,
        dataset: Dataset,
        collator: Callable[[list[Any]], dict[str, Any]],
        label_names: Collection[str],
        seed: int,
        process_index: int,
        n_processes: int,
    ) -> None:
        if not has_length(dataset) or isinstance(dataset, IterableDataset | datasets.IterableDataset):
            raise ValueError(
                "distillation_dataset is a stream, but its examples are drawn in any order; pass one with a length."
            )
        self.size = len(dataset)  # type: ignore[arg-type]
        if self.size == 0:
            raise ValueError("distillation_dataset has no examples; leave it out.")
        self.dataset = dataset
        self.collator = collator
        self.label_names = label_names
        self.seed = seed
        self.process_index = process_index
        self.n_processes = n_processes
        self._order: tuple[int, list[int]] = (-1, [])  # the number of a pass over the examples, and its order
        self._micro_batch = (-1, 0)  # the number of a step, and of the micro-batch in it

    def next(self, step: int, batch_size: int, accumulation: int) -> UnlabelledBatch:
        """Return the next batch of this process.

        Args:
            step: The number of the step in stage 2, from 0.
            batch_size: The number of examples.
            accumulation: The number of micro-batches in a step.
        """
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        number = step * accumulation + self._micro_batch[1]
        first = (number * self.n_processes + self.process_index) * batch_size
        examples = [self.dataset[self._index(place)] for place in range(first, first + batch_size)]
        inputs = self.collator(examples)
        return UnlabelledBatch({name: value for name, value in inputs.items() if name not in self.label_names})

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[1][offset]
