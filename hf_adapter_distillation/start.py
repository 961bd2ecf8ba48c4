"""Where a student starts: at the average of its teachers' weights, and from there at the average of their updates."""

from collections.abc import Callable, Sequence

import datasets
import torch
from adapters import ModelAdaptersMixin
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset
from transformers.utils import logging

from .hub import adapter_digest
from .layers import bottleneck_layers
from .stacked import ends_in_up_projection
from .state import Distillation, distillations

logger = logging.get_logger(__name__)

START_EXAMPLES = 1024  # of the training data


def _mean(modules: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    states = [module.state_dict() for module in modules]
    return {key: torch.stack([state[key] for state in states]).mean(dim=0) for key in states[0]}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def start_at_average(model: ModelAdaptersMixin, student: str, distillation: Distillation) -> None:
    """Sets the student to the average of its teachers' weights, if their configs agree; `start_head` does the head."""
    # No part of what the weights compute:
    ignored = {"dropout", "stochastic_depth", "init_weights", "init_weights_seed"}

    def relevant(name: str) -> dict:
        return {key: v for key, v in model.adapters_config.get(name).to_dict().items() if key not in ignored}

    teachers = distillation.config.teachers
    if other := [name for name in teachers if relevant(name) != relevant(student)]:
        logger.warning(
            f"{student!r} starts at random weights: its config is not that of teacher {other[0]!r}, so there is no "
            f"average to start from. Pass DistillationConfig(student_start='random') to silence this."
        )
        return
    if model.adapters_config.get(student)["phm_layer"]:
        logger.warning(
            f"{student!r} starts at random weights: the average of the teachers' Kronecker factors is no average of "
            f"their weights. Pass DistillationConfig(student_start='random') to silence this."
        )
        return
    of_teachers = [model.get_adapter(name) for name in teachers]
    for place, modules in model.get_adapter(student).items():
        for location, module in modules.items():
            module.load_state_dict(_mean([modules[place][location] for modules in of_teachers]))
    distillation.start_digest = adapter_digest(model, student)


def start_head(model: ModelAdaptersMixin, student: str, distillation: Distillation) -> None:
    """Sets the student's head to the average of its teachers' heads, where their shapes agree; adds it if missing.

    Happens once, before the first training, and only as long as the student's weights are those it started from: a
    student that was trained or loaded meanwhile keeps its head.
    """
    if distillation.head_started or distillation.start_digest is None:
        return
    distillation.head_started = True
    teachers = distillation.config.teachers
    unchanged = distillation.start_digest == adapter_digest(model, student)
    if not unchanged or any(name not in model.heads for name in teachers):
        return
    heads = [model.heads[name] for name in teachers]
    if student not in model.heads:
        if all(head.config == heads[0].config for head in heads):
            model.average_head(student, list(teachers))
        return
    head = model.heads[student]
    if all(type(other) is type(head) and _shapes(other) == _shapes(head) for other in heads):
        head.load_state_dict(_mean(heads))


def start_examples(dataset: Dataset, seed: int) -> Dataset | None:
    """The examples that a student's start is fitted on, at most `START_EXAMPLES`, drawn from the training data.

    Args:
        dataset: The training data.
        seed: For the draw.

    Returns:
        The examples; the first ones of an `IterableDataset` of datasets, None for other streams, which cannot be read
        twice.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.take(START_EXAMPLES)
    if isinstance(dataset, IterableDataset):
        return None
    size = len(dataset)  # type: ignore[arg-type]
    indices = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:START_EXAMPLES].tolist()
    return dataset.select(indices) if isinstance(dataset, datasets.Dataset) else Subset(dataset, indices)


def can_be_fitted(model: ModelAdaptersMixin, student: str) -> bool:
    """Whether the update of a student is linear in its up-projections."""
    return all(ends_in_up_projection(layer.adapters[student]) for _, layer in bottleneck_layers(model, student))


def fit_start(
    model: ModelAdaptersMixin,
    student: str,
    forward_passes: Callable[[], None],
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Moves a student from the average of its teachers' weights to the average of their updates.

    The average of weights puts out less than the average of the teachers: what they have learnt stands in different
    features. The student keeps the averaged down-projections; its up-projections are fitted to the mean of the
    teachers' updates, what `TeacherFusion` puts out before its training, by least squares, in a forward pass that
    carries this mean on. No labels are used.

    Args:
        model: The model, on which `train_adapter(student)` was called.
        student: The name of the student.
        forward_passes: Runs the model on the data.
        reduce: Sums a tensor over the processes.

    Returns:
        The share of the mean update's squares that the student now explains, averaged over the layers.
    """
    distillation = distillations(model.adapters_config)[student]
    training = model.training
    fits = distillation.fits = {}
    model.eval()
    try:
        with torch.no_grad():
            forward_passes()
    finally:
        distillation.fits = distillation.record = None
        model.train(training)
    unexplained = []
    for name, layer in bottleneck_layers(model, student):
        if name in fits:
            fit, up = fits[name], layer.adapters[student].adapter_up
            fit.reduce(reduce)
            weight, bias, error = fit.solve(up.weight.data, up.bias.data)
            up.weight.data.copy_(weight)
            up.bias.data.copy_(bias)
            unexplained.append(error)
    return 1 - torch.stack(unexplained).mean().item()
