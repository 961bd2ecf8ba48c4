"""Where the student starts before the first step of the trainer."""

import logging

import datasets
import pytest
import torch
from adapters import LoRAConfig, SeqBnConfig
from model_state import changed, snapshot
from tiny_models import (
    TEACHERS,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    noisy,
    with_teachers_of_their_own_scores,
)
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update
from hf_adapter_distillation.method.weights import TeacherWeights
from hf_adapter_distillation.student import warm_start
from hf_adapter_distillation.student.least_squares import UpProjectionFit
from hf_adapter_distillation.student.warm_start import START_EXAMPLES, FittingPass, fit_start, is_at_average
from hf_adapter_distillation.training.data import draw_examples


def first_layer(model, batch):
    """The input of the first layer's adapters, and its adapters."""
    _, layer = adapter_layers(model, "insurance")[0]
    seen = []
    hook = layer.adapters["insurance"].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(**batch)
    hook.remove()
    return seen[0][batch["attention_mask"].bool()], layer.adapters


@pytest.mark.parametrize("config", ["double_seq_bn", "seq_bn[scaling=2.0]", SeqBnConfig(scaling="learned")])
def test_the_student_starts_at_the_teachers_mean_update(config, trainer_args):
    """Against torch's own least squares, in the first layer, whose input does not depend on the student."""
    model = make_student(make_model(dtype=torch.float64).double(), config=config).double()
    before, trainer = snapshot(model), trainer_for(model, trainer_args())
    state = torch.get_rng_state()
    batch = make_batch(16)
    h, adapters = first_layer(model, batch)
    mean = torch.stack([adapter_update(adapters[name], h, h) for name in TEACHERS]).mean(0)
    student = adapters["insurance"]
    z = torch.cat([student.adapter_down(h), torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
    expected = z @ torch.linalg.lstsq(z, mean, driver="gelsd").solution
    average_error = (adapter_update(student, h, h) - mean).square().sum()
    trainer.fit_start()
    error = (adapter_update(student, h, h) - mean).square().sum()
    assert (expected - mean).square().sum() <= error < 0.9 * average_error
    assert error - (expected - mean).square().sum() < 1e-3 * average_error
    assert changed(model, before) == {name for name in before if ".insurance.adapter_up." in name}
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def test_a_layer_sees_what_the_layers_below_pass_on_of_the_mean(trainer_args):
    """The last layer against a fit by hand, to its inputs where each layer passes on the mean update."""
    model = make_student(make_model(dtype=torch.float64).double(), config="double_seq_bn").double()
    trainer, batch, hooks, seen = trainer_for(model, trainer_args()), make_batch(16), [], []
    for _, layer in adapter_layers(model, "insurance"):

        def pass_on_the_mean(module, inputs, kwargs, output, adapters=layer.adapters):
            mean = torch.stack([adapter_update(adapters[name], inputs[0], inputs[0]) for name in TEACHERS]).mean(0)
            seen.append((inputs[0], mean))
            return kwargs["residual_input"] + mean, *output[1:]

        hooks.append(layer.adapters["insurance"].register_forward_hook(pass_on_the_mean, with_kwargs=True))
    with torch.no_grad():
        model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    student, (h, mean) = layer.adapters["insurance"], seen[-1]
    fit = UpProjectionFit()
    fit.add(student.adapter_down(h), mean, batch["attention_mask"])
    weight, bias, _ = fit.solve(student.adapter_up.weight.data, student.adapter_up.bias.data)
    trainer.fit_start()
    torch.testing.assert_close(student.adapter_up.weight.data, weight, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(student.adapter_up.bias.data, bias, rtol=1e-8, atol=1e-10)


def test_dropout_plays_no_part(trainer_args):
    results = []
    for seed in (1, 2):
        model = make_student(make_model(dropout=True))
        trainer = trainer_for(model, trainer_args())
        torch.manual_seed(seed)
        trainer.fit_start()
        results.append(snapshot(model))
        assert model.training
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items() if ".insurance." in name)


def test_all_layers_are_fitted_to_what_a_forward_pass_of_the_mean_sees(trainer_args, caplog):
    """Teachers that are the same but for their up-projections: their mean is the average, nothing is left to fit."""
    model = make_student(make_model(dtype=torch.float64).double(), config="double_seq_bn", train=False)
    for _, layer in adapter_layers(model, "bank"):
        for name in TEACHERS[1:]:
            layer.adapters[name].adapter_down.load_state_dict(layer.adapters["bank"].adapter_down.state_dict())
    settings = had.DistillationConfig(TEACHERS, student_start="teachers")
    model.add_adapter("insurance", config="double_seq_bn", distill_from=settings, overwrite_ok=True)
    model.double().train_adapter("insurance")
    average = snapshot(model)
    trainer = trainer_for(model, trainer_args())
    with caplog.at_level(logging.INFO, logger="hf_adapter_distillation"):
        trainer.fit_start()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, average[name], rtol=1e-6, atol=1e-8)
    assert "'insurance' starts at the teachers' mean update, 100.0% of which it explains." in caplog.text


@pytest.mark.parametrize("how", ["average", "random", "trained before", "resumed", "other config"])
def test_a_student_that_is_not_at_the_average_stays_where_it_is(how, trainer_args, monkeypatch):
    if how == "other config":
        model = make_student(make_model())
        model.add_adapter("insurance", config="seq_bn[reduction_factor=8]", distill_from=TEACHERS, overwrite_ok=True)
        model.train_adapter("insurance")
    else:
        model = make_student(make_model(), student_start=how if how in ("average", "random") else "teachers")
    trainer = trainer_for(model, trainer_args(max_steps=2, save_steps=1, save_strategy="steps"))
    if how == "trained before":
        noisy(model, "insurance")
    fitted, original = [], fit_start
    monkeypatch.setattr(
        "hf_adapter_distillation.training.preparation.fit_start", lambda *args: fitted.append(1) or original(*args)
    )
    if how == "resumed":
        trainer.train()
        assert fitted == [1], "a new training is fitted"
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
        assert fitted == [1]
        return
    before = snapshot(model)
    trainer.fit_start()
    assert not fitted
    assert not changed(model, before)


CASTS = [[torch.float64], [torch.float16], [torch.bfloat16], [torch.bfloat16, torch.float32], [torch.float16] * 2]


@pytest.mark.parametrize("dtypes", CASTS, ids=str)
def test_a_cast_keeps_the_start(dtypes, trainer_args):
    model = make_student(make_model(), train=False)
    for dtype in dtypes:
        model.to(dtype)
    assert is_at_average(model, "insurance")
    model.train_adapter("insurance")
    assert "insurance" in model.heads, "the average of the teachers' heads"
    before = snapshot(model)
    trainer_for(model, trainer_args()).fit_start()
    assert changed(model, before) == {name for name in before if ".insurance.adapter_up." in name}
    assert not is_at_average(model, "insurance")


def test_one_changed_weight_is_a_training():
    model = make_student(make_model(), train=False)
    name, weight = next(item for item in model.named_parameters() if ".insurance." in item[0])
    weight.data.view(-1)[0] *= 1 + 1e-6
    assert not is_at_average(model, "insurance"), name


def test_a_training_starts_with_it_once(trainer_args):
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(learning_rate=0.0))
    before = snapshot(model)
    trainer.train()
    moved = {name for name in changed(model, before) if "insurance" in name and "fusion" not in name}
    assert moved == {name for name in before if ".insurance.adapter_up." in name}
    before = snapshot(model)
    trainer.train()
    assert not changed(model, before)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func", "autocast"])
def test_the_loss_plays_no_part(how, trainer_args):
    smoothing = 0.1 if how == "label_smoothing_factor" else 0.0
    loss_func = (lambda outputs, labels, num_items_in_batch: 1 / 0) if how == "compute_loss_func" else None
    dataset = make_dataset()
    if how == "compute_loss_func":  # labels that mean nothing to the model
        dataset = dataset.map(lambda row: {"labels": [row["labels"]] * 3})
    args = trainer_args(label_smoothing_factor=smoothing, bf16=how == "autocast")
    trainer = trainer_for(make_student(make_model()), args, compute_loss_func=loss_func, train_dataset=dataset)
    before = snapshot(trainer.model)
    trainer.fit_start()
    assert changed(trainer.model, before)


def test_examples_are_drawn_from_all_of_the_data():
    data = datasets.Dataset.from_dict({"x": list(range(5000))})
    chosen, others = (draw_examples(data, START_EXAMPLES, seed)["x"] for seed in (1, 2))
    assert len(set(chosen)) == START_EXAMPLES
    assert max(chosen) > 4000
    assert (
        draw_examples(data, START_EXAMPLES, seed=1)["x"] == chosen != draw_examples(data, START_EXAMPLES, seed=2)["x"]
    )
    assert sorted(draw_examples(list(range(5)), START_EXAMPLES, seed=1)) == list(range(5))
    assert [row["x"] for row in draw_examples(data.to_iterable_dataset(), START_EXAMPLES, seed=1)] == list(
        range(START_EXAMPLES)
    )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(make_dataset())


def test_a_stream_leaves_the_average(trainer_args, caplog):
    trainer = trainer_for(make_student(make_model()), trainer_args(max_steps=1), train_dataset=Stream())
    before = snapshot(trainer.model)
    trainer.fit_start()
    assert not changed(trainer.model, before)
    assert "a stream of examples is not read twice" in caplog.text


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor of all operations."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        outputs = output if isinstance(output, tuple | list) else [output]
        self.size = max(self.size, *(value.numel() for value in outputs if isinstance(value, torch.Tensor)), 0)
        return output


def test_the_updates_of_all_teachers_are_not_in_memory_at_once(trainer_args):
    n_teachers, n_examples, largest = 64, 16, Largest()
    model = make_student(make_model(), teachers=[f"t{i}" for i in range(n_teachers)])
    trainer = trainer_for(model, trainer_args(per_device_eval_batch_size=n_examples))
    with largest:
        trainer.fit_start()
    assert 0 < largest.size < n_examples * 8 * 32 * n_teachers / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_mean_update_is_the_mean_of_the_updates(dtype, trainer_args, monkeypatch):
    class Compared(FittingPass):
        def run_layer(self, place):
            stacked = torch.stack(list(place.updates().values()))
            assert len(stacked) == len(TEACHERS)
            tolerance = 1e-3 if dtype == torch.float16 else 1e-6
            torch.testing.assert_close(
                place.mix(place.fusion.weights_of), stacked.mean(dim=0), rtol=tolerance, atol=tolerance
            )
            compared.append(place)
            return super().run_layer(place)

    compared = []
    monkeypatch.setattr(warm_start, "FittingPass", Compared)
    model = make_student(make_model()).to(dtype)
    trainer_for(model, trainer_args()).fit_start()
    assert compared


# A start at weights of the teachers


def given_weights(model, by_teacher, gain=0.5, per_place=0.0):
    """Weights that may differ from place to place."""
    places = [fusion.location for fusion in fusions_of(model, "insurance")]
    return TeacherWeights(
        {place: {n: w * (1 - per_place * i) for n, w in by_teacher.items()} for i, place in enumerate(places)}, gain
    )


def weighted_trainer(model, args, monkeypatch, weights):
    """A trainer whose weights are given, not learned."""
    monkeypatch.setattr("hf_adapter_distillation.training.preparation.learn_weights", lambda *_, **__: weights)
    return trainer_for(model, args)


@pytest.mark.parametrize("scale", [1, 2])
def test_a_weighted_student_starts_at_the_weighted_update(scale, trainer_args, monkeypatch):
    """With the share of the null teacher, or a sum above 1, and without a light teacher.

    Against torch's own least squares.
    """
    model = make_student(make_model(dtype=torch.float64).double(), config="double_seq_bn", student_start="weighted")
    model = with_teachers_of_their_own_scores(model.double()).double()
    learned = {name: scale * weight for name, weight in {"bank": 0.5, "travel": 0.05, "work": 0.2}.items()}
    weights = given_weights(model, learned, per_place=0.1)
    batch = make_batch(16)
    h, adapters = first_layer(model, batch)
    kept = {name: learned[name] * 0.75 / 0.7 for name in ("bank", "work")}  # which share what all three have
    target = sum(weight * adapter_update(adapters[name], h, h) for name, weight in kept.items())
    trainer = weighted_trainer(model, trainer_args(), monkeypatch, weights)
    trainer.fit_start()
    assert trainer.block.teachers == ("bank", "work")
    student, share = adapters["insurance"], 0.5 / 0.7
    for part in ("adapter_down.0.weight", "adapter_down.0.bias"):
        bank, work = (adapters[name].state_dict()[part] for name in kept)
        torch.testing.assert_close(student.state_dict()[part], share * bank + (1 - share) * work)
    z = torch.cat([student.adapter_down(h), torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
    best = z @ torch.linalg.lstsq(z, target, driver="gelsd").solution
    assert (adapter_update(student, h, h) - best).square().sum() < 1e-3 * target.square().sum()
    for key, value in model.heads["insurance"].state_dict().items():
        bank, work = (model.heads[name].state_dict()[key] for name in kept)
        torch.testing.assert_close(value, share * bank + (1 - share) * work)
    fusion = fusions_of(model, "insurance")[0]
    assert fusion.weights() == pytest.approx(kept)


def test_a_head_for_other_labels_keeps_its_start(trainer_args, monkeypatch):
    model = make_model()
    for name, labels in (("bank", "ab"), ("travel", "cd"), ("work", "ef"), ("insurance", "gh")):
        distill_from = TEACHERS if name == "insurance" else None
        model.add_adapter(name, config="seq_bn", distill_from=distill_from)
        model.add_classification_head(name, id2label=dict(enumerate(labels)))
    own = {key: value.clone() for key, value in model.heads["insurance"].state_dict().items()}
    model.train_adapter("insurance")
    weights = given_weights(model, {"bank": 0.9, "travel": 0.0, "work": 0.0})
    trainer = weighted_trainer(model, trainer_args(), monkeypatch, weights)
    trainer.fit_start()
    assert trainer.block.teachers == ("bank",)
    for key, value in model.heads["insurance"].state_dict().items():
        assert torch.equal(value, own[key])


@pytest.mark.parametrize("scale", [1, 2])
def test_a_weighted_lora_starts_at_the_weighted_weight_change(scale, trainer_args, monkeypatch):
    """At each place with its own weights, and of the teachers that it has, whatever the order of their projections."""
    model = make_model()
    for name in TEACHERS:
        leave_out = [1] if name == "work" else []
        model.add_adapter(name, config=LoRAConfig(r=2, alpha=3, attn_matrices=["v", "q"], leave_out=leave_out))
        noisy(model, name)
    settings = had.DistillationConfig(TEACHERS, student_start="weighted", weights_per_layer=True)
    model.add_adapter("insurance", config=LoRAConfig(r=8, alpha=5), distill_from=settings)
    model.add_classification_head("insurance")
    model.double().train_adapter("insurance")
    learned = {name: scale * weight for name, weight in {"bank": 0.4, "travel": 0.2, "work": 0.3}.items()}
    weights = given_weights(model, learned, per_place=0.2)
    trainer = weighted_trainer(model, trainer_args(), monkeypatch, weights)
    trainer.fit_start()
    found = adapter_layers(model, "insurance")
    assert len(found) == 4
    for name, layer in found:
        loras, row = layer.loras, weights.by_place[name]
        here = [teacher for teacher in TEACHERS if teacher in loras]
        assert len(here) == (2 if ".layer.1." in name else 3)
        length = max(1.0, sum(row.values()))  # those that are missing at a place leave their share to the others
        total = (sum(row[teacher] for teacher in here) + max(0.0, 1 - sum(row.values()))) / length
        changes = [loras[n].lora_B @ loras[n].lora_A * loras[n].scaling * row[n] / total for n in here]
        student = loras["insurance"]
        change = student.lora_B @ student.lora_A * student.scaling
        torch.testing.assert_close(change, sum(changes), rtol=1e-8, atol=1e-10)
