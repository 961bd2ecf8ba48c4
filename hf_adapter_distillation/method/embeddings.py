"""Sentence embeddings in the training pass: how they are pooled, and the objective that matches their similarities."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from .layer_pass import LayerPass, Place
from .losses import at_least_float32

SCALE = 20.0  # of the cosines, as in the ranking losses of Sentence Transformers

Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (B, T, d) and the mask (B, T) to (B, d)


class EnsemblePass(LayerPass):
    """Pass in which each layer passes on the weighted mean of the teachers' updates, in the place of the student's."""

    def run_layer(self, place: Place) -> torch.Tensor:
        """Pass the weighted mean on."""
        return place.base + place.mix(place.fusion.weights_of)


class SimilarityLoss(nn.Module):
    r"""Match of the similarities between the texts of a batch: the student's with those of its teachers' ensemble.

    .. math::
        \mathcal{L} = \frac{\tau^2}{B} \sum_i \mathrm{KL}\Big(\mathrm{softmax}_{j \neq i} \frac{s \cos(t_i, t_j)}{\tau}
                      \,\Big\|\, \mathrm{softmax}_{j \neq i} \frac{s \cos(e_i, e_j)}{\tau}\Big)

    with the student's embeddings e, the ensemble's t, the scale s = 20 of the ranking losses, and the temperature. The
    ensemble is the model whose layers pass on the weighted mean of the teachers' updates: one forward pass.

    Relations between examples instead of outputs: relational knowledge distillation (Park et al.,
    https://arxiv.org/abs/1904.05068); the temperature and its square are those of Hinton et al.,
    https://arxiv.org/abs/1503.02531.

    Args:
        temperature: The temperature, above 0.
    """

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: torch.Tensor, ensemble: torch.Tensor) -> torch.Tensor:
        """Compute the loss of embeddings (batch, d) each, without gradient to the ensemble.

        With fewer than three texts there is nothing to compare, and the loss is 0.
        """
        if len(student) < 3:
            return student.sum() * 0.0
        ours, theirs = self._log_probabilities(student), self._log_probabilities(ensemble.detach())  # (B, B - 1)
        divergence = (theirs.exp() * (theirs - ours)).sum(dim=1).mean()
        return self.temperature**2 * divergence

    def _log_probabilities(self, embeddings: torch.Tensor) -> torch.Tensor:
        unit = normalize(embeddings.to(at_least_float32(embeddings.dtype)), dim=-1)
        with torch.autocast(unit.device.type, enabled=False):
            cosines = unit @ unit.T  # (B, B)
        others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        return (SCALE / self.temperature * cosines[others].view(len(unit), -1)).log_softmax(dim=1)


def mean_pooling(hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens that count, (batch, d), of (batch, seq_len, d) and their mask."""
    weights = (mask != 0).to(hidden_states).unsqueeze(-1)  # (B, T, 1)
    return (weights * hidden_states).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def last_hidden_state(output: Any) -> torch.Tensor:
    """Return the last hidden states of a model's output, (batch, seq_len, d).

    Raises:
        ValueError: If there are none, as in the output of a model with a head.
    """
    if not isinstance(output, dict) or output.get("last_hidden_state") is None:
        raise ValueError(
            f"The objective 'similarity' needs the last hidden states of a model without a head, but the output is a "
            f"{type(output).__name__}; use AutoModel, as a SentenceTransformer does, or choose 'logits'."
        )
    return output["last_hidden_state"]
