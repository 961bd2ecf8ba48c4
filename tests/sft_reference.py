"""The gradients of a step of supervised fine-tuning with distillation, computed plainly and without padding."""

import torch
from adapters import AdapterSetup, Stack
from tiny_models import TEACHERS
from torch import nn

from hf_adapter_distillation._compat import BottleneckLayer, LoRALinear

STUDENT = "insurance"


def sequences_of(inputs):
    """The sequences of each row of a batch, without padding: one, or with packing those that start at position 0."""
    rows = []
    for row, ids in enumerate(inputs["input_ids"]):
        if "attention_mask" in inputs:
            rows.append([ids[inputs["attention_mask"][row] == 1]])
        else:
            starts = (inputs["position_ids"][row] == 0).nonzero().flatten().tolist()
            rows.append([ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)])
    return rows


def places_of(model):
    """The layers that hold the student, by name: the module whose first argument is its input, and its adapters."""
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and STUDENT in module.loras:
            places[name] = (module, module.loras)
        elif isinstance(module, BottleneckLayer) and STUDENT in module.adapters:
            places[name] = (module.adapters[STUDENT], module.adapters)
    return places


def inputs_of_places(model, ids):
    """The input of the student at each place, (T, d), for one sequence that runs alone under the student."""
    found, handles = {}, []
    for name, (module, _) in places_of(model).items():
        handles.append(module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: args[0][0]})))
    with AdapterSetup(Stack(STUDENT)):
        model.base_model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def update(adapter, x):
    """The update of LoRA or of a bottleneck, (T, d)."""
    if hasattr(adapter, "lora_A"):
        return torch.einsum("td,rd,or->to", x, adapter.lora_A, adapter.lora_B) * adapter.scaling
    down, up = adapter.adapter_down[0], adapter.adapter_up
    features = torch.relu(torch.einsum("td,md->tm", x, down.weight) + down.bias)
    return torch.einsum("tm,dm->td", features, up.weight) + up.bias


def terms(model, inputs, weight, regularization):
    """The distillation terms of a batch: the weighted mean over places and rows, and the regularisation."""
    rows = [[inputs_of_places(model, ids) for ids in sequences] for sequences in sequences_of(inputs)]
    matches, total = [], 0.0
    for name, (_, modules) in places_of(model).items():
        layer = model.get_submodule(name)
        fusion = layer.distillation_fusion[STUDENT]
        matches.append([])
        for row in rows:
            x = torch.cat([found[name] for found in row])  # (T, d)
            student, inside = update(modules[STUDENT], x), x.detach()
            updates = [update(modules[teacher], inside).detach() for teacher in TEACHERS if teacher in modules]
            query = nn.functional.linear(inside, fusion.query.weight, fusion.query.bias)
            scores = torch.stack([(query * (u @ fusion.key.weight.T)).sum(-1) for u in updates], dim=-1)  # (T, N)
            attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
            fused = sum(a[:, None] * (u @ fusion.value.weight.T) for a, u in zip(attention.T, updates, strict=True))
            powers = (student.detach().square().mean(), fused.detach().square().mean())
            of_states = [states.detach().var(unbiased=False) for states in (fused, x)]
            matches[-1].append(((student - fused).square().mean(), max(powers), *of_states))
        value = fusion.value.weight
        total = total + regularization * (value - torch.eye(len(value), dtype=value.dtype)).square().sum()
    losses = []
    for row in zip(*matches, strict=True):  # its places
        floor = 0.1 * sum(power / of_input for _, power, _, of_input in row) / len(row)
        losses += [error / max(variance, floor * of_input) for error, _, variance, of_input in row]
    return total + weight * torch.stack(losses).mean()
