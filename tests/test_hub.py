"""What leaves the package, and digests."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import TEACHERS, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.student.provenance import adapter_digest, is_hub_id, read_provenance

LOAD = """
    import importlib.abc, json, sys
    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_adapter_distillation":
                raise ImportError("blocked")
    sys.meta_path.insert(0, Blocked())
    import adapters, torch, transformers
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
    assert not any(name.startswith("hf_adapter_distillation") for name in sys.modules)
"""


def test_a_saved_student_loads_without_this_package(trainer_args, tmp_path):
    batch = make_batch()
    del batch["labels"]
    torch.save(batch, tmp_path / "batch.pt")
    cases, logits = [], []
    for kind in ("flex", "classification"):
        base = make_model(kind=kind)  # a model of its own: adapters cannot train one after save_pretrained
        (base if kind == "classification" else base.base_model).save_pretrained(str(tmp_path / kind))
        model = make_student(make_model(kind=kind))
        had.DistillationTrainer(model, trainer_args(keep_fusion=True), train_dataset=make_dataset()).train()
        for setup, safe in ((False, False), (False, True), (True, False))[: 3 if kind == "flex" else 1]:
            folder = str(tmp_path / f"{kind}-{setup}-{safe}")
            if setup:
                block = had.AdapterDistillation("insurance", TEACHERS)
                model.save_adapter_setup(folder, block, head_setup="insurance")
            else:
                model.save_adapter(folder, "insurance", use_safetensors=safe)
            cases.append([str(tmp_path / kind), folder, kind != "flex", setup, safe])
            with torch.no_grad():
                logits.append(model.eval()(**batch).logits)
    argument = json.dumps([str(tmp_path), cases])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LOAD), argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert len(loaded) == 4
    assert all(torch.equal(*each) for each in zip(loaded, logits, strict=True))


def test_a_saved_student_has_the_files_and_keys_of_a_plain_adapter(trainer_args, tmp_path):
    model = make_student(make_model())
    had.DistillationTrainer(model, trainer_args(keep_fusion=True), train_dataset=make_dataset()).train()
    model.add_adapter("plain")
    model.add_classification_head("plain")
    saved = {}
    for name in ("insurance", "plain"):
        folder = tmp_path / name
        model.save_adapter(str(folder), name)
        weights = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        shapes = {key.replace(name, "NAME"): value.shape for key, value in weights.items()}
        saved[name] = ({path.name for path in folder.iterdir()}, shapes)
    assert saved["insurance"] == saved["plain"]


def test_digest_follows_the_weights_and_nothing_else(tmp_path):
    model = make_model()
    model.add_adapter("bank")
    digest = adapter_digest(model, "bank")
    assert len(digest) == 64
    assert digest == adapter_digest(model.base_model, "bank")
    model.save_adapter(str(tmp_path / "bank"), "bank")
    other = make_model(seed=1)
    other.load_adapter(str(tmp_path / "bank"), load_as="renamed")
    assert adapter_digest(other, "renamed") == digest
    noisy(other, "renamed", std=1e-7)
    assert adapter_digest(other, "renamed") != digest
    model.add_adapter("travel")
    assert adapter_digest(model, "travel") != digest
    model.to(torch.bfloat16)
    assert adapter_digest(model, "bank") != digest


def test_provenance_of_a_plain_adapter_is_refused(tmp_path):
    model = make_model()
    model.add_adapter("bank")
    model.save_adapter(str(tmp_path / "bank"), "bank")
    with pytest.raises(ValueError, match="was not distilled; it names no teachers"):
        read_provenance(str(tmp_path / "bank"))


def test_what_has_the_form_of_a_hub_id():
    assert all(map(is_hub_id, ("me/faq", "me/faq@v1", "some-one/faq_2.0@0123abc")))
    assert not any(map(is_hub_id, ("faq", "faq@v1", "./faq", "a/b/c", "../faq", "me/", "@v1", "")))
