"""What the teachers predict with their own heads, and the objectives that match it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch import nn

from ..composition import AdapterDistillation
from .losses import CrossTaskLoss, LogitLoss, logit_matching_loss, two_classes


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Runs a module in evaluation mode, and puts each part of it back into the mode that it had."""
    # Linear maps are the same in both modes, and those of bitsandbytes would pack their weights anew.
    training = [part for part in module.modules() if part.training and not isinstance(part, nn.Linear)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def as_teacher(model: ModelAdaptersMixin, block: AdapterDistillation, name: str) -> AdapterSetup:
    """The setup in which a model is a teacher: its adapter in the place of the student's, its head if it has one."""
    own_head = name if name in getattr(model, "heads", {}) else None
    return AdapterSetup(Stack(*block.children[:-1], name), head_setup=own_head)


def of_each_teacher(
    model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]], name: str
) -> list[list[torch.Tensor]]:
    """One part of the outputs of each teacher with its own head.

    Args:
        model: The model.
        block: The distillation block.
        inputs: The arguments of forward, batch by batch.
        name: The name of the part, `"logits"` or `"loss"`.

    Returns:
        The part for each teacher, and in it for each batch, detached.
    """
    found = []
    with without_dropout(model), torch.no_grad():
        for teacher in block.teachers:
            with as_teacher(model, block, teacher):
                found.append([model(**batch)[name] for batch in inputs])
    return found


def scores(logits: torch.Tensor) -> torch.Tensor:
    """The logit of the positive label: of two classes, or of a single label; (..., 2) or (..., 1) to (...)."""
    return logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits.squeeze(-1)


def teacher_logits(
    context_type: type,
    run: Callable[[Any], Any],
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Runs a batch with each teacher and its head.

    Args:
        context_type: adapters' `ForwardContext`.
        run: Runs the model's forward in a context.
        model: The model.
        block: The distillation block.
        args: The arguments of forward.
        kwargs: Its keyword arguments.

    Returns:
        The logits by their names in the output of the model, (n_teachers, ...) each, detached.
    """
    outputs = []
    with without_dropout(model), torch.no_grad():
        for name in block.teachers:
            with as_teacher(model, block, name), context_type(model, *args, **kwargs) as context:
                outputs.append(run(context))
    names = [name for name in outputs[0] if name.endswith("logits")]
    return {name: torch.stack([output[name] for output in outputs]) for name in names}


def output_losses(
    objectives: dict[str, float],
    temperature: float,
    kind: str,
    student: dict[str, torch.Tensor],
    teachers: dict[str, torch.Tensor],
    token_weights: dict[str, torch.Tensor | None],
    labels: torch.Tensor | None,
    calibration: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """What the objectives of predictions are in one forward pass.

    Args:
        objectives: Their weights.
        temperature: Their temperature.
        kind: What the heads predict (`kind_of_labels`).
        student: The student's logits by their names in the output.
        teachers: The teachers', (n_teachers, ...) each.
        token_weights: For logits of tokens the weights of these, (batch, seq_len), else None.
        labels: The labels of the batch, if there are any.
        calibration: The slope and the offset of each teacher's scores, (n_teachers, 2), for `cross_task`.

    Returns:
        The unweighted losses by their names.
    """
    losses: dict[str, torch.Tensor] = {}
    if "logits" in objectives:
        terms = []
        for name, logits in student.items():
            if kind == "values":
                terms.append(logit_matching_loss(logits, teachers[name].mean(dim=0), token_weights[name]))
                continue
            pair = (logits, teachers[name])
            own, others = map(two_classes, pair) if kind == "labels" else pair
            weights = token_weights[name] if logits.dim() > 2 else None  # spans are chosen among the tokens
            terms.append(LogitLoss(temperature)(own, others, weights))
        losses["logits"] = torch.stack(terms).mean()
    if "cross_task" in objectives:
        others = scores(teachers["logits"])  # (N, B)
        if calibration is not None:
            slope, offset = calibration.to(others).unbind(dim=1)  # (N,) each
            others = slope.unsqueeze(1) * others + offset.unsqueeze(1)  # (N, B)
        labels = None if labels is None else labels.reshape(-1)
        losses["cross_task"] = CrossTaskLoss(temperature)(scores(student["logits"]), others, labels)
    return losses
