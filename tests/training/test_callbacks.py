"""The callbacks: SIGTERM, and the stage in the progress bar."""

import os
import signal
import threading

import pytest
from model_state import changed, snapshot
from tiny_models import make_dataset, make_model, make_student
from trainings import EachStep, trainer_for
from transformers import ProgressCallback

from hf_adapter_distillation.training.callbacks import SigtermCallback, StageCallback
from hf_adapter_distillation.training.checkpoint import newest_whole_checkpoint

FOUR_OF_EACH = ["stage 1: "] * 4 + ["stage 2: "] * 4


def bar_of(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)).training_bar


@pytest.fixture
def shown():
    """A trainer whose descriptions of the bar are noted at the end of each step."""

    def make(args):
        descriptions = []
        trainer = trainer_for(make_student(make_model()), args)
        trainer.add_callback(EachStep(lambda *_, **__: descriptions.append(bar_of(trainer).desc)))
        return trainer, descriptions

    return make


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, FOUR_OF_EACH),
        ({"gradient_accumulation_steps": 2}, ["stage 1: "] * 2 + ["stage 2: "] * 2),
        ({"distillation_start": 0.0, "max_steps": 2}, ["stage 2: "] * 2),
        ({"distillation_start": 1.0, "max_steps": 2}, ["stage 1: "] * 2),
    ],
)
def test_the_bar_shows_the_stage_of_the_running_step(arguments, expected, shown, trainer_args, capsys):
    trainer, descriptions = shown(trainer_args(disable_tqdm=False, **arguments))
    trainer.train()
    assert descriptions == expected
    drawn = capsys.readouterr().err
    for stage in ("stage 1: ", "stage 2: "):
        assert (stage in drawn) == (stage in expected)


def test_each_training_has_a_bar_of_its_own(shown, trainer_args):
    arguments = {"keep_fusion": True, "distillation_start": 1.0, "max_steps": 1}
    trainer, descriptions = shown(trainer_args(disable_tqdm=False, **arguments))
    for _ in range(2):
        trainer.train()
    assert descriptions == ["stage 1: "] * 2


def test_a_bar_of_another_callback_shows_it_too(shown, trainer_args):
    """Added when the trainer is made, it makes its bar after the other callbacks have begun."""

    class OtherProgress(ProgressCallback):
        pass

    trainer, descriptions = shown(trainer_args(disable_tqdm=False))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OtherProgress)
    trainer.train()
    assert descriptions == FOUR_OF_EACH


def test_disable_tqdm_shows_nothing(trainer_args, capsys):
    trainer_for(make_student(make_model()), trainer_args(max_steps=2, logging_strategy="no")).train()
    assert "stage" not in "".join(capsys.readouterr())


def test_a_process_without_a_bar_shows_nothing(trainer_args):
    """Trainer makes one on the first process alone."""
    trainer = trainer_for(make_student(make_model()), trainer_args(disable_tqdm=False, max_steps=2))
    trainer.state.max_steps = 2
    assert bar_of(trainer) is None
    callback = StageCallback(lambda: trainer.first_distillation_step, trainer.callback_handler)
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    assert callback.stage == 1


def test_the_table_of_a_notebook_is_what_it_was(trainer_args, capsys):
    pytest.importorskip("IPython")
    from transformers.utils.notebook import NotebookProgressCallback

    trainer = trainer_for(make_student(make_model()), trainer_args(disable_tqdm=False))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(NotebookProgressCallback)
    trainer.train()
    assert trainer.state.global_step == 8
    printed = "".join(capsys.readouterr())
    assert "HTML object" in printed
    assert "stage 2: " not in printed


def test_sigterm_ends_with_a_checkpoint_and_the_resumed_run_is_the_unbroken_one(trainer_args, tmp_path):
    def trainer(folder, callbacks=(), **kwargs):
        args = trainer_args(
            output_dir=str(tmp_path / folder), max_steps=8, save_strategy="epoch", keep_fusion=True,
            eval_strategy="epoch", save_on_sigterm=True, **kwargs,
        )  # fmt: skip
        model = make_student(make_model(dropout=True), carrier="mixed")
        return trainer_for(model, args, callbacks=list(callbacks), eval_dataset=make_dataset(seed=1))

    def terminate(args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    unbroken = trainer("unbroken")
    unbroken.train()
    with pytest.raises(SystemExit) as caught:
        trainer("terminated", [EachStep(terminate)]).train()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert newest_whole_checkpoint(str(tmp_path / "terminated")).endswith("checkpoint-5")
    resumed = trainer("terminated")
    resumed.train(resume_from_checkpoint=True)
    assert not changed(resumed.model, snapshot(unbroken.model))
    losses = [[log["task_loss"] for log in t.state.log_history if "task_loss" in log] for t in (unbroken, resumed)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


@pytest.mark.parametrize("save_on_sigterm", [False, True])
def test_the_trainer_has_each_callback_once(save_on_sigterm, trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(save_on_sigterm=save_on_sigterm))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(StageCallback) == 1
    assert kinds.count(SigtermCallback) == save_on_sigterm


def test_sigterm_is_caught_in_the_main_thread_alone(trainer_args):
    trainer, errors = trainer_for(make_student(make_model()), trainer_args(max_steps=1, save_on_sigterm=True)), []

    def train():
        with pytest.raises(ValueError, match="save_on_sigterm=True catches a signal, .*; leave it out, or call train"):
            trainer.train()
        errors.append("refused")

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == ["refused"]
