"""A LoRA on a model, saved as PEFT saves it; `teachers.peft_lora` reads it back."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from adapters import AdapterConfig, LoRAConfig, ModelAdaptersMixin
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .._compat import ADAPTER_CONFIG_NAME, LoRAMergedLinear, forward_arguments
from ..downloads import read_adapter_config, suggestion
from ..method.distillation import distillations
from ..teachers.peft_lora import FACTORS, PEFT_WEIGHTS_NAME, PREFIX, is_peft
from ..teachers.projections import ATTENTION_KEYS, common_ends, holders_of
from .peft_heads import plain_with_head
from .provenance import PROVENANCE_NAME, Provenance

PEFT_FILES = (PEFT_WEIGHTS_NAME, PROVENANCE_NAME, ADAPTER_CONFIG_NAME)

TASKS = {  # of PEFT, by the end of the name of the class
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


class Exported(NamedTuple):
    """A LoRA of a projection in the form of PEFT: A (r, in), B (out, r)."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    is_transposed: bool  # PEFT calls it fan_in_fan_out

    @property
    def rank(self) -> int:
        """The rank, of a merged projection the sum over its parts."""
        return self.down.shape[0]


def save_adapter_as_peft(
    model: ModelAdaptersMixin, adapter_name: str, save_directory: str | Path, with_head: bool = True
) -> None:
    """Save a LoRA, distilled or not, as PEFT does, for programs that know PEFT and not adapters.

    The folder gets `adapter_model.safetensors` and `adapter_config.json`, and for a distilled student its provenance
    in `distillation.json`; a student that was saved and loaded into another model has none there, so use
    `adapter-distill export` for a saved student. `PeftModel.from_pretrained` of PEFT, and `load_adapter` of
    transformers and of Sentence Transformers, read it on the plain model. The files are written elsewhere and then
    moved, so nothing is left of a failed save.

    Args:
        with_head: Save the head of the adapter in `modules_to_save`, for the class of transformers that has the same
            head. The output embeddings of a language model are the base model's and are not saved, unless the adapter
            has a separate head or PEFT trained them. Without a head, the adapter is for `AutoModel`, or for the class
            of the language model.

    Raises:
        TypeError: If it is no model with adapters.
        ValueError: If the adapter is not a plain LoRA, the plain model has no such head, or the folder holds something
            else.
    """
    if not isinstance(model, ModelAdaptersMixin):
        raise TypeError(
            f"save_adapter_as_peft takes a model with adapters, not a {type(model).__name__}; call adapters.init, or "
            "save_pretrained of a PeftModel."
        )
    distillation = distillations(model.adapters_config).get(adapter_name)
    has_provenance = distillation is not None and not distillation.is_loaded
    provenance = Provenance.of(model, distillation).to_dict() if distillation and has_provenance else None
    write_as_peft(model, adapter_name, save_directory, with_head, provenance)


def write_as_peft(
    model: ModelAdaptersMixin,
    adapter_name: str,
    save_directory: str | Path,
    with_head: bool,
    provenance: dict[str, Any] | None,
) -> None:
    """Save a LoRA as PEFT does, with a provenance in the form of `Provenance.to_dict`."""
    if not str(save_directory):
        raise ValueError("save_directory='' names no folder; give one.")
    folder, config = Path(save_directory), _lora_config(model, adapter_name)
    check_folder(folder)
    plain, modules, head = plain_with_head(model, adapter_name, with_head)
    base_path = next(name for name, module in plain.named_modules() if module is plain.base_model)
    lora = {f"{base_path}.{path}".lstrip("."): each for path, each in _exported(model, adapter_name).items()}
    factors = {
        path + key: factor
        for path, each in lora.items()
        for key, factor in zip(FACTORS, (each.down, each.up), strict=True)
    }
    weights = {PREFIX + key: weight.detach().cpu().contiguous() for key, weight in (factors | head).items()}
    saved = _peft_config(plain, lora) | {
        "base_model_name_or_path": model.model_name,
        "lora_dropout": config.dropout,
        "modules_to_save": modules or None,
    }
    _write(folder, weights, saved, provenance)


def check_lora_config(label: str, config: AdapterConfig) -> None:
    """Raise `ValueError` if an adapter of a config has no form in PEFT; `label` is the adapter in messages."""
    kind = f"a {type(config).__name__}"
    if isinstance(config, LoRAConfig):
        kinds = {
            "a scaling LoRA (IA3)": config.composition_mode == "scale",
            "VeRA": {config.vera_d, config.vera_b} != {None},
            "a LoRA with gates": config.use_gating,
            "a DoRA, whose norm PEFT computes in another way": config.use_dora,
        }
        found = [kind for kind, is_kind in kinds.items() if is_kind]
        if not found and type(config) is LoRAConfig:
            return
        kind = next(iter(found), kind)
    raise ValueError(
        f"{label} is {kind}, which has no form in PEFT; only a plain LoRA is exported (save_adapter saves it)."
    )


def _lora_config(model: ModelAdaptersMixin, name: str) -> LoRAConfig:
    """Return the config of an adapter; raise `ValueError` if it has no form in PEFT."""
    if name not in model.adapters_config:
        hint = suggestion(name, model.adapters_config)
        names = ", ".join(map(repr, model.adapters_config)) or "none"
        raise ValueError(f"There is no adapter {name!r} to export; {hint or f'adapters on the model: {names}.'}")
    config: Any = model.adapters_config.get(name)
    check_lora_config(f"Adapter {name!r}", config)
    if not holders_of(model, name):
        raise ValueError(f"Adapter {name!r} has no LoRA in a projection of this model; there is nothing to export.")
    return config


def _exported(model: ModelAdaptersMixin, name: str) -> dict[str, Exported]:
    """Return the LoRA of each projection, by its path in the base model."""
    found = {}
    for path, module in holders_of(model, name).items():
        lora = module.loras[name]
        down, up = lora.lora_A, lora.lora_B
        if isinstance(module, LoRAMergedLinear):
            parts = iter(up.split(module.out_features // len(ATTENTION_KEYS)))
            empty = up.new_zeros(module.out_features // len(ATTENTION_KEYS), 0)
            up = torch.block_diag(*(next(parts) if enabled else empty for enabled in lora.enable_lora))
        alpha = lora.scaling * down.shape[0]
        is_whole = math.isclose(alpha, round(alpha), rel_tol=1e-12)
        found[path] = Exported(down, up, round(alpha) if is_whole else alpha, module.fan_in_fan_out)
    return found


def _peft_config(plain: PreTrainedModel, lora: Mapping[str, Exported]) -> dict[str, Any]:
    """Return the config of PEFT for the LoRA of some projections of a plain model."""
    model_class, names = type(plain), [name for name, _ in plain.named_modules()]
    # PEFT's class of a task passes both to the model, even if one is None.
    takes_text = plain.main_input_name == "input_ids" and "inputs_embeds" in forward_arguments(plain)
    task = next((task for end, task in TASKS.items() if model_class.__name__.endswith(end) and takes_text), None)
    (rank, alpha), _ = Counter((each.rank, each.alpha) for each in lora.values()).most_common(1)[0]
    ranks, alphas = {}, {}
    for others in {(each.rank, each.alpha) for each in lora.values()} - {(rank, alpha)}:
        for end in common_ends({path for path, each in lora.items() if (each.rank, each.alpha) == others}, names):
            ranks[end], alphas[end] = others
    return {
        "peft_type": "LORA",
        "task_type": task,
        "auto_mapping": {"base_model_class": model_class.__name__, "parent_library": model_class.__module__},
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": common_ends(lora.keys(), names),
        "fan_in_fan_out": any(each.is_transposed for each in lora.values()),
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
    }


def check_folder(folder: Path) -> None:
    """Raise `ValueError` if a folder cannot be replaced whole, or holds an adapter that save_adapter wrote."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder} is a link to {folder.readlink()}, which is not there; give a folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder.")
    for path in (folder / file for file in PEFT_FILES):
        if path.is_dir():
            raise ValueError(f"{path} is a folder in the place of a file; remove it, or give another folder.")
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not is_peft(read_adapter_config(folder)):
        raise ValueError(f"{folder} holds an adapter that save_adapter wrote; give another folder.")


def _write(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], provenance: Any) -> None:
    """Write all files beside a folder and move them into it, the config last."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        made = Path(name) / "made"
        made.mkdir()
        save_file(weights, made / PEFT_WEIGHTS_NAME, metadata={"format": "pt"})
        for file, content in ((ADAPTER_CONFIG_NAME, config), (PROVENANCE_NAME, provenance)):
            if content is not None:
                (made / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not folder.exists():
            made.rename(folder)
            return
        for file in PEFT_FILES:
            if (made / file).exists():
                os.replace(made / file, folder / file)
            else:
                (folder / file).unlink(missing_ok=True)
