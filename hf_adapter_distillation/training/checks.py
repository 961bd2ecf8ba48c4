"""Checks of a trainer's settings, before any time is spent."""

from importlib.util import find_spec

from accelerate import DistributedType

from ..analysis.plots import MISSING
from ..configuration import DistillationTrainingArguments
from ..method.distillation import Distillation

NOT_SHARDED = (
    "is not supported: what is trained is too small to be worth sharding. Leave it out; accelerate launch runs the "
    "training on several GPUs, each with a copy of the model."
)


def check_arguments(args: DistillationTrainingArguments) -> None:
    """Check the arguments for ways to spread the training that make no sense for it.

    Raises:
        ValueError: With the setting.
        ImportError: If an analysis is wanted and matplotlib is not installed.
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


def check_combinations(
    args: DistillationTrainingArguments,
    distillation: Distillation,
    distributed_type: DistributedType,
    *,
    model_has_labels: bool,
    has_unlabelled: bool,
) -> None:
    """Check for settings that exclude one another.

    Args:
        args: The arguments.
        distillation: The student's distillation.
        distributed_type: How accelerate spreads the training.
        model_has_labels: Whether the model gets the labels; label smoothing and `compute_loss_func` take them away.
        has_unlabelled: Whether there are examples without labels.

    Raises:
        ValueError: With the settings.
    """
    if (kind := distributed_type.value) != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerate's distributed_type {kind} {NOT_SHARDED}")
    config = distillation.config
    if args.torch_compile and distillation.level == "layer":
        raise ValueError(
            "torch_compile=True is not supported where whole layers are fused (level='layer'); leave it out."
        )
    if args.torch_compile and config.output_objectives:
        raise ValueError(
            f"torch_compile=True is not supported with the objective {min(config.output_objectives)!r}; leave it out."
        )
    if config.carrier == "dual" and not model_has_labels:
        raise ValueError(
            "The carrier 'dual' needs the model's own loss in both of its passes; leave out "
            "label_smoothing_factor and compute_loss_func, or choose the carrier 'mixed'."
        )
    for objective in ("cross_task", "task_specific"):
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
