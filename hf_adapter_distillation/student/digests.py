"""Digests of the weights of adapters."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from adapters import ModelAdaptersMixin

from ..method.losses import in_float64

CAST_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def adapter_digest(model: ModelAdaptersMixin, name: str) -> str:
    """Return the SHA-256 digest of the weights of an adapter: their places in the base model, types, shapes, values.

    The digest, 64 hexadecimal digits, is the same for an adapter under another name, on another copy of the base
    model, with or without heads.
    """
    digest = hashlib.sha256()
    for place, tensor in adapter_weights(model, name):
        digest.update(f"{place} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def rounded_digests(model: ModelAdaptersMixin, name: str) -> frozenset[str]:
    """Return digests of an adapter's weights as they are, and rounded to each data type to which a model is cast.

    A cast of the model, also there and back, leaves the `value_digest` of the adapter among them.
    """
    return frozenset(value_digest(model, name, dtype) for dtype in (None, *CAST_TYPES))


def value_digest(model: ModelAdaptersMixin, name: str, rounding: torch.dtype | None = None) -> str:
    """Return the SHA-256 digest of the values of an adapter, whatever their data type, rounded to one if given."""
    digest = hashlib.sha256()
    for place, tensor in adapter_weights(model, name):
        digest.update(f"{place} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(in_float64(tensor.to(rounding))))
    return digest.hexdigest()


def adapter_weights(model: ModelAdaptersMixin, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights and buffers of an adapter with their places in the base model, in a fixed order."""
    for place, modules in sorted(model.get_adapter(name).items()):
        for location, module in sorted(modules.items()):
            for key, tensor in sorted(module.state_dict().items()):
                yield f"{place}.{location}.{key}", tensor


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def teacher_digests(model: ModelAdaptersMixin, teachers: Sequence[str]) -> dict[str, str]:
    """Return the `adapter_digest` of each teacher by its name."""
    return {name: adapter_digest(model, name) for name in teachers}


def check_teachers_unchanged(model: ModelAdaptersMixin, digests: Mapping[str, str]) -> None:
    """Compare the teachers' weights with their digests before the training; raise RuntimeError if they differ."""
    for name, digest in digests.items():
        if adapter_digest(model, name) != digest:
            raise RuntimeError(f"The weights of teacher {name!r} changed in training; reload it before you use it.")
