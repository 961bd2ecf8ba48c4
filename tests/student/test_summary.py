"""The short table at the end of a training."""

from tiny_models import make_dataset, make_model, make_student

import hf_adapter_distillation as had
from hf_adapter_distillation.student.summary import as_table, summary_rows
from hf_adapter_distillation.student.training_run import TeacherSource, TrainingRun


def test_the_table_by_hand():
    run = TrainingRun(
        [TeacherSource("bank", "bank", None, "x")],
        {
            "steps": 20,
            "epochs": 4.0,
            "start_explained": 0.874,
            "teacher_weights": {"bank": 0.6, "travel": 0.1},
            "teacher_gain": 0.1234,
        },
        losses={"1": {"loss": 1.0}, "2": {"distillation_loss": 0.0123456789}},
        evaluation={"eval_accuracy": 0.8123456789},
        attention={"layer.0": {"bank": 1.0}, "layer.1": {"bank": 0.5}},
    )
    assert as_table(summary_rows("insurance", run)).splitlines() == [
        "student               'insurance', 20 steps, 4 epochs",
        "start                 explained 87% of its teachers' mean update before the first step",
        "teacher bank          weight 0.60, attention 0.75",
        "teacher travel        weight 0.10, left out",
        "no teacher            weight 0.30",
        "gain of the teachers  12.3% of the task loss, on held-out labels",
        "distance at the end   0.01235 (distillation loss)",
        "eval_accuracy         0.8123",
    ]
    assert dict(summary_rows("insurance", TrainingRun([])))["distance at the end"].startswith("-, since stage 2")


def test_a_trainer_prints_the_table_unless_bars_are_disabled(trainer_args, capsys):
    for is_disabled in (False, True):
        model = make_student(make_model(kind="classification"))
        args = trainer_args(max_steps=2, distillation_start=0, disable_tqdm=is_disabled)
        had.DistillationTrainer(model, args, train_dataset=make_dataset()).train()
        table = as_table(summary_rows("insurance", had.distillation_of(model, "insurance").run))
        printed = capsys.readouterr()
        assert (table in printed.out + printed.err) != is_disabled
        assert "explained " in table
