"""Examples that the trainer reads beside its training batches: before the first step, and without labels."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers.trainer_utils import has_length

if TYPE_CHECKING:
    from .trainer import DistillationTrainer


def drawn(dataset: Dataset, number: int, seed: int) -> Dataset | None:
    """Some examples of the training data.

    Args:
        dataset: The training data.
        number: How many, at most.
        seed: For the draw.

    Returns:
        The examples; the first ones of an `IterableDataset` of datasets, None for other streams, which cannot be read
        twice.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(number)
    if isinstance(dataset, IterableDataset):
        return None
    size = len(dataset)  # type: ignore[arg-type]
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist()
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)


def _prepared(trainer: "DistillationTrainer", examples: Dataset) -> tuple[Dataset, Any]:
    """A dataset and a collator without the columns that the model does not take."""
    if isinstance(examples, datasets.Dataset):
        return trainer._remove_unused_columns(examples, "distillation"), trainer.data_collator
    return examples, trainer._get_collator_with_removed_columns(trainer.data_collator, "distillation")


def batches(trainer: "DistillationTrainer", examples: Dataset) -> Iterator[dict[str, Any]]:
    """The examples as inputs of the model.

    Each process reads all of them: a share of its own would be padded with examples that count twice.

    Args:
        trainer: The trainer, whose collator and evaluation batch size are used.
        examples: The examples.

    Yields:
        The batches, on the device of the training.
    """
    examples, collator = _prepared(trainer, examples)
    for inputs in DataLoader(examples, trainer.args.eval_batch_size, collate_fn=collator):
        yield trainer._prepare_inputs(inputs)


class UnlabelledBatches:
    """The batches of examples without labels that stage 2 reads beside those of the training data.

    The numbers of step and micro-batch say what is in a batch, so that a resumed training goes on where it stopped.
    Each pass over the examples has an order of its own.

    Args:
        trainer: The trainer, whose collator and batch size are used.
        dataset: The examples; columns of labels are left out.

    Raises:
        ValueError: If the examples are a stream, or there are none.
    """

    def __init__(self, trainer: "DistillationTrainer", dataset: Dataset) -> None:
        if not has_length(dataset) or isinstance(dataset, IterableDataset | datasets.IterableDataset):
            raise ValueError(
                "distillation_dataset is a stream, but its examples are drawn in any order; pass one with a length."
            )
        self.size = len(dataset)  # type: ignore[arg-type]
        if self.size == 0:
            raise ValueError("distillation_dataset has no examples; leave it out.")
        self.trainer = trainer
        self.dataset, self.collator = _prepared(trainer, dataset)
        self._order: tuple[int, list[int]] = (-1, [])  # of which pass over the examples
        self._micro_batch = (-1, 0)  # of which step, and which of it

    def next(self, step: int) -> dict[str, Any]:
        """The next batch as inputs of the model.

        Args:
            step: The number of the step in stage 2, from 0.

        Returns:
            The inputs of this process, without labels, on its device.
        """
        trainer = self.trainer
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        number = step * trainer.args.gradient_accumulation_steps + self._micro_batch[1]
        size = trainer._train_batch_size
        first = (number * trainer.args.world_size + trainer.args.process_index) * size
        examples = [self.dataset[self._index(place)] for place in range(first, first + size)]
        inputs = {name: value for name, value in self.collator(examples).items() if name not in trainer.label_names}
        return trainer._prepare_inputs(inputs)

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, self.size)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.trainer.args.seed + epoch)
            self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
        return self._order[1][offset]
