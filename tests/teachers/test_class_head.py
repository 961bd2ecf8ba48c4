"""A head for classes that is fitted: against plain references in float64, and where it cannot be."""

import pytest
import torch
from tiny_models import make_batch, make_model
from torch.nn.functional import cross_entropy, one_hot

from hf_adapter_distillation.teachers import class_head
from hf_adapter_distillation.teachers.class_head import ClassHead, fit_ridge


def blobs(n, d):
    """States around a point for each of three classes, with their classes."""
    torch.manual_seed(0)
    labels = torch.arange(n) % 3
    points = torch.randn(3, d, dtype=torch.float64)
    return points[labels] + 1.5 * torch.randn(n, d, dtype=torch.float64) + 5, labels


def plain_ridge(states, labels, n_classes, ridge, sharpness):
    """Weight and bias by the normal equations, with an intercept that is not held back."""
    targets = one_hot(labels, n_classes).double()
    centered = states - states.mean(0)
    gram = centered.T @ centered + ridge * torch.eye(states.shape[1]).double()
    weight = torch.linalg.solve(gram, centered.T @ (targets - targets.mean(0))).T
    return sharpness * weight, sharpness * (targets.mean(0) - weight @ states.mean(0))


@pytest.mark.parametrize("shape", [(24, 7), (9, 40)], ids=["more examples than inputs", "fewer"])
def test_the_fit_and_its_examples_left_out_equal_plain_ones(shape, monkeypatch):
    states, labels = blobs(*shape)
    mean = (states - states.mean(0)).square().sum() / len(states)  # of the eigenvalues
    losses = {}
    for ridge in class_head.RIDGES:
        for sharpness in class_head.SHARPNESS:
            left_out = []
            for number in range(len(states)):
                others = torch.arange(len(states)) != number
                weight, bias = plain_ridge(states[others], labels[others], 3, ridge * mean, sharpness)
                left_out.append(weight @ states[number] + bias)
            losses[ridge, sharpness] = cross_entropy(torch.stack(left_out), labels).item()
    ridge, sharpness = min(losses, key=losses.__getitem__)
    fitted = fit_ridge(states, labels, 3)
    assert fitted.loss == pytest.approx(losses[ridge, sharpness], rel=1e-9)
    weight, bias = plain_ridge(states, labels, 3, ridge * mean, sharpness)
    torch.testing.assert_close(fitted.weight, weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(fitted.bias, bias, rtol=1e-8, atol=1e-10)
    assert len({losses[key] for key in losses}) == len(losses), "each pair counts"


@pytest.mark.parametrize("states", [torch.zeros(4, 3), torch.ones(1, 3)], ids=["no difference", "one example"])
def test_states_that_say_nothing_give_a_finite_head(states):
    fitted = fit_ridge(states.double(), torch.arange(len(states)) % 2, 3)
    assert all(value.isfinite().all() for value in fitted[:2])


def model_with(head="classification", **settings):
    model = make_model(dtype=torch.float64)
    model.add_adapter("insurance", config="seq_bn")
    torch.manual_seed(4)
    getattr(model, f"add_{head}_head")("insurance", **settings)
    model.double().train_adapter("insurance")
    return model.eval()


def head_of(model):
    return ClassHead.of(model, "insurance", list(model.heads["insurance"].parameters()))


def fit(model, batches, loss=None):
    return head_of(model).fit(loss or (lambda batch: model(**batch).loss), batches, lambda part: [part])


def batches_for(labels, seeds=(0, 1, 2)):
    return [make_batch(seed=seed) | {"labels": torch.tensor(labels)} for seed in seeds]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_last_layer_is_fitted_to_the_states_before_it(layers):
    model, batches = model_with(num_labels=3, layers=layers), batches_for([0, 1, 2, 1])
    layer = [module for module in model.heads["insurance"].modules() if isinstance(module, torch.nn.Linear)][-1]
    states = []
    with torch.no_grad(), layer.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0])):
        before = sum(model(**batch).loss for batch in batches)
    others = {name: value.clone() for name, value in model.named_parameters() if value is not layer.weight}
    assert fit(model, batches)
    expected = fit_ridge(torch.cat(states), torch.cat([batch["labels"] for batch in batches]), 3)
    torch.testing.assert_close(layer.weight, expected.weight)
    torch.testing.assert_close(layer.bias, expected.bias)
    assert sum(model(**batch).loss for batch in batches) < before
    changed = [
        name for name, value in model.named_parameters() if name in others and not torch.equal(value, others[name])
    ]
    assert len(changed) == 1, "the bias"
    assert changed[0].endswith(".bias")


def test_a_head_for_tokens_is_fitted_to_those_with_labels():
    model = model_with("tagging", num_labels=3)
    batch = make_batch()
    labels = (torch.arange(batch["input_ids"].numel()) % 4 - 1).view_as(batch["input_ids"])
    batch["labels"] = torch.where(labels < 0, -100, labels)
    layer = [module for module in model.heads["insurance"].modules() if isinstance(module, torch.nn.Linear)][-1]
    states = []
    with torch.no_grad(), layer.register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0])):
        model(**batch)
    assert fit(model, [batch])
    counts = batch["labels"] >= 0
    torch.testing.assert_close(layer.weight, fit_ridge(states[0][counts], batch["labels"][counts], 3).weight)


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ("classification", {"num_labels": 1}),
        ("classification", {"num_labels": 3, "multilabel": True}),
        ("qa", {}),
        ("causal_lm", {}),
    ],
)
def test_heads_for_other_things_than_classes_are_not_fitted(head, settings):
    assert head_of(model_with(head, **settings)) is None


def test_a_last_layer_that_is_frozen_or_has_no_bias_is_not_fitted():
    model = model_with(num_labels=3)
    assert ClassHead.of(model, "insurance", list(model.heads["insurance"].parameters())[:-1]) is None
    model.heads["insurance"][-1] = torch.nn.Linear(32, 3, bias=False)
    assert head_of(model) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch.pop("labels"),
        lambda batch: batch.update(labels=batch["labels"].double()),
        lambda batch: batch.update(labels=batch["labels"][:2]),
        lambda batch: batch.update(labels=torch.full((4,), -100)),
    ],
)
def test_labels_that_do_not_fit_change_nothing(change):
    model, batches = model_with(num_labels=3), batches_for([0, 1, 2, 1], seeds=[0])
    before = {name: value.clone() for name, value in model.named_parameters()}
    change(batches[0])
    inputs = {name: value for name, value in batches[0].items() if name != "labels"}
    assert not fit(model, batches, lambda batch: model(**inputs).logits.sum())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_states_that_are_not_finite_change_nothing():
    model, batches = model_with(num_labels=3), batches_for([0, 1, 2, 1], seeds=[0])
    model.base_model.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    assert not fit(model, batches)
    assert all(value.isfinite().all() for value in model.heads["insurance"].parameters())


def test_a_process_whose_labels_do_not_fit_runs_all_its_batches():
    model, batches, seen = model_with(num_labels=3), batches_for([0, 1, 2, 1]), []
    del batches[0]["labels"]
    assert not fit(model, batches, lambda batch: seen.append(model(input_ids=batch["input_ids"]).logits))
    assert len(seen) == 3


def test_a_model_that_runs_twice_for_a_loss_is_not_fitted():
    model, batches = model_with(num_labels=3), batches_for([0, 1, 2, 1], seeds=[0])
    assert not fit(model, batches, lambda batch: model(**batch).loss + model(**batch).loss)


def test_all_processes_fit_together_or_none():
    model, batches = model_with(num_labels=3), batches_for([0, 1, 2, 1])
    assert fit(model, batches)
    weight = head_of(model).layer.weight.detach().clone()
    other = head_of(model)._rows(lambda batch: model(**batch).loss, batches[1:])
    loss = lambda batch: model(**batch).loss  # noqa: E731
    assert head_of(model).fit(loss, batches[:1], lambda part: [part, other])
    torch.testing.assert_close(head_of(model).layer.weight, weight)
    assert not head_of(model).fit(loss, batches[:1], lambda part: [part, None])
