"""All changes that this package makes to adapters: `register()` makes them, `unregister()` undoes them."""

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, get_args

import adapters.composition
from adapters import DEFAULT_ADAPTER_CONFIG, AdapterConfig, ModelAdaptersMixin, ModelWithHeadsAdaptersMixin, Stack
from adapters.composition import ALLOWED_NESTINGS
from adapters.hub_mixin import PushAdapterToHubMixin
from adapters.methods.adapter_layer_base import ComposableAdapterLayerBase

from ._compat import ForwardContext, LoRAMergedLinear, warn_if_untested
from .composition import AdapterDistillation
from .configuration import DistillationConfig
from .downloads import find_cached
from .method.distillation import distillations
from .method.forward import call_with_distillation
from .method.fusion import fusions_of
from .method.layers import FusedLayer, compose_distillation
from .student.adding import add_student
from .student.blocks import block_to_train, check_prepared
from .student.fusions import prepare_fusion, prepare_probes
from .student.preparing import forget_adapter, prepare_head, release_heads
from .student.provenance import Provenance, note_loaded
from .teachers.projections import warn_of_further, wrap_named

DISTILL_FROM = """
Added by hf_adapter_distillation:
    distill_from (list of str or DistillationConfig, optional):
        The teachers of the new adapter: names of adapters on the model, local folders or Hub ids;
        in a `DistillationConfig` also the folder of a pool of saved adapters.
"""

# The replaced attributes: (owner, attribute, original). Empty while nothing is registered.
_originals: list[tuple[type, str, Any]] = []


def register() -> None:
    """Add the block `AdapterDistillation` and `add_adapter(..., distill_from=...)` to adapters.

    The import of the package calls this. It also applies to models that exist already, and changes nothing for a model
    without a distilled student, with two exceptions. A model that is made from now on gets no random bias in its
    merged projections of query, key and value. A LoRA is also added to those linear layers that its `attn_matrices`
    name and adapters leaves out (`o_proj`). A second call does nothing.
    """
    if _originals:
        return
    warn_if_untested()
    adapters.composition.AdapterDistillation = AdapterDistillation
    ALLOWED_NESTINGS[AdapterDistillation] = [str]
    ALLOWED_NESTINGS[Stack].append(AdapterDistillation)
    _wrap(ComposableAdapterLayerBase, "_get_compose_func", _get_compose_func)
    _wrap(ForwardContext, "_call_forward", call_with_distillation)
    _document_distill_from(_wrap(ModelAdaptersMixin, "add_adapter", _add_adapter))
    _document_distill_from(_wrap(ModelWithHeadsAdaptersMixin, "add_adapter", _add_adapter))
    _wrap(ModelAdaptersMixin, "train_adapter", _train_adapter)
    _wrap(ModelWithHeadsAdaptersMixin, "train_adapter", _train_adapter_with_head)
    _wrap(ModelWithHeadsAdaptersMixin, "train_adapter_fusion", _train_adapter_fusion)
    _wrap(ModelAdaptersMixin, "set_active_adapters", _set_active_adapters)
    _wrap(ModelAdaptersMixin, "delete_adapter", _delete_adapter)
    _wrap(ModelWithHeadsAdaptersMixin, "delete_adapter", _delete_adapter)
    _wrap(ModelAdaptersMixin, "load_adapter", _load_adapter)
    _wrap(ModelAdaptersMixin, "save_adapter", _save_adapter)
    _wrap(ModelAdaptersMixin, "save_pretrained", _save_pretrained)
    _wrap(PushAdapterToHubMixin, "push_adapter_to_hub", _push_adapter_to_hub)
    _wrap(LoRAMergedLinear, "wrap", _wrap_merged)


def unregister() -> None:
    """Restore the objects that `register` replaced. A second call does nothing.

    A model whose active setup is an `AdapterDistillation` block cannot run afterwards; activate its student
    (`model.set_active_adapters("student")`) first.
    """
    if not _originals:
        return
    while _originals:
        owner, attribute, original = _originals.pop()
        setattr(owner, attribute, original)
    ALLOWED_NESTINGS[Stack].remove(AdapterDistillation)
    del ALLOWED_NESTINGS[AdapterDistillation]
    del adapters.composition.AdapterDistillation


def _wrap(owner: type, attribute: str, wrapper: Callable) -> Callable:
    """Replace a method by `wrapper(original, self, ...)`, or a class method, and return the replacement."""
    original = vars(owner)[attribute]
    function = original.__func__ if isinstance(original, classmethod) else original

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(function, self, *args, **kwargs)

    _originals.append((owner, attribute, original))
    setattr(owner, attribute, classmethod(method) if isinstance(original, classmethod) else method)
    return method


def _document_distill_from(method: Callable) -> None:
    """Add `distill_from` to the signature and docstring of `add_adapter`."""
    signature = inspect.signature(method)
    parameter = inspect.Parameter("distill_from", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    method.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])  # type: ignore[attr-defined]
    method.__doc__ = f"{inspect.getdoc(method)}\n{DISTILL_FROM}"


def _get_compose_func(original: Callable, self: ComposableAdapterLayerBase, composition_type: type) -> Callable:
    if composition_type is not AdapterDistillation:
        return original(self, composition_type)
    if isinstance(self, get_args(FusedLayer)):  # the compilers of torch 2.9 and 2.10 cannot trace the union
        return functools.partial(compose_distillation, self)
    return self.compose_stack


def _add_adapter(
    original: Callable,
    self: ModelAdaptersMixin,
    adapter_name: str,
    config: str | dict | AdapterConfig | None = None,
    overwrite_ok: bool = False,
    set_active: bool = False,
    distill_from: Sequence[str] | DistillationConfig | None = None,
) -> None:

    def add_plain() -> None:
        students = distillations(self.adapters_config)
        is_there = overwrite_ok and adapter_name in self.adapters_config
        # adapters refuses a wrong config before it deletes the old adapter: from the base model, which has no heads.
        if is_there and students and self.supports_adapter(AdapterConfig.load(config) or DEFAULT_ADAPTER_CONFIG):
            if adapter_name in students:
                students[adapter_name].added_head = False  # the head stays for the new adapter
            forget_adapter(self, adapter_name)
        wrap_named(self, config)
        original(self, adapter_name, config, overwrite_ok, set_active)

    if distill_from is None:
        return add_plain()
    if adapter_name in self.adapters_config and not overwrite_ok:
        raise ValueError(f"The model already has an adapter {adapter_name!r}; pass overwrite_ok=True to replace it.")
    add_student(self, add_plain, adapter_name, config, distill_from)


def _train_adapter(
    original: Callable, self: ModelAdaptersMixin, adapter_setup: Any, train_embeddings: bool = False
) -> None:
    block = block_to_train(self, adapter_setup)
    original(self, block or adapter_setup, train_embeddings)
    if block is not None:
        prepare_fusion(self, block)


def _train_adapter_with_head(
    original: Callable, self: ModelWithHeadsAdaptersMixin, adapter_setup: Any, train_embeddings: bool = False
) -> None:
    block = block_to_train(self, adapter_setup)
    is_first = block is not None and not fusions_of(self, block.student)
    release_heads(self, distillations(self.adapters_config).values())
    original(self, block or adapter_setup, train_embeddings)
    if block is not None:
        prepare_head(self, block.student, train_embeddings, is_first)
        prepare_probes(self, block.student)


def _train_adapter_fusion(original: Callable, self: ModelWithHeadsAdaptersMixin, *args: Any, **kwargs: Any) -> None:
    release_heads(self, distillations(self.adapters_config).values())
    original(self, *args, **kwargs)


def _set_active_adapters(
    original: Callable, self: ModelAdaptersMixin, adapter_setup: Any, skip_layers: list[int] | None = None
) -> None:
    check_prepared(self, adapter_setup)
    original(self, adapter_setup, skip_layers)


def _delete_adapter(original: Callable, self: ModelAdaptersMixin, adapter_name: str) -> None:
    if distillations(self.adapters_config):
        forget_adapter(self, adapter_name)
    original(self, adapter_name)


def _load_adapter(
    original: Callable,
    self: ModelAdaptersMixin,
    adapter_name_or_path: str,
    config: Any = None,
    version: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> str:
    name = original(self, adapter_name_or_path, config, version, *args, **kwargs)
    if distillation := distillations(self.adapters_config).get(name):
        is_folder = os.path.isdir(adapter_name_or_path)
        cached = None if is_folder else find_cached(adapter_name_or_path, version, kwargs.get("cache_dir"))
        note_loaded(distillation, adapter_name_or_path if is_folder else cached)
    return name


def _save_adapter(
    original: Callable,
    self: ModelAdaptersMixin,
    save_directory: str,
    adapter_name: str,
    meta_dict: dict | None = None,
    **kwargs: Any,
) -> None:
    distillation = distillations(self.adapters_config).get(adapter_name)
    if distillation is not None and not distillation.is_loaded:
        meta_dict = {**(meta_dict or {}), "distillation": Provenance.of(self, distillation).to_dict()}
    if adapter_name in self.adapters_config:
        warn_of_further(adapter_name, self.adapters_config.get(adapter_name))
    original(self, save_directory, adapter_name, meta_dict=meta_dict, **kwargs)


def _save_pretrained(original: Callable, self: ModelAdaptersMixin, save_directory: str, **kwargs: Any) -> None:
    if not distillations(self.adapters_config):
        return original(self, save_directory, **kwargs)
    fusion = [key for key in self.state_dict() if ".distillation_fusion." in key]
    ignored = self._keys_to_ignore_on_save
    self._keys_to_ignore_on_save = [*(ignored or ()), *fusion]
    try:
        original(self, save_directory, **kwargs)
    finally:
        self._keys_to_ignore_on_save = ignored


def _push_adapter_to_hub(
    original: Callable, self: ModelAdaptersMixin, repo_id: str, adapter_name: str, *args: Any, **kwargs: Any
) -> str:
    if adapter_name not in self.adapters_config:  # adapters would create the repository first
        names = ", ".join(map(repr, self.adapters_config)) or "none"
        raise ValueError(f"There is no adapter {adapter_name!r} to push; adapters on the model: {names}.")
    distillation = distillations(self.adapters_config).get(adapter_name)
    if distillation is not None and not distillation.is_loaded:
        from .hub.push import push_student  # imports datasets and the Trainer of transformers

        return push_student(self, repo_id, adapter_name, *args, **kwargs)
    if "format" in kwargs:
        raise ValueError(
            f"format takes a student of this model, and {adapter_name!r} was loaded or is not distilled; save it by "
            "save_adapter_as_peft and upload the folder."
        )
    return original(self, repo_id, adapter_name, *args, **kwargs)


def _wrap_merged(
    original: Callable, cls: type[LoRAMergedLinear], module: Any, *args: Any, **kwargs: Any
) -> LoRAMergedLinear:
    merged = original(cls, module, *args, **kwargs)
    if module.bias is None:  # adapters 1.3.0 leaves the random one of the new module, which nobody saves
        merged.bias = None
    return merged
