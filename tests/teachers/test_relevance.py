"""The relevance of adapters at first order, against finite differences."""

import pytest
import torch
from tiny_models import TEACHERS, make_batch, make_model, make_student

from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.teachers.relevance import measure_relevance


def relevance_of(teacher, **settings):
    """The relevance of one teacher, and the model with it; the student's head stays as it is."""
    model = make_student(make_model(dtype=torch.float64), teachers=[teacher], **settings).double()
    torch.manual_seed(3)
    for parameter in (*model.heads["insurance"].parameters(), *_parameters(model, teacher)):
        parameter.data = 0.3 * torch.randn_like(parameter)
    loss = lambda batch: model(**batch)["loss"]  # noqa: E731
    before = {name: value.clone() for name, value in model.state_dict().items()}
    relevance = measure_relevance(model, active_block(model), loss, lambda: [make_batch()], steps=0)()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    return relevance, model


def _parameters(model, name):
    places = model.get_adapter(name).values()
    return [parameter for place in places for module in place.values() for parameter in module.parameters()]


def derivative(model, teacher):
    """The derivative of the loss by the teacher's weight at 0, by the update's norm over tokens that count."""
    ups = [module.adapter_up for place in model.get_adapter(teacher).values() for module in place.values()]
    weights, batch, step = [p.data.clone() for up in ups for p in up.parameters()], make_batch(), 1e-5
    model.set_active_adapters(teacher)
    model.active_head = "insurance"
    losses, updates = [], {}
    hooks = [up.register_forward_hook(lambda up, _, out: updates.__setitem__(up, out.detach())) for up in ups]
    for sign in (-1, 1):
        for parameter, weight in zip((p for up in ups for p in up.parameters()), weights, strict=True):
            parameter.data = sign * step * weight
        with torch.no_grad():
            losses.append(model.eval()(**batch)["loss"].item())
    for hook in hooks:
        hook.remove()
    first = torch.zeros_like(batch["attention_mask"])
    first[:, 0] = 1  # the token that the head reads behind the last layer
    masks = [batch["attention_mask"], first]
    squares = [(updates[up] / step).square().sum(-1)[mask == 1].sum() for up, mask in zip(ups, masks, strict=True)]
    return -(losses[1] - losses[0]) / (2 * step) / sum(squares).sqrt().item()


def test_the_relevance_is_the_derivative_of_the_loss_by_the_teachers_weight():
    """By the norm of the update, and by that of the gradient, which all teachers share."""
    ratios = []
    for teacher in ("bank", "travel"):
        relevance, model = relevance_of(teacher)
        ratios.append(relevance / derivative(model, teacher))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[0] > 0


def test_whole_layers_are_compared_where_methods_differ():
    inside, _ = relevance_of("bank", level="adapter")
    layers, model = relevance_of("bank", level="layer")
    assert model.training
    assert -1 < layers < 1
    assert layers != 0
    assert inside * layers > 0, "the norm behind the adapter turns the direction, but not round"


def test_a_loss_that_ignores_the_model_is_an_error():
    model = make_student(make_model(), teachers=TEACHERS[:1])
    with pytest.raises(ValueError, match="does not depend on the teachers"):
        measure_relevance(model, active_block(model), lambda batch: torch.ones(()), lambda: [make_batch()], steps=0)
