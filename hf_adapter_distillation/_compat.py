"""Private names of adapters and transformers, differences between their models, and the tested versions."""
# ruff: noqa: F401  (other modules import the private names from here)

import importlib.metadata
import inspect
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from adapters.context import ForwardContext
from adapters.head_utils import STATIC_TO_FLEX_HEAD_MAP
from adapters.loading import AdapterLoader
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.lora import LoRA, LoRALinear, LoRAMergedLinear, LoRAState, Vera
from adapters.methods.modeling import Adapter, ParallelAdapter
from adapters.methods.prefix_tuning import PrefixTuningPool
from adapters.methods.reft import ReftModule
from adapters.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from adapters.utils import HEAD_CONFIG_NAME, HEAD_WEIGHTS_NAME, SAFE_HEAD_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from packaging.version import Version
from torch import nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

# The files of weights that adapters saves, each as safetensors or as a pickle.
ADAPTER_WEIGHTS = (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)
HEAD_WEIGHTS = (SAFE_HEAD_WEIGHTS_NAME, HEAD_WEIGHTS_NAME)
COMPILES = Version(torch.__version__) >= Version("2.9")  # older compilers fail in the contexts of adapters
TESTED = {"adapters": ("1.3.0", "2"), "transformers": ("4.57.6", "4.58")}


def warn_if_untested() -> None:
    """Warn if the installed version of adapters or transformers is outside the tested range."""
    for package, (low, high) in TESTED.items():
        version = importlib.metadata.version(package)
        if not Version(low) <= Version(version) < Version(high):
            warnings.warn(
                f"hf-adapter-distillation is tested with {package}>={low},<{high}, not with {version}; "
                f"install a tested version to silence this warning.",
                stacklevel=3,
            )


def heads_of(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the flexible heads of a model by name; empty for a model with a static head or without one."""
    return model.heads if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) else {}


def merged_without_bias(model: nn.Module) -> str | None:
    """Return a merged projection to which `adapters.init` of stock adapters gives a random bias; None without one.

    `AutoAdapterModel.from_pretrained`, for models with flexible heads, sets such a bias to zero.
    """
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        return None
    modules = model.named_modules()
    return next((path for path, each in modules if isinstance(each, LoRAMergedLinear) and each.bias is None), None)


def forward_arguments(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the positional arguments of a model's forward, without `self`.

    `inspect.signature` cannot tell them: the wrappers of adapters take `*args` and show the signature of the model
    that was initialised last.
    """
    functions = (inspect.unwrap(vars(cls)["forward"]) for cls in type(model).__mro__ if "forward" in vars(cls))
    codes = (function.__code__ for function in functions)
    code = next(code for code in codes if not code.co_flags & inspect.CO_VARARGS)
    return code.co_varnames[1 : code.co_argcount]


def named_arguments(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a model by their names."""
    return dict(zip(forward_arguments(model), args, strict=False)) | kwargs if args else dict(kwargs)


def original_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of a model before `adapters.init`."""
    classes = (cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel))
    return next(cls for cls in classes if not issubclass(cls, ModelAdaptersMixin))


def attention_of(model: PreTrainedModel) -> str | None:
    """Return the implementation of the attention, such as "sdpa" or "eager"."""
    return getattr(model.config, "_attn_implementation", None)


def on_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Any:
    """Return a model of a class without weights."""
    with torch.device("meta"):
        return model_class(deepcopy(config))


def bare_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the class of the base model; some models with a static head, such as T5, are their own base model."""
    mapping: Any = MODEL_MAPPING
    base: Any = model.base_model
    return original_class(base) if base is not model else mapping.get(type(model.config), original_class(model))


def children_of_base(model: PreTrainedModel) -> set[str]:
    """Return the names of the modules of the base model, without the head of a model that is its own base model."""
    base, bare = model.base_model, bare_class(model)
    if base is model and bare is not original_class(model):
        base = on_meta(bare, model.config)
    return {name for name, _ in base.named_children()}


def scale_of_head_states(model: ModelWithFlexibleHeadsAdaptersMixin, kind: str) -> float:
    """Return the factor of the states that a kind of head reads, beyond that of the class with the same head.

    T5 scales all states as for its vocabulary, but not those of a head for classes of whole texts.
    """
    config = model.config
    if kind in ("causal_lm", "seq2seq_lm", "classification", "multilabel_classification"):
        return 1.0
    return config.d_model**-0.5 if config.model_type in ("t5", "mt5") and config.tie_word_embeddings else 1.0


def loss_counts_items(model: PreTrainedModel) -> bool:
    """Return whether the model's own loss is normalised by Trainer's `num_items_in_batch`.

    Trainer looks for `**kwargs` in `forward`, which every model has after `adapters.init`. Only the losses of
    `PreTrainedModel.loss_function` use the number. Flexible heads and most static heads ignore it, and some (T5) raise
    an error.
    """
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        return False
    original = original_class(model)
    forward = inspect.unwrap(original.forward)
    takes_kwargs = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())
    uses_number = "loss_function" in forward.__code__.co_names
    return takes_kwargs and uses_number and getattr(model, "accepts_loss_kwargs", True)
