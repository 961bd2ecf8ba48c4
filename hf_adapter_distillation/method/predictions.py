"""Predictions of the teachers with their own heads, and the objectives that match them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch import nn

from .._compat import heads_of
from ..composition import AdapterDistillation
from .logit_losses import LogitLoss, logit_matching_loss, two_classes
from .losses import at_least_float32

OF_TOKENS = ("attention_mask", "input_ids", "position_ids", "token_type_ids")  # are padded to one length


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode, and put each part of it back into its mode."""
    # Linear maps are the same in both modes, and those of bitsandbytes would pack their weights again.
    training = [part for part in module.modules() if part.training and not isinstance(part, nn.Linear)]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def run_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, run: Callable[[], Any]) -> list[Any]:
    """Run with each teacher instead of the student, and with its head if it has one; without dropout and graph."""
    outputs = []
    with without_dropout(model), torch.no_grad():
        for name in block.teachers:
            head = name if name in heads_of(model) else None
            with AdapterSetup(Stack(*block.children[:-1], name), head_setup=head):
                outputs.append(run())
    return outputs


def of_each_teacher(
    model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]], name: str
) -> list[list[torch.Tensor]]:
    """Return the `"logits"` or the `"loss"` of each teacher for each batch, detached."""
    return run_teachers(model, block, lambda: [model(**batch)[name] for batch in inputs])


def scores(logits: torch.Tensor) -> torch.Tensor:
    """Return the logit of the positive label, of two classes or of a single label; (..., 2) or (..., 1) to (...)."""
    return logits[..., 1] - logits[..., 0] if logits.shape[-1] == 2 else logits.squeeze(-1)


def calibrated(teacher_scores: torch.Tensor, calibration: torch.Tensor) -> torch.Tensor:
    """Apply the slope and the offset of each teacher, (n_teachers, 2), to its scores, (n_teachers, batch)."""
    slope, offset = calibration.to(teacher_scores).T.unsqueeze(-1)  # (N, 1) each
    return slope * teacher_scores + offset


def teacher_logits(
    model: ModelAdaptersMixin, block: AdapterDistillation, run: Callable[[], Any]
) -> dict[str, torch.Tensor]:
    """Return the teachers' logits by their names in the output of a run, (n_teachers, ...) each, detached."""
    outputs = run_teachers(model, block, run)
    names = [name for name in outputs[0] if name.endswith("logits")]
    return {name: torch.stack([output[name] for output in outputs]) for name in names}


def match_logits(
    student: torch.Tensor,
    teachers: torch.Tensor,
    weights: torch.Tensor | None,
    kind: str,
    loss: LogitLoss,
    shares: Sequence[float],
) -> torch.Tensor:
    """Compute the objective `logits` for logits (..., n_labels) and (n_teachers, ..., n_labels).

    The weights are for logits of tokens, (batch, seq_len); the kind is the `heads.kind_of_labels`. The shares of the
    teachers in their mean sum to 1.
    """
    of_teachers = torch.tensor(shares, dtype=at_least_float32(teachers.dtype), device=teachers.device)  # (N,)
    if kind == "values":
        shape = (-1, *(1,) * student.dim())
        mean = (of_teachers.view(shape) * teachers).sum(dim=0)  # no matrix product, which autocast would round
        return logit_matching_loss(student, mean, weights)
    weights = weights if student.dim() > 2 else None  # spans are chosen among the tokens
    if kind == "labels":
        student, teachers = two_classes(student), two_classes(teachers)
    return loss(student, teachers, weights, of_teachers)


class PredictionCache:
    """Logits of the teachers, (n_examples, n_teachers, n_labels), by the `example_keys` of the model's inputs."""

    def __init__(self, logits: torch.Tensor, keys: list[bytes]) -> None:
        self.logits = logits
        self._places = {key: place for place, key in enumerate(keys)}

    def get(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the logits for a batch, (n_teachers, batch, n_labels), or None if one of the examples is unknown."""
        places = [self._places.get(key) for key in example_keys(inputs)]
        if not places or None in places:
            return None
        device = next(value.device for value in inputs.values() if isinstance(value, torch.Tensor))
        return self.logits[places].transpose(0, 1).to(device)


def example_keys(inputs: dict[str, Any]) -> list[bytes]:
    """Return one digest for each example of a batch, independent of its labels and of padding on its right.

    Padding on the left counts: it moves learned positions, and heads of adapters find their token by its place.
    Inputs without tensors have no digests.
    """
    tensors = {name: v.cpu() for name, v in sorted(inputs.items()) if isinstance(v, torch.Tensor) and name != "labels"}
    if not tensors:
        return []
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
