"""Trainers, and callbacks that look at a training or stop it."""

import torch
from tiny_models import make_dataset
from transformers import TrainerCallback

import hf_adapter_distillation as had


class EachStep(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(args, state, control, **kwargs)


class StopAt(TrainerCallback):
    """Stops as a kill would, after the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer_for(model, args, **kwargs):
    kwargs.setdefault("train_dataset", make_dataset())
    return had.DistillationTrainer(model=model, args=args, **kwargs)


def gradients(model, args, batch_size, accumulation, **kwargs):
    """The gradients and the logged values of the first step."""
    found = {}

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    arguments = args(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1,
        distillation_start=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = trainer_for(model, arguments, callbacks=[Grab()], **kwargs)
    trainer.train()
    return found, trainer.state.log_history[0]


def float16_trainer(device, model, trainer_args, init_scale=2.0**16, **kwargs):
    """A trainer with fp16=True, or on the CPU, where Trainer refuses that, with what it stands for."""
    if device == "gpu":
        return trainer_for(model, trainer_args(use_cpu=False, fp16=True, max_grad_norm=0.0, **kwargs))
    trainer = trainer_for(model, trainer_args(max_grad_norm=0.0, **kwargs))
    trainer.compute_loss_context_manager = lambda: torch.autocast("cpu", torch.float16)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return trainer
