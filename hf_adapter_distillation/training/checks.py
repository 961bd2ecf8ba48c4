"""Settings that a `DistillationTrainer` refuses when it is made."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from ..analysis.plots import MISSING
from ..configuration import DistillationTrainingArguments

if TYPE_CHECKING:
    from .trainer import DistillationTrainer

NOT_SHARDED = (
    "is not supported: what is trained is too small to be worth sharding. Leave it out; accelerate launch runs the "
    "training on several GPUs, each with a copy of the model."
)


def check_arguments(args: DistillationTrainingArguments) -> None:
    """Refuses ways to spread the training that make no sense for it.

    Args:
        args: The arguments.

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


def check_combinations(trainer: "DistillationTrainer", distillation_dataset: Dataset | None) -> None:
    """Refuses settings that exclude one another.

    Args:
        trainer: The trainer.
        distillation_dataset: Its examples without labels.

    Raises:
        ValueError: With the settings.
    """
    if (kind := trainer.accelerator.distributed_type.value) != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerate's distributed_type {kind} {NOT_SHARDED}")
    distillation, config = trainer.distillation, trainer.distillation.config
    if trainer.args.torch_compile and distillation.level == "layer":
        raise ValueError(
            "torch_compile=True is not supported where whole layers are fused (level='layer'); leave it out."
        )
    if trainer.args.torch_compile and config.output_objectives:
        raise ValueError(
            f"torch_compile=True is not supported with the objective {min(config.output_objectives)!r}; leave it out."
        )
    without_labels = trainer.label_smoother or trainer.compute_loss_func  # they take them away from the model
    if config.carrier == "dual" and without_labels:
        raise ValueError(
            "The carrier 'dual' needs the model's own loss in both of its passes; leave out "
            "label_smoothing_factor and compute_loss_func, or choose the carrier 'mixed'."
        )
    for objective in ("cross_task", "task_specific"):
        if objective in config.objectives and without_labels:
            raise ValueError(
                f"The objective {objective!r} needs the labels in the model's own forward; leave out "
                "label_smoothing_factor and compute_loss_func, or choose another objective."
            )
    if config.carrier == "dual" and distillation_dataset is not None:
        raise ValueError(
            "The carrier 'dual' needs labels in both of its passes; leave out distillation_dataset, or choose the "
            "carrier 'mixed'."
        )
