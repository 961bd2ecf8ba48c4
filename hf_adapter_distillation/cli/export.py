"""The command `export`: save a LoRA for PEFT."""

from argparse import Namespace
from pathlib import Path

from adapters import AutoAdapterModel

from ..downloads import locate_saved
from ..student.peft_export import check_lora_config, write_as_peft
from ..student.provenance import provenance_of, read_saved
from ..teachers.loading import ADAPTER_FILES, load_saved_adapter, read_config
from .models import base_of, load_pretrained


def export(args: Namespace) -> str:
    """Save an adapter for PEFT, with its head if it has one and with its provenance if it was distilled."""
    folder = locate_saved(args.source, ADAPTER_FILES)
    saved, label = read_saved(folder), f"Adapter {args.source!r}"
    if "peft_type" in saved:
        raise ValueError(f"{args.source} is an adapter of PEFT already.")
    check_lora_config(label, read_config(label, saved.get("config")))
    base = base_of(saved, args.source, args.model)
    provenance = provenance_of(saved, args.source).to_dict() if "distillation" in saved else None
    (model,) = load_pretrained(base, AutoAdapterModel.from_pretrained, named_by=None if args.model else args.source)
    name = str(saved.get("name") or Path(args.source).name)
    load_saved_adapter(model, folder, name, label)
    write_as_peft(model, name, args.output, not args.no_head, provenance)
    return f"{name!r} is saved for PEFT in {args.output}"
