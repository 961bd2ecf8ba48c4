"""The trainers of transformers with both stages."""

from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from ..configuration import DistillationArgumentsMixin
from .arguments import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
from .mixin import DistillationMixin


class DistillationTrainer(DistillationMixin, Trainer):
    """Train a student adapter in two stages, as `DistillationMixin` says, with the `Trainer` of transformers.

    Args:
        args: The arguments; by default `DistillationTrainingArguments("tmp_trainer")`.
        **kwargs: As for `DistillationMixin` and `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArgumentsMixin | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args or DistillationTrainingArguments("tmp_trainer"), *others, **kwargs)


class Seq2SeqDistillationTrainer(DistillationMixin, Seq2SeqTrainer):
    """Train a student adapter in two stages, as `DistillationMixin` says, with the `Seq2SeqTrainer` of transformers.

    With `predict_with_generate=True` evaluation and prediction generate with the student.

    Args:
        args: The arguments; by default `Seq2SeqDistillationTrainingArguments("tmp_trainer")`.
        **kwargs: As for `DistillationMixin` and `transformers.Seq2SeqTrainer`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArgumentsMixin | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args or Seq2SeqDistillationTrainingArguments("tmp_trainer"), *others, **kwargs)


AdapterDistillationTrainer = DistillationTrainer
