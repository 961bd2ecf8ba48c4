"""What a finished training says about itself, for the provenance and the card of its student."""

import re
from collections.abc import Mapping
from math import isfinite, nan
from numbers import Real
from typing import Any

import datasets

LOSSES = ("loss", "task_loss", "distillation_loss", "fusion_regularization", "fused_task_loss")
NO_METRICS = ("_runtime", "_per_second", "_preparation_time")


def measured(logged: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, without its speed and what is no finite number.

    Args:
        logged: What `Trainer.evaluate` returned.

    Returns:
        The values by their names with prefix, rounded.
    """
    return {
        key: round(float(value), 6)
        for key, value in logged.items()
        if isinstance(value, Real) and isfinite(value) and "_" in key and not key.endswith(NO_METRICS)
    }


def summary(dataset: Any, log_history: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The data set, the last losses of each stage, and the evaluation at the step whose weights were kept.

    Args:
        dataset: The training data.
        log_history: Trainer's log.
        step: The number of that step.

    Returns:
        `"dataset"` (an id on the Hub), `"losses"` and `"evaluation"`, as far as they are known.
    """
    losses: dict[str, dict[str, float]] = {}
    evaluation: dict[str, float] = {}
    for logged in log_history:
        if "stage" in logged:
            losses[str(logged["stage"])] = {key: logged[key] for key in LOSSES if isfinite(logged.get(key, nan))}
        elif logged.get("step") == step and "loss" not in logged and "train_runtime" not in logged:
            evaluation |= measured({key: value for key, value in logged.items() if key not in ("step", "epoch")})
    known = {"dataset": hub_dataset(dataset), "losses": losses, "evaluation": evaluation}
    return {key: value for key, value in known.items() if value}


def hub_dataset(dataset: Any) -> str | None:
    """The id of a data set on the Hub, by the addresses that `datasets.load_dataset` has noted.

    Args:
        dataset: The data.

    Returns:
        The id, or None for data that came from elsewhere.
    """
    checksums = dataset.info.download_checksums if isinstance(dataset, datasets.Dataset) else None
    ids = {match[1] for address in checksums or () if (match := re.match(r"hf://datasets/([^@]+)@", address))}
    return ids.pop() if len(ids) == 1 else None
