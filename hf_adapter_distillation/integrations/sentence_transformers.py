"""The trainers of Sentence Transformers with both stages, for embedding models and cross-encoders."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..composition import AdapterDistillation
from ..configuration import AdapterDefaultsMixin, DistillationArgumentsMixin
from ..method.distillation import distillations
from ..method.wrappers import models_with_adapters, noting_inputs
from ..student.saving import saving_the_base_alone
from ..training.mixin import DistillationMixin

try:
    # The redundant aliases let the command line have the names from here, with the error below.
    from sentence_transformers import SentenceTransformer as SentenceTransformer
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.evaluation import SentenceEvaluator as SentenceEvaluator
    from sentence_transformers.training_args import BatchSamplers
except ImportError as error:
    raise ImportError(
        "The trainers of embedding models need sentence-transformers 5; install it with "
        "pip install 'sentence-transformers>=5.4,<6'."
    ) from error


@dataclass
class SentenceTransformerDistillationTrainingArguments(AdapterDefaultsMixin, SentenceTransformerTrainingArguments):
    """Arguments of `SentenceTransformerTrainer`, extended by the arguments of the two stages.

    The defaults of `learning_rate` and `logging_steps` are those of `DistillationTrainingArguments`.
    """


@dataclass
class CrossEncoderDistillationTrainingArguments(AdapterDefaultsMixin, CrossEncoderTrainingArguments):
    """Arguments of `CrossEncoderTrainer`, extended by the arguments of the two stages.

    The defaults of `learning_rate` and `logging_steps` are those of `DistillationTrainingArguments`.
    """


class _WrappedTransformerMixin(DistillationMixin):
    """Both stages for a trainer of Sentence Transformers, whose model wraps the one with adapters."""

    training_args_class: Any
    loss: Any
    accum_loss_components: dict[str, Any]

    def __init__(
        self,
        model: nn.Module | None = None,
        args: DistillationArgumentsMixin | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, args or self.training_args_class("tmp_trainer"), *others, **kwargs)
        for name in ("prompts", "router_mapping") if self._unlabelled is not None else ():
            given = vars(self.args)[name]
            if isinstance(given, dict) and any(isinstance(each, dict) for each in given.values()):
                raise ValueError(
                    f"{name} are given by the names of data sets, but distillation_dataset has none; give them by "
                    "columns, or leave it out."
                )
        if self.model_init is None:  # else the losses have another model until the training begins
            self._check_losses()

    @property
    def _losses(self) -> list[nn.Module]:
        return list(self.loss.values()) if isinstance(self.loss, dict) else [self.loss]

    def _check_losses(self) -> None:
        for loss in self._losses:
            check_loss_of_one_model(loss, self.model)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Check the losses, and prepare the training as `DistillationMixin` does."""
        self._check_losses()
        super().create_optimizer_and_scheduler(num_training_steps)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a forward and a backward pass, as `DistillationMixin.training_step` does.

        A loss with a gradient cache runs all sequences without gradients first, and their number is noted.
        """
        if not any(map(uses_gradient_cache, self._losses)):
            return super().training_step(model, inputs, num_items_in_batch)
        with noting_inputs(self.model_with_adapters, self._count_sequences):
            return super().training_step(model, inputs, num_items_in_batch)

    def _loader_of(self, half: Any) -> DataLoader:
        """Return a loader of some training examples, in any order where they are too few for the sampler."""
        given = self.args.batch_sampler
        try:
            return super()._loader_of(half)
        except ValueError:  # of GroupByLabelBatchSampler
            self.args.batch_sampler = BatchSamplers.BATCH_SAMPLER
            return super()._loader_of(half)
        finally:
            self.args.batch_sampler = given

    def _count_sequences(self, inputs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            settings = self.distillation.settings
            sequences = settings.sequences + len(inputs["attention_mask"])
            self.distillation.settings = replace(settings, sequences=sequences)

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        components = self.accum_loss_components
        self.accum_loss_components = {mode: {} for mode in components}
        try:
            yield
        finally:
            self.accum_loss_components = components

    def _without_unused_columns(self, dataset: Dataset) -> tuple[Dataset, Callable]:
        return dataset, self.data_collator  # which reads columns of text

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        with saving_the_base_alone(self.model_with_adapters):
            self.model.save_pretrained(output_dir, safe_serialization=self.args.save_safetensors)
        super()._save(output_dir, state_dict)


def uses_gradient_cache(loss: nn.Module) -> bool:
    """Return whether a loss, or one inside it, has a gradient cache; the first versions tell it by the class name."""

    def is_cached(part: nn.Module) -> bool:
        by_name = any(cls.__name__.startswith("Cached") for cls in type(part).__mro__)
        return getattr(part, "uses_gradient_cache", by_name)

    return any(map(is_cached, loss.modules()))


def check_loss_of_one_model(loss: nn.Module, model: nn.Module) -> None:
    """Check that a loss trains no copy of a model with a distilled student; a frozen one may be a guide.

    Raises:
        ValueError: If it trains one, as `ContrastiveTensionLoss` does.
    """
    trained = set(model.modules())
    for name, other in models_with_adapters(loss).items():
        is_trained = any(parameter.requires_grad for parameter in other.parameters())
        if other not in trained and is_trained and distillations(other.adapters_config):
            raise ValueError(
                f"{type(loss).__name__} trains another copy of the model, {name!r}, which learns nothing from the "
                "teachers; choose a loss of one model, such as MultipleNegativesRankingLoss, or freeze a guide with "
                "guide.requires_grad_(False)."
            )


class SentenceTransformerDistillationTrainer(_WrappedTransformerMixin, SentenceTransformerTrainer):  # type: ignore[misc]
    """Train a student adapter of an embedding model in two stages, with the `SentenceTransformerTrainer`.

    The transformer inside the `SentenceTransformer` got `adapters.init`, its teachers and its student. Any loss of
    Sentence Transformers that trains one model distils. A saved model, and each checkpoint, is a folder of a
    `SentenceTransformer` with the base model's weights, and in it the folder of the student, an adapter.

    Args:
        model: A `SentenceTransformer` in which `train_adapter` was called for an adapter that has `distill_from`.
        args: The arguments; by default `SentenceTransformerDistillationTrainingArguments("tmp_trainer")`.
        **kwargs: As for `DistillationMixin` and `SentenceTransformerTrainer`: `loss`, `evaluator` and so on. Examples
            of `distillation_dataset` are texts in any number of columns.
    """

    training_args_class: Any = SentenceTransformerDistillationTrainingArguments

    def _check_losses(self) -> None:
        super()._check_losses()
        cached = [type(loss).__name__ for loss in self._losses if uses_gradient_cache(loss)]
        if cached and "similarity" in self.distillation.config.objectives:
            raise ValueError(
                f"The objective 'similarity' compares the texts of a forward pass, but {cached[0]} runs a batch in "
                "parts; choose 'features', or a loss without a gradient cache."
            )

    def _take(self, block: AdapterDistillation, *, has_unlabelled: bool) -> None:
        super()._take(block, has_unlabelled=has_unlabelled)
        leaves_out = any(not vars(module).get("include_prompt", True) for module in self.model)
        if leaves_out and self.args.prompts and "similarity" in self.distillation.config.objectives:
            raise ValueError(
                "The objective 'similarity' pools all tokens, but the model has include_prompt=False and leaves out "
                "those of the prompts; choose 'features', or leave out prompts."
            )
        self.distillation.pool = self._pool

    def _pool(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the embeddings, (batch, d), by the modules behind the transformer."""
        features = {"token_embeddings": hidden_states, "attention_mask": mask}
        for module in list(self.model)[1:]:
            features = module(features)
        return features["sentence_embedding"]

    def _outputs(self, model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
        features, _ = self.collect_features(inputs)
        return [model(column)["sentence_embedding"] for column in features]


class CrossEncoderDistillationTrainer(_WrappedTransformerMixin, CrossEncoderTrainer):  # type: ignore[misc]
    """Train a student adapter of a cross-encoder in two stages, with the `CrossEncoderTrainer`.

    As `SentenceTransformerDistillationTrainer`, for a `CrossEncoder`, whose head is saved with the base model.

    Args:
        model: A `CrossEncoder` in which `train_adapter` was called for an adapter that has `distill_from`.
        args: The arguments; by default `CrossEncoderDistillationTrainingArguments("tmp_trainer")`.
        **kwargs: As for `DistillationMixin` and `CrossEncoderTrainer`: `loss`, `evaluator` and so on.

    Raises:
        ValueError: If there is a `distillation_dataset`.
    """

    training_args_class: Any = CrossEncoderDistillationTrainingArguments

    def __init__(self, *args: Any, distillation_dataset: Dataset | None = None, **kwargs: Any) -> None:
        if distillation_dataset is not None:
            raise ValueError(
                "distillation_dataset is not supported for a CrossEncoder, whose loss forms its pairs; leave it out."
            )
        super().__init__(*args, **kwargs)
