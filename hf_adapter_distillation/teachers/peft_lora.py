"""Conversion of LoRA adapters that PEFT saved (https://github.com/huggingface/peft)."""

from pathlib import Path

import torch
from adapters import LoRAConfig, ModelAdaptersMixin
from safetensors import SafetensorError
from safetensors.torch import load_file

from .._compat import LoRALinear

PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Settings of PEFT that do not change what the saved factors compute, or that other settings switch on.
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "runtime_config",
    "ensure_weight_tying", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "modules_to_save",  # by its weights
}  # fmt: skip
# Values of `init_lora_weights` in lower case; the other starts change the weights of the base model.
HARMLESS_STARTS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}


def is_peft(saved: dict) -> bool:
    """Return whether a saved adapter config is one of PEFT."""
    return "peft_type" in saved


def peft_lora_config(model: ModelAdaptersMixin, folder: Path, saved: dict, label: str) -> LoRAConfig:
    """Return the config under which adapters computes the same as a LoRA of PEFT.

    Layers without a saved weight are left out, as PEFT does with `layers_to_transform`. In the others it may add
    modules; they compute zero, as LoRA does before training. `saved` holds the contents of the folder's
    `adapter_config.json`, `label` the LoRA in messages, for instance "Teacher 'bank'".

    Raises:
        ValueError: If it is no plain LoRA, or has a module that is no projection with LoRA in adapters' model.
    """
    if saved["peft_type"] != "LORA":
        raise ValueError(f"{label} is a PEFT adapter of type {saved['peft_type']}; only LORA is converted.")
    for key, value in saved.items():
        is_start = key == "init_lora_weights" and str(value).lower() in HARMLESS_STARTS
        if key not in HARMLESS and not is_start and value and value != "none":
            raise ValueError(f"{label} is a PEFT adapter with {key}={value!r}; it cannot be converted.")
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
        leave_out=[i for i, layer in model.base_model.iter_layers() if set(projections).isdisjoint(layer.modules())],
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
        elif _is_of_base(model, key.removeprefix(PREFIX)):
            raise ValueError(
                f"{label} is a PEFT adapter that holds {key} of the base model (modules_to_save); "
                "it cannot be converted."
            )
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
            size = f"a projection {saved_path} of another size"
            raise ValueError(f"{label} was made for {size}; use one trained on the same base model.")
        matches[path] = (projection, down, up)
    if not matches:
        raise ValueError(f"{label} has no LoRA weights in {folder / PEFT_WEIGHTS_NAME}; save it again.")
    return list(matches.values())


def _is_of_base(model: ModelAdaptersMixin, key: str) -> bool:
    """Return whether a saved weight belongs to the base model, and not to a head."""
    prefix, name = f"{model.base_model_prefix}.", key.partition(".")[0]
    # Some models with a static head, such as T5, are their own base model.
    return key.startswith(prefix) or (name != "lm_head" and name in dict(model.base_model.named_children()))
