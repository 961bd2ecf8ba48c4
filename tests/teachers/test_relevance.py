"""The relevance of adapters at first order, against finite differences."""

import pytest
import torch
from tiny_models import TEACHERS, distillation_of, make_batch, make_model, make_student

from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.layer_pass import LayerPass
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
    return -(losses[1] - losses[0]) / (2 * step) / size_of([updates[up] / step for up in ups], batch)


def size_of(updates, batch):
    """The norm of the updates of two layers over the tokens that count; behind the last, the head reads the first."""
    first = torch.zeros_like(batch["attention_mask"])
    first[:, 0] = 1
    masks = [batch["attention_mask"], first]
    squares = [update.square().sum(-1)[mask == 1].sum() for update, mask in zip(updates, masks, strict=True)]
    return sum(squares).sqrt().item()


class Weighed(LayerPass):
    """Pass with the update of the only teacher, times a weight, in each layer."""

    keeps_graph = True

    def __init__(self, weight):
        self.weight, self.updates = weight, []

    def run_layer(self, place):
        self.updates.append(place.mix(lambda names: torch.ones(len(names))))
        return place.base + self.weight * self.updates[-1]


def derivative_of_layers(model):
    """The same for the updates of whole layers."""
    batch, losses, step = make_batch(), {}, 1e-5
    for weight in (-step, 0.0, step):
        layer_pass = Weighed(weight)
        with torch.no_grad(), distillation_of(model).inspected_by(layer_pass):
            losses[weight] = model.eval()(**batch)["loss"].item()
        if weight == 0:
            size = size_of(layer_pass.updates, batch)
    return -(losses[step] - losses[-step]) / (2 * step) / size


def test_the_relevance_is_the_derivative_of_the_loss_by_the_teachers_weight():
    """By the norm of the update, and by that of the gradient, which all teachers share."""
    ratios = []
    for teacher in ("bank", "travel"):
        relevance, model = relevance_of(teacher)
        ratios.append(relevance / derivative(model, teacher))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[0] > 0


def test_the_relevance_of_whole_layers_is_that_derivative_too():
    ratios = []
    for teacher in ("bank", "travel"):
        relevance, model = relevance_of(teacher, level="layer")
        assert model.training
        ratios.append(relevance / derivative_of_layers(model))
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    assert ratios[0] > 0


def test_a_loss_that_ignores_the_model_is_an_error():
    model = make_student(make_model(), teachers=TEACHERS[:1])
    with pytest.raises(ValueError, match="does not depend on the teachers"):
        measure_relevance(model, active_block(model), lambda batch: torch.ones(()), lambda: [make_batch()], steps=0)
