"""Measure how much the fusion uses each teacher on given data, with standard errors.

The functions need the fusion: call them before or during a training, or after one with `keep_fusion=True` and another
`model.train_adapter(student)`. `DistillationTrainingArguments(analysis=True)` writes them at the end of the training.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import nan, sqrt
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets
import torch
from accelerate.utils import send_to_device
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator
from transformers.utils import logging

from ..composition import AdapterDistillation, block_of
from ..method.distillation import distillation_of, distillations
from ..method.fusion import fusions_of
from ..method.layer_pass import LayerPass, Place
from ..method.losses import FeatureLoss
from ..method.predictions import without_dropout
from ..method.wrappers import accepted_inputs
from .plots import (
    Estimate,
    plot_leave_one_teacher_out,
    plot_student_distance,
    plot_teacher_attention,
    plot_teacher_weights,
)

logger = logging.get_logger(__name__)

Data: TypeAlias = Dataset | datasets.Dataset | DataLoader
Collator: TypeAlias = Callable[[list[Any]], Mapping[str, Any]]
AttentionTable: TypeAlias = dict[str, dict[str, Estimate]]


def teacher_attention(
    model: ModelAdaptersMixin, dataset: Data, data_collator: Collator | None = None, batch_size: int = 16
) -> AttentionTable:
    """Measure the mean attention of the fusion to each teacher, by layer.

    The model runs in evaluation mode, so that each layer sees the student's hidden states, as in production.

    Args:
        model: A model whose active setup is a distillation block with its fusion.
        dataset: Examples as a trainer takes them (other columns are left out), or a `DataLoader` of batches.
        data_collator: A function that makes a batch, for instance `DataCollatorWithPadding(tokenizer)`. The default,
            `transformers.default_data_collator`, does not pad.

    Returns:
        `{layer: {teacher: estimate}}`: the mean over sequences of the mean over non-padding tokens. The means of a
        layer sum to 1, or with weighted teachers to 1 less the attention to no teacher.

    Raises:
        ValueError: If no distillation block is active, its fusion was dropped, or there are no examples.
    """
    block = _observed_block(model)
    table = {}
    for location, parts in _observations(model, _loader(dataset, data_collator, batch_size)).items():
        attention = torch.cat([part.attention for part in parts])  # (n_sequences, n_teachers)
        weights = dict(zip(parts[0].names, attention.T, strict=True))
        absent = torch.zeros(len(attention))  # a teacher without a module in this layer
        table[location] = {name: _estimate(weights.get(name, absent)) for name in block.teachers}
    return table


def student_distance(
    model: ModelAdaptersMixin, dataset: Data, data_collator: Collator | None = None, batch_size: int = 16
) -> dict[str, Estimate]:
    """Measure the distance of the student to its fused teachers, by layer.

    The distance is that of `losses.FeatureLoss` in evaluation mode: the squared distance of the updates in units of
    the variance of the fused update. It is 0 for a student that equals its fused teachers, and 1 for one that adds
    nothing. The arguments are those of `teacher_attention`.

    Returns:
        `{layer: estimate}`, means over sequences.

    Raises:
        ValueError: As for `teacher_attention`.
    """
    observations = _observations(model, _loader(dataset, data_collator, batch_size))
    return {place: _estimate(torch.cat([part.distance for part in parts])) for place, parts in observations.items()}


def leave_one_teacher_out(
    model: ModelAdaptersMixin, dataset: Data, data_collator: Collator | None = None, batch_size: int = 16
) -> dict[str, Estimate]:
    """Measure the change of the fused teachers' task loss when one of them is left out, for each teacher.

    Each layer passes on the fused output, without the student. The examples, which need labels, run once with all
    teachers and once without each, when the others share the attention. Nothing is trained: the change measures the
    use of a teacher for the fusion, not for a student trained without it. The arguments are those of
    `teacher_attention`.

    Returns:
        `{teacher: estimate}`: the loss without the teacher minus the loss with all, above 0 where the teacher helps.
        The means are over examples. The errors come from the differences of batches, and are NaN for a single batch.

    Raises:
        ValueError: As for `teacher_attention`; if there is a single teacher, or the outputs of the model have no loss.
    """
    block = _observed_block(model)
    if len(block.teachers) < 2:
        raise ValueError(f"{block.student!r} has a single teacher, {block.teachers[0]!r}; none can be left out.")
    batches = list(_loader(dataset, data_collator, batch_size))  # the same for all, so that differences are paired
    sizes, with_all = _losses(model, block, batches)
    differences = {}
    for left_out in block.teachers:
        others = [name for name in block.teachers if name != left_out]
        _, without = _losses(model, AdapterDistillation(Stack(*block.children), others), batches)
        differences[left_out] = _estimate(without - with_all, sizes)
    return differences


def write_analysis(
    model: ModelAdaptersMixin,
    dataset: Data,
    folder: str | Path,
    data_collator: Collator | None = None,
    batch_size: int = 16,
) -> AttentionTable:
    """Write the results of all three functions as tables (CSV) and figures (PNG), and return the attention.

    The weights of the teachers, where they were learned, are a fourth table. If no teacher can be left out (a single
    teacher, no labels), a warning says so, and the others are written. The folder is created if it is missing. The
    other arguments are those of `teacher_attention`; the data set should have labels and not be the training data.

    Raises:
        ValueError: As for `teacher_attention`.
        ImportError: If matplotlib is not installed.
    """
    loader = _loader(dataset, data_collator, batch_size)
    attention, distance = teacher_attention(model, loader), student_distance(model, loader)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells: list[tuple] = [(layer, name, *cell) for layer, row in attention.items() for name, cell in row.items()]
    _write(folder / "teacher_attention", ("layer", "teacher"), cells, plot_teacher_attention(attention))
    if (weights := distillation_of(model).weights) is not None:
        cells = [(place, name, weight) for place, row in weights.by_place.items() for name, weight in row.items()]
        _write(
            folder / "teacher_weights", ("place", "teacher"), cells, plot_teacher_weights(weights.mean()), ["weight"]
        )
    cells = [(layer, *cell) for layer, cell in distance.items()]
    _write(folder / "student_distance", ("layer",), cells, plot_student_distance(distance))
    try:
        differences = leave_one_teacher_out(model, loader)
    except ValueError as error:
        logger.warning(f"No teacher was left out: {error}")
        return attention
    cells = [(name, *cell) for name, cell in differences.items()]
    _write(folder / "leave_one_teacher_out", ("teacher",), cells, plot_leave_one_teacher_out(differences))
    return attention


def _write(
    path: Path, keys: tuple[str, ...], rows: Sequence[tuple], figure: Any, values: Sequence[str] = Estimate._fields
) -> None:
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([(*keys, *values), *rows])
    figure.savefig(path.with_suffix(".png"))


def _observed_block(model: ModelAdaptersMixin) -> AdapterDistillation:
    setup = model.active_adapters
    block = block_of(setup)
    if block is None or block.student not in distillations(model.adapters_config):
        raise ValueError(f"The active setup {setup} distils nothing; call model.train_adapter(student).")
    return block


def _loader(dataset: Data, data_collator: Collator | None, batch_size: int) -> DataLoader:
    if isinstance(dataset, DataLoader):
        return dataset
    return DataLoader(dataset, batch_size, collate_fn=data_collator or _unpadded)


def _unpadded(examples: list[Any]) -> Mapping[str, Any]:
    try:
        return default_data_collator(examples)
    except ValueError as error:
        raise ValueError(
            f"The examples make no batch ({error}); pass data_collator=DataCollatorWithPadding(tokenizer)."
        ) from error


def _inputs(model: ModelAdaptersMixin, batch: Mapping[str, Any]) -> dict[str, Any]:
    return send_to_device(accepted_inputs(model, batch), model.device)


class Observation(NamedTuple):
    """Measurements of the sequences of a batch at one place, without sequences of padding only."""

    names: tuple[str, ...]  # of the teachers
    attention: torch.Tensor  # (n_sequences, n_teachers), means over tokens
    distance: torch.Tensor  # (n_sequences,), of the student's update to the fused one (`losses.FeatureLoss`)


class ObservingPass(LayerPass):
    """Forward pass that observes the fusion in each layer, and passes on the student's output or the fused one."""

    def __init__(self, passes_fused_on: bool) -> None:
        self.passes_fused_on = passes_fused_on
        self.observations: dict[str, list[Observation]] = {}

    def run_layer(self, place: Place) -> torch.Tensor | None:
        """Observe one place."""
        fused = place.fuse()
        weights, _ = self.token_weights(place.fusion, place.student_output)
        attention = torch.einsum("bt,btn->bn", weights, fused.attention.to(weights.dtype))
        distance = FeatureLoss.of_sequences(place.student_output, fused.output, weights)  # (B,)
        counted = weights.any(dim=1)  # (B,)
        observation = Observation(fused.names, attention[counted], distance[counted])
        self.observations.setdefault(place.fusion.location, []).append(observation)
        return place.base + fused.output if self.passes_fused_on else None


@contextmanager
def _observing(model: ModelAdaptersMixin, passes_fused_on: bool) -> Iterator[ObservingPass]:
    observing_pass, student = ObservingPass(passes_fused_on), _observed_block(model).student
    distillation = distillation_of(model, student)
    if distillation.has_new_fusion and all(fusion.log_weights is None for fusion in fusions_of(model, student)):
        logger.warning_once(  # type: ignore[attr-defined]
            f"The fusion of {student!r} is not trained, so it weighs the teachers alike. Train it first, with "
            "keep_fusion=True."
        )
    with distillation.inspected_by(observing_pass), without_dropout(model), torch.no_grad():
        yield observing_pass


def _observations(model: ModelAdaptersMixin, loader: DataLoader) -> dict[str, list[Observation]]:
    """Observe each place on all batches."""
    with _observing(model, passes_fused_on=False) as observing_pass:
        for batch in loader:
            model(**_inputs(model, batch))
    if not observing_pass.observations:
        raise ValueError("There is no attention to show: there are no examples, or the fusion was dropped.")
    return observing_pass.observations


def _losses(
    model: ModelAdaptersMixin, block: AdapterDistillation, batches: Sequence[Mapping[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of examples and the task loss, with the fused teachers, of each batch, (n_batches,) each."""
    sizes, losses = [], []
    with _observing(model, passes_fused_on=True) as observing_pass, AdapterSetup(block):
        for batch in batches:
            loss = model(**_inputs(model, batch)).get("loss")
            if loss is None:
                raise ValueError(f"{type(model).__name__} puts out no loss; add a column of labels to the examples.")
            if not observing_pass.observations:
                raise ValueError("There are no fused teachers to run: the fusion was dropped.")
            sizes.append(len(next(iter(batch.values()))))
            losses.append(loss.item())
    if not losses:
        raise ValueError("There is no loss to compare: there are no examples.")
    return torch.tensor(sizes).double(), torch.tensor(losses).double()


def _estimate(values: torch.Tensor, weights: torch.Tensor | None = None) -> Estimate:
    """Return the (weighted) mean of values, (n,), with its standard error."""
    n, values = len(values), values.cpu().double()
    weights = torch.ones_like(values) if weights is None else weights
    weights = weights / weights.sum()
    mean = (weights * values).sum()
    variance = (weights * (values - mean)).square().sum() * n / (n - 1) if n > 1 else torch.tensor(nan)
    return Estimate(mean.item(), sqrt(variance.item()))
