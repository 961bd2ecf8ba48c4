"""What a call or a training may change of a model, and what it did."""

from dataclasses import replace

import torch

from hf_adapter_distillation.method.distillation import distillation_of, distillations


def configure(model, student="insurance", **settings):
    """Changes settings of the next forward passes."""
    distillation = distillation_of(model, student)
    distillation.settings = replace(distillation.settings, **settings)


def take_terms(model, student="insurance"):
    """The sum of the terms of the forward passes since the last step."""
    return distillation_of(model, student).take_record().added


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    """The names of the parameters that are not bitwise what they were."""
    now = dict(model.named_parameters())
    return {name for name, value in before.items() if name in now and not torch.equal(now[name], value)}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def everything(model):
    """What a failed call must leave as it was."""
    heads = list(getattr(model, "heads", {}))
    active = (str(model.active_adapters), getattr(model, "active_head", None))
    names = [name for name, _ in model.named_modules()]
    return (
        list(model.adapters_config),
        heads,
        active,
        names,
        list(distillations(model.adapters_config)),
        trainable(model),
    )
