"""Terms of a training forward pass: their sum, and the record of them."""

from collections.abc import Sequence

import torch

from .distillation import DistillationRecord, TeacherAttention
from .layer_match import LayerMatch, bounded_losses
from .losses import value_regularization
from .training_pass import LayerTerms, TrainingPass


def sum_terms(current: TrainingPass) -> tuple[torch.Tensor, DistillationRecord]:
    """Return the sum of the terms of a pass, with its graph, and their record. The sum is 0 in stage 1."""
    config, settings = current.distillation.config, current.distillation.settings
    added = _parameters_in_graph(current)
    record = DistillationRecord(added, _attention(current))
    means, record.layer_losses = _means(current)
    if means:
        weighted = [weight * means[name] for name, weight in config.objectives.items()]
        distillation_loss = sum(weighted[1:], weighted[0]) + current.logit_loss
        regularization = torch.zeros_like(distillation_loss)
        values = [fusion.value.weight for fusion in current.fusions.values() if fusion.value is not None]
        if current.runs_teachers and values:  # all layers may be skipped
            regularization = settings.regularization * value_regularization(values)
        added = added + settings.weight * distillation_loss + regularization
        record.distillation_loss, record.fusion_regularization = distillation_loss.detach(), regularization.detach()
        if len(means) > 1:
            record.terms = {f"distillation_loss/{name}": mean.detach() for name, mean in means.items()}
    if current.ratios:
        record.terms["task_specific_ratio"] = torch.stack(current.ratios).mean()
    if current.probe_losses:
        probe_loss = torch.stack(current.probe_losses).mean()
        record.terms["probe_loss"] = probe_loss.detach()
        added = added + probe_loss
    if current.fused_task_loss is not None:
        record.fused_task_loss = current.fused_task_loss.detach()
    record.added = added.detach()
    return added, record


def _parameters_in_graph(current: TrainingPass) -> torch.Tensor:
    """Return 0, with the fusion's parameters in its graph if DistributedDataParallel could wait for one in vain."""
    zero, config = torch.zeros(()), current.distillation.config
    if current.layers and config.carrier != "mixed" and "task_specific" not in config.objectives:
        return zero
    parameters = (parameter for fusion in current.fusions.values() for parameter in fusion.parameters())
    return sum((parameter.sum() * 0.0 for parameter in parameters), zero)


def _means(current: TrainingPass) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the unweighted mean of each objective, and the weighted loss of each layer, (n_layers,), detached.

    Where the pass calls the base model several times, a layer counts by its sequences in each call.
    """
    weights, sizes = current.distillation.config.layer_objectives, [layer.sequences for layer in current.layers]
    if not sizes or not weights:
        return current.output_losses, None
    layers = {name: _layer_losses(current.layers, name) for name in weights}  # (L,) each
    of_layers = torch.stack([weight * layers[name].detach() for name, weight in weights.items()]).sum(dim=0)  # (L,)
    if len(set(sizes)) > 1:
        shares = of_layers.new_tensor([size * len(sizes) / sum(sizes) for size in sizes])  # (L,)
        layers = {name: shares * losses for name, losses in layers.items()}
    return {name: losses.mean() for name, losses in layers.items()} | current.output_losses, of_layers


def _layer_losses(layers: Sequence[LayerTerms], objective: str) -> torch.Tensor:
    """Return the loss of each layer, times its weight, (n_layers,); the layers of each call have a common floor."""
    losses = []
    for call in dict.fromkeys(layer.call for layer in layers):
        matches: list[LayerMatch] = []
        others: list[torch.Tensor] = []
        weights = []
        for layer in layers:
            if layer.call == call:
                match = layer.matches[objective]
                matches.append(match) if isinstance(match, LayerMatch) else others.append(match)
                weights.append(layer.weight)
        values = bounded_losses(matches) if matches else torch.stack(others)  # (L,)
        losses.append(values if set(weights) == {1.0} else values * values.new_tensor(weights))
    return torch.cat(losses)


def _attention(current: TrainingPass) -> dict[str, TeacherAttention]:
    """Return the attention at each place, the mean over the sequences of all calls of its layer."""
    attention = {}
    for location, calls in current.attention.items():
        total = sum(size for size, _, _ in calls)
        means = [weights * (size / total) for size, _, weights in calls]
        attention[location] = TeacherAttention(calls[0][1], torch.stack(means).sum(dim=0))
    return attention
