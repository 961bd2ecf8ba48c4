"""Losses that are no numbers, and what is left behind after many steps and many students."""

import gc
import threading

import pytest
import torch
from conftest import TEACHERS, make_batch, make_model, make_student, noisy, snapshot
from test_trainer import EachStep, trainer_for
from transformers import TrainerCallback

from hf_adapter_distillation.layers import adapter_layers
from hf_adapter_distillation.state import distillations


class Break(TrainerCallback):
    """Breaks the model before a step, and notes its weights then."""

    def __init__(self, model, step, function):
        self.model, self.step, self.function = model, step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function(self.model)
            self.weights = snapshot(self.model)


def layer_of(model, number):
    return adapter_layers(model, "insurance")[number][1]


BREAKS = {
    "student": (
        6, "dual", lambda model: layer_of(model, 0).adapters["insurance"].adapter_up.weight.data.fill_(float("nan")),
        "nan: distillation_loss, first in encoder.layer.0.output",
    ),
    "fusion": (
        6, "student", lambda model: layer_of(model, 1).distillation_fusion["insurance"].value.weight.data.fill_(1e30),
        "nan: distillation_loss, first in encoder.layer.1.output",
    ),
    "head": (
        6, "mixed", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: task_loss, while distillation_loss is finite in all layers",
    ),
    "logits": (
        6, "dual", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: distillation_loss, in the logits",
    ),
    "stage 1": (
        2, "student", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: task_loss, in stage 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_loss_that_is_no_number_names_the_term_and_the_layer(what, trainer_args):
    step, carrier, function, message = BREAKS[what]
    model = make_student(make_model(), carrier=carrier, student_start="random")
    breaking = Break(model, step, function)
    trainer = trainer_for(model, trainer_args(), callbacks=[breaking])
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    assert str(caught.value) == (
        f"The loss of step {step + 1} is {message}. No weight has changed in this step; lower the learning rate, "
        "or pass stop_on_nan=False to go on."
    )
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name].nan_to_num(0), value.nan_to_num(0)) for name, value in breaking.weights.items())


def test_the_regularisation_is_named(trainer_args):
    """Of a value matrix whose square is infinite, while what it puts out is matched by no layer."""
    model = make_student(make_model(), student_start="random")
    distillation = distillations(model.adapters_config)["insurance"]
    model.train()
    model(**make_batch())
    record = distillation.take_record()
    assert record.not_finite() == "task_loss, while distillation_loss is finite in all layers"
    record.fusion_regularization = torch.tensor(float("inf"))
    assert record.not_finite() == "fusion_regularization"


def test_stop_on_nan_can_be_unset(trainer_args):
    model = make_student(make_model())
    breaking = Break(model, 6, BREAKS["head"][2])
    trainer = trainer_for(model, trainer_args(stop_on_nan=False), callbacks=[breaking])
    trainer.train()
    assert trainer.state.global_step == 8


# Leaks


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_the_number_of_live_tensors_is_flat_in_both_stages(trainer_args):
    counts = {}

    def note(args, state, control, **kwargs):
        if state.global_step in (20, 200, 220, 400):
            counts[state.global_step] = live_tensors()

    args = trainer_args(max_steps=401, distillation_start=200 / 401, logging_steps=50)
    trainer_for(make_student(make_model(), carrier="dual"), args, callbacks=[EachStep(note)]).train()
    assert counts[200] == counts[20] and counts[400] == counts[220]


def traces(model):
    """All that a student could leave on a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [name for name, _ in model.named_modules()],
        "hooks": [(name, hook) for name, module in model.named_modules() for hook in hooks if getattr(module, hook)],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "adapters": (list(model.adapters_config), list(model.adapters_config.fusions)),
        "config": sorted(vars(model.adapters_config)),
        "distillations": list(distillations(model.adapters_config)),
        "heads": list(model.heads),
    }


def test_a_hundred_deleted_students_leave_nothing_behind():
    model = make_student(make_model())  # what the first one makes, such as the module list of the fusion, may stay
    batch, counts, before = make_batch(), [], None
    for number in range(101):
        name = f"student_{number}"
        model.add_adapter(name, distill_from=TEACHERS)
        model.train_adapter(name)
        model.train()
        model(**batch).loss.backward()
        model.zero_grad()
        model.delete_adapter(name)
        if name in model.heads:
            model.delete_head(name)
        if number in (0, 100):
            counts.append(live_tensors())
            before = before or traces(model)
    assert traces(model) == before
    assert counts[0] == counts[1]


def test_models_trained_in_two_threads_do_not_mix_their_losses():
    def student(seed):
        model = make_student(make_model(seed=seed), carrier=("fused", "dual")[seed], student_start="random")
        noisy(model, "insurance")
        return model

    def train(model, found):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(30):
            loss = model.train()(**make_batch(seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record = distillations(model.adapters_config)["insurance"].take_record()
            found.append((loss.item(), record.added.item(), record.distillation_loss.item()))

    alone, together = ([[], []] for _ in range(2))
    for seed in (0, 1):
        train(student(seed), alone[seed])
    threads = [threading.Thread(target=train, args=(student(seed), together[seed])) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(alone[0]) == len(alone[1]) == 30 and alone[0] != alone[1]
    assert together == alone
