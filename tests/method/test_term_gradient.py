"""The terms join whatever loss is computed from an output, with the gradient of the plain sum."""

from collections import namedtuple

import pytest
import torch
from marks import needs_compiler
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput

from hf_adapter_distillation.method.term_gradient import carry

Pair = namedtuple("Pair", ["scores", "loss"])
LOSSES = {
    "from the last": lambda outputs: outputs[-1].square().mean(),
    "from the first": lambda outputs: outputs[0].square().mean(),
    "from all": lambda outputs: sum(output.square().mean() for output in outputs),
    "from one twice": lambda outputs: outputs[1].sum() + outputs[1].square().mean(),
    "that is 0": lambda outputs: 0.0 * outputs[1].sum(),
}


class Layers(torch.nn.Module):
    """Three layers with a term each, whose outputs carry the sum of the terms."""

    def __init__(self, checkpointed=False, carries=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
        self.targets = torch.nn.ParameterList(torch.randn(6, dtype=torch.float64) for _ in range(3))
        self.checkpointed, self.carries = checkpointed, carries

    def layer(self, number, states):
        states = self.layers[number](states).tanh()
        return states, (states - self.targets[number]).square().mean()

    def forward(self, states, factor=0.7, total=1.0):
        outputs, terms = [], []
        for number in range(3):
            if self.checkpointed:
                states, term = checkpoint(self.layer, number, states, use_reentrant=False)
            else:
                states, term = self.layer(number, states)
            outputs.append(states)
            terms.append(term)
        if not torch.is_grad_enabled():
            return outputs
        terms = torch.stack(terms).mean()
        if not self.carries:
            return outputs, factor * terms
        return carry(
            outputs, terms, torch.tensor(factor, dtype=torch.float64), torch.tensor(total), follows_loss=False
        )[0]


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check_gradient(loss, model, run):
    """Compare the gradient of a loss of the outputs of `run`, which carry the terms, with that of loss and terms."""
    states = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    expected = Layers(carries=False)
    outputs, terms = expected(states)
    (LOSSES[loss](outputs) + terms).backward()
    found = run(states)
    for output, same in zip(found, outputs, strict=True):
        assert torch.equal(output, same), "the values stay"
    model.zero_grad()
    LOSSES[loss](found).backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_sum(loss, checkpointed):
    model = Layers(checkpointed=checkpointed)
    check_gradient(loss, model, model)


@pytest.mark.timeout(900)  # which a busy machine may need to compile
def test_an_output_can_be_changed_in_place():
    """As poolings do, which set the states of padding to a number."""
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    output, _ = carry(
        {"states": 2 * weight}, weight.square().sum(), torch.ones(()), torch.ones(()), follows_loss=False
    )
    output["states"][0] = -1e9
    output["states"].sum().backward()
    assert weight.grad.tolist() == [2.0, 4.0 + 2.0, 6.0 + 2.0]


@needs_compiler
def test_the_gradient_of_compiled_code_is_that_of_the_sum():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for loss in LOSSES:
        check_gradient(loss, model, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_gradient_cache_adds_up_to_the_batch():
    """Each part runs without a graph, then, with the gradients of a loss of all parts, with one."""
    states = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def contrast(vectors):
        return torch.nn.functional.cross_entropy(vectors @ vectors.roll(1, 0).T, torch.arange(6))

    expected = Layers(carries=False)
    outputs, terms = expected(states)
    (contrast(outputs[-1]) + terms).backward()

    model = Layers()
    with torch.no_grad():
        vectors = torch.cat([model(part)[-1] for part in states.split(2)]).requires_grad_()
    contrast(vectors).backward()
    for part, gradient in zip(states.split(2), vectors.grad.split(2), strict=True):
        (model(part, factor=2 * 0.7, total=6.0)[-1] * gradient).sum().backward()
    for name, gradient in gradients(expected).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("use", "gradient"),
    [
        (lambda output: 3 * output["loss"], 3.0),
        (lambda output: output["loss"] / 4 + output["logits"].sum(), 0.25),
        (lambda output: output["logits"].sum(), 0.5),
    ],
)
def test_terms_follow_the_loss_of_the_model_if_the_training_uses_it(use, gradient):
    weight = torch.tensor(2.0, requires_grad=True)
    terms = torch.tensor(1.0, requires_grad=True)
    output = {"loss": weight.square(), "logits": weight * torch.ones(3)}
    output, _ = carry(output, 1.0 * terms, torch.tensor(0.5), torch.tensor(1.0), follows_loss=True)
    use(output).backward()
    assert terms.grad == gradient


@pytest.mark.parametrize(
    "output",
    [
        lambda states: states,
        lambda states: (states, None, (states, 3)),
        lambda states: [states],
        lambda states: {"a": {"b": states}},
        lambda states: BaseModelOutput(last_hidden_state=states, hidden_states=(states, states)),
        lambda states: Pair(states, None),
    ],
)
def test_outputs_of_any_form_carry_the_terms_and_keep_it(output):
    terms = torch.zeros((), requires_grad=True)
    states = torch.ones(2, 2, requires_grad=True)
    plain = output(1.0 * states)
    found, zero = carry(output(1.0 * states), 1.0 * terms, torch.tensor(1.0), torch.tensor(1.0), follows_loss=False)
    assert type(found) is type(plain)
    assert zero == 0
    flat = torch.utils._pytree.tree_leaves(dict(found) if isinstance(found, dict) else found)
    sum(leaf.sum() for leaf in flat if isinstance(leaf, torch.Tensor)).backward()
    assert terms.grad == 1


def test_a_loss_can_be_changed_in_place():
    terms = torch.zeros((), requires_grad=True)
    output = {"loss": torch.ones((), requires_grad=True).square()}
    output, _ = carry(output, 1.0 * terms, torch.tensor(1.0), torch.tensor(1.0), follows_loss=True)
    loss = output["loss"]
    loss *= 2
    loss.backward()
    assert terms.grad == 2


def test_an_output_without_a_gradient_is_an_error():
    terms = torch.zeros((), requires_grad=True)
    with pytest.raises(TypeError, match="^The model's output, object, has no tensor that the distillation terms"):
        carry(object(), terms, torch.tensor(1.0), torch.tensor(1.0), follows_loss=False)
