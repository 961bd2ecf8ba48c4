"""Supervised fine-tuning of a causal language model with the `SFTTrainer` of trl, in both stages."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import datasets
from adapters import AdapterConfig, ConfigUnion, ModelWithFlexibleHeadsAdaptersMixin, ReftConfig
from torch import nn
from torch.utils.data import Dataset
from transformers import ProcessorMixin

from .._compat import forward_arguments
from ..configuration import AdapterDefaultsMixin, option
from ..method.distillation import active_block, distillation_of
from ..method.wrappers import model_with_adapters
from ..training.data import UnlabelledBatch
from ..training.mixin import DistillationMixin

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        "The trainer of language models needs trl; install it with pip install 'trl>=1.7,<2'."
    ) from error


@dataclass
class SFTDistillationConfig(AdapterDefaultsMixin, SFTConfig):
    """Arguments of trl's `SFTTrainer`, extended by the arguments of the two stages.

    `num_train_epochs` (or `max_steps`) counts both stages together. The defaults are those of trl (`bf16` and
    `gradient_checkpointing` are on), except `learning_rate`, 2e-4 instead of 2e-5, and `logging_steps`, 0.05, a share
    of all steps.
    """

    learning_rate: float = option("Peak learning rate of the student.", 2e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True replaces layers of the model; leave it out.")
        if self.loss_type == "chunked_nll" and self.label_smoothing_factor:  # newer versions of trl rename it
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} needs logits, which the loss_type "
                "'chunked_nll' does not compute; choose 'nll'."
            )
        path = self.chat_template_path
        if path is not None and not path.endswith((".jinja", ".j2")):
            raise ValueError(
                f"chat_template_path={path!r} would add tokens to the frozen base model; give a .jinja file, or set "
                "tokenizer.chat_template."
            )
        if self.is_flat and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of} pads packed batches, which have no mask that would "
                "leave the padding out of the distillation; leave it out."
            )

    @property
    def is_flat(self) -> bool:
        """Whether several sequences stand in one row, without a mask; positions start at 0 in each."""
        return self.padding_free or (self.packing and self.packing_strategy != "wrapped")


class SFTDistillationTrainer(DistillationMixin, SFTTrainer):
    """Train a student adapter of a causal language model in two stages, as `DistillationMixin` says, with trl.

    Data sets, chats, masks of the labels, packing and the loss are those of `SFTTrainer`. Padding does not count in
    the distillation loss. In a packed batch all tokens count, and each row is one sequence of the mean.

    Args:
        model: A model of transformers with a language modelling head, after `adapters.init` and `train_adapter`.
        args: The arguments; by default `SFTDistillationConfig("tmp_trainer")`.
        **kwargs: As for `DistillationMixin` and `trl.SFTTrainer`: `processing_class`, `train_dataset` and so on.
            `distillation_dataset` may have all forms of a `train_dataset`.

    Raises:
        ValueError: As for `DistillationMixin`, and if an argument does not go with distillation.
    """

    completion_only_loss: Any

    def __init__(
        self, model: nn.Module, args: SFTDistillationConfig | None = None, *others: Any, **kwargs: Any
    ) -> None:
        if kwargs.get("peft_config") is not None:
            raise ValueError("peft_config would add an adapter of peft, but the student is trained; leave it out.")
        if isinstance(kwargs.get("processing_class"), ProcessorMixin):
            name = type(kwargs["processing_class"]).__name__
            raise ValueError(f"Images are not supported, but processing_class is a {name}; pass its tokenizer.")
        args = args or SFTDistillationConfig("tmp_trainer")
        check_causal_lm(model)
        if isinstance(args, SFTDistillationConfig):
            if args.is_flat:
                check_flat_rows(model)
            if args.loss_type == "chunked_nll" and kwargs.get("compute_loss_func") is not None:
                raise ValueError(
                    "compute_loss_func needs logits, which the loss_type 'chunked_nll' does not compute; choose 'nll'."
                )
        super().__init__(model, args, *others, **kwargs)

    def _without_unused_columns(self, dataset: Dataset) -> tuple[Dataset, Callable]:
        is_text = isinstance(dataset, datasets.Dataset) and "input_ids" not in dataset.column_names
        if is_text and not self._skip_prepare_dataset:
            args, completion_only_loss = copy(self.args), self.completion_only_loss
            args.assistant_only_loss = self.completion_only_loss = False  # labels do not count, and may be missing
            try:
                arguments = (args, args.packing, self._formatting_func, "distillation")
                dataset = self._prepare_dataset(dataset, self.processing_class, *arguments)
            finally:
                self.completion_only_loss = completion_only_loss
        return super()._without_unused_columns(dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        return self._with_few_logits(prepared) if isinstance(inputs, UnlabelledBatch) else prepared

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._model_inputs(inputs)
        return inputs if self.args.analysis else self._with_few_logits(inputs)  # which compares losses

    def _with_few_logits(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return inputs whose logits fit into memory, where only the layers count."""
        few = {name: value for name, value in inputs.items() if name != "labels"}
        return few | {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(self.model) else few


def check_causal_lm(model: nn.Module) -> None:
    """Check that trl computes all that the student's distillation needs.

    Raises:
        TypeError: If it is not a model.
        ValueError: If the model has heads of its own for each adapter, or the carrier or an objective needs the
            model's own loss or predictions.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r} is a name; load the model, call adapters.init, add_adapter and train_adapter, and pass "
            "the model."
        )
    inner = model_with_adapters(model)
    if isinstance(inner, ModelWithFlexibleHeadsAdaptersMixin):
        raise ValueError(
            f"{type(inner).__name__} has heads for adapters, but trl needs one head; call adapters.init with a model "
            "of AutoModelForCausalLM."
        )
    config = distillation_of(inner, active_block(inner).student).config
    if config.carrier == "dual":
        raise ValueError(
            "The carrier 'dual' needs the model's own loss, but trl computes another; choose the carrier 'mixed'."
        )
    if "logits" in config.objectives:
        raise ValueError(
            "The objective 'logits' needs the logits, which trl does not compute; use DistillationTrainer with labels "
            "that are -100 outside the answer, or choose 'features'."
        )
    if "similarity" in config.objectives:
        raise ValueError(
            "The objective 'similarity' is for models of embeddings, but a causal language model has none; choose "
            "'features' or 'cosine'."
        )
    for objective in config.objectives:
        if objective not in ("features", "cosine"):
            raise ValueError(
                f"The objective {objective!r} needs a head for each teacher, but a causal language model has one for "
                "all; choose 'features' or 'cosine'."
            )


def check_flat_rows(model: nn.Module) -> None:
    """Check that neither student nor teachers take a row of several sequences for one.

    Raises:
        ValueError: With the name of the first adapter that does.
    """
    inner = model_with_adapters(model)
    block = active_block(inner)
    for name in (*block.children, *block.teachers):
        if _reads_rows(inner.adapters_config.get(name)):
            raise ValueError(
                f"packing and padding_free put several sequences into one row, but {name!r} has ReFT or a gate, which "
                "take a row for one sequence; leave them out, or choose packing_strategy='wrapped'."
            )


def _reads_rows(config: AdapterConfig) -> bool:
    if isinstance(config, ConfigUnion):
        return any(map(_reads_rows, config.configs))
    return isinstance(config, ReftConfig) or bool(config.get("use_gating"))
