"""What a whole transformer layer computes for an `AdapterDistillation` block whose adapters have no common update.

Prefixes, scaled activations or interventions on the hidden states add nothing that could be fused at one place inside
a layer. What each adapter changes in the layer's output can be: the layer runs once more without any adapter, once
with the student, and once with each teacher, all on the same input.
"""

from typing import Any

import torch
from adapters import ModelAdaptersMixin
from torch import nn
from transformers import Cache

from .._compat import AdapterLayerBase
from .fusion import fusions_at
from .layer_pass import DistillationPass, current_pass
from .predictions import without_dropout


def holds(layer: nn.Module, adapter: str) -> bool:
    """Whether an adapter, of whatever method, has a module in a transformer layer."""
    return any(
        isinstance(module, AdapterLayerBase) and adapter in module.adapter_modules for module in layer.modules()
    )


def whole_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, nn.Module]]:
    """The transformer layers of the base model in which an adapter has a module, with their names."""
    layers = {id(layer) for _, layer in model.base_model.iter_layers()}
    return [(name, m) for name, m in model.base_model.named_modules() if id(m) in layers and holds(m, adapter)]


def hidden_size(layer: nn.Module) -> int:
    """The width of the hidden states of a transformer layer."""
    # Whatever adapters puts into a layer knows the config of its own stack (of a decoder, of a vision model).
    return next(module.model_config.hidden_size for module in layer.modules() if isinstance(module, AdapterLayerBase))


def distill_layer(student: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    r"""A forward hook on a transformer layer: runs it again with the teachers, and fuses what they change.

    The update of an adapter is here :math:`u_n = f_n(x) - f_0(x)`, with f_n the layer with adapter n and f_0 the layer
    without any. The layer is run again without dropout, and with the carrier `student` on detached inputs: each layer
    is matched at the states that it gets.

    Args:
        student: The student that the hook was made for.
        layer: The layer, whose hidden states are (batch, seq_len, hidden).
        args: Its arguments.
        kwargs: Its keyword arguments.
        output: What it put out with the student.

    Returns:
        The output with the states that are passed on, as the carrier says; None where they are what they were.
    """
    current = current_pass()
    if current is None or current.block.student != student:
        return None
    fusion = fusions_at(layer)[student]
    current.fusions[fusion.location] = fusion
    if not current.distillation.fuses:
        return None

    args, kwargs = _inputs(args, kwargs, detach=current.matched_only)
    with without_dropout(layer):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not current.matched_only):
            without = _run(current, None, layer, args, kwargs)  # (B, T, d)
        student_output = _run(current, student, layer, args, kwargs) - without  # (B, T, d)
        if current.part == "student":
            current.gather(fusion, student_output, None)
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not current.matched_only):
            names = [name for name in current.block.teachers if holds(layer, name)]
            updates = {name: _run(current, name, layer, args, kwargs) - without for name in names}

    if not current.matched_only:
        updates[student] = student_output
    hidden_states = args[0] if args else kwargs["hidden_states"]  # (B, T, d)
    fused = current.fuse(fusion, hidden_states, updates, without)
    current.gather(fusion, student_output, fused)
    if current.passes_student_on:
        return None
    passed_on = current.passed_on(_states(output), without + fused.output)  # (B, T, d)
    return passed_on if isinstance(output, torch.Tensor) else (passed_on, *output[1:])


def _run(current: DistillationPass, adapter: str | None, layer: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
    setup, context = current.reruns[adapter]
    with setup, context:
        return _states(layer(*args, **kwargs))


def _states(output: torch.Tensor | tuple) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _inputs(args: tuple, kwargs: dict[str, Any], detach: bool) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a layer that is run again: without the cache, to which it would append its keys a second time."""

    def of_rerun(value: Any) -> Any:
        if isinstance(value, Cache):
            return None
        return value.detach() if detach and isinstance(value, torch.Tensor) else value

    return tuple(map(of_rerun, args)), {name: of_rerun(value) for name, value in kwargs.items()}
