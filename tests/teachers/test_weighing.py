"""Weights of the teachers: what the weighing finds, and what it leaves alone."""

import random

import numpy as np
import pytest
import torch
from good_and_harmful import batches_of, good_and_harmful
from messages import exactly
from model_state import everything
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.teachers.learner import Learner
from hf_adapter_distillation.teachers.weighing import learn_weights


def weigh(teachers, **kwargs):
    model = good_and_harmful()
    model.add_adapter("insurance", config="double_seq_bn", distill_from=teachers)
    model.train_adapter("insurance")
    return had.weigh_teachers(model, batches_of(64), **kwargs)


def test_the_teacher_of_the_task_gets_the_weight():
    weights = weigh(["shuffled", "good", "random"])
    mean = weights.mean()
    assert mean["good"] > 0.8
    assert 1 < sum(mean.values()) < 2, "more of a good teacher is better, up to a limit"
    assert weights.gain > 0.3
    assert weights.heavy() == ["good"]
    per_layer = weigh(["shuffled", "good", "random"], per_layer=True)
    assert len(per_layer.by_place) == 4
    assert len({row["good"] for row in per_layer.by_place.values()}) == 4
    assert per_layer.mean()["good"] == max(per_layer.mean().values())
    alone = weigh(["good"])
    assert alone.mean()["good"] > 0.8
    assert alone.heavy() == ["good"]


def test_the_teacher_of_the_task_gets_the_weight_whatever_the_order_of_its_labels():
    model, teachers = good_and_harmful(), ["shuffled", "good", "random"]
    for name in teachers:
        model.heads[name].config["label2id"] = {"upper": 0, "lower": 1}
    model.add_adapter("insurance", config="double_seq_bn", distill_from=teachers)
    model.add_classification_head("insurance", id2label={0: "lower", 1: "upper"})
    model.train_adapter("insurance")
    for key, value in model.heads["insurance"].state_dict().items():
        mean = sum(model.heads[name].state_dict()[key] for name in teachers) / 3
        torch.testing.assert_close(value, mean.flip(0) if key.startswith("4.") else mean)
    batches = [batch | {"labels": 1 - batch["labels"]} for batch in batches_of(64)]
    assert had.weigh_teachers(model, batches).mean()["good"] > 0.8


@pytest.mark.parametrize(("flipped", "kept"), [(0, 1.0), (4, 0.5), (12, 0.0)])
def test_weights_that_the_other_half_does_not_confirm_are_shrunk(flipped, kept):
    """As far as it judges best, against a plain repetition of the weighing for each share of the scores."""
    model = good_and_harmful()
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["shuffled", "good", "random"])
    model.train_adapter("insurance")
    halves = [batches_of(16), [dict(batch) for batch in batches_of(24, seed=8, size=12)]]
    for batch in halves[1]:
        batch["labels"] = torch.cat([1 - batch["labels"][:flipped], batch["labels"][flipped:]])

    def loss(batch):
        return model(**batch).loss

    losses, weights, without = {}, {}, 0.0
    for share in (0.0, 0.5, 1.0):
        losses[share], weights[share], without = 0.0, 0.0, 0.0
        for number in range(2):
            learner = Learner(model, active_block(model), loss, False, 1, (), lambda tensor: tensor, 1.0)
            judge = {name: torch.cat([batch[name] for batch in halves[1 - number]]) for name in halves[0][0]}
            with learner.running():
                learner.learn(lambda half=halves[number]: half, 8)
                learner.scores.data *= share
                learner.log_scales.data *= share
                losses[share] += learner.losses([judge]).item()
                weights[share] += learner.weights()[0] / 2
            with learner.without_teachers(), learner.running():
                without += learner.losses([judge]).item()
    best = 1.0 if losses[1.0] <= 0.95 * without else min(losses, key=losses.get)
    assert best == kept
    learned = learn_weights(model, active_block(model), loss, [lambda: halves[0], lambda: halves[1]], steps=16)
    assert list(learned.mean().values()) == pytest.approx(weights[best][:-1].tolist(), rel=1e-5)
    assert learned.gain == pytest.approx(1 - losses[best] / without, rel=1e-4)
    if best == 0.0:
        assert list(learned.mean().values()) == pytest.approx([1 / 4] * 3)


def test_a_batch_without_a_label_does_not_count():
    model = good_and_harmful()
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["shuffled", "good", "random"])
    model.train_adapter("insurance")
    batches = batches_of(64)
    gain = had.weigh_teachers(model, batches).gain
    without = {**batches[0], "labels": torch.full_like(batches[0]["labels"], -100)}
    assert model(**without).loss.isnan()
    weights = had.weigh_teachers(model, [*batches, without])
    assert weights.mean()["good"] > 0.8
    assert weights.gain == pytest.approx(gain, abs=0.1)
    assert gain > 0.3


@pytest.mark.parametrize("offset", [-1.0, -10.0])
def test_a_loss_that_is_not_above_zero_has_no_share_to_gain(offset):
    model = good_and_harmful()
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["shuffled", "good", "random"])
    model.train_adapter("insurance")
    message = (
        "The teachers of 'insurance' cannot be weighed: half of the batches have no labels, or the loss without "
        "teachers, of which the gain is a share, is not above 0."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        had.weigh_teachers(model, batches_of(32), lambda batch: model(**batch).loss + offset)


@pytest.mark.parametrize(("steps", "least"), [(4, 0.4), (8, 0.6), (16, 0.8), (40, 0.8)])
def test_few_steps_go_nearly_as_far_as_many(steps, least):
    weights = weigh(["shuffled", "good", "random"], steps=steps)
    assert weights.mean()["good"] > least
    assert weights.gain > 0.2


def test_the_head_of_a_new_task_is_fitted_beside_the_weights():
    """So that the teacher of the task shows, whatever the head's start; one on base states is nearly as good."""
    for seed in range(3):
        found = []
        for teachers in (["shuffled", "good", "random"], ["shuffled", "random"]):
            model = good_and_harmful()
            torch.manual_seed(seed)
            model.add_adapter("insurance", config="double_seq_bn", distill_from=teachers)
            model.add_classification_head("insurance", num_labels=2, layers=1)
            model.train_adapter("insurance")
            found.append(had.weigh_teachers(model, batches_of(128), steps=64))
        assert found[0].mean()["good"] > 0.7
        assert found[0].gain > max(0.01, found[1].gain)


def test_teachers_that_know_nothing_gain_nothing():
    weights = weigh(["shuffled", "random"])
    assert weights.gain < 0.1
    assert 0 < sum(weights.mean().values()) < 2
    assert weights.heavy()


def whole_state(model):
    values = {name: value.clone() for name, value in model.state_dict(keep_vars=False).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    return values, gradients, modes, draws, everything(model)


def assert_unchanged(model, before):
    values, gradients, modes, draws, others = whole_state(model)
    assert values.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in values.items())
    assert gradients.keys() == before[1].keys()
    assert all(gradients[name] is before[1][name] for name in gradients)
    assert (modes, others) == (before[2], before[4])
    assert torch.equal(draws[0], before[3][0])
    assert draws[1] == before[3][1]
    assert (draws[2] == before[3][2]).all()


@pytest.mark.parametrize("case", ["mixed heads", "new head", "static head", "a silent layer"])
@pytest.mark.parametrize("fails_at", [None, 1, 4])
def test_nothing_on_the_model_changes(case, fails_at):
    """Parameters, buffers, gradients that were there, modes and random states, also when the loss raises."""
    kind = "classification" if case == "static head" else "flex"
    model = make_student(make_model(kind=kind, dropout=True))
    if case == "new head":
        model.delete_head("insurance")
        model.add_classification_head("insurance", num_labels=2, layers=1)
        model.train_adapter("insurance")
    if case == "a silent layer":
        for name in TEACHERS:
            for parameter in adapter_layers(model, name)[0][1].adapters[name].adapter_up.parameters():
                parameter.data.zero_()
        model = make_silent(model)
    model.train()
    model(**make_batch()).loss.backward()
    had.distillation_of(model).begin_step()
    before, calls = whole_state(model), []

    def loss(batch):
        calls.append(1)
        if len(calls) == fails_at:
            raise RuntimeError("of the user")
        assert not model.training
        return model(**batch).loss

    if fails_at is None:
        weights = had.weigh_teachers(model, [make_batch(seed=seed) for seed in range(3)], loss, steps=4)
        assert 0 < sum(weights.mean().values()) < 2
    else:
        with pytest.raises(RuntimeError, match="of the user"):
            had.weigh_teachers(model, [make_batch(seed=seed) for seed in range(3)], loss, steps=4)
    assert_unchanged(model, before)
    assert had.distillation_of(model).inspection is None


def make_silent(model):
    """The same model with fusions for the layers that are not silent."""
    model.delete_adapter("insurance")
    model.add_adapter("insurance", config="seq_bn", distill_from=had.DistillationConfig(TEACHERS))
    noisy(model, "insurance")
    model.train_adapter("insurance")
    assert sum("distillation_fusion.insurance.value" in name for name, _ in model.named_parameters()) == 1
    return model


@pytest.mark.parametrize("kind", ["flex", "classification"])
def test_a_new_head_is_fitted_or_trained_along(kind):
    """Of a flex model, and the static head of a model that has one for all; fitted where the batches have labels."""
    model = make_student(make_model(kind=kind))
    if kind == "flex":
        model.delete_head("insurance")
        model.add_classification_head("insurance", num_labels=2, layers=1)
        model.train_adapter("insurance")
    head = model.heads["insurance"] if kind == "flex" else model.classifier
    key = "weight" if kind != "flex" else "1.weight"
    start, batches = head.state_dict()[key].clone(), [make_batch(), make_batch(seed=1)]

    def heads_seen(batches, labels):
        seen = []

        def loss(batch):
            seen.append(head.state_dict()[key].clone())
            return model(**{"labels": labels, **batch}).loss

        had.weigh_teachers(model, batches, loss, steps=4)
        assert torch.equal(head.state_dict()[key], start), "put back"
        return [(weight - start).abs().max().item() for weight in seen]

    # Of each half: two steps and three evaluations with the teachers, and two steps and one without.
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    moved = heads_seen(unlabelled, batches[0]["labels"])
    moved = [far for number, far in enumerate(moved) if number not in (0, 9)]  # it was tried to fit it
    assert len(moved) == 16
    assert [far == 0 for far in moved] == ([True] + [False] * 4 + [True] + [False] * 2) * 2
    # A fit and two steps, a fit before each of the three evaluations, and a fit and an evaluation without teachers.
    moved = heads_seen(batches, None)
    assert len(moved) == 22
    assert [far == 0 for far in moved] == ([True] + [False] * 8 + [True, False]) * 2


def test_bad_batches_and_losses():
    model, batch = make_student(make_model()), make_batch()
    before = whole_state(model)
    cases = [
        (([],), {}, "There are no batches to weigh the teachers with; give at least one, with labels."),
        (([batch],), {"steps": 1}, "steps=1 is out of range; it must be a number of steps, at least 2."),
        (
            ([batch], lambda batch: model(**batch).loss.detach()), {},
            "The loss of a batch does not depend on the teachers; compute it from the output of the model, with "
            "gradients, and with the distilled student active.",
        ),
        (
            ([batch], lambda batch: model(**batch).logits), {},
            "The loss of a batch is a tensor (4, 2); it must be a tensor with one number.",
        ),
        (
            ([batch], lambda batch: model(**batch).loss.item()), {},
            "The loss of a batch is a float; it must be a tensor with one number.",
        ),
    ]  # fmt: skip
    for args, kwargs, message in cases:
        with pytest.raises(ValueError, match=exactly(message)):
            had.weigh_teachers(model, *args, **kwargs)
        assert_unchanged(model, before)


def test_losses_that_are_never_finite_are_refused():
    model = make_student(make_model())
    before = whole_state(model)
    message = (
        "The teachers of 'insurance' cannot be weighed: no step has finite gradients; check the loss and the labels, "
        "or train in bfloat16 or float32."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        had.weigh_teachers(model, [make_batch()], lambda batch: model(**batch).loss * float("nan"), steps=4)
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", ["seq_bn", "prefix_tuning"])
def test_a_teacher_that_is_not_finite_is_named(config):
    model = make_student(make_model(), config=config)
    module = next(iter(next(iter(model.get_adapter("travel").values())).values()))
    next(module.parameters()).data.fill_(float("inf"))
    before = whole_state(model)
    with pytest.raises(FloatingPointError) as error:
        had.weigh_teachers(model, [make_batch()], steps=4)
    assert str(error.value).startswith("'insurance' cannot start at its teachers: the update of teacher 'travel' is ")
    assert str(error.value).endswith("; train in bf16 or float32, leave this teacher out.")
    assert_unchanged(model, before)


def test_a_step_that_is_not_finite_is_left_out():
    model, calls = make_student(make_model()), []

    def loss(batch):
        calls.append(1)
        return model(**batch).loss * (float("nan") if len(calls) == 1 else 1.0)

    weights = had.weigh_teachers(model, [make_batch()], loss, steps=4)
    assert len(set(weights.mean().values())) == 3


@pytest.mark.parametrize("of_student", [False, True])
@pytest.mark.parametrize("given", [None, False, True])
def test_weights_are_learned_per_layer_where_the_student_is_to_have_them(of_student, given, monkeypatch):
    model, learned = make_student(make_model(), student_start="weighted", weights_per_layer=of_student), []

    def note(learner):
        learned.append(len(learner.scores))
        return weights(learner)

    weights = Learner.weights
    monkeypatch.setattr(Learner, "weights", note)
    had.weigh_teachers(model, [make_batch()], steps=2, per_layer=given)
    expected = of_student if given is None else given
    assert set(learned) == {len(fusions_of(model, "insurance")) if expected else 1}


def test_one_batch_is_both_halves_and_a_loader_is_read_once():
    model, reads = make_student(make_model()), []

    def once():
        reads.append(1)
        yield make_batch()

    weights = had.weigh_teachers(model, once(), steps=4)
    assert weights == had.weigh_teachers(model, [make_batch()], steps=4)
    assert reads == [1]
