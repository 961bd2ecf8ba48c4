"""What is logged: the terms of the loss, and the norms of the gradients."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from adapters import AutoAdapterModel
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student
from trainings import EachStep, float16_trainer, trainer_for
from transformers import BertConfig, set_seed

import hf_adapter_distillation as had

NORMS = {"grad_norm/student", "grad_norm/head", "grad_norm/fusion"}
TERMS = {"task_loss", "distillation_loss", "fusion_regularization", *(f"attention/{name}" for name in TEACHERS)}


def part_of(name):
    if ".distillation_fusion." in name:
        return "grad_norm/fusion"
    return "grad_norm/head" if name.startswith(("heads.", "classifier.")) else "grad_norm/student"


class Reference:
    """The norms of each step, in float64, of the gradients as the last backward pass has left them.

    The trainer sees none of it: hooks of the parameters keep what autograd accumulates, before anything is clipped.
    """

    def __init__(self, model):
        self.gradients, self.steps = {}, []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p, n=name: self.keep(n, p))

    def keep(self, name, parameter):
        self.gradients[name] = parameter.grad.detach().double().clone()

    def end_step(self, args, state, control, **kwargs):
        squares = defaultdict(float)
        for name, gradient in self.gradients.items():
            squares[part_of(name)] += gradient.square().sum().item()
        self.steps.append({part: math.sqrt(square) for part, square in squares.items()})


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("clipped", [0.0, 0.01])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("flex", {"carrier": "mixed"}),
        ("classification", {"carrier": "student", "config": "lora"}),
        ("flex", {"level": "layer", "objective": {"features": 1.0, "task_specific": 0.5}}),
    ],
)
def test_norms_are_those_of_a_step_before_clipping(kind, options, accumulation, clipped, trainer_args):
    """The last step of an epoch has fewer micro-batches than the others: 7 in steps of 3."""
    model = make_student(make_model(kind=kind, dtype=torch.float64), **options).double()
    reference = Reference(model)
    args = trainer_args(
        per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, max_grad_norm=clipped
    )  # fmt: skip
    trainer = trainer_for(
        model, args, train_dataset=make_dataset(14), distillation_dataset=make_dataset(6, seed=3),
        callbacks=[EachStep(reference.end_step)],
    )  # fmt: skip
    trainer.train()
    logs = logs_of(trainer)
    assert len(logs) == len(reference.steps) == 2 * math.ceil(7 / accumulation)
    for log, expected in zip(logs, reference.steps, strict=True):
        parts = NORMS if log["stage"] == 2 else NORMS - {"grad_norm/fusion"}
        assert NORMS & log.keys() == parts
        assert all(log[part] == pytest.approx(expected[part], rel=1e-12) and log[part] > 0 for part in parts)
        if clipped:
            assert log["grad_norm"] > clipped
            assert log["grad_norm"] == pytest.approx(math.hypot(*(log[part] for part in parts)), rel=1e-12)
        else:
            assert "grad_norm" not in log


def test_norms_are_those_of_the_last_step(trainer_args, monkeypatch):
    model, computed = make_student(make_model(dtype=torch.float64)).double(), []
    reference = Reference(model)
    args = trainer_args(logging_steps=3, max_steps=8, gradient_accumulation_steps=2)
    trainer = trainer_for(model, args, callbacks=[EachStep(reference.end_step)])
    note = trainer._terms.note_gradients
    monkeypatch.setattr(trainer._terms, "note_gradients", lambda: computed.append(note()))
    trainer.train()
    assert len(computed) == 8  # not once for each micro-batch
    logs = logs_of(trainer)
    assert [log["step"] for log in logs] == [3, 6]
    for log in logs:
        norms = {part: value for part, value in log.items() if part in NORMS}
        assert len(norms) == (3 if log["stage"] == 2 else 2)
        assert norms == pytest.approx({part: reference.steps[log["step"] - 1][part] for part in norms}, rel=1e-12)


def test_norms_in_float16_are_those_of_float32(trainer_args):
    logs = []
    for make in (trainer_for, lambda model, args: float16_trainer("cpu", model, lambda **kw: args, 2.0**10)):
        trainer = make(make_student(make_model()), trainer_args(max_steps=2))
        trainer.train()
        logs.append(logs_of(trainer))
    for full, half in zip(*logs, strict=True):
        parts = NORMS & full.keys()
        assert {part: half[part] for part in parts} == pytest.approx({part: full[part] for part in parts}, rel=0.05)


def test_a_new_accelerator_of_the_trainer_scales_the_norms_and_stops_the_processes(trainer_args):
    """Each trial of a search for hyperparameters makes one."""
    norms = []
    for is_new in (False, True):
        trainer = trainer_for(make_student(make_model()), trainer_args(max_steps=1, save_on_sigterm=True))
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        if is_new:
            trainer.create_accelerator_and_postprocess()
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
        trainer.train()
        norms.append({part: value for part, value in logs_of(trainer)[0].items() if part in NORMS})
        assert trainer._sigterm.accelerator() is trainer.accelerator
    assert norms[0]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_each_training_has_the_norms_of_its_own_model(trainer_args):
    """With `model_init` each training makes a model anew, so that both are the same."""
    trainer = trainer_for(
        None, trainer_args(max_steps=4, keep_fusion=True), model_init=lambda: make_student(make_model())
    )
    logs = []
    for _ in range(2):
        trainer.train()
        held = {id(parameter) for parameters in trainer._terms.trained.values() for parameter in parameters}
        assert held == {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
        logs.append([{part: log[part] for part in NORMS & log.keys()} for log in logs_of(trainer)])
    assert [len(norms) for norms in logs[0]] == [2, 2, 3, 3]
    assert logs[0] == logs[1]


def test_tensorboard_has_each_term_at_each_log(trainer_args, tmp_path):
    trainer = trainer_for(
        make_student(make_model()),
        trainer_args(
            report_to=["tensorboard"], logging_dir=str(tmp_path / "board"), logging_steps=2, max_steps=8,
            eval_strategy="steps", eval_steps=4,
        ),
        eval_dataset=make_dataset(seed=1),
    )  # fmt: skip
    trainer.train()
    assert len(list(Path(tmp_path / "board").glob("events.*"))) == 1
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    board = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    expected = defaultdict(dict)
    for log in trainer.state.log_history:
        for key, value in log.items():
            if key != "step":
                tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                expected[tag][log["step"]] = value
    assert board.keys() == expected.keys()
    for tag, values in expected.items():
        assert board[tag] == pytest.approx(values, rel=1e-6), tag  # float32 there
    of_both_stages = {"task_loss", "stage", "loss", "grad_norm", "grad_norm/student", "grad_norm/head"}
    steps = {name: [2, 4, 6, 8] for name in of_both_stages}
    steps |= {name: [6, 8] for name in (TERMS | NORMS) - of_both_stages}
    assert {name: list(board[f"train/{name}"]) for name in steps} == steps
    assert list(board["train/stage"].values()) == [1, 1, 2, 2]


def test_a_short_training_with_the_defaults_learns_and_logs_ten_times(tmp_path):
    """Three classes: the loss of chance is 1.1. At the learning rate of Trainer it stays there."""
    batch = make_batch(112, seq_len=4, labels=None)
    labels = torch.arange(112) % 3
    batch |= {"labels": labels, "input_ids": 3 + labels[:, None].expand(-1, 4)}
    set_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model = AutoAdapterModel.from_config(BertConfig(60, **sizes))
    make_student(model, teachers=["bank"], train=False).add_classification_head("insurance", num_labels=3)
    model.train_adapter("insurance")
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}
    args = had.DistillationTrainingArguments(str(tmp_path), use_cpu=True, **quiet)
    dataset = Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    trainer = trainer_for(model, args, train_dataset=dataset)
    trainer.train()
    losses = [log["task_loss"] for log in logs_of(trainer)]
    assert trainer.state.max_steps == 42
    assert len(losses) >= 10
    assert losses[0] > 0.9
    assert losses[-1] < 0.4
