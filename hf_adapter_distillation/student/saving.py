"""The files of a student on a model."""

from adapters import ModelAdaptersMixin


def save_weights(model: ModelAdaptersMixin, student: str, folder: str) -> None:
    """Write the student with its head by `save_adapter`, as safetensors where adapters can."""
    # Adapters cannot write prefixes as safetensors: several layers share them.
    has_prefix = any(f".prefix_tunings.{student}." in name for name, _ in model.named_parameters())
    model.save_adapter(folder, student, use_safetensors=not has_prefix)
