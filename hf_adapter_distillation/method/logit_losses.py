"""Losses that match the student's logits: with those of its teachers, or of the fused pass.

Each is a scalar in float32 (float64 for float64 inputs). Its weights, (batch, seq_len), are the `token_weights` of the
padding mask.
"""

from math import log, log1p

import torch
from torch import nn
from torch.nn.functional import softplus

from .layer_match import MINIMAL_VARIANCE
from .losses import in_float32, mean_over_tokens


def log_mixture(logits: torch.Tensor, temperature: float, shares: torch.Tensor | None = None) -> torch.Tensor:
    """Return the log of the teachers' mean distribution, (..., n_labels), of logits (n_teachers, ..., n_labels).

    `shares` are the weights in the mean, (n_teachers,), which sum to 1; equal by default.
    """
    of_teachers = (logits / temperature).log_softmax(dim=-1)  # (N, ..., C)
    shares = of_teachers.new_full((len(logits),), 1 / len(logits)) if shares is None else shares.to(of_teachers)
    return (of_teachers + shares.log().view(-1, *[1] * (logits.dim() - 1))).logsumexp(dim=0)  # (..., C)


def divergence(target: torch.Tensor, student: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """Compute the generalised Jensen-Shannon divergence, (...), of two log distributions (..., n_labels).

    0 is the forward Kullback-Leibler divergence KL(target || student), 1 the reverse KL(student || target), and a
    number between them weights the divergences of both from their mixture, as in `LogitLoss`. A label with the
    probability 0 in both, by a logit of -inf, adds nothing.
    """
    smallest = torch.finfo(target.dtype).min
    target = target.clamp(min=smallest)  # whose gradients are no NaN
    if beta == 0:
        return _kullback_leibler(target, student)
    if beta == 1:
        return _kullback_leibler(student, target)
    mixture = torch.logaddexp(target + log(beta), student.clamp(min=smallest) + log1p(-beta))  # (..., C)
    return beta * _kullback_leibler(target, mixture) + (1 - beta) * _kullback_leibler(student, mixture)


def _kullback_leibler(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    probabilities = first.exp()  # (..., C)
    return (probabilities * (first - second).masked_fill(probabilities == 0, 0.0)).sum(dim=-1)


class LogitLoss(nn.Module):
    r"""Divergence of the student's predictions from soft labels, the mean of the teachers' predictions.

    .. math::
        p = \sum_n w_n \, \mathrm{softmax}(y_n / \tau), \quad q = \mathrm{softmax}(y / \tau), \qquad
        \mathcal{L} = \tau^2 \, D_\beta(p, q), \quad
        D_0 = \mathrm{KL}(p \Vert q), \quad D_1 = \mathrm{KL}(q \Vert p), \quad
        D_\beta = \beta \, \mathrm{KL}(p \Vert m) + (1 - \beta) \, \mathrm{KL}(q \Vert m), \quad
        m = \beta p + (1 - \beta) q

    with the logits y of the student and y_n of teacher n, each with its own head. The factor keeps the size of the
    gradient where the temperature changes (Hinton et al., https://arxiv.org/abs/1503.02531, who average several
    teachers in the same way). The generalised Jensen-Shannon divergence is that of GKD (Agarwal et al.,
    https://arxiv.org/abs/2306.13649). Unlike `FeatureLoss`, it needs a common label space.
    """

    def __init__(self, temperature: float = 2.0, beta: float = 0.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.beta = beta

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor,
        weights: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the mean over all predictions outside padding, without a gradient to the teachers.

        The logits are (..., n_labels) and (n_teachers, ..., n_labels). Logits of tokens, (batch, seq_len, ...,
        n_labels), have weights. The shares are those of `log_mixture`.
        """
        student, teachers = in_float32(student_logits, teacher_logits.detach())
        soft = log_mixture(teachers, self.temperature, shares)  # (..., C)
        return mean_over_tokens(self.of_predictions(student, soft), weights)

    def of_predictions(self, student: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        """Compute the loss of each prediction, (...), of logits and a log distribution, (..., n_labels)."""
        predicted = (student / self.temperature).log_softmax(dim=-1)  # (..., C)
        return self.temperature**2 * divergence(soft, predicted, self.beta)


class CrossTaskLoss(nn.Module):
    r"""Match of a student's scores with teachers of other tasks: how likely each item is right, and their order.

    .. math::
        \tilde r_n = s \max(s \, r_n, m), \quad s = 2 y - 1, \qquad
        \mathcal{L} = \tau^2 \, \mathrm{KL}\Big(\frac{1}{N} \sum_n \sigma(\tilde r_n / \tau) \;\Big\Vert\;
                                              \sigma(r / \tau)\Big)
        + \frac{\sum_{ij} w_{ij} \, \mathrm{softplus}(r_j - r_i)}{\sum_{ij} w_{ij}}

    with the student's score r, the calibrated score r_n of teacher n (`ranking.fit_platt`), and the label y. A score
    that does not reach the margin m on the side of the label is clipped to it. The second sum runs over the pairs of
    the batch with the same label in which the teachers' mean score puts i before j; :math:`w_{ij}` is the difference
    of their probabilities, so near ties hardly count.

    After CrossDistil (Yang et al., AAAI 2022, https://arxiv.org/abs/2202.09852): calibration, error correction, and a
    pairwise term. There all tasks have labels for the same items and train each other; here the teachers are frozen,
    and their scores, calibrated once, replace the labels that form the quadruplets. Pairs are formed within a
    micro-batch, as in-batch negatives are: a smaller micro-batch has fewer.
    """

    def __init__(self, temperature: float = 2.0, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin
        self.soft_labels = LogitLoss(temperature)

    def forward(
        self, student_scores: torch.Tensor, teacher_scores: torch.Tensor, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute the loss, without a gradient to the teachers.

        The scores are logits of the positive label, (batch,) of the student and (n_teachers, batch), calibrated. The
        labels are 0 or 1, one for each score; without labels no prediction is corrected, and all pairs count. The
        prediction for an example with the label -100 is not corrected, and it forms no pairs.
        """
        student, teachers = in_float32(student_scores, teacher_scores.detach())  # (B,), (N, B)
        corrected, of_one_label = teachers, student.new_ones(len(student), len(student))
        if labels is not None:
            labels = labels.reshape(-1)  # (B,)
            known = labels >= 0  # (B,)
            sign = 2 * labels.to(student.dtype) - 1  # (B,)
            corrected = torch.where(known, sign * (sign * teachers).clamp(min=self.margin), teachers)  # (N, B)
            of_one_label = (known & (labels.unsqueeze(1) == labels)).to(student.dtype)  # (B, B)
        matched = self.soft_labels(two_classes(student), two_classes(corrected))

        mean = teachers.mean(dim=0)  # (B,)
        probability = mean.sigmoid()  # (B,)
        weight = of_one_label * (probability.unsqueeze(1) - probability).clamp(min=0)  # (B, B)
        ranked = weight * softplus(student - student.unsqueeze(1))  # (B, B), i before j
        return matched + ranked.sum() / weight.sum().clamp(min=MINIMAL_VARIANCE)


def two_classes(scores: torch.Tensor) -> torch.Tensor:
    """Return the logits of the negative and the positive class, (..., 2), whose softmax is the sigmoid of a score."""
    return torch.stack([torch.zeros_like(scores), scores], dim=-1)


def logit_matching_loss(
    student_logits: torch.Tensor, fused_logits: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the mean squared difference of the student's and the fused pass's logits, for the carrier `dual`.

    Logit regression (Ba and Caruana, https://arxiv.org/abs/1312.6184) fits all heads: classes, labels, scores, tokens.

    No gradient flows through the fused pass. Logits of tokens, (batch, seq_len, ...), have weights.
    """
    student, fused = in_float32(student_logits, fused_logits.detach())
    differences = (student - fused).masked_fill(student == fused, 0.0)  # also of labels that both exclude by -inf
    return mean_over_tokens(differences.square(), weights)
