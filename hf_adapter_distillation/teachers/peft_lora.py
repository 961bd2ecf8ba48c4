"""LoRA teachers that were saved by PEFT (https://github.com/huggingface/peft)."""

from pathlib import Path
from typing import Any

import torch
from adapters import LoRAConfig, ModelAdaptersMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from .._compat import LoRALinear

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# What changes the function of the saved LoRA, by the value that leaves it as it is here.
PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
}


def is_peft(saved: dict) -> bool:
    """Whether a saved adapter config is one of PEFT."""
    return "peft_type" in saved


def peft_lora_config(model: ModelAdaptersMixin, teacher: str, folder: Path, saved: dict) -> LoRAConfig:
    """The config under which adapters computes what a LoRA of PEFT does.

    Args:
        model: The model that it is meant for.
        teacher: The entry of `distill_from`, for messages.
        folder: The local folder.
        saved: What stands in its `adapter_config.json`.

    Returns:
        The config. Its modules may be more than the saved ones (PEFT may leave out layers); those compute zero, as
        LoRA does before its training.

    Raises:
        ValueError: If it is no plain LoRA, or has a module that is no projection with LoRA in adapters' model.
    """
    if saved["peft_type"] != "LORA":
        raise ValueError(
            f"Teacher {teacher!r} is a PEFT adapter of type {saved['peft_type']}; only LORA is converted."
        )
    for key, value in PLAIN.items():
        if saved.get(key) and saved[key] != value:
            raise ValueError(
                f"Teacher {teacher!r} is a PEFT adapter with {key}={saved[key]!r}; it cannot be converted."
            )
    modules = _matched(model, teacher, folder).values()
    rank = saved["r"]
    scaling = saved["lora_alpha"] / (rank**0.5 if saved.get("use_rslora") else rank)
    places = {module.location_key for module, _, _ in modules}
    return LoRAConfig(
        selfattn_lora="selfattn_lora" in places,
        intermediate_lora="intermediate_lora" in places,
        output_lora="output_lora" in places,
        attn_matrices=sorted({module.attn_key for module, _, _ in modules if module.attn_key is not None}),
        r=rank,
        alpha=scaling * rank,
        dropout=saved.get("lora_dropout") or 0.0,
    )


@torch.no_grad()
def load_peft_lora(model: ModelAdaptersMixin, teacher: str, name: str, folder: Path, config: LoRAConfig) -> None:
    """Adds an adapter that computes what a LoRA of PEFT does; a head that was saved with it is not loaded.

    Args:
        model: The model to load it on.
        teacher: The entry of `distill_from`, for messages.
        name: The name that it gets on the model.
        folder: The local folder.
        config: What `peft_lora_config` made.
    """
    matched = _matched(model, teacher, folder)
    model.add_adapter(name, config=config)
    for module, down, up in matched.values():
        module.loras[name].lora_A.copy_(down)
        module.loras[name].lora_B.copy_(up)


def _projections(model: ModelAdaptersMixin) -> dict[str, LoRALinear]:
    return {path: m for path, m in model.base_model.named_modules() if isinstance(m, LoRALinear)}


def _matched(
    model: ModelAdaptersMixin, teacher: str, folder: Path
) -> dict[str, tuple[LoRALinear, torch.Tensor, torch.Tensor]]:
    """The projections that the saved weights belong to, with A and B, by their names in the base model."""
    try:
        state = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Teacher {teacher!r} cannot be loaded: {folder / WEIGHTS_NAME} is missing or damaged; save it anew."
        ) from error
    projections = _projections(model)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        saved_path, part, _ = key.rpartition(".lora_")
        if part:
            weights.setdefault(saved_path.removeprefix(PREFIX), {})[key[len(saved_path) :]] = tensor
    matched = {}
    for saved_path, of_module in weights.items():
        path = next((p for p in projections if saved_path == p or saved_path.endswith(f".{p}")), "")
        if not path or of_module.keys() != {".lora_A.weight", ".lora_B.weight"}:
            raise ValueError(
                f"Teacher {teacher!r} has LoRA in {saved_path}, which is no projection that takes LoRA in adapters' "
                f"{model.config.model_type}; use a LoRA in the projections of the attention and feed-forward blocks."
            )
        module, down, up = projections[path], of_module[".lora_A.weight"], of_module[".lora_B.weight"]
        if (down.shape[1], up.shape[0]) != (module.in_features, module.out_features):
            raise ValueError(
                f"Teacher {teacher!r} was made for a projection {saved_path} of another size; use teachers trained on "
                f"the same base model."
            )
        matched[path] = (module, down, up)
    if not matched:
        raise ValueError(f"Teacher {teacher!r} has no LoRA weights in {folder / WEIGHTS_NAME}; save it anew.")
    return matched
