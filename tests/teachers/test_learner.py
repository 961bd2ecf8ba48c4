"""Weights that are learned: their mixture against plain references in float64, and the steps that learn them."""

import pytest
import torch
from adapters import AdapterSetup, DoubleSeqBnConfig, LoRAConfig, SeqBnConfig, Stack
from good_and_harmful import batches_of, good_and_harmful
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy, with_teachers_of_their_own_scores

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update
from hf_adapter_distillation.teachers.batches import mean_over_examples
from hf_adapter_distillation.teachers.learner import Learner

LORA = LoRAConfig(r=4, alpha=2, attn_matrices=["q", "v"], output_lora=True)
KINDS = {  # the configs of three teachers, and that of the student
    "bottlenecks": (["double_seq_bn"] * 3, "double_seq_bn"),
    "lora": ([LORA] * 3, LORA),
    "in several chunks": (["seq_bn[reduction_factor=1]"] * 3, "seq_bn"),
    "mixed widths": (["seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=8]", "seq_bn"], "seq_bn"),
    "a layer left out": ([SeqBnConfig(leave_out=[0]), "seq_bn", SeqBnConfig(leave_out=[0])], "seq_bn"),
    "not stacked": ([DoubleSeqBnConfig(use_gating=True), "double_seq_bn", "double_seq_bn"], "double_seq_bn"),
    "whole layers": (["prefix_tuning"] * 3, "prefix_tuning"),
}


def model_with(configs, student_config, kind="base"):
    model = make_model(kind=kind, dtype=torch.float64)
    for name, config in zip(TEACHERS, configs, strict=True):
        model.add_adapter(name, config=config)
        noisy(model, name)
    settings = had.DistillationConfig(TEACHERS, student_start="random")
    model.add_adapter("insurance", config=student_config, distill_from=settings)
    noisy(model, "insurance")
    model.double().train_adapter("insurance")
    return model


def learner_of(model, loss=None, per_layer=False, accumulation=1, beside=()):
    """A learner with random scores and scales, and its loss."""
    loss = loss or (lambda batch: model(**batch)["loss"])
    learner = Learner(model, active_block(model), loss, per_layer, accumulation, beside, lambda tensor: tensor, 1.0)
    torch.manual_seed(3)
    learner.scores.data.normal_()
    learner.log_scales.data.normal_()
    return learner


def states(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["last_hidden_state"]


def loss_of(states):
    return (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states).sin()).sum()


def shares(row, names):
    """The weights at a place that has some of the teachers, from their scores, the null teacher's, and the scale."""
    scores = torch.stack([*(row[TEACHERS.index(name)] for name in names), row[-2]])
    return dict(zip(names, (row[-1].exp() * scores.exp() / scores.exp().sum())[:-1], strict=True))


def mixed_states(model, rows, batch):
    """The last states with hooks that put the weighted sum of the updates in the student's place."""
    hooks = []
    for number, (_, layer) in enumerate(adapter_layers(model, "insurance")):
        modules = layer.adapter_modules
        weights = shares(rows[number % len(rows)], [name for name in TEACHERS if name in modules])

        def mix(module, inputs, kwargs, output, modules=modules, weights=weights):
            is_lora = "residual_input" not in kwargs
            h = inputs[1] if is_lora else inputs[0]
            residual = 0.0 if is_lora else kwargs["residual_input"]
            update = sum(weight * adapter_update(modules[name], h, residual) for name, weight in weights.items())
            return residual + update, *output[1:]

        hooks.append(modules["insurance"].register_forward_hook(mix, with_kwargs=True))
    with AdapterSetup(Stack("insurance")):
        result = states(model, batch)
    for hook in hooks:
        hook.remove()
    return result


def mixed_states_of_whole_layers(model, rows, batch):
    """The last states, layer by layer: each run in a model whose layer gets the states, and with each teacher."""
    layers, h = model.encoder.layer, None
    for number, layer in enumerate(layers):

        def run(teacher, layer=layer, h=h):
            seen = []
            hooks = [layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))]
            if h is not None:
                hooks.append(layer.register_forward_pre_hook(lambda module, inputs: (h, *inputs[1:])))
            with AdapterSetup(Stack(teacher) if teacher else None):
                states(model, batch)
            for hook in hooks:
                hook.remove()
            return seen[0]

        base, weights = run(None), shares(rows[number % len(rows)], TEACHERS)
        h = base + sum(weight * (run(name) - base) for name, weight in weights.items())
    return h


@pytest.mark.parametrize("per_layer", [False, True], ids=["one weight", "per layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mixture_equals_a_plain_sum(kind, per_layer):
    model, batch = model_with(*KINDS[kind]), make_batch()
    seen = []
    learner = learner_of(model, lambda batch: loss_of(seen.append(states(model, batch)) or seen[-1]), per_layer)
    rows = torch.cat([learner.scores, learner.log_scales], dim=1).detach().requires_grad_()
    assert len(rows) == (len(learner.places) if per_layer else 1)
    with learner.running():
        learner._backward(batch, 1.0)
        gradient = torch.cat([learner.scores.grad, learner.log_scales.grad], dim=1)
    plain = mixed_states_of_whole_layers if kind == "whole layers" else mixed_states
    expected = plain(model.eval(), rows, batch)
    torch.testing.assert_close(seen[0], expected, rtol=1e-10, atol=1e-10)
    (expected_gradient,) = torch.autograd.grad(loss_of(expected), rows)
    assert expected_gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    with learner.running(), learner.without_teachers(), torch.no_grad():
        without = states(model, batch)
    with AdapterSetup(None):
        torch.testing.assert_close(without, states(model, batch), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradients_reach_the_scores_through_mixture_and_head(per_layer):
    """Against central differences of the loss, with the teachers' heads mixed."""
    model = with_teachers_of_their_own_scores(make_student(make_model(dtype=torch.float64)).double()).double()
    batch = make_batch()
    learner = learner_of(model, per_layer=per_layer)
    assert len(learner.heads) == len(learner.head) == 4
    assert not learner.trained
    with learner.running():
        learner._backward(batch, 1.0)
        for parameter in (learner.scores, learner.log_scales):
            gradient, parameter.grad = parameter.grad, None
            flat, differences = parameter.data.view(-1), []
            for number in range(len(flat)):
                values = []
                for step in (1e-5, -2e-5):
                    flat[number] += step
                    values.append(learner.losses([batch]).item())
                flat[number] += 1e-5
                differences.append((values[0] - values[1]) / 2e-5)
            assert gradient.abs().max() > 1e-3
            torch.testing.assert_close(gradient.flatten(), torch.tensor(differences).double(), rtol=1e-5, atol=1e-8)
    with learner.running():
        learner._mix_heads()
        (row,) = learner.scores.mean(dim=0, keepdim=True).detach()
        for key, value in model.heads["insurance"].state_dict().items():
            of_teachers = torch.stack([model.heads[name].state_dict()[key] for name in TEACHERS])
            expected = sum(w * v for w, v in zip(row[:-1].softmax(0), of_teachers, strict=True))
            torch.testing.assert_close(value, expected)


def test_batches_count_by_their_examples():
    """In the mean over batches of unequal sizes, also with a loss of shape (1,)."""
    model = good_and_harmful()
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["shuffled", "good", "random"])
    model.train_adapter("insurance")
    other = batches_of(24, seed=8, size=24)
    parts = [{name: value[rows] for name, value in other[0].items()} for rows in (slice(0, 5), slice(5, 24))]
    learners = [learner_of(model, lambda batch: model(**batch).loss[None]) for _ in range(2)]
    losses = [learner.losses(batches) for learner, batches in zip(learners, (other, parts), strict=True)]
    assert [len(each) for each in losses] == [1, 2]
    mean = mean_over_examples(losses[1], torch.tensor([5.0, 19.0]), lambda tensor: tensor)
    assert mean == pytest.approx(losses[0].item(), rel=1e-5)


def classes(n_rows, **settings):
    """Batches of `n_rows` in float64, and a learner whose student has a head of its own, which cannot be fitted."""
    model = good_and_harmful()
    torch.manual_seed(5)
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["shuffled", "good", "random"])
    model.add_classification_head("insurance", num_labels=2, layers=1)
    model.double().train_adapter("insurance")
    learner = learner_of(model, lambda batch: model(**batch).loss, **settings)
    learner.class_head = None
    assert len(learner.trained) == 2
    return learner, batches_of(24, size=n_rows)


@pytest.mark.parametrize(("labels", "n_new"), [("ab", 0), ("cd", 4)])
def test_a_head_for_other_labels_than_the_teachers_is_new(labels, n_new):
    model = make_model()
    for name in (*TEACHERS, "insurance"):
        model.add_adapter(name, config="seq_bn", distill_from=TEACHERS if name == "insurance" else None)
        names = labels if name == "insurance" else "ab"
        model.add_classification_head(name, id2label=dict(enumerate(names)))
    model.train_adapter("insurance")
    learner = learner_of(model)
    assert len(learner.new_head) == n_new
    assert (learner.class_head is not None) == (n_new > 0)


def test_a_step_of_several_batches_equals_one_of_a_large_batch():
    learned = []
    for n_rows, accumulation in ((8, 1), (2, 4), (1, 8)):
        learner, batches = classes(n_rows, accumulation=accumulation)
        with learner.running():
            assert learner.learn(lambda batches=batches: batches, 5)
            learned.append([*learner.weights(), *(p.detach().clone().flatten() for p in learner.trained)])
    for other in learned[1:]:
        for value, expected in zip(other, learned[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)


def test_the_last_step_of_a_pass_may_have_fewer_batches():
    learner, batches = classes(8, accumulation=2)
    seen = []
    learner.loss = lambda batch, loss=learner.loss: seen.append(batch["labels"].tolist()) or loss(batch)
    with learner.running():
        learner.learn(lambda: batches, 4)
    of_pass = [batch["labels"].tolist() for batch in batches]
    assert seen == 2 * of_pass, "a step of two batches and one of one, twice"


def test_a_head_in_half_precision_is_learned_as_in_float32():
    heads = []
    for dtype in (torch.float32, torch.float16):
        learner, batches = classes(8)
        learner.model.to(dtype)
        with learner.running():
            assert learner.learn(lambda batches=batches: batches, 6)
            heads.append(torch.cat([parameter.flatten().float() for parameter in learner.trained]))
    assert heads[1].isfinite().all()
    torch.testing.assert_close(heads[1], heads[0], rtol=0, atol=0.01)


def test_the_weights_of_a_wide_head_move_less():
    learner, batches = classes(8)
    wide = torch.nn.Parameter(torch.zeros(2, 4 * 384, dtype=torch.float64))
    narrow = torch.nn.Parameter(torch.zeros(2, 4, dtype=torch.float64))
    learner.beside += [wide, narrow]
    inner = learner.loss
    learner.loss = lambda batch: inner(batch) + wide.sum() + narrow.sum()
    before = [parameter.detach().clone() for parameter in (wide, narrow)]
    moved = []
    with learner.running():
        learner.learn(lambda: batches, 6)
        moved = [(p - old).abs().max().item() for p, old in zip((wide, narrow), before, strict=True)]
    assert moved[1] == pytest.approx(4 * moved[0], rel=1e-4)
    assert 0.05 < moved[1] <= 0.11
