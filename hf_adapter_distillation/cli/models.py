"""Load base models, and locate saved adapters with the base model that they name."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adapters import AutoAdapterModel, ModelAdaptersMixin
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from ..downloads import is_repo_id, locate_saved, one_line, read_adapter_config
from ..teachers.loading import ADAPTER_FILES, locate_teacher, read_config
from ..teachers.pool import read_pool
from .options import EvalArguments, PredictArguments, TrainArguments, parse_value


class SavedAdapter(NamedTuple):
    """Saved adapter on this machine."""

    folder: Path
    name: str
    base: str  # folder or Hub id of the base model
    named_by: str | None  # the adapter, if no option names the base model


def locate_adapter(args: EvalArguments | PredictArguments) -> SavedAdapter:
    """Return the saved adapter of the options, downloaded if it is on the Hub."""
    folder = locate_saved(args.adapter, ADAPTER_FILES)
    saved = read_adapter_config(folder)
    base = base_of(saved, args.adapter, args.model)
    named_by = None if args.model else args.adapter
    return SavedAdapter(folder, str(saved.get("name") or "adapter"), base, named_by)  # PEFT saves no name


def base_of(saved: Mapping[str, Any], source: str, given: str | None) -> str:
    """Return the folder or Hub id of an adapter's base model: the given one, or the one that its config names."""
    base = given or saved.get("model_name") or saved.get("base_model_name_or_path")  # the last is of PEFT
    if not base:
        raise ValueError(f"{source} names no base model; pass --model.")
    return str(base)


def load_base(
    name: str, max_length: int, named_by: str | None = None
) -> tuple[ModelAdaptersMixin, PreTrainedTokenizerBase]:
    """Load a base model, which must take `max_length` tokens, and its tokenizer with a padding token.

    Args:
        named_by: As for `load_pretrained`.
    """
    tokenizer, model = load_pretrained(
        name, AutoTokenizer.from_pretrained, AutoAdapterModel.from_pretrained, named_by=named_by
    )
    check_max_length(name, max_length, model.config, tokenizer)
    if tokenizer.pad_token is None:  # GPT-2 and Llama have none
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def add_student_adapter(model: ModelAdaptersMixin, args: TrainArguments) -> None:
    """Add the student of the options to a base model."""
    model.add_adapter(args.student, config=_student_config(model, args), distill_from=args.distillation())


def _student_config(model: ModelAdaptersMixin, args: TrainArguments) -> Any:
    """Return the method of the student: the one of the options, else the one that all teachers have."""
    if args.adapter_config is not None:
        return parse_value("adapter_config", args.adapter_config)
    configs, pool = {}, args.pool()
    entries = args.teachers if pool is None else read_pool(model, pool, args.student, 1).values()
    for entry in entries:
        teacher = locate_teacher(model, entry)
        if teacher.saved is not None:
            configs[entry] = read_config(teacher.label, teacher.saved.config)
    first, *others = configs
    if different := [entry for entry in others if configs[entry] != configs[first]]:
        raise ValueError(
            f"Teachers {first!r} and {different[0]!r} have different methods; choose the student's with "
            "--adapter_config, such as seq_bn or lora."
        )
    return configs[first]


def check_max_length(name: str, max_length: int, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model takes `max_length` tokens."""
    positions = config.to_dict().get("max_position_embeddings") or tokenizer.model_max_length
    if max_length > (limit := min(positions, tokenizer.model_max_length)):
        raise ValueError(f"max_length={max_length} is out of range; {name} takes {limit} tokens at most.")


def load_pretrained(name: str, *loaders: Callable[[str], Any], named_by: str | None = None) -> list[Any]:
    """Load a base model, and what else belongs to it, from a folder or the Hub.

    Args:
        named_by: The adapter that names the base model, if the user did not.

    Raises:
        ValueError: If the name is neither a folder of a model nor a Hub id.
        OSError: If the model cannot be loaded.
    """
    label = f"model={name!r}" + (f" (named by {named_by}; --model replaces it)" if named_by else "")
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, CONFIG_NAME)):
            raise ValueError(f"{label} holds no {CONFIG_NAME}; give the folder of a model.")
    elif not is_repo_id(name):
        raise ValueError(f"{label} is neither a folder nor a Hub id; give a saved model.")
    try:
        return [load(name) for load in loaders]
    except Exception as error:  # tokenizers raises a plain Exception on damaged files
        raise OSError(f"{label} cannot be loaded: {one_line(error)}") from error
