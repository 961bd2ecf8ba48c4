"""What is noted once a training has ended: the proof that the teachers are unchanged, the run, the attention."""

from pathlib import Path
from typing import Any

from adapters import ModelAdaptersMixin
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerState
from transformers.utils import logging

from ..analysis.observe import teacher_attention, write_analysis
from ..configuration import DistillationTrainingArguments
from ..method.distillation import Distillation
from ..student.provenance import adapter_digest, provenance
from ..student.summary import summary
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


def training_run(
    model: ModelAdaptersMixin,
    distillation: Distillation,
    args: DistillationTrainingArguments,
    state: TrainerState,
    dataset: Dataset,
    stages: dict[str, Any],
) -> dict[str, Any]:
    """Return what the provenance of a student tells of its training.

    Args:
        model: The model.
        distillation: The student's distillation.
        args: The arguments.
        state: The state at the end.
        dataset: The training data.
        stages: When stage 2 began, and the weight in it.
    """
    settings = ("fusion_regularization", "learning_rate", "seed", "fusion_learning_rate")
    best = state.best_global_step if args.load_best_model_at_end else None
    return {
        "teachers": provenance(model, distillation)["teachers"],
        **stages,
        **{name: getattr(args, name) for name in settings},
        **({} if distillation.ranking is None else {"ranking": distillation.ranking}),
        "steps": state.global_step,
        "epochs": round(state.epoch or 0, 2),
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **summary(dataset, state.log_history, best or state.global_step),
    }


def observe_attention(
    model: ModelAdaptersMixin, dataset: Dataset, examples: Examples, folder: Path | None
) -> dict[str, Any]:
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
    rounded = {layer: {name: round(cell.mean, 4) for name, cell in row.items()} for layer, row in table.items()}
    return {"attention": rounded}
