"""Parameter group of the fusion in an optimizer, whoever created it."""

from collections.abc import Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from adapters import ModelAdaptersMixin
from torch import nn

from ..method.parameters import is_fusion


def fusion_parameters(model: ModelAdaptersMixin, student: str) -> list[nn.Parameter]:
    """Return the parameters of the fusion of a student."""
    return [parameter for name, parameter in model.named_parameters() if is_fusion(name, student)]


def unprepared(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    """Return an optimizer without the wrapper of accelerate."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def group_fusion(
    optimizer: torch.optim.Optimizer,
    fusion: Sequence[nn.Parameter],
    earlier: Sequence[nn.Parameter],
    rate: float,
    *,
    has_scheduler: bool,
) -> None:
    """Move the fusion into a group with its own learning rate and without weight decay, and drop an earlier fusion.

    Raises:
        ValueError: If the fusion is not yet in groups without weight decay, but a scheduler reads the groups.
    """
    ids, groups = set(map(id, fusion)), optimizer.param_groups
    undecayed = [set(map(id, group["params"])) for group in groups if not group.get("weight_decay")]
    if not ids or ids in undecayed or (has_scheduler and ids <= set().union(*undecayed)):
        return
    if has_scheduler:
        raise ValueError(
            "The scheduler in optimizers=(optimizer, scheduler) leaves no room for the fusion, which needs a group "
            "without weight decay; pass optimizers=(optimizer, None) and choose lr_scheduler_type."
        )
    stale = {id(parameter) for parameter in earlier} - ids
    groups[:] = [group for group in groups if not group["params"] or not stale.issuperset(map(id, group["params"]))]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in stale | ids]
    for parameter in earlier:
        if id(parameter) in stale:
            optimizer.state.pop(parameter, None)
    optimizer.add_param_group({"params": list(fusion), "lr": rate, "weight_decay": 0.0})


def check_optimized(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Check that the optimizer has all trainable parameters.

    Raises:
        ValueError: With the first parameter that it lacks.
    """
    ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ids:
            raise ValueError(
                f"The optimizer lacks {name}, which is to be trained; give it all parameters with requires_grad."
            )
