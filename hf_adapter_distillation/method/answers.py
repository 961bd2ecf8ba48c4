"""The objective `logits` for language models: the teachers' distributions over the vocabulary, on the answer alone.

The logits of a batch are large: (batch, seq_len, vocabulary). The logits of one teacher are there at a time. Only the
mixture of all teachers on the tokens of the answer is kept, and the divergence from it is computed in chunks.
"""

from math import log

import torch
from torch.utils.checkpoint import checkpoint

from .logit_losses import LogitLoss
from .losses import at_least_float32, token_weights

CHUNK = 2**22  # logits whose distributions are computed at once


def answer_mask(labels: torch.Tensor, shifts: bool) -> torch.Tensor:
    """Return which logits predict a token of the answer, (batch, seq_len): one whose label is not -100.

    `shifts` says that the logits at a token predict the next one, as in a causal language model.
    """
    mask = labels != -100  # (B, T)
    if shifts:
        mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask


class AnswerMixture:
    """The teachers' mean distribution on the tokens of the answer, to which one teacher after the other is added.

    Args:
        mask: Which logits predict a token of the answer, (batch, seq_len).
        temperature: The temperature of the distributions.
    """

    def __init__(self, mask: torch.Tensor, temperature: float) -> None:
        self.mask = mask
        self.temperature = temperature
        self.log_probabilities: torch.Tensor | None = None  # (n_answer_tokens, vocabulary)

    @torch.no_grad()
    def add(self, logits: torch.Tensor, share: float) -> None:
        """Add a teacher by its logits, (batch, seq_len, vocabulary), with its share of the mean."""
        of_answer = logits[self.mask]  # (K, V)
        is_first = self.log_probabilities is None
        if self.log_probabilities is None:
            self.log_probabilities = of_answer.new_empty(of_answer.shape, dtype=at_least_float32(logits.dtype))
        total = self.log_probabilities
        for rows, known in zip(_chunks(of_answer), _chunks(total), strict=True):
            added = (rows.to(total.dtype) / self.temperature).log_softmax(dim=-1) + log(max(share, 1e-30))
            known.copy_(added) if is_first else torch.logaddexp(known, added, out=known)


def answer_loss(logits: torch.Tensor, mixture: AnswerMixture, loss: LogitLoss) -> torch.Tensor:
    """Compute the mean over the tokens of the answer of each sequence, and then over sequences.

    Chunks are computed again in the backward pass. A sequence without an answer counts as 0.
    """
    assert mixture.log_probabilities is not None
    weights = token_weights(mixture.mask.to(mixture.log_probabilities.dtype))[mixture.mask]  # (K,)
    parts = zip(
        _chunks(logits[mixture.mask]), _chunks(mixture.log_probabilities), weights.split(_rows(logits)), strict=True
    )
    sums = [checkpoint(_weighted_sum, loss, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / len(logits)


def _weighted_sum(loss: LogitLoss, logits: torch.Tensor, soft: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * loss.of_predictions(logits.to(soft.dtype), soft)).sum()


def _chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split rows of logits, (K, V), into chunks."""
    return tensor.split(_rows(tensor))


def _rows(logits: torch.Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])
