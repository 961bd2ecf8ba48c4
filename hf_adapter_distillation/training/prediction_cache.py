"""What the frozen teachers predict for the training examples: computed once, before the first step.

A run of each teacher beside each training batch would cost more than the training. For heads of sequences the few
numbers that it gives are kept instead. They are computed in one order before the training, so that a resumed training
finds the same ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..method.distillation import Distillation
from ..method.predictions import of_each_teacher
from .data import batches

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

logger = logging.get_logger(__name__)

MAX_BYTES = 10**9  # of main memory, in each process
OF_TOKENS = ("attention_mask", "input_ids", "position_ids", "token_type_ids")  # are padded to one length


class PredictionCache:
    """The teachers' logits of examples, found by what the model is given of an example.

    Args:
        logits: The logits of all teachers, (n_examples, n_teachers, n_labels).
        keys: What `example_keys` makes of the examples, in the same order.
    """

    def __init__(self, logits: torch.Tensor, keys: list[bytes]) -> None:
        self.logits = logits
        self._places = {key: place for place, key in enumerate(keys)}

    def get(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """The logits for a batch.

        Args:
            inputs: The arguments of the model's forward.

        Returns:
            The logits, (n_teachers, batch, n_labels); None if one of the examples is not known.
        """
        places = [self._places.get(key) for key in example_keys(inputs)]
        if not places or None in places:
            return None
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        return self.logits[places].transpose(0, 1).to(device)


def example_keys(inputs: dict[str, Any]) -> list[bytes]:
    """One digest for each example of a batch, the same whatever it is padded to on its right.

    Args:
        inputs: The arguments of the model's forward; labels make no difference.

    Returns:
        The digests; empty if there are no tensors.
    """
    tensors = {name: v for name, v in sorted(inputs.items()) if isinstance(v, torch.Tensor) and name != "labels"}
    if not tensors:
        return []
    tensors = {name: value.cpu() for name, value in tensors.items()}
    n_examples = len(next(iter(tensors.values())))
    mask = tensors.get("attention_mask")
    lengths = None
    if mask is not None and mask.dim() == 2:
        lengths = ((mask != 0) * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).tolist()  # to the last that counts
    keys = []
    for i in range(n_examples):
        digest = blake2b(digest_size=16)
        for name, value in tensors.items():
            row = value[i : i + 1] if len(value) == n_examples else value
            if lengths is not None and name in OF_TOKENS:
                row = row[:, : lengths[i]]
            digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
            digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


@contextmanager
def cached_predictions(distillation: Distillation) -> Iterator[None]:
    """Forgets at the end of a training what `predict` has computed at its beginning."""
    try:
        yield
    finally:
        distillation.predictions = None


def predict(trainer: "DistillationTrainer") -> None:
    """Lets each teacher predict the examples that stage 2 reads more than once, if an objective asks for predictions.

    Args:
        trainer: The trainer.
    """
    distillation = trainer.distillation
    distillation.predictions = None
    if not distillation.config.output_objectives:
        return
    steps = trainer.state.max_steps - trainer.first_distillation_step
    n_read = steps * trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
    datasets = [trainer.train_dataset, None if trainer._unlabelled is None else trainer._unlabelled.dataset]
    found: list[tuple[list[bytes], torch.Tensor]] = []
    for dataset in datasets:
        if dataset is not None and _has_examples(dataset) and len(dataset) < n_read:
            found += _predictions(trainer, dataset)
    if found:
        keys = [key for part, _ in found for key in part]
        logits = torch.cat([logits for _, logits in found])
        logger.info(f"The teachers have predicted {len(keys)} examples ({logits.nbytes / 1e6:.1f} MB).")
        distillation.predictions = PredictionCache(logits, keys)


def _has_examples(dataset: Any) -> bool:
    return has_length(dataset) and not isinstance(dataset, IterableDataset)


def _predictions(trainer: "DistillationTrainer", dataset: Dataset) -> list[tuple[list[bytes], torch.Tensor]]:
    """The keys of each batch of a data set with its logits, (batch, n_teachers, n_labels); each process does a share.

    Empty where the heads predict something else of each token, or it would be too much to keep.
    """
    found = []
    index, processes = trainer.args.process_index, trainer.args.world_size
    with torch.random.fork_rng(), trainer.compute_loss_context_manager():
        for number, inputs in enumerate(batches(trainer, dataset)):
            if number % processes != index:
                continue
            one_by_one = of_each_teacher(trainer.model, trainer.block, [inputs], "logits")
            logits = torch.stack([parts[0] for parts in one_by_one], dim=1)  # (B, N, n_labels), or more
            if logits.dim() > 3 or logits[0].nbytes * len(dataset) > MAX_BYTES:  # type: ignore[arg-type]
                break
            found.append((example_keys(inputs), logits.cpu()))
        else:
            return gather_object(found)
    return []
