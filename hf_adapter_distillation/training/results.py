"""Checks and measurements at the end of a training."""

from pathlib import Path

from adapters import ModelAdaptersMixin
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

from ..analysis.observe import teacher_attention, write_analysis
from ..student.provenance import adapter_digest
from .data import draw_examples
from .preparation import Examples

logger = logging.get_logger(__name__)

ANALYSED_EXAMPLES = 256


def check_teachers_unchanged(model: ModelAdaptersMixin, digests: dict[str, str]) -> None:
    """Compare the teachers' weights with their digests before the training.

    Raises:
        RuntimeError: If the weights of a teacher have changed.
    """
    for name, digest in digests.items():
        if adapter_digest(model, name) != digest:
            raise RuntimeError(f"The weights of teacher {name!r} changed in training; reload it before you use it.")


def observe_attention(
    model: ModelAdaptersMixin, dataset: Dataset, examples: Examples, folder: Path | None
) -> dict[str, dict[str, float]]:
    """Return the attention over the teachers for the provenance.

    Args:
        model: The model, whose fusion is still there.
        dataset: The data set to draw examples from.
        examples: Access to them.
        folder: The folder that the whole analysis is written to, if any.

    Returns:
        The mean attention by layer and teacher; nothing for a stream, which is not read twice.
    """
    drawn = draw_examples(dataset, ANALYSED_EXAMPLES, examples.seed)
    if drawn is None:
        return {}
    loader: DataLoader = DataLoader(list(examples.model_inputs(drawn)), batch_size=None)  # type: ignore[arg-type]
    table = teacher_attention(model, loader)
    if folder is not None:
        try:
            write_analysis(model, loader, folder)
        except OSError as error:  # at the end of a training nothing may be lost
            logger.warning(f"The analysis could not be written: {error}.")
    return {layer: {name: round(cell.mean, 4) for name, cell in row.items()} for layer, row in table.items()}
