"""The gradients of a step of stage 2 by plain autograd: a model with the student alone, and its terms added by hand.

Nothing of the package's forward pass runs: hooks on the student's modules collect their inputs and updates.
"""

from contextlib import contextmanager

import torch
from adapters import Stack
from tiny_models import TEACHERS

from hf_adapter_distillation.method.wrappers import model_with_adapters

MINIMAL_VARIANCE = 1e-6


class Terms:
    """The distillation loss and the regularisation of all forward passes while it watches a model."""

    def __init__(self, model, student):
        self.places = {  # by layers
            name: (layer, [])
            for name, layer in model.base_model.named_modules()
            if student in getattr(layer, "distillation_fusion", {})
        }
        self.student, self.mask = student, None

    def note_mask(self, module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.mask = (ids != 0).double()  # the id of padding

    def value(self, weight, regularization):
        losses, distances = [], []
        for layer, calls in self.places.values():
            fusion = layer.distillation_fusion[self.student]
            of_sequences = [self.of_sequences(layer, fusion, *call) for call in calls]
            losses.append(torch.cat(of_sequences).mean())
            distances.append((fusion.value.weight - torch.eye(len(fusion.value.weight))).square().sum())
        return weight * torch.stack(losses).mean() + regularization * torch.stack(distances).sum()

    def of_sequences(self, layer, fusion, hidden_states, update, mask):
        updates = []
        for name in TEACHERS:
            down, up = layer.adapters[name].adapter_down[0], layer.adapters[name].adapter_up
            updates.append(torch.relu(hidden_states @ down.weight.T + down.bias) @ up.weight.T + up.bias)
        query = hidden_states @ fusion.query.weight.T + fusion.query.bias  # (B, T, d)
        scores = torch.stack([(query * (each @ fusion.key.weight.T)).sum(-1) for each in updates], -1)  # (B, T, N)
        attention = scores.softmax(-1)
        fused = sum(attention[..., n : n + 1] * (u @ fusion.value.weight.T) for n, u in enumerate(updates))
        losses = []
        for u, f, tokens in zip(update, fused, mask.bool(), strict=True):  # without padding
            variance = f[tokens].detach().var(correction=0)
            losses.append((u[tokens] - f[tokens]).square().mean() / variance.clamp(min=MINIMAL_VARIANCE))
        return torch.stack(losses)


@contextmanager
def watched(model, student="insurance"):
    """Watches the student of a model, which runs alone."""
    inner = model_with_adapters(model)
    inner.set_active_adapters(Stack(student))
    terms, handles = Terms(inner, student), []
    if not inner.config.is_encoder_decoder:
        handles.append(inner.base_model.embeddings.register_forward_pre_hook(terms.note_mask, with_kwargs=True))
    for layer, calls in terms.places.values():

        def note(module, args, output, calls=calls):
            mask = torch.ones(output[2].shape[:2]) if terms.mask is None else terms.mask
            calls.append((args[0].detach(), output[2], mask))

        handles.append(layer.adapters[student].register_forward_hook(note))
    yield terms
    for handle in handles:
        handle.remove()


def reference_gradients(model, batches, task_loss, weight, regularization, forward=None):
    """Returns the gradients of a step with micro-batches, the mean of whose losses is the loss of the step.

    A task loss with a gradient cache runs by itself, and the terms belong to a `forward` without one.
    """
    model.train()
    for batch in batches:
        with watched(model) as terms:
            loss = (forward or task_loss)(model, batch)
            assert all(calls for _, calls in terms.places.values())
            value = terms.value(weight, regularization)
        ((value if forward else loss + value) / len(batches)).backward()
        if forward:
            (task_loss(model, batch) / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
