"""The choice of teachers and the calibration before a training."""

import random

import numpy as np
import pytest
import torch
from good_and_harmful import good_and_harmful, sequences
from messages import exactly
from model_state import changed, snapshot
from tiny_models import (
    TEACHERS,
    distillation_of,
    heard,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    noisy,
    with_teachers,
    with_teachers_of_their_own_scores,
)
from torch.nn.functional import cross_entropy
from trainings import EachStep, trainer_for
from transformers import TrainerCallback, set_seed
from wrapped_models import Classifier

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.weights import TeacherWeights
from hf_adapter_distillation.student.preparing import keep_teachers
from hf_adapter_distillation.student.provenance import read_provenance
from hf_adapter_distillation.student.training_run import TrainingRun
from hf_adapter_distillation.training import preparation


def distilled(teachers, trainer_args, **config):
    model = good_and_harmful()
    torch.manual_seed(0)
    settings = had.DistillationConfig(teachers, **{"student_start": "teachers", **config})
    model.add_adapter("insurance", config="double_seq_bn", distill_from=settings)
    model.train_adapter("insurance")
    trainer = trainer_for(
        model, trainer_args(distillation_start=0.0, weighing_steps=40), train_dataset=sequences(128, seed=7)
    )
    trainer.train()
    return trainer


def test_teachers_that_only_harm_get_no_attention(trainer_args):
    """All three may be kept, and two are no better than chance: the rest is as if they had not been there."""
    teachers = ["shuffled", "good", "random"]
    trainer = distilled(teachers, trainer_args, teacher_selection=3)
    assert list(trainer.distillation.ranking)[0] == "good"
    assert trainer.distillation.ranking["good"] > 0.9
    assert trainer.block.teachers == ("good",)
    assert trainer.distillation.config.teachers == ["good"]
    logs = [log for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs
    assert all(log["attention/good"] == pytest.approx(1) for log in logs)
    assert not any(f"attention/{name}" in log for log in logs for name in ("shuffled", "random"))
    alone = distilled(["good"], trainer_args)
    now = dict(trainer.model.named_parameters())
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(now[name], parameter), name
    for name in teachers:  # they stay on the model
        before, after = good_and_harmful().get_adapter(name), trainer.model.get_adapter(name)
        for place, modules in before.items():
            for location, module in modules.items():
                for key, value in module.state_dict().items():
                    assert torch.equal(after[place][location].state_dict()[key], value)


def test_the_provenance_names_the_teachers_that_were_kept(trainer_args, tmp_path):
    trainer = distilled(["shuffled", "good", "random"], trainer_args, teacher_selection=1)
    trainer.model.save_adapter(str(tmp_path / "insurance"), "insurance")
    saved = read_provenance(str(tmp_path / "insurance"))
    assert [teacher.name for teacher in saved.teachers] == ["good"]
    assert saved.run.settings["ranking"] == trainer.distillation.ranking
    assert saved.settings["teacher_selection"] == 1


def test_the_best_are_kept_where_none_is_above_chance(trainer_args, caplog):
    model = with_teachers_of_their_own_scores(make_student(make_model(), teacher_selection=2))
    trainer = trainer_for(model, trainer_args())
    with caplog.at_level("WARNING", "hf_adapter_distillation"):
        trainer.train()
    ranking = list(trainer.distillation.ranking)
    assert set(trainer.block.teachers) == set(ranking[:2])
    assert len(trainer.block.teachers) == 2
    assert "No teacher of 'insurance' is above chance on its training data (AUC" in caplog.text


def test_the_ranking_draws_nothing_that_the_training_would_have_drawn(trainer_args):
    """With all teachers kept, the training is that without a ranking."""
    models = []
    for selection in ("all", 3):
        model = make_student(make_model(dropout=True), teacher_selection=selection, head="tagging")
        tagged = make_dataset().map(lambda row: {"labels": [token % 2 for token in row["input_ids"]]})
        trainer_for(model, trainer_args(), train_dataset=tagged).train()
        models.append(model)
    assert not changed(models[1], snapshot(models[0]))


def test_a_student_that_has_moved_keeps_its_weights():
    model = make_student(make_model(), teacher_selection=1)
    noisy(model, "insurance")
    before = snapshot(model)
    keep_teachers(model, active_block(model), ["travel"])
    assert active_block(model).teachers == ("travel",)
    assert not {name for name in changed(model, before) if "distillation_fusion" not in name}


def test_a_student_at_its_start_starts_anew_at_those_that_are_kept():
    model = with_teachers_of_their_own_scores(make_student(make_model()))
    keep_teachers(model, active_block(model), ["work", "travel"])
    assert active_block(model).teachers == ("travel", "work"), "in the order that they had"
    other = make_student(make_model(), train=False)
    other.delete_adapter("insurance")
    other = with_teachers_of_their_own_scores(other)
    other.add_adapter("insurance", config="seq_bn", distill_from=["travel", "work"])
    other.train_adapter("insurance")
    now = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        if ".insurance" in name and "fusion" not in name:
            torch.testing.assert_close(now[name], parameter, rtol=0, atol=0)


def test_predictions_of_the_calibration_are_those_of_the_teachers(trainer_args):
    """Platt's lines of scores that the training data gives, with the loss that they make."""
    model = with_teachers_of_their_own_scores(make_student(make_model(), objective="cross_task"))
    trainer = trainer_for(model, trainer_args(distillation_start=0.0, num_train_epochs=1, keep_fusion=True))
    trainer.train()
    calibration = trainer._prepared.calibration
    assert calibration.shape == (3, 2)
    batch = make_batch(16)
    for (slope, offset), name in zip(calibration, TEACHERS, strict=True):
        logits = heard(model, name, batch).logits.double()
        line = slope * (logits[:, 1] - logits[:, 0]) + offset
        own = cross_entropy(logits, batch["labels"])
        calibrated = cross_entropy(torch.stack([torch.zeros_like(line), line], 1), batch["labels"])
        assert calibrated < own
        assert calibrated < 0.7


@pytest.mark.parametrize("config", [{"teacher_selection": 2}, {"objective": "cross_task"}])
def test_a_stream_that_cannot_be_read_twice_is_refused(config, trainer_args):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from make_dataset()

    model = make_student(make_model(), student_start="random", **config)
    trainer = trainer_for(model, trainer_args(max_steps=2), train_dataset=Stream())
    what = "teacher_selection=2" if "teacher_selection" in config else "The objective 'cross_task'"
    message = f"{what} reads examples before the training; pass a train_dataset that can be read twice."
    with pytest.raises(ValueError, match=exactly(message)):
        trainer.train()
    assert distillation_of(model).ranking is None


# Teachers weighed by the task


def weighted(model=None, **kwargs):
    return with_teachers_of_their_own_scores(
        make_student(model or make_model(dropout=True), student_start="weighted", **kwargs)
    )


def count_weighing(monkeypatch, weights=None):
    """Counts the times that weights are learned; they may be given instead."""
    calls, original = [], preparation.learn_weights
    monkeypatch.setattr(
        preparation, "learn_weights", lambda *a, **kw: calls.append(1) or weights or original(*a, **kw)
    )
    return calls


def of_places(model, gain, **weights):
    return TeacherWeights({fusion.location: weights for fusion in fusions_of(model, "insurance")}, gain)


def test_a_training_weighs_its_teachers_and_follows_what_they_are_worth(trainer_args, tmp_path):
    trainer = distilled(["shuffled", "good", "random"], trainer_args, student_start="weighted")
    weights = trainer.distillation.weights
    assert trainer.block.teachers == ("good",)
    assert weights.mean()["good"] > 0.5
    assert weights.gain > 0.1
    assert trainer.distillation_weight == weights.gain * 1.0
    attention = [log["attention/good"] for log in trainer.state.log_history if "attention/good" in log][-1]
    assert attention == pytest.approx(min(1.0, weights.at("", ["good"])["good"]), abs=0.1), "a share of the scale"
    trainer.model.save_adapter(str(tmp_path / "insurance"), "insurance")
    settings = read_provenance(str(tmp_path / "insurance")).run.settings
    assert settings["teacher_weights"] == pytest.approx(weights.mean(), abs=1e-4)
    assert settings["teacher_gain"] == pytest.approx(weights.gain, abs=1e-4)
    assert settings["distillation_weight"] == weights.gain


def test_the_gain_does_not_depend_on_how_examples_meet_in_batches(trainer_args):
    """Teachers without any update gain nothing, whatever the order of each pass, and with a smaller last batch."""
    model = make_student(make_model(), student_start="weighted")
    with torch.no_grad():
        for name in TEACHERS:
            for adapter in model.get_adapter(name).values():
                for module in adapter.values():
                    module.adapter_up.weight.zero_()
                    module.adapter_up.bias.zero_()
            model.heads[name].load_state_dict(model.heads["bank"].state_dict())
            model.heads[name][-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    trainer = trainer_for(
        model, trainer_args(per_device_train_batch_size=3, weighing_steps=6), train_dataset=make_dataset(14)
    )
    trainer.fit_start()
    assert trainer.distillation.weights.gain == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("given", "shares"), [(None, [1, 2 / 3, 1 / 3, 0]), (0.5, [1, 1, 1, 1])])
def test_the_strength_of_weighted_teachers_falls_to_zero_unless_it_is_given(given, shares, trainer_args, monkeypatch):
    """The first of five steps is of stage 1."""
    model = weighted()
    monkeypatch.setattr(preparation, "learn_weights", lambda *_, **__: of_places(model, 0.25, bank=0.6, travel=0.4))
    args = trainer_args(max_steps=5, distillation_start=0.2, distillation_weight=given)
    trainer = trainer_for(model, args)
    strengths = []

    class Notes(TrainerCallback):
        def on_step_end(self, *_, **__):
            strengths.append(trainer.distillation.settings.weight)

    trainer.add_callback(Notes)
    trainer.train()
    first = 0.25 if given is None else given
    assert strengths[1:] == pytest.approx([first * share for share in shares])


@pytest.mark.parametrize("gain", [-0.2, 0.04])
def test_the_loss_of_teachers_that_do_not_help_is_logged_but_does_not_count(gain, trainer_args, monkeypatch):
    model = weighted()
    count_weighing(monkeypatch, of_places(model, gain, bank=0.2, travel=0.2, work=0.2))
    trainer = trainer_for(model, trainer_args(distillation_start=0.0))
    trainer.train()
    assert trainer.distillation_weight == 0.0
    assert all("distillation_loss" in log for log in trainer.state.log_history if "loss" in log)
    assert trainer_for(weighted(), trainer_args(distillation_weight=0.3)).distillation_weight == 0.3


@pytest.mark.parametrize(
    ("carrier", "settings", "runs"),
    [
        ("student", {}, True),
        ("fused", {}, False),
        ("mixed", {}, False),
        ("dual", {}, False),
        ("fused", {"distillation_weight": 0.0}, True),
        ("mixed", {"distillation_weight": 0.5}, True),
    ],
)
def test_no_layer_passes_on_what_teachers_say_that_do_not_help_unless_asked_to(
    carrier, settings, runs, trainer_args, monkeypatch
):
    model = weighted(carrier=carrier)
    count_weighing(monkeypatch, of_places(model, -0.2, bank=0.2, travel=0.2, work=0.2))
    trainer = trainer_for(model, trainer_args(distillation_start=0.0, max_steps=2, **settings))
    trainer.train()
    assert any("distillation_loss" in log for log in trainer.state.log_history) == runs


def test_the_first_log_has_the_weights_and_the_gain(trainer_args, monkeypatch):
    model = weighted()
    count_weighing(monkeypatch, of_places(model, 0.25, bank=0.5, travel=0.3, work=0.1))
    trainer = trainer_for(model, trainer_args(max_steps=2))
    trainer.train()
    first, second = (log for log in trainer.state.log_history if "loss" in log)
    assert {key: value for key, value in first.items() if key.startswith("teacher_")} == pytest.approx(
        {"teacher_gain": 0.25, "teacher_weight/bank": 0.5, "teacher_weight/travel": 0.3, "teacher_weight/work": 0.1}
    )
    assert not any(key.startswith("teacher_") for key in second)


def test_halves_that_give_no_batch_give_equal_weights(trainer_args, monkeypatch, caplog):
    trainer = trainer_for(weighted(), trainer_args(max_steps=1))
    labelled = trainer._labelled()
    monkeypatch.setattr(trainer, "_labelled", lambda: labelled._replace(halves=[labelled.halves[0], list]))
    trainer.train()
    assert trainer.distillation.weights is None
    assert (
        "The teachers of 'insurance' get equal weights: too few training examples or labels, a stream" in caplog.text
    )


@pytest.mark.parametrize("config", ["seq_bn", "lora", "prefix_tuning"])
@pytest.mark.parametrize(("gain", "helps"), [(-0.1, False), (0.04, False), (0.06, True)])
def test_a_student_whose_teachers_do_not_help_starts_as_a_new_adapter(
    config, gain, helps, trainer_args, monkeypatch, caplog
):
    """With its head, as if it had been added without teachers."""

    def add(model, **distill_from):
        torch.manual_seed(5)
        model.add_adapter("insurance", config=config, **distill_from)
        torch.manual_seed(6)
        model.add_classification_head("insurance")
        return model

    new = snapshot(add(with_teachers(config=config)))
    model = add(with_teachers(config=config), distill_from=TEACHERS)
    model.train_adapter("insurance")
    monkeypatch.setattr(
        preparation, "learn_weights", lambda *_, **__: of_places(model, gain, bank=0.4, travel=0.3, work=0.2)
    )
    trainer_for(model, trainer_args()).fit_start()
    moved = {name for name in changed(model, new) if "insurance" in name and "fusion" not in name}
    assert any(name.startswith("heads.") for name in moved) == helps
    assert bool(moved) == helps
    message = f"its teachers do not help on held-out labels (gain {gain:.1%})"
    assert (message in caplog.text) != helps


def test_a_new_head_of_another_shape_is_left_alone(trainer_args, monkeypatch):
    model = weighted()
    model.add_classification_head("insurance", num_labels=5, overwrite_ok=True)
    head = snapshot(model.heads["insurance"])
    count_weighing(monkeypatch, of_places(model, -0.2, bank=0.2, travel=0.2, work=0.2))
    trainer_for(model, trainer_args()).fit_start()
    assert not changed(model.heads["insurance"], head)


def test_selected_teachers_run_whatever_they_weigh(trainer_args, monkeypatch):
    model = weighted(teacher_selection=2)
    monkeypatch.setattr(
        preparation, "learn_weights", lambda *_, **__: of_places(model, 0.5, bank=0.4, travel=0.4, work=0.4)
    )
    monkeypatch.setattr(TeacherWeights, "heavy", lambda _: [])
    trainer = trainer_for(model, trainer_args(max_steps=1))
    trainer.train()
    assert len(trainer.block.teachers) == 2


@pytest.mark.parametrize("fits_first", [False, True])
@pytest.mark.parametrize("start", ["weighted", "teachers"])
def test_teachers_whose_heads_do_not_know_the_labels_are_selected_by_their_weights(
    start, fits_first, trainer_args, monkeypatch
):
    """Where weights are learned; else by their agreement with the others, which needs no labels."""
    model = with_teachers_of_their_own_scores(make_student(make_model(), student_start=start, teacher_selection=2))
    for name in TEACHERS:
        model.delete_head(name)
    weights = of_places(model, 0.5, bank=0.2, travel=0.9, work=0.4)
    calls, ranked = count_weighing(monkeypatch, weights), []
    original = preparation.rank_teachers
    monkeypatch.setattr(preparation, "rank_teachers", lambda *a: ranked.append(1) or original(*a))
    trainer = trainer_for(model, trainer_args(max_steps=1))
    if fits_first:
        trainer.fit_start()
    trainer.train()
    if start == "weighted":
        assert (len(calls), ranked) == (1, [])
        assert trainer.block.teachers == ("travel", "work")
        assert trainer.distillation.ranking == {"travel": 0.9, "work": 0.4, "bank": 0.2}
        assert list(trainer.distillation.ranking) == ["travel", "work", "bank"]
    else:
        assert (calls, len(ranked)) == ([], 1 + fits_first)
        assert set(trainer.block.teachers) == set(list(trainer.distillation.ranking)[:2])


def test_teachers_that_answer_questions_are_selected_by_their_weights(trainer_args, monkeypatch):
    """Their heads predict what the student's does, but no batch has a column of labels by which to rank them."""
    model = make_student(make_model(), head="qa", student_start="weighted", teacher_selection=1)
    spans = make_dataset(labels="none").map(lambda row: {"start_positions": 1, "end_positions": 2})
    calls = count_weighing(monkeypatch, of_places(model, 0.5, bank=0.2, travel=0.9, work=0.4))
    trainer = trainer_for(model, trainer_args(max_steps=1), train_dataset=spans)
    trainer.train()
    assert len(calls) == 1
    assert trainer.block.teachers == ("travel",)


def test_a_resumed_training_keeps_the_teachers_that_weighed_most(trainer_args, monkeypatch):
    def trainer(**kwargs):
        model = weighted(teacher_selection=1)
        for name in TEACHERS:
            model.delete_head(name)
        calls = count_weighing(monkeypatch, of_places(model, 0.5, bank=0.2, travel=0.9, work=0.4))
        return trainer_for(model, trainer_args(save_strategy="steps", save_steps=1, **kwargs)), calls

    first, calls = trainer(max_steps=1)
    first.train()
    assert len(calls) == 1
    second, calls = trainer(max_steps=2)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-1")
    assert calls == []
    assert second.block.teachers == first.block.teachers == ("travel",)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from make_dataset()


@pytest.mark.parametrize("data", ["one example", "a stream"])
def test_too_little_data_gives_equal_weights(data, trainer_args, caplog):
    model = weighted()
    model_of_equal = with_teachers_of_their_own_scores(make_student(make_model(dropout=True)))
    data = make_dataset(1) if data == "one example" else Stream()
    args = {"max_steps": 2, "keep_fusion": True}
    trainer = trainer_for(model, trainer_args(**args), train_dataset=data)
    trainer.distillation.weights = of_places(model, 0.5, bank=0.2)
    trainer.distillation.run = TrainingRun([])  # of an earlier training, with these weights
    for fusion in fusions_of(model, "insurance"):
        fusion.set_weights({"bank": 0.2, "travel": 0.9, "work": 0.4})
    trainer.train()
    assert (
        "The teachers of 'insurance' get equal weights: too few training examples or labels, a stream" in caplog.text
    )
    assert trainer.distillation.weights is None
    assert trainer.block.teachers == tuple(TEACHERS)
    trainer_for(model_of_equal, trainer_args(**args), train_dataset=data).train()
    assert not changed(model, snapshot(model_of_equal))


def test_weighing_draws_nothing_and_dropout_plays_no_part(trainer_args):
    """Also in a wrapper, whose norm has buffers."""
    found = []
    for dropout in (True, False):
        model = Classifier(make_student(make_model(kind="base", dropout=dropout), student_start="weighted"))
        start = {name: value.clone() for name, value in model.state_dict().items()}
        trainer = trainer_for(model, trainer_args(weighing_steps=4))
        torch.manual_seed(1)
        model.head.load_state_dict({name: torch.full_like(v, 0.1) for name, v in model.head.state_dict().items()})
        state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
        trainer.fit_start()
        assert len(trainer.block.teachers) == 3
        assert torch.equal(torch.get_rng_state(), state)
        assert modes == [module.training for module in model.modules()]
        assert all(torch.equal(v, start[n]) for n, v in model.state_dict().items() if n.startswith("norm."))
        assert all((value == 0.1).all() for value in model.head.state_dict().values())
        found.append(trainer.distillation.weights)
    assert found[0] == found[1]


def test_a_wrappers_head_is_trained_along(trainer_args):
    model = Classifier(make_student(make_model(kind="base"), student_start="weighted"))
    labelled = trainer_for(model, trainer_args())._labelled()
    beside = {id(parameter) for parameter in labelled.beside}
    assert beside == {id(p) for part in (model.norm, model.head) for p in part.parameters()}


def test_the_halves_share_no_example(trainer_args):
    trainer = trainer_for(weighted(), trainer_args(weighing_steps=3, per_device_train_batch_size=4))
    first, second = ([batch["input_ids"] for batch in half()] for half in trainer._labelled().halves)
    rows = [tuple(row.tolist()) for batch in (*first, *second) for row in batch]
    assert len(rows) == len(set(rows)) == 12
    assert trainer.train_dataset.num_rows == 16
    trainer.train_dataset = make_dataset(1)
    assert trainer._labelled() is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_training_weighs_again_and_keeps_the_student(accumulation, trainer_args, monkeypatch):
    calls = count_weighing(monkeypatch)
    args = trainer_args(learning_rate=0.0, gradient_accumulation_steps=accumulation, max_steps=2)
    trainer = trainer_for(weighted(), args)
    trainer.train()
    student = {name: v for name, v in snapshot(trainer.model).items() if ".insurance." in name}
    trainer.train()
    assert len(calls) == 2
    assert not changed(trainer.model, student)
    trainer.fit_start()  # without a fusion there is nothing to weigh
    assert len(calls) == 2


def test_a_loss_that_counts_items_is_given_their_number(trainer_args):
    def summed(outputs, labels, num_items_in_batch):
        return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    weights = []
    for loss in (None, summed):
        trainer = trainer_for(weighted(make_model()), trainer_args(weighing_steps=4), compute_loss_func=loss)
        trainer.fit_start()
        weights.append(trainer.distillation.weights)
    assert weights[0].mean() == pytest.approx(weights[1].mean(), rel=1e-5)
    assert weights[0].gain == pytest.approx(weights[1].gain, rel=1e-4)


def test_the_teachers_are_weighed_once_before_the_first_step(trainer_args, monkeypatch):
    trainer = trainer_for(make_student(make_model(), student_start="weighted"), trainer_args(max_steps=2))
    trainer.fit_start()
    weights = trainer.distillation.weights
    assert weights is not None
    learned = []
    monkeypatch.setattr(preparation, "learn_weights", lambda *args, **kwargs: learned.append(args))
    trainer.train()
    assert learned == []
    assert trainer.distillation.weights is weights


@pytest.mark.parametrize("fits_first", [False, True])
def test_the_training_after_one_that_did_not_end_weighs_again(fits_first, trainer_args, monkeypatch, caplog):
    """The teachers that are left, whether the weights were learned by it or by `fit_start`."""
    model = weighted()
    calls = count_weighing(monkeypatch, of_places(model, 0.5, bank=0.01, travel=0.9, work=0.4))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    trainer = trainer_for(model, trainer_args(max_steps=2), callbacks=[EachStep(stop)])
    if fits_first:
        trainer.fit_start()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(calls) == 1
    warning = (
        "'insurance' goes on from its present weights, with the teachers that it still has ('travel', 'work'): its "
        "last training did not end, or was loaded over. Add it again with overwrite_ok=True to start anew."
    )
    assert warning not in caplog.text
    again = of_places(model, 0.3, travel=0.3, work=0.4)
    calls = count_weighing(monkeypatch, again)
    trainer = trainer_for(model, trainer_args(max_steps=2, keep_fusion=True))
    trainer.train()
    assert len(calls) == 1
    assert warning in caplog.text
    assert trainer.distillation.weights == again
    assert trainer.block.teachers == ("travel", "work")
    assert fusions_of(model, "insurance")[0].weights() == pytest.approx({"travel": 0.3, "work": 0.4})


def test_a_training_that_begins_again_with_a_smaller_batch_keeps_its_weights(trainer_args, monkeypatch, caplog):
    model = weighted()
    calls = count_weighing(monkeypatch, of_places(model, 0.5, bank=0.01, travel=0.9, work=0.4))
    trainer = trainer_for(model, trainer_args(auto_find_batch_size=True, max_steps=2))
    sizes, compute_loss = [], trainer.compute_loss

    def too_large(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if model.training and sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = too_large
    trainer.train()
    assert (max(sizes), sizes[-1]) == (4, 2)
    assert len(calls) == 1
    assert trainer.block.teachers == ("travel", "work")
    assert "did not end" not in caplog.text


def test_a_teacher_that_is_not_finite_is_named_before_the_first_step(trainer_args):
    """And the student starts at the others once it is gone."""
    model = weighted()
    next(iter(next(iter(model.get_adapter("travel").values())).values())).adapter_up.weight.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="'insurance' cannot start .* 'travel' is not finite"):
        trainer_for(model, trainer_args(max_steps=1)).train()
    with pytest.warns(UserWarning, match="'travel' was a teacher"):
        model.delete_adapter("travel")
    model.train_adapter("insurance")
    trainer = trainer_for(model, trainer_args(max_steps=1))
    trainer.train()
    assert trainer.distillation.weights.mean().keys() == {"bank", "work"}


# Teachers without weights


@pytest.mark.parametrize("config", ["lora", "seq_bn"])
def test_teachers_that_add_nothing_anywhere_are_named_once(config, trainer_args, caplog):
    def warnings_of(silent):
        model = make_student(make_model(), config=config, student_start="random")
        for name in silent:
            for place in model.get_adapter(name).values():
                for module in place.values():
                    for key, parameter in module.named_parameters():
                        if "lora_B" in key or "adapter_up" in key:
                            parameter.data.zero_()
        caplog.clear()
        trainer_for(model, trainer_args(max_steps=2)).train()
        return [record.message for record in caplog.records if "add nothing anywhere" in record.message]

    (message,) = warnings_of(TEACHERS[:2])
    assert message == (
        "The teachers 'bank', 'travel' of 'insurance' add nothing anywhere (all weights of their up-projections are "
        "zero), and the distillation pulls the student there; train them first, or leave them out."
    )
    assert warnings_of([]) == []


def test_a_loss_that_draws_in_the_weighing_leaves_the_random_states(trainer_args):
    draws = random.random, np.random.random

    def loss(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs.logits, labels) * (1 + sum(draw() for draw in draws))

    set_seed(0)
    expected = [draw() for draw in draws]
    model = make_student(make_model(), student_start="weighted")
    trainer = trainer_for(model, trainer_args(weighing_steps=4), compute_loss_func=loss)
    set_seed(0)
    trainer.fit_start()
    assert trainer.distillation.weights is not None
    assert [draw() for draw in draws] == expected
