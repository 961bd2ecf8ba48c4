"""The files of a student on a model."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin, ModelWithHeadsAdaptersMixin
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .._compat import ADAPTER_WEIGHTS, HEAD_WEIGHTS, heads_of, on_meta, original_class

DIGESTS_NAME = "checkpoint_digests.json"  # in a checkpoint, of its other files


def save_weights(model: ModelAdaptersMixin, student: str, folder: str, safetensors: bool = True) -> None:
    """Write the student with its head by `save_adapter`, as safetensors where they are wanted and adapters can.

    The head of a language model is left out where `train_adapter` has frozen it: it is the base model's. Files of an
    earlier save in the other format are deleted.
    """
    # Adapters cannot write prefixes as safetensors: several layers share them.
    has_prefix = any(f".prefix_tunings.{student}." in name for name, _ in model.named_parameters())
    is_pickle = has_prefix or not safetensors
    without_head = {"with_head": False} if _has_frozen_head(model) else {}
    model.save_adapter(folder, student, use_safetensors=not is_pickle, **without_head)
    for names in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        (Path(folder) / names[not is_pickle]).unlink(missing_ok=True)
    heads = heads_of(model)
    if student in heads and any(name.startswith(student) for name in heads if name != student):
        path = Path(folder) / HEAD_WEIGHTS[is_pickle]
        write_weights(read_weights(path, student), path)


def _has_frozen_head(model: ModelAdaptersMixin) -> bool:
    """Return whether a model has one head for all adapters, and no parameter of it is trained."""
    if not isinstance(model, ModelWithHeadsAdaptersMixin) or isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        return False
    base = set(map(id, model.base_model.parameters()))
    return not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in base)


def read_weights(path: Path, student: str) -> dict[str, torch.Tensor]:
    """Read a file of weights without other heads: adapters saves the head "bank2" with the head "bank"."""
    is_safe = path.suffix == ".safetensors"
    state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    # Cloned: tensors that safetensors 0.4.3 to 0.5.0 have read may share a storage, which torch pickles with each.
    return {
        key: value.clone()
        for key, value in state.items()
        if not key.startswith("heads.") or key.startswith(f"heads.{student}.")
    }


def write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write weights as safetensors or as a pickle, by the name of the file."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def saving_the_base_alone(model: ModelAdaptersMixin) -> Iterator[None]:
    """Let `save_pretrained` of a model, whoever calls it, write the model as it was before `adapters.init`."""
    saved = model.base_model if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) else model
    names = on_meta(original_class(saved), model.config).state_dict().keys()

    def save_pretrained(save_directory: str, **kwargs: Any) -> None:
        state = saved.state_dict()
        PreTrainedModel.save_pretrained(
            saved, save_directory, state_dict={name: state[name] for name in names}, **kwargs
        )

    vars(model)["save_pretrained"] = save_pretrained
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]
