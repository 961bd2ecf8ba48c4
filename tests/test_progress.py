"""The stage in the progress bar."""

import pytest
from conftest import make_model, make_student
from test_trainer import EachStep, trainer_for
from transformers import ProgressCallback

from hf_adapter_distillation.training.progress import StageCallback

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
    callback = StageCallback(trainer)
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
