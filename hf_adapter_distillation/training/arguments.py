"""Training arguments of transformers with the arguments of the two stages."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..configuration import AdapterDefaultsMixin


@dataclass
class DistillationTrainingArguments(AdapterDefaultsMixin, TrainingArguments):
    """Training arguments of transformers, extended by the arguments of the two stages.

    `num_train_epochs` (or `max_steps`) counts both stages together. Two defaults differ from those of transformers:
    `learning_rate` is 1e-3, and `logging_steps` 0.05, a share of all steps.
    """


@dataclass
class Seq2SeqDistillationTrainingArguments(AdapterDefaultsMixin, Seq2SeqTrainingArguments):
    """Arguments of `Seq2SeqTrainer`, `predict_with_generate` and others, extended by the arguments of the two stages.

    `num_train_epochs` (or `max_steps`) counts both stages together. The defaults of `learning_rate` and
    `logging_steps` are those of `DistillationTrainingArguments`.
    """
