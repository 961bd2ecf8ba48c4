"""Which teachers are kept: by their own heads, else by what they agree on."""

import copy

import pytest
import torch
from adapters import AdapterSetup, AdapterTrainer, Stack
from conftest import (
    TEACHERS,
    VOCABULARY,
    changed,
    exactly,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    noisy,
    snapshot,
)
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from test_objectives import distillation_of, of_head, with_teachers_of_their_own_scores
from test_trainer import trainer_for
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import TrainingArguments

import hf_adapter_distillation as had
from hf_adapter_distillation.method.parameters import active_block
from hf_adapter_distillation.student.adding import keep_teachers
from hf_adapter_distillation.student.provenance import read_provenance
from hf_adapter_distillation.training.ranking import area_under_curve, rank_teachers


def test_the_area_under_the_curve_with_ties():
    assert area_under_curve(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == (1 + 1 + 1 + 0.5) / 4
    assert area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])) == 0.5
    generator = torch.Generator().manual_seed(0)
    scores, labels = (torch.randint(0, n, (50,), generator=generator) for n in (9, 2))
    assert area_under_curve(scores.float(), labels) == pytest.approx(roc_auc_score(labels, scores))


def heard(model, teacher, batch, head=True):
    setup = Stack(teacher) if teacher else None
    with AdapterSetup(setup, head_setup=teacher if head else None), torch.no_grad():
        return model.eval()(**batch, output_hidden_states=True)


def test_two_classes_are_ranked_by_the_area_under_the_curve():
    model = with_teachers_of_their_own_scores(make_student(make_model()))
    batches = [make_batch(8, seed=0), make_batch(5, seed=1)]
    ranking = rank_teachers(model, active_block(model), batches)
    assert ranking.what == "AUC"
    assert model.training
    labels = torch.cat([batch["labels"] for batch in batches])
    for name in TEACHERS:
        logits = torch.cat([heard(model, name, batch).logits for batch in batches])
        assert ranking.scores[name] == pytest.approx(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    positive = int(labels.sum())
    assert ranking.chance == pytest.approx(0.5 + 2 * (14 / (12 * positive * (13 - positive))) ** 0.5)
    assert len(set(ranking.scores.values())) == 3


def test_several_classes_are_ranked_by_the_accuracy_and_others_by_the_loss():
    model, batch = of_head("classification")
    ranking = rank_teachers(model, active_block(model), [batch])
    hits = {name: (heard(model, name, batch).logits.argmax(-1) == batch["labels"]) for name in TEACHERS}
    assert ranking.scores == {name: hit.double().mean().item() for name, hit in hits.items()}
    assert (ranking.what, ranking.chance) == ("accuracy", pytest.approx(0.5 + 2 * 0.25))
    for head in ("tagging", "qa", "multiple_choice"):
        model, batch = of_head(head)
        if head == "qa":
            batch["labels"] = torch.zeros(4, dtype=torch.long)
        ranking = rank_teachers(model, active_block(model), [batch, batch])
        losses = {name: -heard(model, name, batch).loss.item() for name in TEACHERS}
        assert ranking.what == "-loss"
        assert ranking.scores == pytest.approx(losses)


@pytest.mark.parametrize("why", ["no labels", "other labels", "one head for all"])
def test_without_common_labels_teachers_are_ranked_by_what_they_agree_on(why):
    model = make_student(make_model(kind="classification" if why == "one head for all" else "flex"))
    batch = make_batch()
    if why == "no labels":
        del batch["labels"]
    elif why == "other labels":
        model.add_classification_head("work", num_labels=3, overwrite_ok=True)
        model.train_adapter("insurance")
    ranking = rank_teachers(model, active_block(model), [batch])
    states = {}
    for name in (None, *TEACHERS):
        active = model.active_adapters
        model.set_active_adapters(name)
        with torch.no_grad():
            states[name] = (
                model.eval()
                .base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                .last_hidden_state
            )
        model.set_active_adapters(active)
    updates = {name: states[name] - states[None] for name in TEACHERS}
    mask = batch["attention_mask"].bool()
    for name, update in updates.items():
        others = sum(other for key, other in updates.items() if key != name) / 2
        cosines = [cosine_similarity(u[m], o[m], dim=-1).mean() for u, o, m in zip(update, others, mask, strict=True)]
        assert ranking.scores[name] == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)
    assert ranking.what == "cosine"


def sequences(n, seed, shuffled=False):
    """Sequences, of which those are positive whose first token is in the lower half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (n, 8), generator=generator)
    labels = (input_ids[:, 0] < VOCABULARY // 2).long()
    if shuffled:
        labels = labels[torch.randperm(n, generator=generator)]
    return Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": labels.tolist()})


@pytest.fixture(scope="module")
def good_and_harmful(tmp_path_factory):
    """A model with a teacher of the task, one that has learnt shuffled labels, and one with random weights."""
    model = make_model()
    args = TrainingArguments(
        str(tmp_path_factory.mktemp("teachers")), per_device_train_batch_size=16, num_train_epochs=6,
        learning_rate=5e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    for seed, name in enumerate(("shuffled", "good", "random")):
        model.add_adapter(name, config="double_seq_bn")
        model.add_classification_head(name)
        if name == "random":
            noisy(model, name)
            continue
        model.train_adapter(name)
        AdapterTrainer(model, args, train_dataset=sequences(512, seed, shuffled=name == "shuffled")).train()
    return model


def distilled(model, teachers, trainer_args, **config):
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    model.add_adapter("insurance", config="double_seq_bn", distill_from=had.DistillationConfig(teachers, **config))
    model.train_adapter("insurance")
    trainer = trainer_for(model, trainer_args(distillation_start=0.0), train_dataset=sequences(128, seed=7))
    trainer.train()
    return trainer


def test_teachers_that_only_harm_get_no_attention(good_and_harmful, trainer_args):
    """All three may be kept, and two are no better than chance: the rest is as if they had not been there."""
    teachers = ["shuffled", "good", "random"]
    trainer = distilled(good_and_harmful, teachers, trainer_args, teacher_selection=3)
    assert list(trainer.distillation.ranking)[0] == "good"
    assert trainer.distillation.ranking["good"] > 0.9
    assert trainer.block.teachers == ("good",)
    assert trainer.distillation.config.teachers == ["good"]
    logs = [log for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs
    assert all(log["attention/good"] == pytest.approx(1) for log in logs)
    assert not any(f"attention/{name}" in log for log in logs for name in ("shuffled", "random"))
    alone = distilled(good_and_harmful, ["good"], trainer_args)
    now = dict(trainer.model.named_parameters())
    for name, parameter in alone.model.named_parameters():
        assert torch.equal(now[name], parameter), name
    for name in teachers:  # they stay on the model
        before, after = good_and_harmful.get_adapter(name), trainer.model.get_adapter(name)
        for place, modules in before.items():
            for location, module in modules.items():
                for key, value in module.state_dict().items():
                    assert torch.equal(after[place][location].state_dict()[key], value)


def test_the_provenance_names_the_teachers_that_were_kept(good_and_harmful, trainer_args, tmp_path):
    trainer = distilled(good_and_harmful, ["shuffled", "good", "random"], trainer_args, teacher_selection=1)
    trainer.model.save_adapter(str(tmp_path / "insurance"), "insurance")
    saved = read_provenance(str(tmp_path / "insurance"))
    assert [teacher["name"] for teacher in saved["teachers"]] == ["good"]
    assert saved["ranking"] == trainer.distillation.ranking
    assert saved["teacher_selection"] == 1


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
    calibration = trainer.distillation.calibration
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
