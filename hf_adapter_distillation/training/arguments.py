"""Training arguments of transformers with the arguments of the two stages."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..configuration import DistillationArgumentsMixin


@dataclass
class DistillationTrainingArguments(DistillationArgumentsMixin, TrainingArguments):
    """Training arguments of transformers, extended by the arguments of the two stages.

    `num_train_epochs` (or `max_steps`) counts both stages together.
    """


@dataclass
class Seq2SeqDistillationTrainingArguments(DistillationArgumentsMixin, Seq2SeqTrainingArguments):
    """Arguments of `Seq2SeqTrainer`, `predict_with_generate` and others, extended by the arguments of the two stages.

    `num_train_epochs` (or `max_steps`) counts both stages together.
    """
