"""Checks of a trainer's settings, before any time is spent."""

from importlib.util import find_spec
from typing import TypeGuard

import torch
from accelerate import DistributedType
from adapters import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin
from torch import nn

from .._compat import (
    Adapter,
    AdapterLayerBase,
    LoRA,
    LoRALinear,
    LoRAMergedLinear,
    ReftModule,
    Vera,
    forward_arguments,
)
from ..analysis.plots import MISSING
from ..composition import AdapterDistillation
from ..configuration import DistillationArgumentsMixin, DistillationConfig
from ..method.distillation import Distillation
from ..method.parameters import parameter_roles

NOT_SHARDED = (
    "is not supported: what is trained is too small to be worth sharding. Leave it out; to shard the frozen base "
    "model, call hf_adapter_distillation.training.sharding.shard_base_model before the trainer is made."
)
MULTIPLYING = (LoRA, Vera, Adapter, ReftModule)  # the modules of others, such as IA3, may have another data type


def check_arguments(args: DistillationArgumentsMixin) -> None:
    """Check that the arguments neither shard the model nor, without matplotlib, ask for an analysis.

    Raises:
        ValueError: If the training would run on several GPUs in an unsupported way.
        ImportError: If `analysis=True` and matplotlib is not installed.
    """
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} {NOT_SHARDED}")
    if args.analysis and find_spec("matplotlib") is None:
        raise ImportError(f"analysis=True draws figures. {MISSING}")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported; start with accelerate launch."
        )


def check_loss(
    model: ModelAdaptersMixin, config: DistillationConfig, *, has_other_loss: bool, is_wrapped: bool
) -> None:
    """Check that a training has a loss, and that what needs the model's own has it.

    Args:
        model: The model with adapters.
        has_other_loss: Whether there is a loss outside the model of the trainer.
        is_wrapped: Whether the model of the trainer wraps the model with adapters.

    Raises:
        ValueError: If a model without a head has no other loss, or an objective or the carrier needs the model's own.
    """
    kind = type(model).__name__
    has_head = isinstance(model, ModelWithHeadsAdaptersMixin) or "labels" in forward_arguments(model)
    if not (has_head or is_wrapped or has_other_loss):
        raise ValueError(
            f"{kind} has no head and so no loss; override compute_loss, pass compute_loss_func, wrap the model in one "
            "with a loss, or use AutoAdapterModel with a head."
        )
    if has_head and "similarity" in config.objectives:
        raise ValueError(
            f"The objective 'similarity' needs embeddings, but a {kind} has a head; take the model without a head "
            "(AutoModel), as a SentenceTransformer does, or choose 'logits'."
        )
    if has_head and not is_wrapped:
        return
    if config.carrier == "dual":
        raise ValueError(
            f"The carrier 'dual' needs the loss of the model with adapters, but the loss of this training is computed "
            f"outside of {kind}; choose the carrier 'mixed'."
        )
    for objective in ("cross_task", "task_specific") if has_head else ("cross_task", "task_specific", "logits"):
        if objective in config.objectives:
            raise ValueError(
                f"The objective {objective!r} needs a head and its labels in the model with adapters, but the loss of "
                f"this training is computed outside of {kind}; choose 'features' or 'cosine'."
            )


def check_data_types(model: ModelAdaptersMixin, block: AdapterDistillation, mixed_precision: str) -> None:
    """Check that torch can multiply the student's matrices with the hidden states of the base model.

    These have the data type of a projection with LoRA, and else the one of the base model, if it has a single one.
    Weights in 4 or 8 bits are left out.

    Raises:
        ValueError: If their data types differ, and no autocast makes them equal.
    """
    if mixed_precision != "no" or torch.is_autocast_enabled(model.device.type):
        return
    roles = parameter_roles(model, block)
    of_base = {weight.dtype for name, weight in model.named_parameters() if roles[name] == "base model"}
    for layer in model.base_model.modules():
        module = layer.adapter_modules[block.student] if _holds(layer, block.student) else None
        if not isinstance(module, MULTIPLYING):
            continue
        wanted, *others = {layer.weight.dtype} if isinstance(layer, LoRALinear | LoRAMergedLinear) else of_base
        dtypes = [weight.dtype for weight in module.parameters()]
        if wanted in dtypes or others or not wanted.is_floating_point:
            continue
        own, other = (str(dtype).removeprefix("torch.") for dtype in (dtypes[0], wanted))
        raise ValueError(
            f"Student {block.student!r} is in {own} and the base model in {other}, which torch cannot multiply; call "
            f"model.to(torch.{other}) after add_adapter{', or pass bf16=True' if wanted != torch.float64 else ''}."
        )


def _holds(layer: nn.Module, adapter: str) -> TypeGuard[AdapterLayerBase]:
    return isinstance(layer, AdapterLayerBase) and adapter in layer.adapter_modules


def check_combinations(
    args: DistillationArgumentsMixin,
    distillation: Distillation,
    distributed_type: DistributedType,
    *,
    predicts_text: bool,
    model_has_labels: bool,
    has_unlabelled: bool,
) -> None:
    """Check for settings that exclude one another; a loss computed outside the model leaves it without labels."""
    if (kind := distributed_type.value) != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerate's distributed_type {kind} {NOT_SHARDED}")
    config = distillation.config
    if "similarity" in config.objectives and args.per_device_train_batch_size < 3:
        raise ValueError(
            "The objective 'similarity' compares the texts of a batch, which must be three or more; raise "
            f"per_device_train_batch_size={args.per_device_train_batch_size}, or choose another objective."
        )
    if args.torch_compile and (distillation.level == "layer" or config.output_objectives):
        if distillation.level == "layer":
            reason = "where whole layers are fused (level='layer')"
        else:
            reason = f"with the objective {min(config.output_objectives)!r}"
        raise ValueError(f"torch_compile=True is not supported {reason}; leave it out.")
    if args.distillation_share is not None and args.distillation_share < 1 and config.carrier != "student":
        raise ValueError(
            f"distillation_share={args.distillation_share:g} needs the carrier 'student', with which the task loss "
            f"does not depend on the teachers, not {config.carrier!r}; leave it out."
        )
    if config.carrier == "dual" and not model_has_labels:
        raise ValueError(
            "The carrier 'dual' needs the model's own loss in both of its passes; leave out "
            "label_smoothing_factor and compute_loss_func, or choose the carrier 'mixed'."
        )
    for objective in ("cross_task", "task_specific", *(["logits"] if predicts_text else [])):
        if objective in config.objectives and not model_has_labels:
            raise ValueError(
                f"The objective {objective!r} needs the labels in the model's own forward; leave out "
                "label_smoothing_factor and compute_loss_func, or choose another objective."
            )
    if config.carrier == "dual" and has_unlabelled:
        raise ValueError(
            "The carrier 'dual' needs labels in both of its passes; leave out distillation_dataset, or choose the "
            "carrier 'mixed'."
        )
