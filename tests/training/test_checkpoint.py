"""Checkpoints that are whole, and what happens to those that are not."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_runs import FILES, SAVE_STEPS, STEPS
from marks import LONG
from messages import exactly
from model_state import changed, snapshot
from paths import ROOT
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import TEACHERS, make_model, make_student
from trainings import EachStep, StopAt, trainer_for

from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.weights import TeacherWeights
from hf_adapter_distillation.training import checkpoint
from hf_adapter_distillation.training.checkpoint import (
    check_whole,
    load_student,
    newest_whole_checkpoint,
    save_student,
)


@pytest.mark.parametrize("n_kills", [8, pytest.param(100, marks=LONG)])
def test_killed_runs_lose_nothing(n_kills, tmp_path, record_property):
    """Kills at random calls of both stages and within each file of a checkpoint, of which one is kept at a time."""
    script, environment = ROOT / "tests" / "killed_runs.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(n_kills)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills, all_kills = {}, json.loads((tmp_path / "kills.json").read_text())
    record_property("cases", len(all_kills))
    for kill in all_kills:
        assert kill["status"] == -signal.SIGKILL
        kills[kill["folder"]] = kill["newest"]
    assert len(kills) == n_kills + 1 + len(FILES)
    for index, file in enumerate(FILES):
        assert kills.pop(file) == f"checkpoint-{(6, 9)[index % 2] - SAVE_STEPS}"
    assert {None, "checkpoint-3", "checkpoint-6", "checkpoint-9"} <= set(kills.values()), "kills in both stages"
    unbroken = torch.load(tmp_path / "unbroken" / "end.pt", weights_only=True)
    assert len(unbroken["logs"]) == STEPS + 1
    assert any("fusion" in name for name in unbroken["weights"])
    for folder in (*kills, *FILES):
        resumed = torch.load(tmp_path / folder / "end.pt", weights_only=True)
        assert resumed["logs"] == unbroken["logs"], folder
        assert resumed["weights"].keys() == unbroken["weights"].keys()
        assert all(torch.equal(value, unbroken["weights"][name]) for name, value in resumed["weights"].items()), folder


@pytest.fixture
def training(trainer_args):
    """A finished training with checkpoints of steps 1 to 3, and a function that makes a trainer to resume it."""

    def trainer(**kwargs):
        args = trainer_args(max_steps=3, save_strategy="steps", save_steps=1, distillation_start=0.3)
        return trainer_for(make_student(make_model()), args, **kwargs)

    first = trainer()
    first.train()
    return Path(first.args.output_dir), trainer


def test_what_damages_a_checkpoint(training, record_property):
    """A power cut may leave any file empty or full of zeros, that of the digests, too."""
    folder, _ = training
    names = [path for path in (folder / "checkpoint-3").rglob("*") if path.is_file()]
    assert len(names) == 11
    assert newest_whole_checkpoint(str(folder)) == str(folder / "checkpoint-3")
    for path in names:
        content = path.read_bytes()
        for damaged in (None, content[: len(content) // 2], b"", bytes(len(content))):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            fault = "does not exist" if damaged is None else "is damaged"
            name = path.relative_to(folder / "checkpoint-3")
            message = f"{folder / 'checkpoint-3'} is no whole checkpoint: {name} {fault}."
            with pytest.raises(ValueError, match=exactly(message)):
                check_whole(str(folder / "checkpoint-3"))
            assert newest_whole_checkpoint(str(folder)) == str(folder / "checkpoint-2")
            path.write_bytes(content)
            record_property("cases", 1)
    weights = folder / "checkpoint-3" / checkpoint.FUSION_WEIGHTS_NAME
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert newest_whole_checkpoint(str(folder)) == str(folder / "checkpoint-2")
    record_property("cases", 1)
    assert newest_whole_checkpoint(str(folder / "none")) is None


def test_a_damaged_checkpoint_is_skipped_and_named_or_refused(training, caplog):
    folder, trainer = training
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    resumed = trainer(callbacks=[EachStep(lambda args, state, control, **kwargs: steps.append(state.global_step))])
    before, steps = snapshot(resumed.model), []
    with pytest.raises(ValueError, match="checkpoint-3 is no whole checkpoint: optimizer.pt does not exist"):
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert not changed(resumed.model, before)
    resumed.train(resume_from_checkpoint=True)
    assert steps == [3]
    warning = (
        f"{folder / 'checkpoint-3'} is no whole checkpoint: optimizer.pt does not exist. An older one is looked for"
    )
    assert warning in caplog.text
    check_whole(str(folder / "checkpoint-3"))
    for step in (1, 2, 3):
        (folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="training has no whole checkpoint; leave out resume_from_checkpoint"):
        trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_counts_when_it_is_whole_again(training, monkeypatch):
    folder, trainer = training
    monkeypatch.setattr(
        "transformers.TrainerState.save_to_json", lambda *args: pytest.fail("killed before the last file")
    )
    with pytest.raises(pytest.fail.Exception):
        trainer().train()
    with pytest.raises(ValueError, match="checkpoint-1 is no whole checkpoint: trainer_state.json does not exist"):
        check_whole(str(folder / "checkpoint-1"))


@pytest.mark.parametrize(
    ("owner", "error", "reason"),
    [
        ("torch.save", OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (
            "torch.save",
            RuntimeError("PytorchStreamWriter failed writing file data/3\nmore"),
            "failed writing file data/3",
        ),
        (
            "hf_adapter_distillation.training.checkpoint.save_file",
            SafetensorError("I/O error: no space"),
            "I/O error: no space",
        ),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_last_whole_checkpoint(owner, error, reason, training, monkeypatch):
    folder, trainer = training
    full = trainer()
    full.args.max_steps = 5

    def fail(*args, **kwargs):
        raise error

    class Fill(EachStep):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                monkeypatch.setattr(owner, fail)

    full.add_callback(Fill(lambda *args, **kwargs: None))
    with pytest.raises(RuntimeError) as caught:
        full.train(resume_from_checkpoint=True)
    message = str(caught.value)
    assert message.startswith("The checkpoint of step 4 could not be written (")
    assert "\n" not in message
    assert reason in message
    assert f"the newest whole one is {folder / 'checkpoint-3'}." in message
    check_whole(str(folder / "checkpoint-3"))


NAMES = ["bank", "bank2", "ban", "an"]
PAIRS = [("seq_bn", student, other) for student in NAMES for other in NAMES if student != other]


@pytest.mark.parametrize(("config", "student", "other"), [*PAIRS, ("prefix_tuning", "bank", "bank2")])
def test_a_checkpoint_has_only_the_head_of_the_student(config, student, other, tmp_path):
    def model(head=True):
        model = make_student(make_model(), student, [other, "work"], config)
        if not head:
            model.delete_head(other)
        return model

    def weights(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    saved, resumed, without_head = model(), model(), model(head=False)
    save_student(saved, student, str(tmp_path))
    for file in ("model_head.safetensors", "pytorch_model_head.bin"):
        if (path := tmp_path / student / file).exists():
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            assert {name.split(".")[1] for name in state} == {student}
    for target in (resumed, without_head):
        for parameter in target.heads.parameters():
            parameter.data.fill_(0.5)
        before = weights(target)
        load_student(target, active_block(target), str(tmp_path))
        loaded = {name for name, value in weights(target).items() if not torch.equal(value, before[name])}
        assert {name.split(".")[1] for name in loaded if name.startswith("heads.")} == {student}
        for name, value in saved.heads[student].state_dict().items():
            assert torch.equal(value, target.heads[student].state_dict()[name])


def test_the_head_of_another_in_an_earlier_checkpoint_is_left_out(tmp_path):
    model = make_student(make_model(), "bank", ["bank2", "work"])
    save_student(model, "bank", str(tmp_path))
    model.save_head(str(tmp_path / "bank"), "bank", use_safetensors=True)  # with the head "bank2"
    model.heads["bank2"][1].weight.data.fill_(0.5)
    load_student(model, active_block(model), str(tmp_path))
    assert (model.heads["bank2"][1].weight == 0.5).all()


@pytest.mark.parametrize("order", [None, ["work", "travel", "bank"]], ids=["same order", "other order"])
def test_a_weighted_training_goes_on_with_its_weights(order, trainer_args, monkeypatch):
    """One teacher is left out. A resumed training does not weigh again, and ends bitwise as one without a stop."""
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "keep_fusion": True, "weighing_steps": 4}
    calls = []

    def trainer(folder, teachers=TEACHERS, callbacks=()):
        model = make_student(make_model(dropout=True), teachers=teachers, student_start="weighted", carrier="mixed")
        args = trainer_args(output_dir=trainer_args().output_dir + folder, distillation_start=0.0, **settings)
        return trainer_for(model, args, callbacks=list(callbacks))

    def given(model, block, *args, **kwargs):
        calls.append(1)
        rows = ({"bank": 0.1 / 3 + i * 1e-2, "travel": 0.3 + i * 1e-2, "work": 0.4} for i in range(2))
        places = (fusion.location for fusion in fusions_of(model, "insurance"))
        return TeacherWeights({place: dict(row) for place, row in zip(places, rows, strict=True)}, 0.37)

    monkeypatch.setattr("hf_adapter_distillation.training.preparation.learn_weights", given)
    unbroken = trainer("unbroken")
    unbroken.train()
    trainer("stopped", callbacks=[StopAt(2)]).train()
    assert len(calls) == 2
    resumed = trainer("stopped", order or TEACHERS)
    frozen = {k: v for k, v in unbroken.model.state_dict().items() if "insurance" not in k}
    resumed.model.load_state_dict(frozen, strict=False)  # teachers that were added in another order, too
    resumed.train(resume_from_checkpoint=True)
    assert len(calls) == 2
    assert set(resumed.block.teachers) == {"travel", "work"}
    assert resumed.distillation.weights == unbroken.distillation.weights
    assert resumed.distillation_weight == unbroken.distillation_weight == 0.37
    for ours, theirs in zip(*(fusions_of(t.model, "insurance") for t in (resumed, unbroken)), strict=True):
        assert ours.weights() == theirs.weights()
    if order is None:
        assert not changed(resumed.model, snapshot(unbroken.model))
