"""The model with adapters inside the model of a trainer, which may wrap it, and the inputs that it takes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adapters import ModelAdaptersMixin
from torch import nn

from .._compat import forward_arguments, heads_of, named_arguments
from .distillation import active_block, distillations

# Inputs that change the output alone, or the loss in it.
HOW_TO_RETURN = ("output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch")


def models_with_adapters(model: nn.Module) -> dict[str, ModelAdaptersMixin]:
    """Return the models with adapters inside a module, which may be one, by their names; not those inside others."""
    found: dict[str, ModelAdaptersMixin] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if isinstance(module, ModelAdaptersMixin) and not inside:
            found[name] = module
    return found


def model_with_adapters(model: nn.Module) -> ModelAdaptersMixin:
    """Return the outermost model with adapters inside a module, which may be that model itself.

    A `SentenceTransformer`, a `CrossEncoder` or a classifier of your own may wrap it.

    Raises:
        TypeError: If no module has adapters.
        ValueError: If several models with distilled students stand side by side.
    """
    found = models_with_adapters(model) if isinstance(model, nn.Module) else {}
    with_students = {name: module for name, module in found.items() if distillations(module.adapters_config)}
    if len(with_students) > 1:
        raise ValueError(
            f"{type(model).__name__} has distilled students in {' and '.join(map(repr, with_students))}, but one "
            "model is trained at a time; share one model, or train each on its own."
        )
    if not found:
        active_block(model)  # a TypeError that says where to add adapters
    return next(iter((with_students or found).values()))


def accepted_inputs(model: ModelAdaptersMixin, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a batch that a model or one of its heads takes."""
    heads: Mapping[str, Any] = heads_of(model)
    accepted = {*forward_arguments(model), *(name for head in heads.values() for name in head.get_label_names())}
    return {name: value for name, value in batch.items() if name in accepted}


@contextmanager
def noting_inputs(model: ModelAdaptersMixin, note: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Call a function with the inputs of each call of a model."""
    before, original = vars(model).get("forward"), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        named = named_arguments(model, args, kwargs)
        note({name: value for name, value in named.items() if name not in HOW_TO_RETURN})
        return original(*args, **kwargs)

    vars(model)["forward"] = forward  # Sentence Transformers calls it without the module's hooks
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before
