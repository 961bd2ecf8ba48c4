"""What leaves the package is a plain adapter."""

import pytest
import torch
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student
from without_package import logits_without_package

import hf_adapter_distillation as had
from hf_adapter_distillation.student.saving import save_weights


def test_a_saved_student_loads_without_this_package(trainer_args, tmp_path):
    batch = make_batch()
    del batch["labels"]
    torch.save(batch, tmp_path / "batch.pt")
    cases, logits = [], []
    for family, kind, ways in (("bert", "flex", 3), ("bert", "classification", 1), ("deberta", "flex", 1)):
        base = make_model(family, kind)  # a model of its own: adapters cannot train one after save_pretrained
        (base if kind == "classification" else base.base_model).save_pretrained(str(tmp_path / (family + kind)))
        model = make_student(make_model(family, kind))
        had.DistillationTrainer(model, trainer_args(keep_fusion=True), train_dataset=make_dataset()).train()
        for setup, safe in ((False, False), (False, True), (True, False))[:ways]:
            folder = str(tmp_path / f"{family}-{kind}-{setup}-{safe}")
            if setup:
                block = had.AdapterDistillation("insurance", TEACHERS)
                model.save_adapter_setup(folder, block, head_setup="insurance")
            else:
                model.save_adapter(folder, "insurance", use_safetensors=safe)
            cases.append([str(tmp_path / (family + kind)), folder, kind != "flex", setup, safe])
            with torch.no_grad():
                logits.append(model.eval()(**batch).logits)
    loaded = logits_without_package(tmp_path, cases)
    assert len(loaded) == 5
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


@pytest.mark.parametrize(
    ("family", "kind", "has_head"),
    [("llama", "causal_lm", False), ("bert", "classification", True), ("bert", "flex", True), ("bert", "base", False)],
)
def test_the_frozen_head_of_a_language_model_is_not_saved(family, kind, has_head, tmp_path):
    save_weights(make_student(make_model(family, kind)), "insurance", str(tmp_path))
    assert (tmp_path / "model_head.safetensors").exists() == has_head
