"""Conversion of LoRA adapters that PEFT saved (https://github.com/huggingface/peft)."""

from pathlib import Path

import torch
from adapters import LoRAConfig, ModelAdaptersMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from .._compat import LoRALinear

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings that change what a LoRA computes, unless they are empty, False or "none".
NOT_CONVERTED = (
    "bias", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "trainable_token_indices", "target_parameters",
)  # fmt: skip


def is_peft(saved: dict) -> bool:
    """Return whether a saved adapter config is one of PEFT."""
    return "peft_type" in saved


def peft_lora_config(model: ModelAdaptersMixin, folder: Path, saved: dict, label: str) -> LoRAConfig:
    """Return the config under which adapters computes the same as a LoRA of PEFT.

    It may add modules where PEFT left out layers; they compute zero, as LoRA does before training.

    Args:
        saved: The contents of the folder's `adapter_config.json`.
        label: The LoRA in messages, for instance "Teacher 'bank'".

    Raises:
        ValueError: If it is no plain LoRA, or has a module that is no projection with LoRA in adapters' model.
    """
    if saved["peft_type"] != "LORA":
        raise ValueError(f"{label} is a PEFT adapter of type {saved['peft_type']}; only LORA is converted.")
    for key in NOT_CONVERTED:
        if saved.get(key) and saved[key] != "none":
            raise ValueError(f"{label} is a PEFT adapter with {key}={saved[key]!r}; it cannot be converted.")
    projections = [projection for projection, _, _ in _match(model, folder, label)]
    rank = saved["r"]
    scaling = saved["lora_alpha"] / (rank**0.5 if saved.get("use_rslora") else rank)
    places = {projection.location_key for projection in projections}
    return LoRAConfig(
        selfattn_lora="selfattn_lora" in places,
        intermediate_lora="intermediate_lora" in places,
        output_lora="output_lora" in places,
        attn_matrices=sorted({projection.attn_key for projection in projections if projection.attn_key is not None}),
        r=rank,
        alpha=scaling * rank,
        dropout=saved.get("lora_dropout") or 0.0,
    )


@torch.no_grad()
def load_peft_lora(model: ModelAdaptersMixin, folder: Path, name: str, config: LoRAConfig, label: str) -> None:
    """Add an adapter that computes the same as a LoRA of PEFT, without a head that was saved with it.

    `config` is the result of `peft_lora_config` for the same folder and label.
    """
    matches = _match(model, folder, label)
    model.add_adapter(name, config=config)
    for projection, down, up in matches:
        projection.loras[name].lora_A.copy_(down)
        projection.loras[name].lora_B.copy_(up)


def _match(model: ModelAdaptersMixin, folder: Path, label: str) -> list[tuple[LoRALinear, torch.Tensor, torch.Tensor]]:
    """Return the projections that the saved weights belong to, with A (r, in) and B (out, r)."""
    try:
        state = load_file(folder / PEFT_WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        file = folder / PEFT_WEIGHTS_NAME
        raise ValueError(f"{label} cannot be loaded: {file} is missing or damaged; save it again.") from error
    projections = {path: m for path, m in model.base_model.named_modules() if isinstance(m, LoRALinear)}
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        saved_path, part, _ = key.rpartition(".lora_")
        if part:
            weights.setdefault(saved_path.removeprefix(PREFIX), {})[key[len(saved_path) :]] = tensor
    matches = {}
    for saved_path, factors in weights.items():
        path = next((p for p in projections if saved_path == p or saved_path.endswith(f".{p}")), "")
        if not path or factors.keys() != {".lora_A.weight", ".lora_B.weight"}:
            raise ValueError(
                f"{label} has LoRA in {saved_path}, which is no projection that takes LoRA in adapters' "
                f"{model.config.model_type}; use a LoRA in the projections of the attention and feed-forward blocks."
            )
        projection, down, up = projections[path], factors[".lora_A.weight"], factors[".lora_B.weight"]
        if (down.shape[1], up.shape[0]) != (projection.in_features, projection.out_features):
            raise ValueError(
                f"{label} was made for a projection {saved_path} of another size; use one trained on the same base "
                f"model."
            )
        matches[path] = (projection, down, up)
    if not matches:
        raise ValueError(f"{label} has no LoRA weights in {folder / PEFT_WEIGHTS_NAME}; save it again.")
    return list(matches.values())
