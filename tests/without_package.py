"""Processes that load adapters where this package cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import torch

BLOCK = """
    import importlib.abc, sys
    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_adapter_distillation":
                raise ImportError("blocked")
    sys.meta_path.insert(0, Blocked())
"""
CHECK = """
    assert not any(name.startswith("hf_adapter_distillation") for name in sys.modules)
"""
LOAD = """
    import adapters, json, torch, transformers
    out, cases = json.loads(sys.argv[1])
    batch, logits = torch.load(out + "/batch.pt", weights_only=True), []
    for base, folder, static, setup, safe in cases:
        if static:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
            adapters.init(model)
        else:
            model = adapters.AutoAdapterModel.from_pretrained(base)
        if setup:
            model.load_adapter_setup(folder, set_active=True)
        else:
            model.set_active_adapters(model.load_adapter(folder, use_safetensors=safe))
        with torch.no_grad():
            logits.append(model.eval()(**batch).logits)
    torch.save(logits, out + "/logits.pt")
"""


def run_without_package(code: str, *arguments: str, **environment: str) -> None:
    """Runs indented code in a process of its own, with `sys` imported, and checks that it ends well."""
    command = [sys.executable, "-c", dedent(BLOCK) + dedent(code) + dedent(CHECK), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def logits_without_package(folder: Path, cases: list[list]) -> list[torch.Tensor]:
    """Returns the logits for `folder/batch.pt` of each case: base model, adapter, static head, setup, safetensors."""
    run_without_package(LOAD, json.dumps([str(folder), cases]))
    return torch.load(folder / "logits.pt", weights_only=True)
