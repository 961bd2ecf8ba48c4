"""What a trainer writes, and reads again."""

import logging
from pathlib import Path

import pytest
import torch
from model_state import changed, snapshot
from tiny_models import make_dataset, make_model, make_student
from trainings import EachStep, trainer_for


def test_a_checkpoint_holds_student_head_and_fusion_alone(trainer_args, tmp_path):
    trainer_for(make_student(make_model()), trainer_args(max_steps=1, save_strategy="steps", save_steps=1)).train()
    checkpoint = tmp_path / "training" / "checkpoint-1"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        "insurance/adapter_config.json", "insurance/adapter.safetensors", "insurance/head_config.json",
        "insurance/model_head.safetensors", "distillation_fusion.safetensors", "training_args.bin", "optimizer.pt",
        "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint_digests.json",
    }  # fmt: skip


def test_the_best_model_is_loaded_at_the_end(trainer_args, tmp_path):
    model = make_student(make_model())
    kept = {}

    def worse_from_step_3(args, state, control, **kwargs):
        if state.global_step == 2:
            kept.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    scores = iter([0.1, 0.9, 0.5, 0.2])
    args = trainer_args(
        max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, keep_fusion=True,
        load_best_model_at_end=True, metric_for_best_model="score", distillation_start=0.25,
    )  # fmt: skip
    trainer = trainer_for(
        model, args, eval_dataset=make_dataset(), compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[EachStep(worse_from_step_3)],
    )  # fmt: skip
    trainer.train()
    now = dict(model.named_parameters())
    assert kept
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert model.active_head == "insurance"


def test_a_checkpoint_of_the_model_alone_can_be_resumed(trainer_args):
    args = trainer_args(max_steps=4, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer_for(make_student(make_model()), args).train()
    trainer = trainer_for(make_student(make_model()), args)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert trainer.state.global_step == 4


def test_a_resumed_training_warns_of_other_steps_and_not_of_shares_of_them(trainer_args, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, "transformers")  # other tests lower it
    args = trainer_args(max_steps=4, save_strategy="steps", save_steps=0.5, logging_steps=0.05)
    trainer_for(make_student(make_model()), args).train()
    for other, warned in ({}, False), ({"logging_steps": 3}, True):
        caplog.clear()
        args = trainer_args(max_steps=4, save_strategy="steps", save_steps=0.5, **{"logging_steps": 0.05, **other})
        trainer_for(make_student(make_model()), args).train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
        assert ("do not match" in caplog.text) == warned, caplog.text
    assert "logging_steps: 3 (from args) != 1 (from trainer_state.json)" in caplog.text


@pytest.mark.parametrize("safetensors", [True, False])
def test_the_format_of_save_safetensors(safetensors, trainer_args):
    """Into folders that an earlier training in the other format has left."""

    def trainer(safetensors, **kwargs):
        settings = {"save_strategy": "steps", "save_steps": 2, "distillation_start": 0.0, "keep_fusion": True}
        return trainer_for(
            make_student(make_model()), trainer_args(save_safetensors=safetensors, **settings, **kwargs)
        )

    earlier = trainer(not safetensors, max_steps=2, learning_rate=0.1)
    earlier.train()
    earlier.save_model()
    unbroken = trainer(safetensors, max_steps=4)
    unbroken.train()
    unbroken.save_model()
    folder = Path(unbroken.args.output_dir)
    suffix = ".safetensors" if safetensors else ".bin"
    for path in (folder, folder / "checkpoint-2"):
        weights = {file.suffix for file in (path / "insurance").iterdir()} - {".json"}
        assert weights == {suffix}
    resumed = trainer(safetensors, max_steps=4)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert not changed(resumed.model, snapshot(unbroken.model))
    loaded = make_model()
    loaded.load_adapter(str(folder / "insurance"), use_safetensors=safetensors)
    for name, value in loaded.state_dict().items():
        assert "insurance" not in name or torch.equal(value, unbroken.model.state_dict()[name])
