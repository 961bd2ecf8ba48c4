"""The sum of the terms of a pass."""

import torch
from tiny_models import make_model, make_student

from hf_adapter_distillation.method.distillation import distillation_of
from hf_adapter_distillation.method.layer_match import LayerMatch, bounded_losses
from hf_adapter_distillation.method.terms import sum_terms
from hf_adapter_distillation.method.training_pass import LayerTerms, StudentPass


def match_of(*values):
    """A match of sequences, each with its error, variance, power and variance of the input."""
    return LayerMatch(*torch.tensor(values, dtype=torch.float64).T)


def test_the_layers_of_each_call_have_a_floor_of_their_own_and_a_weight():
    """A call counts by its sequences: two in the first call, one in the second."""
    model = make_student(make_model())
    current = StudentPass(distillation_of(model, "insurance"))
    first = [match_of((1, 1, 1, 1), (2, 1, 1, 1)), match_of((1, 0, 1, 1), (0.3, 0.2, 4, 2))]
    second = [match_of((5, 1, 1, 1)), match_of((1, 1e-3, 9, 1))]
    for call, (matches, sequences) in enumerate([(first, 2), (second, 1)]):
        for weight, match in zip((0.5, 1.5), matches, strict=True):
            current.layers.append(LayerTerms(call, sequences, weight, {"features": match}))
    _, record = sum_terms(current)
    weights = torch.tensor([0.5, 1.5])
    of_calls = [weights * bounded_losses(first), weights * bounded_losses(second)]
    torch.testing.assert_close(record.layer_losses, torch.cat(of_calls))
    expected = of_calls[0].mean() * 2 / 3 + of_calls[1].mean() / 3
    torch.testing.assert_close(record.distillation_loss, expected)


def test_the_attention_of_a_layer_that_runs_often_is_the_mean_over_its_runs():
    """ALBERT runs one layer many times; the runs count by their sequences."""
    model = make_student(make_model())
    current = StudentPass(distillation_of(model, "insurance"))
    current.attention["layer"] = [(1, ("a", "b"), torch.tensor([1.0, 0.0])), (3, ("a", "b"), torch.tensor([0.2, 0.8]))]
    _, record = sum_terms(current)
    assert record.attention["layer"].names == ("a", "b")
    torch.testing.assert_close(record.attention["layer"].weights, torch.tensor([0.4, 0.6]))
