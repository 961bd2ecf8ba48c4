"""The fusion in the optimizer, whoever created it."""

import pytest
import torch
from messages import exactly
from tiny_models import make_dataset, make_model, make_student
from trainings import trainer_for
from transformers import TrainerCallback

import hf_adapter_distillation as had
from hf_adapter_distillation.training.optimizer import fusion_parameters


class Watch(TrainerCallback):
    """Keeps the fusion of a training, and its weights before the first step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.fusion = fusion_parameters(model, "insurance")
        self.before = [parameter.detach().clone() for parameter in self.fusion]

    def moved(self):
        assert self.fusion
        return any(not torch.equal(p, before) for p, before in zip(self.fusion, self.before, strict=True))


def own_optimizer(model, **kwargs):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5, **kwargs)


@pytest.mark.parametrize("keep_fusion", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_second_training_trains_its_fusion(own, keep_fusion, trainer_args):
    model, watch = make_student(make_model()), Watch()
    optimizers = (own_optimizer(model) if own else None, None)
    args = trainer_args(distillation_start=0.0, keep_fusion=keep_fusion, max_steps=2)
    trainer = trainer_for(model, args, callbacks=[watch], optimizers=optimizers)
    trainer.train()
    first = trainer.optimizer
    assert watch.moved()
    trainer.train()
    assert watch.moved()
    assert (trainer.optimizer is first) is own
    *_, group = trainer.optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, watch.fusion))
    assert (group["initial_lr"], group["weight_decay"]) == (5e-3, 0.0)
    n_optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    n_trained = len([p for n, p in model.named_parameters() if p.requires_grad])
    assert n_optimized == n_trained + (0 if keep_fusion else len(watch.fusion))
    trainer.optimizer.state_dict()  # an error with states of parameters that left


def test_selected_teachers_have_a_fusion_in_an_optimizer_of_the_user(trainer_args):
    model, watch = make_student(make_model(), teacher_selection=2), Watch()
    args = trainer_args(distillation_start=0.0, max_steps=2)
    trainer_for(model, args, callbacks=[watch], optimizers=(own_optimizer(model), None)).train()
    assert watch.moved()


class Forgetful(had.DistillationTrainer):
    def create_optimizer(self):
        if self.optimizer is None:
            fusion = set(fusion_parameters(self.model, self.block.student))
            trained = [p for p in self.model.parameters() if p.requires_grad and p not in fusion]
            self.optimizer = torch.optim.SGD(trained, lr=1e-2, weight_decay=0.5)
        return self.optimizer


class Lacking(Forgetful):
    def create_optimizer(self):
        optimizer = super().create_optimizer()
        optimizer.param_groups[0]["params"].pop()
        return optimizer


@pytest.mark.parametrize("kind", [Forgetful, had.DistillationTrainer])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_fusion_moves_in_stage_2_alone(start, kind, trainer_args):
    model, watch = make_student(make_model()), Watch()
    optimizers = (None if kind is Forgetful else own_optimizer(model), None)
    args = trainer_args(distillation_start=start, max_steps=2)
    trainer = kind(model, args, train_dataset=make_dataset(), callbacks=[watch], optimizers=optimizers)
    trainer.train()
    assert watch.moved() is (start == 0.0)


def test_an_optimizer_that_lacks_parameters_is_refused(trainer_args):
    trainer = Lacking(make_student(make_model()), trainer_args(), train_dataset=make_dataset())
    with pytest.raises(ValueError, match="The optimizer lacks heads.insurance.*, which is to be trained; give it all"):
        trainer.train()


def test_a_scheduler_of_the_user_needs_a_fusion_without_decay(trainer_args):
    model = make_student(make_model())
    optimizer = own_optimizer(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    message = (
        "The scheduler in optimizers=(optimizer, scheduler) leaves no room for the fusion, which needs a group "
        "without weight decay; pass optimizers=(optimizer, None) and choose lr_scheduler_type."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, trainer_args(), optimizers=(optimizer, scheduler)).train()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    watch = Watch()
    trainer_for(model, trainer_args(), callbacks=[watch], optimizers=(optimizer, scheduler)).train()
    assert watch.moved()
