"""The trainer pushes over HTTP to a Hub on the loopback interface."""

import os
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from model_state import snapshot
from pushes import NO_TOKEN, NOT_PUSHED, OF_A_PUSH, full_disk, pushed, refused, trained
from safetensors.torch import load
from tiny_models import TEACHERS, make_dataset, make_model, make_student, with_teachers
from transformers.trainer import OPTIMIZER_NAME, TRAINING_ARGS_NAME

import hf_adapter_distillation as had
from hf_adapter_distillation.training.checkpoint import FUSION_WEIGHTS_NAME, check_whole


def test_the_trainer_pushes_the_student_alone(hub, trainer_args):
    trainer = trained(trainer_args)
    commit = trainer.push_to_hub(language="en", license="mit", dataset_tags="clinc_oos")
    repo = hub.repos["me/training"]  # the name of output_dir
    assert pushed(repo) == OF_A_PUSH
    assert repo.messages[1:] == ["End of training"]
    assert commit.oid == repo.refs["main"]
    assert "language:\n- en" in repo.files["README.md"].decode()
    assert not Path(trainer.args.output_dir, "README.md").exists()
    trainer.create_model_card(license="mit")
    assert "license: mit" in Path(trainer.args.output_dir, "README.md").read_text()
    future = trainer.push_to_hub("Again", blocking=False, revision="next", license="apache-2.0")
    assert future.result().oid == repo.refs["next"] != repo.refs["main"]


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_what_is_pushed_at_each_save(strategy, hub, trainer_args):
    given = {"push_to_hub": True, "hub_model_id": "me/faq", "hub_private_repo": True, "hub_strategy": strategy}
    trainer = trained(trainer_args, **given, hub_token="hf_me", hub_always_push=True, save_strategy="epoch")
    repo = hub.repos["me/faq"]
    at_saves = [f"Training in progress, epoch {epoch}" for epoch in (1, 2)]
    folders = {
        "end": [], "every_save": [], "checkpoint": ["last-checkpoint"],
        "all_checkpoints": ["checkpoint-4", "checkpoint-8"],
    }[strategy]  # fmt: skip
    messages = [m for at in at_saves for m in (at, *([f"{at}, checkpoint"] if folders else []))]
    assert repo.private
    assert repo.messages[1:] == ([] if strategy == "end" else messages)
    roots = {path for path in pushed(repo) if "/" not in path}
    assert roots == (set() if strategy == "end" else OF_A_PUSH)
    assert {path.split("/")[0] for path in pushed(repo) if "/" in path} == set(folders)
    for folder in folders:
        assert {f"{folder}/{name}" for name in (OPTIMIZER_NAME, FUSION_WEIGHTS_NAME)} <= set(repo.files)
        assert f"{folder}/{TRAINING_ARGS_NAME}" not in repo.files
    assert not any(
        f"{teacher}." in key
        for teacher in TEACHERS
        for path, content in repo.files.items()
        if path.endswith(".safetensors")
        for key in load(content)
    )

    trainer.push_to_hub()
    assert repo.messages[-1] == "End of training"
    assert {path for path in pushed(repo) if "/" not in path} == OF_A_PUSH | {"attention.png"}
    assert {path.split("/")[0] for path in pushed(repo) if "/" in path} == set(folders)
    weights = load(repo.files["adapter.safetensors"])
    assert all(torch.equal(trainer.model.state_dict()[key], value) for key, value in weights.items())


def test_nothing_that_is_pushed_names_a_folder_of_this_machine(hub, trainer_args, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "the-machine-of-this-test")
    for name in TEACHERS[:2]:
        with_teachers(teachers=[name]).save_adapter(str(tmp_path / name), name)
    model = make_model()
    model.add_adapter("insurance", distill_from=[str(tmp_path / name) for name in TEACHERS[:2]])
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    args = trainer_args(
        push_to_hub=True, hub_model_id="me/faq", hub_strategy="all_checkpoints", hub_always_push=True,
        save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
    )  # fmt: skip
    data = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(8)}
    trainer = had.DistillationTrainer(model, args, **data)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["me/faq"].files
    assert sum(path.endswith("/trainer_state.json") for path in files) == 2
    for path, content in files.items():
        for folder in (str(tmp_path), str(Path.home()), os.getcwd()):
            assert folder == "/" or folder.encode() not in content, path
        assert b"the-machine-of-this-test" not in content, path
    folder = Path(snapshot_download("me/faq")) / "checkpoint-4"
    check_whole(str(folder))
    trainer.train(resume_from_checkpoint=str(folder))
    assert trainer.state.global_step == 8


def test_a_training_resumes_from_a_checkpoint_of_the_hub(hub, trainer_args, tmp_path):
    whole = trained(trainer_args, save_strategy="steps", save_steps=5, output_dir=str(tmp_path / "whole"))
    args = {"push_to_hub": True, "hub_model_id": "me/faq", "hub_strategy": "checkpoint", "save_steps": 5}
    trained(trainer_args, save_strategy="steps", **args)
    folder = Path(snapshot_download("me/faq")) / "last-checkpoint"
    model = make_student(make_model())
    trainer = had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset())
    trainer.train(resume_from_checkpoint=str(folder))
    expected = {name: p for name, p in snapshot(whole.model).items() if "insurance" in name}
    assert expected
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in expected.items())


@pytest.mark.parametrize("where", ["on the Hub", "on the disk"])
def test_a_push_that_fails_in_training_is_a_warning(where, hub, trainer_args, caplog, monkeypatch):
    hub.create("me/faq")
    if where == "on the Hub":
        reason = "the Hub failed with 500; try again"
        hub.fail("POST /api/models/me/faq/commit", 500)
    else:
        reason = "no space left"
        monkeypatch.setattr("hf_adapter_distillation.hub.push.copyfile", full_disk)
    args = {"push_to_hub": True, "hub_model_id": "me/faq", "save_strategy": "epoch", "hub_always_push": True}
    trained(trainer_args, **args)
    warning = f"{NOT_PUSHED}{reason}. The training goes on, and the next save pushes again."
    assert [record.message for record in caplog.records].count(warning) == 2
    assert len(hub.repos["me/faq"].commits) == 1


def test_no_repository_is_made_for_a_training_that_cannot_start(hub, trainer_args, monkeypatch):
    model = make_student(make_model())
    args = trainer_args(push_to_hub=True, hub_model_id="me/faq")
    dual = make_student(make_model(), carrier="dual")
    with hub.quiet(), pytest.raises(ValueError, match="carrier 'dual' needs the model's own loss"):
        had.DistillationTrainer(dual, args, train_dataset=make_dataset(), compute_loss_func=lambda *a, **k: 0)
    monkeypatch.delenv("HF_TOKEN")
    with hub.quiet():
        make = had.DistillationTrainer
        refused(OSError, NOT_PUSHED + NO_TOKEN, make, model, args, train_dataset=make_dataset())
    had.DistillationTrainer(model, trainer_args(push_to_hub=True, hub_model_id="me/faq", hub_token="hf_me"))
    assert "me/faq" in hub.repos
