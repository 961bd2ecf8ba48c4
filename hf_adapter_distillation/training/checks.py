"""Checks of a trainer's settings, before any time is spent."""

from importlib.util import find_spec

from accelerate import DistributedType
from adapters import ModelAdaptersMixin, ModelWithHeadsAdaptersMixin

from ..analysis.plots import MISSING
from ..configuration import DistillationArgumentsMixin
from ..method.distillation import Distillation

NOT_SHARDED = (
    "is not supported: what is trained is too small to be worth sharding. Leave it out; accelerate launch runs the "
    "training on several GPUs, each with a copy of the model."
)


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


def check_loss(model: ModelAdaptersMixin, *, has_other_loss: bool) -> None:
    """Check that a training has a loss: of the model with its head, or another one.

    Raises:
        ValueError: If the model has no head.
    """
    if not has_other_loss and not isinstance(model, ModelWithHeadsAdaptersMixin):
        raise ValueError(
            f"{type(model).__name__} has no head and so no loss; override compute_loss, pass compute_loss_func, wrap "
            "the model in one with a loss, or use AutoAdapterModel with a head."
        )


def check_combinations(
    args: DistillationArgumentsMixin,
    distillation: Distillation,
    distributed_type: DistributedType,
    *,
    model_has_labels: bool,
    has_unlabelled: bool,
) -> None:
    """Check for settings that exclude one another; a loss computed outside the model leaves it without labels."""
    if (kind := distributed_type.value) != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(f"accelerate's distributed_type {kind} {NOT_SHARDED}")
    config = distillation.config
    if args.torch_compile and (distillation.level == "layer" or config.output_objectives):
        if distillation.level == "layer":
            reason = "where whole layers are fused (level='layer')"
        else:
            reason = f"with the objective {min(config.output_objectives)!r}"
        raise ValueError(f"torch_compile=True is not supported {reason}; leave it out.")
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
