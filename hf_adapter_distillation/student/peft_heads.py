"""The head of an adapter as the head of a class of transformers, which PEFT keeps in `modules_to_save`."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import transformers
from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from torch import nn
from transformers import PreTrainedModel

from .._compat import (
    STATIC_TO_FLEX_HEAD_MAP,
    bare_class,
    children_of_base,
    heads_of,
    on_meta,
    original_class,
    scale_of_head_states,
)
from ..method.heads import head_config
from ..teachers.peft_model import MODULES_OF_PEFT

# What the heads of adapters have where a config does not say so.
FORM = {"layers": 1, "activation_function": None, "use_pooler": False, "layer_norm": False, "bias": True}
LANGUAGE_MODELS = ("causal_lm", "seq2seq_lm", "masked_lm")
SAME_LAYERS = {"multilabel_classification": "classification"}  # they differ in the loss alone
NO_HEAD = "export it without the head, by save_adapter_as_peft(with_head=False) or adapter-distill export --no_head."


class PlainModel(NamedTuple):
    """The model of transformers that an adapter is for.

    Args:
        model: The plain model, on the meta device.
        modules: The paths of the modules that are saved as the head.
        weights: The weights of these modules, by their names in the model.
    """

    model: PreTrainedModel
    modules: list[str]
    weights: dict[str, torch.Tensor]


def plain_with_head(model: ModelAdaptersMixin, adapter: str, with_head: bool) -> PlainModel:
    """Return the plain model of an adapter, with the weights of its head.

    The output embeddings of a language model belong to the base model, so they are no part of the head, unless the
    adapter has a separate head or PEFT trained them (`from_peft`). An adapter without a head is for the class of the
    base model, or of the language model.

    Raises:
        ValueError: If no class of transformers has the head.
    """
    if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        plain = on_meta(original_class(model), model.config)
        plain.base_model_prefix = model.base_model_prefix  # some classes name a module that they lack, as of Gemma 3
        own = _static_head(model, plain)
        if with_head or not own.modules:
            return own
        if model.get_output_embeddings() is not None:
            return PlainModel(own.model, [], {})
    if not with_head or adapter not in heads_of(model):
        return PlainModel(on_meta(bare_class(model), model.config), [], {})
    config = head_config(model, adapter)
    class_name, layers = _same_head(model, adapter, config)
    plain_config = deepcopy(model.config)
    if (num_labels := config.get("num_labels")) is not None:
        plain_config.num_labels = num_labels
    plain = on_meta(getattr(transformers, class_name), plain_config)
    head: Any = heads_of(model)[adapter]
    output = head.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight and len(layers) == 1:
        return PlainModel(plain, [], {})
    weights, state = {}, head.state_dict()
    first = min(int(key.partition(".")[0]) for key in state)
    scale = scale_of_head_states(model, config["head_type"])
    for key, weight in state.items():
        number, _, part = key.partition(".")
        scaled = weight * scale if (int(number), part) == (first, "weight") else weight
        weights[f"{layers[int(number)]}.{part}"] = scaled
    modules = sorted({key.partition(".")[0] for key in weights})
    _check_same_weights(plain, modules, weights, adapter)
    return PlainModel(plain, modules, weights)


def _static_head(model: ModelAdaptersMixin, plain: PreTrainedModel) -> PlainModel:
    """Return the modules beside the base model in a model with a static head, such as `cls.predictions.transform`.

    Those of a language model are trained with the adapter, except for the output embeddings.
    """
    of_base = children_of_base(plain) if plain.base_model is plain else {plain.base_model_prefix}
    beside = [name for name, _ in plain.named_children() if name not in of_base]
    modules = [path for name in beside for path in _without(plain.get_output_embeddings(), plain, name)]
    modules += [path for path in getattr(model, MODULES_OF_PEFT, []) if path not in modules]
    state = model.state_dict()
    names = [key for key in plain.state_dict() if any(key.startswith(f"{path}.") for path in modules)]
    return PlainModel(plain, sorted(modules), {key: state[key] for key in names})


def _without(output: nn.Module | None, model: nn.Module, path: str) -> Iterator[str]:
    """Yield the path of a module with weights, or those of the largest parts of it that do not hold `output`."""
    module = model.get_submodule(path)
    if module is output or not module.state_dict():
        return
    if all(part is not output for part in module.modules()):
        yield path
        return
    for name, _ in module.named_children():
        yield from _without(output, model, f"{path}.{name}")


def _same_head(model: ModelAdaptersMixin, adapter: str, config: Mapping[str, Any]) -> tuple[str, list[str | None]]:
    """Return the class of transformers with the head of an adapter, and the names of its layers."""
    kind, similar = config["head_type"], ""
    family = original_class(model.base_model).__name__.removesuffix("Model")
    for class_name, static in STATIC_TO_FLEX_HEAD_MAP.items():
        if not class_name.startswith(family) or static["config"]["head_type"] != SAME_LAYERS.get(kind, kind):
            continue
        if getattr(transformers, class_name).config_class is not type(model.config):
            continue  # of a family with a longer name
        form = FORM | ({"bias": False} if kind in LANGUAGE_MODELS else {})
        given, wanted = ({key: each.get(key, form[key]) for key in form} for each in (config, static["config"]))
        if given["layers"] == wanted["layers"] == 1:  # the activation stands between layers
            given["activation_function"] = wanted["activation_function"]
        if given == wanted:
            return class_name, static["layers"]
        differs = ", ".join(f"{key}={wanted[key]!r}" for key in form if given[key] != wanted[key])
        similar = f" (a {class_name} has {differs})"
    raise ValueError(
        f"Adapter {adapter!r} has a head for {kind} that no {model.config.model_type} of transformers has{similar}; "
        f"{NO_HEAD}"
    )


def _check_same_weights(
    plain: PreTrainedModel, modules: list[str], weights: Mapping[str, torch.Tensor], adapter: str
) -> None:
    wanted = {key: weight for key, weight in plain.state_dict().items() if key.partition(".")[0] in modules}
    if {key: weight.shape for key, weight in weights.items()} != {key: weight.shape for key, weight in wanted.items()}:
        raise ValueError(
            f"Adapter {adapter!r} has a head with other weights than a {type(plain).__name__} of transformers; "
            f"{NO_HEAD}"
        )
