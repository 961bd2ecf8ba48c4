"""What is left behind after many steps and many students, and threads that must not meet."""

import gc
import threading

import pytest
import torch
from marks import LONG
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy
from trainings import EachStep, trainer_for

from hf_adapter_distillation.method.distillation import distillations


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=LONG)])
def test_the_number_of_live_tensors_is_flat_in_both_stages(steps, trainer_args):
    counts = []

    def note(args, state, control, **kwargs):
        if state.global_step in (20, steps, steps + 20, 2 * steps):
            counts.append(live_tensors())

    all_steps = 2 * steps + 1  # the last one is logged
    args = trainer_args(max_steps=all_steps, distillation_start=steps / all_steps, logging_steps=50)
    trainer_for(make_student(make_model(), carrier="dual"), args, callbacks=[EachStep(note)]).train()
    early, late, early_in_stage_2, late_in_stage_2 = counts
    assert early == late
    assert early_in_stage_2 == late_in_stage_2


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


@pytest.mark.parametrize("students", [100, pytest.param(1000, marks=LONG)])
def test_deleted_students_leave_nothing_behind(students, record_property):
    model = make_student(make_model())  # what the first one makes, such as the module list of the fusion, may stay
    batch, counts, before = make_batch(), [], None
    for number in range(students + 1):
        name = f"student_{number}"
        model.add_adapter(name, distill_from=TEACHERS)
        model.train_adapter(name)
        model.train()
        model(**batch).loss.backward()
        model.zero_grad()
        model.delete_adapter(name)
        if name in model.heads:
            model.delete_head(name)
        if number in (0, students):
            counts.append(live_tensors())
            before = before or traces(model)
    record_property("cases", number)
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
    assert len(alone[0]) == len(alone[1]) == 30
    assert alone[0] != alone[1]
    assert together == alone
