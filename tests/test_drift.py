"""The warning about a student that learns the task away from its teachers."""

import pytest
from conftest import make_model, make_student
from test_trainer import StopAt, trainer_for

from hf_adapter_distillation.training.drift import drift

RISING, FALLING = [1.0, 1.2, 2.0, 2.5, 2.5, 2.5, 2.4, 2.6], [2.0, 2.0, 1.8, 1.6, 1.6, 1.5, 1.4, 1.4]


def history(distillation, task):
    stage_1 = [{"task_loss": 9.0, "stage": 1}, {"eval_loss": 1.0}]
    return stage_1 + [{"distillation_loss": d, "task_loss": t} for d, t in zip(distillation, task, strict=True)]


def test_the_last_quarter_is_compared_with_the_first():
    assert drift(history(RISING, FALLING)) == pytest.approx((1.1, 2.5, 2.0, 1.4))
    assert drift(history(RISING, [-task for task in reversed(FALLING)])) == pytest.approx((1.1, 2.5, -1.4, -2.0))


@pytest.mark.parametrize(
    ("distillation", "task"),
    [
        (RISING[:7], FALLING[:7]),
        (RISING, RISING),
        (RISING, [2.0] * 6 + [1.51] * 2),
        (FALLING, FALLING),
        ([1.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.9, 1.9], FALLING),
        ([0.1, 1.9, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0], FALLING),
        ([d / 26 for d in RISING], FALLING),
    ],
    ids=["seven logs", "both rise", "task falls too little", "both fall", "a hump", "single logs", "a little"],
)
def test_what_is_no_drift(distillation, task):
    assert drift(history(distillation, task)) is None


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "the distillation loss rose" in record.getMessage()]


def train(trainer_args, weight=1e-4, resume=False, callbacks=(), **kwargs):
    args = trainer_args(
        **{"max_steps": 80, "logging_steps": 4, "distillation_start": 0.0, **kwargs}, distillation_weight=weight
    )
    # The teacher knows nothing of the task; its student starts as its copy.
    trainer = trainer_for(make_student(make_model(), teachers=["bank"]), args, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_student_that_drifts_is_reported_once_with_advice(trainer_args, caplog):
    trainer = train(trainer_args)
    before, after, task_before, task_after = drift(trainer.state.log_history)
    assert after > 2 * before
    assert task_after < 0.75 * task_before
    assert warnings_of(caplog) == [
        f"In stage 2 the distillation loss rose from {before:.3g} to {after:.3g} while the task loss fell from "
        f"{task_before:.3g} to {task_after:.3g}: 'insurance' learns the task away from its teachers. To hold it to "
        "them, raise distillation_weight (it was 0.0001); if it evaluates well as it is, they know little of this "
        "task, and distillation_start=1.0 trains it without them."
    ]


@pytest.mark.parametrize("healthy", [{"weight": 1.0}, {"distillation_start": 1.0}])
def test_the_advice_helps(healthy, trainer_args, caplog):
    trainer = train(trainer_args, **healthy)
    losses = [log["task_loss"] for log in trainer.state.log_history if "task_loss" in log]
    assert losses[-1] < 0.75 * losses[0]
    assert not warnings_of(caplog)


def test_a_resumed_training_is_judged_as_a_whole(trainer_args, caplog):
    saving = {"save_strategy": "steps", "save_steps": 40}
    train(trainer_args)
    train(trainer_args, callbacks=[StopAt(40)], **saving)
    train(trainer_args, resume=True, **saving)
    unbroken, killed, resumed = warnings_of(caplog)
    assert resumed == unbroken != killed
