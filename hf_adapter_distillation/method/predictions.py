"""Predictions of the teachers with their own heads, and the objectives that match them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch import nn

from ..composition import AdapterDistillation
from .losses import CrossTaskLoss, LogitLoss, logit_matching_loss, two_classes

OF_TOKENS = ("attention_mask", "input_ids", "position_ids", "token_type_ids")  # are padded to one length


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode, and put each part of it back into its mode."""
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
    """Return the setup of a teacher: its adapter instead of the student's, and its head if it has one."""
    own_head = name if name in getattr(model, "heads", {}) else None
    return AdapterSetup(Stack(*block.children[:-1], name), head_setup=own_head)


def of_each_teacher(
    model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]], name: str
) -> list[list[torch.Tensor]]:
    """Run each teacher with its own head, and return one part of its outputs.

    Args:
        model: The model.
        block: The distillation block.
        inputs: The arguments of forward, batch by batch.
        name: The name of the part, `"logits"` or `"loss"`.

    Returns:
        The part for each teacher, and in it for each batch, detached.
    """
    outputs = []
    with without_dropout(model), torch.no_grad():
        for teacher in block.teachers:
            with as_teacher(model, block, teacher):
                outputs.append([model(**batch)[name] for batch in inputs])
    return outputs


def scores(logits: torch.Tensor) -> torch.Tensor:
    """Return the logit of the positive label, of two classes or of a single label; (..., 2) or (..., 1) to (...)."""
    return logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits.squeeze(-1)


def teacher_logits(
    context_type: type,
    run: Callable[[Any], Any],
    model: ModelAdaptersMixin,
    block: AdapterDistillation,
    args: tuple,
    kwargs: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Run a batch with each teacher and its head.

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
    """Compute the objectives of predictions.

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


class PredictionCache:
    """Logits of the teachers for examples, found by the inputs of the model.

    Args:
        logits: The logits of all teachers, (n_examples, n_teachers, n_labels).
        keys: The `example_keys` of the examples, in the same order.
    """

    def __init__(self, logits: torch.Tensor, keys: list[bytes]) -> None:
        self.logits = logits
        self._places = {key: place for place, key in enumerate(keys)}

    def get(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the logits for a batch.

        Args:
            inputs: The arguments of the model's forward.

        Returns:
            The logits, (n_teachers, batch, n_labels); None if one of the examples is unknown.
        """
        places = [self._places.get(key) for key in example_keys(inputs)]
        if not places or None in places:
            return None
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        return self.logits[places].transpose(0, 1).to(device)


def example_keys(inputs: dict[str, Any]) -> list[bytes]:
    """Return one digest for each example of a batch, independent of padding on its right.

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
