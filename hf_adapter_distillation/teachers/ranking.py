"""Value of teachers for a new task, from its data before the first step: ranking and calibration."""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity

from .._compat import heads_of
from ..composition import AdapterDistillation
from ..method.calls import masks_of
from ..method.heads import is_binary, is_of_sequences, shares_labels
from ..method.losses import in_float64, token_weights
from ..method.predictions import of_each_teacher, scores, without_dropout

NO_LABELS = "The teachers cannot be compared: all labels are -100; give examples that have labels."


def area_under_curve(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the probability that a positive example has a higher score than a negative one; ties count half.

    This is the area under the ROC curve, 0.5 where a label is missing. Scores and labels, 0 or 1, are (n_examples,).
    """
    positive, negative = scores[labels == 1].unsqueeze(1), scores[labels == 0]
    above = in_float64(positive > negative) + 0.5 * in_float64(positive == negative)  # (n_positive, n_negative)
    return above.mean().item() if above.numel() else 0.5


class Ranking(NamedTuple):
    """Values of teachers for a task.

    Args:
        scores: The score of each teacher, the higher the better.
        what: The kind of the scores: `"AUC"`, `"accuracy"`, `"-loss"` or `"cosine"`.
        chance: The score that an uninformative teacher hardly ever exceeds; -inf where there is no such level.
    """

    scores: dict[str, float]
    what: str
    chance: float


def own_logits(
    model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the logits of the teachers' heads, (n_teachers, n_examples, n_labels), and the labels, (n_examples,).

    The heads share the student's labels, and predict classes of sequences. Examples with the label -100 are left out.

    Raises:
        ValueError: If no example is left.
    """
    logits = torch.stack([torch.cat(batches) for batches in of_each_teacher(model, block, inputs, "logits")])
    labels = torch.cat([batch["labels"].reshape(-1) for batch in inputs])
    if not (has_label := labels >= 0).any():
        raise ValueError(NO_LABELS)
    return logits[:, has_label], labels[has_label]


def predict_labels(model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]) -> bool:
    """Return whether the heads of all teachers predict the student's labels, and all batches have them."""
    know_labels = all(shares_labels(model, block.student, name) for name in block.teachers)
    return know_labels and all("labels" in batch for batch in inputs)


def rank_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]) -> Ranking:
    """Score the teachers by their value for a new task without any training.

    Where the teachers' heads predict the student's labels, each teacher is scored with its own head: by the area under
    the ROC curve for two classes, the accuracy for several, else the loss. Elsewhere a teacher is scored by the cosine
    between its update of the last hidden states and the mean update of the others: a teacher that agrees with none
    has nothing to add. The level of chance lies two standard errors above a guess (area: Mann and Whitney, 1947).
    `inputs` holds examples of the new task, batch by batch.

    Raises:
        ValueError: If no example has a label, or there is neither a common label space nor hidden states in the
            outputs of the model.
    """
    student, teachers = block.student, block.teachers
    if not predict_labels(model, block, inputs):
        values, what, chance = _agreement(model, block, inputs), "cosine", float("-inf")
    elif not is_of_sequences(model, student):
        losses = torch.stack([torch.stack(batches) for batches in of_each_teacher(model, block, inputs, "loss")])
        sizes = torch.tensor([len(batch["labels"]) for batch in inputs]).to(losses)  # (n_batches,)
        has_labels = losses.isfinite().any(dim=0)  # the mean over no labels is NaN
        if not has_labels.any():
            raise ValueError(NO_LABELS)
        losses, sizes = losses[:, has_labels], sizes[has_labels]
        values, what, chance = (-losses @ sizes / sizes.sum()).tolist(), "-loss", float("-inf")
    else:
        logits, labels = own_logits(model, block, inputs)
        if is_binary(model, student):
            values, what = [area_under_curve(scores(one), labels) for one in logits], "AUC"
            n_positive = max(1, int((labels == 1).sum()))
            n_negative = max(1, len(labels) - n_positive)
            chance = 0.5 + 2 * sqrt((len(labels) + 1) / (12 * n_positive * n_negative))
        else:
            values, what = in_float64(logits.argmax(dim=-1) == labels).mean(dim=1).tolist(), "accuracy"
            guess = labels.bincount().max().item() / len(labels)
            chance = guess + 2 * sqrt(guess * (1 - guess) / len(labels))
    return Ranking(dict(zip(teachers, values, strict=True)), what, chance)


def _agreement(model: ModelAdaptersMixin, block: AdapterDistillation, inputs: Sequence[dict[str, Any]]) -> list[float]:
    """Return the cosine of each teacher's update of the last hidden states with the mean of the others' updates."""
    below, head = block.children[:-1], block.student if block.student in heads_of(model) else None
    setups = [AdapterSetup(Stack(*below) if below else None, head_setup=head)]  # teachers may have no head
    setups += [AdapterSetup(Stack(*below, name), head_setup=head) for name in block.teachers]
    totals, n_examples = torch.zeros(len(block.teachers)), 0
    with without_dropout(model), torch.no_grad():
        for batch in inputs:
            states = []
            for setup in setups:
                with setup:
                    states.append(_last_states(model(**batch, output_hidden_states=True)))
            updates = torch.stack(states[1:]).float() - states[0].float()  # (N, B, T, d)
            others = (updates.sum(dim=0) - updates) / max(1, len(updates) - 1)  # (N, B, T, d)
            mask = masks_of(model, batch, is_half=False)[model.config.is_encoder_decoder]
            if mask is None or mask.shape != updates.shape[1:3]:
                mask = torch.ones(updates.shape[1:3])
            weights = token_weights((mask != 0).to(updates.device))  # (B, T)
            totals += (weights * cosine_similarity(updates, others, dim=-1)).sum(dim=(1, 2)).cpu()
            n_examples += len(weights)
    return (totals / n_examples).tolist()


def _last_states(output: Any) -> torch.Tensor:
    states = output.get("decoder_hidden_states") or output.get("hidden_states")
    if not states:
        raise ValueError(
            f"teacher_selection needs hidden states, but {type(output).__name__} has none; leave it out, or give the "
            "teachers heads with the labels of the student."
        )
    return states[-1]


def fit_platt(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    r"""Fit the slope a and the offset b by which a score r predicts the label as :math:`\sigma(a r + b)`.

    Platt scaling maximises the likelihood of smoothed labels, :math:`(N_1 + 1) / (N_1 + 2)` for the N_1 positive and
    :math:`1 / (N_0 + 2)` for the N_0 negative examples, which keeps it finite where a score separates them (Platt,
    Probabilistic outputs for support vector machines, 1999). The scores are (n_teachers, n_examples), the labels 0 or
    1. The result, (n_teachers, 2) in float64, has a slope near 0 for uninformative scores.
    """
    scores = in_float64(scores.detach())
    positive = labels.to(scores) > 0.5
    n_positive, n_negative = positive.sum(), (~positive).sum()
    targets = torch.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2)).expand_as(scores)
    mean = scores.mean(dim=1, keepdim=True)  # (N, 1)
    deviation = scores.std(dim=1, keepdim=True, correction=0).clamp(min=1e-12)  # (N, 1)
    standard = (scores - mean) / deviation  # (N, n)
    line = torch.zeros(len(scores), 2, dtype=torch.float64, device=scores.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        predicted = line[:, :1] * standard + line[:, 1:]  # (N, n)
        value = binary_cross_entropy_with_logits(predicted, targets, reduction="sum")
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    slope, offset = line.detach().split(1, dim=1)  # (N, 1) each
    return torch.cat([slope / deviation, offset - slope * mean / deviation], dim=1)
