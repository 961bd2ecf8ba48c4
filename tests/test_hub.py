"""What leaves the package, and digests."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import TEACHERS, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.hub import adapter_digest, read_provenance

LOAD = """
    import importlib.abc, json, sys
    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_adapter_distillation":
                raise ImportError("blocked")
    sys.meta_path.insert(0, Blocked())
    import adapters, torch, transformers
    base, folder, out, static, setup, safe = json.loads(sys.argv[1])
    if static:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        adapters.init(model)
    else:
        model = adapters.AutoAdapterModel.from_pretrained(base)
    if setup:
        model.load_adapter_setup(folder, set_active=True)
    else:
        model.set_active_adapters(model.load_adapter(folder, use_safetensors=safe))
    batch = torch.load(out + "/batch.pt", weights_only=True)
    with torch.no_grad():
        torch.save(model.eval()(**batch).logits, out + "/logits.pt")
    assert not any(name.startswith("hf_adapter_distillation") for name in sys.modules)
"""


@pytest.mark.parametrize(
    ("kind", "setup", "safe"),
    [("flex", False, False), ("flex", False, True), ("flex", True, False), ("classification", False, False)],
)
def test_a_saved_student_loads_without_this_package(kind, setup, safe, trainer_args, tmp_path):
    base = make_model(kind=kind)  # a model of its own: adapters cannot train one after save_pretrained
    (base if kind == "classification" else base.base_model).save_pretrained(str(tmp_path / "base"))
    model = make_student(make_model(kind=kind))
    had.DistillationTrainer(model, trainer_args(keep_fusion=True), train_dataset=make_dataset()).train()
    folder = tmp_path / "insurance"
    if setup:
        model.save_adapter_setup(str(folder), had.AdapterDistillation("insurance", TEACHERS), head_setup="insurance")
    else:
        model.save_adapter(str(folder), "insurance", use_safetensors=safe)
    batch = make_batch()
    del batch["labels"]
    torch.save(batch, tmp_path / "batch.pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    argument = json.dumps([str(tmp_path / "base"), str(folder), str(tmp_path), kind != "flex", setup, safe])
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(LOAD), argument], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


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


def test_pushing_uploads_the_student_alone(trainer_args, tmp_path, monkeypatch):
    model = make_student(make_model())
    had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset()).train()
    uploaded = {}

    def upload(self, folder, repo_id, timestamps, **kwargs):
        uploaded.update({path.name: path.read_bytes() for path in tmp_path.glob("push/*")})
        return repo_id

    (tmp_path / "push").mkdir()
    monkeypatch.setattr(type(model), "_create_repo", lambda self, repo_id, **kwargs: repo_id, raising=False)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload, raising=False)
    model.push_adapter_to_hub("me/faq-insurance", "insurance", local_path=str(tmp_path / "push"))
    assert set(uploaded) == {
        "adapter_config.json", "pytorch_adapter.bin", "head_config.json", "pytorch_model_head.bin", "README.md",
    }  # fmt: skip
    assert json.loads(uploaded["adapter_config.json"])["distillation"]["teachers"][0]["name"] == "bank"
    card = uploaded["README.md"].decode()
    assert "None dataset" not in card
    assert "arxiv.org/abs/2312.16261" in card
    assert all(f"`{teacher}`" in card for teacher in TEACHERS)


def test_a_card_keeps_what_the_user_says(tmp_path):
    model = make_student(make_model())
    model._save_adapter_card(
        str(tmp_path), "insurance", "me/faq", datasets_tag="me/queries", results="Fine.", citation="Me.", license="mit"
    )
    card = (tmp_path / "README.md").read_text()
    assert "me/queries" in card and "Fine." in card and "Me." in card and "mit" in card


def test_the_card_of_a_plain_adapter_is_untouched(tmp_path):
    model = make_model()
    model.add_adapter("plain")
    model._save_adapter_card(str(tmp_path), "plain", "me/plain")
    card = (tmp_path / "README.md").read_text()
    assert "2312.16261" not in card and "None dataset" in card


def test_digest_follows_the_weights_and_nothing_else(tmp_path):
    model = make_model()
    model.add_adapter("bank")
    digest = adapter_digest(model, "bank")
    assert len(digest) == 64 and digest == adapter_digest(model.base_model, "bank")
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
