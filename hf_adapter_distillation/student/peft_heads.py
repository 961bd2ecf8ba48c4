"""The head of an adapter as the head of a class of transformers, which PEFT keeps in `modules_to_save`."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from transformers import PretrainedConfig, PreTrainedModel

from .._compat import STATIC_TO_FLEX_HEAD_MAP, heads_of, original_class
from ..method.heads import head_config

# What the heads of adapters have where a config does not say so.
FORM = {"layers": 1, "activation_function": None, "use_pooler": False, "layer_norm": False, "bias": True}
LANGUAGE_MODELS = ("causal_lm", "seq2seq_lm", "masked_lm")
SAME_LAYERS = {"multilabel_classification": "classification"}  # they differ in the loss alone


def plain_with_head(
    model: ModelAdaptersMixin, adapter: str, with_head: bool
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return the plain model of an adapter on the meta device, and the weights of its head by their names in it.

    The head of a language model belongs to the base model, so it has no weights here, unless the adapter has a
    separate one. An adapter without a head on a model with flexible heads belongs to the class of the base model.

    Raises:
        ValueError: If no class of transformers has the head.
    """
    if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        plain = _on_meta(original_class(model), model.config)
        is_language_model = model.get_output_embeddings() is not None
        return plain, _static_weights(model, plain) if with_head and not is_language_model else {}
    if not with_head or adapter not in heads_of(model):
        return _on_meta(original_class(model.base_model), model.config), {}
    config = head_config(model, adapter)
    class_name, layers = _same_head(model, adapter, config)
    plain = _on_meta(getattr(transformers, class_name), model.config, config.get("num_labels"))
    head: Any = heads_of(model)[adapter]
    output = head.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight and len(layers) == 1:
        return plain, {}
    weights = {}
    for key, weight in head.state_dict().items():
        number, _, part = key.partition(".")
        weights[f"{layers[int(number)]}.{part}"] = weight
    _check_same_weights(plain, weights, adapter)
    return plain, weights


def modules_of_head(weights: Mapping[str, Any]) -> list[str]:
    """Return the modules that hold the weights of a head."""
    return sorted({key.partition(".")[0] for key in weights})


def _on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig, num_labels: int | None = None) -> Any:
    config = deepcopy(config)
    if num_labels is not None:
        config.num_labels = num_labels
    with torch.device("meta"):
        return model_class(config)


def _static_weights(model: ModelAdaptersMixin, plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights beside the base model in a model with a static head."""
    beside = {name for name, child in plain.named_children() if child is not plain.base_model}
    own = plain.state_dict() if plain.base_model is not plain else {}
    state = model.state_dict()
    return {key: state[key] for key in own if key.partition(".")[0] in beside}


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
        "export it without the head (with_head=False, --no_head)."
    )


def _check_same_weights(plain: PreTrainedModel, weights: Mapping[str, torch.Tensor], adapter: str) -> None:
    modules = modules_of_head(weights)
    wanted = {key: weight for key, weight in plain.state_dict().items() if key.partition(".")[0] in modules}
    if {key: weight.shape for key, weight in weights.items()} != {key: weight.shape for key, weight in wanted.items()}:
        raise ValueError(
            f"Adapter {adapter!r} has a head with other weights than a {type(plain).__name__} of transformers; "
            "export it without the head (with_head=False, --no_head)."
        )
