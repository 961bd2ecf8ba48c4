"""The fusion of whole transformer layers, for adapters that have no common place inside a layer.

Prefixes, scaled activations and interventions on hidden states add no update that could be fused inside a layer. The
change of the layer's output can be fused: the layer runs again without any adapter, with the student, and with each
teacher, all on the same input.
"""

from collections.abc import Callable
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin, Stack
from torch import nn
from transformers import Cache

from .._compat import AdapterLayerBase, ForwardContext, PrefixTuningPool
from ..composition import AdapterDistillation, find_block, running_setup
from .fusion import fusions_at
from .layer_pass import LayerPass, Place, Rerun, current_pass, warn_outside_of_passes
from .predictions import without_dropout


def holds(layer: nn.Module, adapter: str) -> bool:
    """Return whether an adapter, of any method, has a module in a transformer layer."""
    return any(
        isinstance(module, AdapterLayerBase) and adapter in module.adapter_modules for module in layer.modules()
    )


def whole_layers(model: ModelAdaptersMixin, adapter: str) -> list[tuple[str, nn.Module]]:
    """Return the transformer layers of the base model in which an adapter has a module, with their names."""
    layers = {id(layer) for _, layer in model.base_model.iter_layers()}
    return [(name, m) for name, m in model.base_model.named_modules() if id(m) in layers and holds(m, adapter)]


def hidden_size(layer: nn.Module) -> int:
    """Return the width of the hidden states of a transformer layer."""
    # Whatever adapters puts into a layer knows the config of its own stack (of a decoder, of a vision model).
    return next(module.model_config.hidden_size for module in layer.modules() if isinstance(module, AdapterLayerBase))


def _adapter_layer(layer: nn.Module) -> AdapterLayerBase:
    return next(module for module in layer.modules() if isinstance(module, AdapterLayerBase))


def is_skipped(layer: nn.Module) -> bool:
    """Return whether the adapters of a transformer layer are skipped, by `set_active_adapters(..., skip_layers)`."""
    module = _adapter_layer(layer)
    return module.layer_idx in (module.adapters_config.skip_layers or ())


def distill_layer(student: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    r"""Run a transformer layer again with the teachers, and offer it to the current pass; a forward hook.

    The update of an adapter is here :math:`u_n = f_n(x) - f_0(x)`, with f_n the layer with adapter n and f_0 the layer
    without any. The layer runs again without dropout, and with the carrier `student` on detached inputs, so that each
    layer is matched at the states that it reads, (batch, seq_len, hidden).

    Returns:
        The output with the states that the pass decides on; None where the student's stay.
    """
    current = current_pass()
    if current is None:
        block = find_block(running_setup(_adapter_layer(layer).adapters_config))
        if block is not None and block.student == student:
            warn_outside_of_passes(student, layer)
        return None
    if current.inputs.block.student != student or is_skipped(layer):
        return None
    if student not in fusions_at(layer) or not current.visit(fusions_at(layer)[student]):
        return None
    with without_dropout(layer):
        passed_on = current.run_layer(LayerPlace(current, layer, args, kwargs, output))  # (B, T, d)
    if passed_on is None:
        return None
    return passed_on if isinstance(output, torch.Tensor) else (passed_on, *output[1:])


class LayerPlace(Place):
    """Whole transformer layer, in which the student has just run and put out `output`."""

    base: torch.Tensor

    def __init__(self, current: LayerPass, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self.current = current
        self.layer = layer
        self.args, self.kwargs = _inputs(args, kwargs, detach=not current.keeps_graph)
        self.student = current.inputs.block.student
        base = self._run(None)  # (B, T, d)
        super().__init__(
            fusions_at(layer)[self.student],
            self.args[0] if self.args else self.kwargs["hidden_states"],
            base,
            _states(output),
        )

    def student_update(self) -> torch.Tensor:
        """Return what the student changes in the layer's output, (batch, seq_len, hidden)."""
        return self._run(self.student) - self.base

    def _run(self, adapter: str | None) -> torch.Tensor:
        setup, context = self.current.inputs.reruns[adapter]
        in_graph = torch.is_grad_enabled() and (adapter == self.student or self.current.keeps_graph)
        with setup, context, torch.set_grad_enabled(in_graph):
            return _states(self.layer(*self.args, **self.kwargs))

    def updates(self, with_student: bool = False) -> dict[str, torch.Tensor]:
        """Run the layer with each teacher, (batch, seq_len, hidden) each."""
        teachers = self.current.inputs.block.teachers
        updates = {name: self._run(name) - self.base for name in teachers if holds(self.layer, name)}
        return updates | {self.student: self.student_output} if with_student else updates


def _states(output: torch.Tensor | tuple) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _inputs(args: tuple, kwargs: dict[str, Any], detach: bool) -> tuple[tuple, dict[str, Any]]:
    """Return a layer's inputs for another run: without the cache, to which it would append its keys a second time."""

    def of_rerun(value: Any) -> Any:
        if isinstance(value, Cache):
            return None
        return value.detach() if detach and isinstance(value, torch.Tensor) else value

    return tuple(map(of_rerun, args)), {name: of_rerun(value) for name, value in kwargs.items()}


def prepare_reruns(
    model: ModelAdaptersMixin, block: AdapterDistillation, new_context: Callable[[], ForwardContext]
) -> dict[str | None, Rerun]:
    """Prepare the runs of the layers of a pass with the student, with each teacher, and with neither (None).

    Contexts hold what adapters computes once per pass: the states of prefixes, here without dropout, and the positions
    of ReFT. They are created before the layers run, since gradient checkpointing would miss them when it runs a layer
    again.
    """
    reruns, prefixes = {}, [part for part in model.base_model.children() if isinstance(part, PrefixTuningPool)]
    with without_dropout(nn.ModuleList(prefixes)):
        for name in (None, block.student, *block.teachers):
            names = [*block.children[:-1], *([] if name is None else [name])]
            setup = AdapterSetup(Stack(*names) if names else None)
            in_graph = torch.is_grad_enabled() and name == block.student
            with setup, torch.set_grad_enabled(in_graph):
                context = new_context()
            reruns[name] = Rerun(setup, context)
    return reruns
