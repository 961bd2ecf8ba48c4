"""The steps of both stages: when stage 2 begins, what its loss is made of, and what is logged."""

from itertools import pairwise
from math import floor
from random import Random

import pytest
import torch
from model_state import changed, snapshot
from tiny_models import TEACHERS, heard, make_batch, make_dataset, make_model, make_student
from torch.nn.functional import cross_entropy
from trainings import EachStep, gradients, trainer_for
from transformers import TrainerCallback
from wrapped_models import Passing

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.method.weights import TeacherWeights
from hf_adapter_distillation.student.provenance import read_provenance
from hf_adapter_distillation.training.steps import PRIOR_EXAMPLES


def test_the_stage_switches_at_the_right_step(trainer_args):
    model = make_student(make_model(), carrier="mixed")
    fusion = next(p for name, p in model.named_parameters() if "distillation_fusion" in name)
    start, seen = fusion.detach().clone(), []

    def note(args, state, control, **kwargs):
        settings = distillations(model.adapters_config)["insurance"].settings
        moved = not torch.equal(fusion, start)
        seen.append((state.global_step - 1, settings.enabled, moved, round(settings.fused_probability.item(), 6)))

    args = trainer_args(max_steps=10, distillation_start=0.55, keep_fusion=True, weight_decay=0.1, warmup_steps=0)
    trainer_for(model, args, callbacks=[EachStep(note)]).train()
    assert [step for step, enabled, _, _ in seen if enabled] == [6, 7, 8, 9]
    assert [step for step, _, moved, _ in seen if moved] == [6, 7, 8, 9]
    assert [p for step, enabled, _, p in seen if enabled] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (1.0, 8)])
def test_the_ends_of_distillation_start(start, first, trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(distillation_start=start))
    trainer.train()
    assert trainer.first_distillation_step == first
    stages = {log["stage"] for log in trainer.state.log_history if "stage" in log}
    assert stages == ({2} if start == 0 else {1})


@pytest.mark.parametrize(
    ("start", "config", "first"),
    [("teachers", "seq_bn", 0), ("average", "seq_bn", 0), ("random", "seq_bn", 4), ("teachers", "double_seq_bn", 4)],
)
def test_a_student_that_starts_at_its_teachers_has_no_stage_1_by_default(start, config, first, trainer_args):
    model = make_student(make_model(), train=False, student_start=start)
    distill_from = had.DistillationConfig(TEACHERS, student_start=start)
    model.add_adapter("insurance", config=config, distill_from=distill_from, overwrite_ok=True)
    model.add_classification_head("insurance", overwrite_ok=True)
    model.train_adapter("insurance")
    trainer = trainer_for(model, trainer_args(distillation_start=None))
    trainer.train()
    assert trainer.state.max_steps == 8
    assert trainer.first_distillation_step == first
    assert trainer.distillation.run.settings["distillation_start"] == first / 8


@pytest.mark.parametrize(("n", "weight"), [(16, 1.0), (PRIOR_EXAMPLES, 1.0), (400, 0.5), (2000, 0.1)])
def test_the_default_weight_falls_with_the_number_of_examples(n, weight, trainer_args, tmp_path):
    model, dataset = make_student(make_model()), make_dataset(n)
    seen = []
    note = EachStep(lambda *args, **kwargs: seen.append(had.distillation_of(model).settings.weight))
    args = trainer_args(max_steps=2, distillation_start=0.0)
    trainer = trainer_for(model, args, train_dataset=dataset, callbacks=[note])
    trainer.train()
    assert seen == [weight, weight]
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    assert read_provenance(str(tmp_path / "insurance")).run.settings["distillation_weight"] == weight
    log = trainer.state.log_history[0]
    added = weight * log["distillation_loss"] + log["fusion_regularization"]
    assert log["loss"] == pytest.approx(log["task_loss"] + added, abs=1e-4)


def test_a_stream_counts_what_the_training_reads_of_it(trainer_args):
    stream = make_dataset(16).to_iterable_dataset()
    args = trainer_args(max_steps=100, gradient_accumulation_steps=2)  # batches of 4
    trainer = trainer_for(make_student(make_model()), args, train_dataset=stream)
    trainer.state.max_steps = 100
    assert trainer.distillation_weight == 0.25
    args.distillation_weight = 0.3
    assert trainer.distillation_weight == 0.3


@pytest.mark.parametrize("carrier", ["student", "dual"])
def test_loss_terms_are_logged_and_add_up(carrier, trainer_args):
    trainer = trainer_for(
        make_student(make_model(), carrier=carrier),
        trainer_args(distillation_weight=0.7, gradient_accumulation_steps=2),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2]
    for log in logs:
        total = log["task_loss"]
        if log["stage"] == 2:
            total += 0.7 * log["distillation_loss"] + log["fusion_regularization"] + log.get("fused_task_loss", 0)
            fused = TEACHERS if carrier == "student" else [*TEACHERS, "insurance"]
            assert sum(log[f"attention/{name}"] for name in fused) == pytest.approx(1, abs=1e-5)
        else:
            assert "distillation_loss" not in log
        assert log["loss"] == pytest.approx(total, abs=1e-4)  # Trainer rounds the loss to 4 places


@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [
        ("bert", "flex", "classification"),
        ("bert", "classification", "classification"),
        ("gpt2", "causal_lm", "tokens"),
    ],
)
@pytest.mark.parametrize(("carrier", "smoothing"), [("fused", 0.0), ("fused", 0.1), ("dual", 0.0)])
def test_splits_into_micro_batches_give_the_same_gradients(family, kind, labels, carrier, smoothing, trainer_args):
    """8 x 1 equals 2 x 4. Labels are as many in each micro-batch, so that the task loss itself does not differ."""
    dataset = make_dataset(8, labels)
    if labels == "tokens":
        dataset = dataset.map(lambda row: {"attention_mask": [1] * 8, "labels": row["input_ids"]})
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_student(make_model(family, kind, dtype=torch.float64).double(), carrier=carrier)
        model.double()

        def args(**kwargs):
            return trainer_args(label_smoothing_factor=smoothing, **kwargs)

        results.append(gradients(model, args, batch_size, accumulation, train_dataset=dataset))
    (whole, log), (split, other) = results
    assert whole.keys() == split.keys()
    assert any("distillation_fusion" in name for name in whole)
    for name, grad in whole.items():
        torch.testing.assert_close(grad, split[name], rtol=1e-9, atol=1e-12)
    terms = {"task_loss", "distillation_loss", "fusion_regularization"} | {"fused_task_loss"} & log.keys()
    assert ("fused_task_loss" in terms) == (carrier == "dual")
    for key in terms:
        assert log[key] == pytest.approx(other[key], abs=2e-6), key  # logged with 6 places


@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [
        ("bert", "flex", "classification"),
        ("gpt2", "causal_lm", "tokens"),
        ("t5", "seq2seq_lm", "tokens"),
    ],
)
def test_a_wrapper_that_passes_its_inputs_on_gets_the_gradients_of_its_model(family, kind, labels, trainer_args):
    dataset = make_dataset(8, labels)
    if labels == "tokens":  # as many in each micro-batch
        dataset = dataset.map(lambda row: {"attention_mask": [1] * 8, "labels": row["input_ids"]})
    results = []
    for is_wrapped, batch_size, accumulation in ((False, 8, 1), (True, 2, 4)):
        model = make_student(make_model(family, kind, dtype=torch.float64)).double()
        model = Passing(model) if is_wrapped else model
        results.append(gradients(model, trainer_args, batch_size, accumulation, train_dataset=dataset))
    (whole, _), (split, _) = results
    assert {f"inner.{name}" for name in whole} == set(split)
    for name, grad in whole.items():
        torch.testing.assert_close(grad, split[f"inner.{name}"], rtol=1e-9, atol=1e-12)


def test_a_compute_loss_func_gets_the_terms_too(trainer_args):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_student(make_model(dtype=torch.float64))
        model.double()
        results.append(gradients(model, trainer_args, batch_size, accumulation, train_dataset=make_dataset(8),
                                 compute_loss_func=loss_func))  # fmt: skip
    (whole, _), (split, _) = results
    for name, grad in whole.items():
        torch.testing.assert_close(grad, split[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_distillation_reaches_losses_that_are_computed_outside_the_model(how, trainer_args):
    """With the carrier "student" the fusion has no other gradient than that of the distillation loss."""
    kwargs = {}
    if how == "compute_loss_func":
        kwargs[how] = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()

    def args(**given):
        return trainer_args(label_smoothing_factor=0.1 if how == "label_smoothing_factor" else 0.0, **given)

    model = make_student(make_model(), student_start="random")
    found, log = gradients(model, args, 8, 1, train_dataset=make_dataset(8), **kwargs)
    fusion = [grad for name, grad in found.items() if "distillation_fusion" in name]
    assert fusion
    assert any(grad.any() for grad in fusion)
    assert log["distillation_loss"] > 0


def test_the_optimizer_sees_the_fusion_in_stage_2_alone(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(max_steps=8, keep_fusion=True))
    trainer.train()
    states = trainer.optimizer.state
    named = dict(trainer.model.named_parameters())
    steps = {"distillation_fusion" in name: int(states[p]["step"]) for name, p in named.items() if p in states}
    assert steps == {False: 8, True: 4}


def test_teachers_stay_in_evaluation_mode(trainer_args):
    model, modes = make_student(make_model()), []

    def note(args, state, control, **kwargs):
        modes.extend(layer.adapters[name].training for name in TEACHERS for _, layer in adapter_layers(model, name))
        assert model.training

    trainer_for(model, trainer_args(), callbacks=[EachStep(note)]).train()
    assert modes
    assert not any(modes)


def look_at_a_teacher(model):
    """A callback's look: another adapter is active for a moment, and the student's name afterwards."""
    mode = model.training
    model.set_active_adapters("bank")
    heard(model, "bank", make_batch())
    model.train(mode)
    model.set_active_adapters("insurance")


def activate_another_head(model):
    model.active_head = "bank"


LOOKS = {
    "name": lambda model: model.set_active_adapters("insurance"),
    "teacher": look_at_a_teacher,
    "left at a teacher": lambda model: model.set_active_adapters("bank"),
    "nothing": lambda model: model.set_active_adapters(None),
    "head": activate_another_head,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_callback_may_activate_another_setup(look, trainer_args):
    results = []
    for function in (lambda model: None, look):

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                function(model)  # noqa: B023

            on_substep_end = on_step_begin

        model = make_student(make_model())
        args = trainer_args(max_steps=3, gradient_accumulation_steps=2)
        trainer_for(model, args, callbacks=[Look()]).train()
        results.append(snapshot(model))
        assert str(model.active_adapters) == "Stack[insurance]"
    assert not changed(model, results[0])


@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_adapter_drop_skips_layers_of_single_steps(level, trainer_args):
    model, trained, losses = make_student(make_model(), level=level), [], []
    first = {
        layer: [p for n, p in model.named_parameters() if f"layer.{layer}." in n and ".insurance." in n]
        for layer in (0, 1)
    }

    class Drop(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.set_active_adapters("insurance", skip_layers=[0] if state.global_step % 2 else [])

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            trained.append([any(p.grad is not None for p in ps) for ps in first.values()])

    trainer = trainer_for(model, trainer_args(max_steps=4, distillation_start=0.0), callbacks=[Drop()])
    note = trainer._terms.note
    trainer._terms.note = lambda loss, record, *args: (
        losses.append(len(record.layer_losses)) or note(loss, record, *args)
    )
    trainer.train()
    assert trained == [[True, True], [False, True], [True, True], [False, True]]
    assert losses == [2, 1, 2, 1]
    assert all(log["distillation_loss"] > 0 for log in trainer.state.log_history if "distillation_loss" in log)


@pytest.mark.parametrize("selection", ["all", 2])
def test_skipped_layers_stay_skipped_through_a_training(selection, trainer_args):
    model = make_student(make_model(), teacher_selection=selection)
    model.set_active_adapters(model.active_adapters, skip_layers=[0])
    before, trainer = snapshot(model), trainer_for(model, trainer_args(max_steps=2, distillation_start=0.0))
    trainer.train()
    assert model.adapters_config.skip_layers == [0]
    moved = {name for name in changed(model, before) if ".insurance." in name and "heads." not in name}
    assert moved
    if selection == "all":  # else the student starts again, at the average of the kept teachers
        assert all(".layer.1." in name for name in moved)


# A share of the steps


def steps_with_teachers(model, args):
    seen = []
    note = EachStep(lambda *_, **__: seen.append(had.distillation_of(model).settings.enabled))
    trainer_for(model, args, callbacks=[note]).train()
    return [number for number, enabled in enumerate(seen) if enabled]


@pytest.mark.parametrize(("share", "count"), [(1.0, 12), (0.5, 6), (0.25, 3), (1 / 3, 4)])
def test_the_teachers_run_in_a_share_of_the_steps_spread_evenly(share, count, trainer_args):
    args = trainer_args(max_steps=16, distillation_start=0.25, distillation_share=share)
    steps = steps_with_teachers(make_student(make_model()), args)
    assert len(steps) == count
    assert min(steps) >= 4
    assert {b - a for a, b in pairwise(steps)} == {round(1 / share)}


@pytest.mark.parametrize(
    ("settings", "weighted", "steps", "share"),
    [
        ({}, True, 200, 0.25),
        ({}, True, 64, 0.25),
        ({}, True, 40, 0.4),  # of sixteen steps
        ({}, True, 16, 1.0),
        ({}, True, 3, 1.0),
        ({"distillation_start": 0.5}, True, 80, 0.4),
        ({"distillation_start": 1.0}, True, 80, 1.0),  # of no step
        ({}, False, 200, 1.0),
        ({"distillation_share": 0.7}, True, 200, 0.7),
    ],
)
def test_weighted_teachers_run_in_a_quarter_of_a_long_training(settings, weighted, steps, share, trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(**{"distillation_start": 0.0} | settings))
    trainer.state.max_steps = steps
    if weighted:
        trainer.distillation.weights = TeacherWeights({"": dict.fromkeys(TEACHERS, 0.3)}, 0.5)
    assert trainer.distillation_share == share
    begin = trainer.first_distillation_step
    assert sum(map(trainer._runs_teachers, range(steps))) == pytest.approx((steps - begin) * share, abs=1)


@pytest.mark.parametrize("of", ["another carrier", "examples without labels"])
def test_other_trainings_run_the_teachers_in_all_steps(of, trainer_args):
    more = {"distillation_dataset": make_dataset()} if of == "examples without labels" else {}
    carrier = "student" if more else "mixed"
    trainer = trainer_for(make_student(make_model(), carrier=carrier), trainer_args(), **more)
    trainer.state.max_steps = 200
    trainer.distillation.weights = TeacherWeights({"": dict.fromkeys(TEACHERS, 0.3)}, 0.5)
    assert trainer.distillation_share == 1.0


def test_each_step_is_drawn_with_the_probability_of_the_share(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(distillation_start=0.0, distillation_share=0.3))
    trainer.state.max_steps = 5
    draws = torch.zeros(2000, 5)
    for seed in range(len(draws)):
        trainer.args.seed = seed
        draws[seed] = torch.tensor([trainer._runs_teachers(step) for step in range(5)])
    error = (0.3 * 0.7 / len(draws)) ** 0.5
    assert (draws.mean(dim=0) - 0.3).abs().max() < 4 * error


def test_the_mean_gradient_over_the_draws_is_the_exact_one(trainer_args):
    """Each of the four draws of a quarter of four steps, at learning rate 0, against all four steps."""

    def total(seed, share):
        model = make_student(make_model(dtype=torch.float64))
        model.double()
        grads = {}

        class Add(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                for name, p in model.named_parameters():
                    if p.requires_grad:
                        grads[name] = grads.get(name, 0) + (torch.zeros_like(p) if p.grad is None else p.grad)

        args = trainer_args(
            max_steps=4, distillation_start=0.0, distillation_share=share, distillation_weight=0.7, seed=seed,
            data_seed=0, learning_rate=0.0, max_grad_norm=0.0,
        )  # fmt: skip
        trainer_for(model, args, callbacks=[Add()]).train()
        return grads

    exact = total(0, 1.0)
    starts = {}  # a seed for each step that the draw can begin with
    seed = 0
    while len(starts) < 4:
        starts.setdefault(floor(Random(seed).random() * 4), seed)
        seed += 1
    drawn = [total(seed, 0.25) for seed in starts.values()]
    assert any("distillation_fusion" in name for name in exact)
    for name, grad in exact.items():
        mean = sum(grads[name] for grads in drawn) / 4
        torch.testing.assert_close(mean, grad, rtol=1e-8, atol=1e-10)
    assert not all(torch.allclose(drawn[0][name], grad) for name, grad in exact.items())


def test_the_log_of_a_share_adds_up_and_names_the_stage(trainer_args):
    args = trainer_args(max_steps=8, distillation_start=0.25, distillation_share=0.5, distillation_weight=0.7)
    trainer = trainer_for(make_student(make_model()), args)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2, 2, 2, 2, 2]
    assert sum("distillation_loss" in log for log in logs) == 3
    for log in logs:
        added = 0.7 * log.get("distillation_loss", 0) + log.get("fusion_regularization", 0)
        assert log["loss"] == pytest.approx(log["task_loss"] + added / 0.5, abs=2e-4)
    assert {"task_loss", "distillation_loss"} <= trainer.distillation.run.losses["2"].keys()
    assert trainer.distillation.run.settings["distillation_share"] == 0.5


def test_a_resumed_training_takes_the_same_steps(trainer_args, tmp_path):
    def train(model, resume=None):
        args = trainer_args(
            output_dir=str(tmp_path / "run"), max_steps=8, distillation_start=0.0, distillation_share=0.4, seed=3,
            save_strategy="steps", save_steps=3, save_total_limit=None,
        )  # fmt: skip
        trainer_for(model, args).train(resume_from_checkpoint=resume)
        return model

    whole = snapshot(train(make_student(make_model())))
    resumed = train(make_student(make_model()), resume=str(tmp_path / "run" / "checkpoint-3"))
    assert not changed(resumed, whole)


@pytest.mark.parametrize(
    ("kwargs", "carrier", "message"),
    [
        ({"distillation_share": 0.5}, "fused", "distillation_share=0.5 needs the carrier 'student', .*, not 'fused'"),
        (
            {"distillation_share": 0.1},
            "student",
            "runs the teachers in less than one of the 8 steps of stage 2; raise",
        ),
    ],
)
def test_a_share_that_cannot_be_is_an_error(kwargs, carrier, message, trainer_args):
    args = trainer_args(max_steps=8, distillation_start=0.0, **kwargs)
    with pytest.raises(ValueError, match=message):
        trainer_for(make_student(make_model(), carrier=carrier), args).train()


class Adding(had.DistillationTrainer):
    """Adds to the loss of Trainer."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) + 1


@pytest.mark.parametrize("head", ["static", "own", "active", "not shifted"])
@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_smoothed_labels_are_the_next_tokens(head, is_wrapped, adds, trainer_args, monkeypatch):
    if adds:
        monkeypatch.setattr(had, "DistillationTrainer", Adding)
    model = make_model("gpt2", "causal_lm" if head == "static" else "flex")
    model = make_student(model, train=False, head="causal_lm", student_start="random")
    if head != "static":
        name = "all" if head == "active" else "insurance"
        model.add_causal_lm_head(name)
        model.heads[name].config["shift_labels"] = head != "not shifted"
    model.train_adapter("insurance")
    args = trainer_args(label_smoothing_factor=0.1)
    wrapped = Passing(model) if is_wrapped else model
    wrapped.config = model.config  # Trainer reads it
    trainer = trainer_for(wrapped, args, train_dataset=make_dataset(labels="tokens"))
    model.eval()
    batch = make_batch(labels="tokens")
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, T, n_tokens)
    labels = batch["labels"]
    if head != "not shifted":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(wrapped, dict(batch)), expected + adds)
