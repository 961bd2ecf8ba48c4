"""Checks and measurements at the end of a training."""

from pathlib import Path

from adapters import ModelAdaptersMixin
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..analysis.observe import teacher_attention, write_analysis
from ..student.provenance import adapter_digest
from .data import Examples, draw_examples

logger = logging.get_logger(__name__)

ANALYSED_EXAMPLES = 256


def check_teachers_unchanged(model: ModelAdaptersMixin, digests: dict[str, str]) -> None:
    """Compare the teachers' weights with their digests before the training; raise RuntimeError if they differ."""
    for name, digest in digests.items():
        if adapter_digest(model, name) != digest:
            raise RuntimeError(f"The weights of teacher {name!r} changed in training; reload it before you use it.")


def observe_attention(
    model: ModelAdaptersMixin, dataset: Dataset, examples: Examples, folder: Path | None
) -> dict[str, dict[str, float]]:
    """Measure the mean attention by layer and teacher; write the whole analysis to a folder, if one is given.

    Empty for a stream, which is not read twice.
    """
    drawn = draw_examples(dataset, ANALYSED_EXAMPLES, examples.seed)
    if drawn is None:
        return {}
    batches = [examples.model_inputs(inputs) for inputs in examples.batches(drawn)]
    loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    table = teacher_attention(model, loader)
    if folder is not None:
        try:
            write_analysis(model, loader, folder)
        except OSError as error:  # at the end of a training nothing may be lost
            logger.warning(f"The analysis could not be written: {error}.")
    return {layer: {name: round(cell.mean, 4) for name, cell in row.items()} for layer, row in table.items()}
