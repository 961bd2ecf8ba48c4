"""Scores of teachers, and Platt scaling, against scikit-learn and plain steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tiny_models import (
    TEACHERS,
    heard,
    make_batch,
    make_model,
    make_student,
    of_head,
    with_teachers,
    with_teachers_of_their_own_scores,
)
from torch.nn.functional import cosine_similarity

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.teachers.ranking import area_under_curve, fit_platt, rank_teachers


def reference(scores, labels):
    """The same maximum: each example counts as positive and as negative, with the smoothed label as its weight."""
    n_positive, n_negative = labels.sum(), (1 - labels).sum()
    targets = np.where(labels == 1, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    x = np.concatenate([scores, scores])[:, None]
    y = np.concatenate([np.ones_like(labels), np.zeros_like(labels)])
    regression = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    regression.fit(x, y, sample_weight=np.concatenate([targets, 1 - targets]))
    return [regression.coef_.item(), regression.intercept_.item()]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.integers(4, 60), st.floats(0.1, 20))
def test_equals_a_logistic_regression_on_smoothed_labels(seed, n, scale):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    labels[0], labels[1] = 0, 1
    scores = scale * (torch.randn(2, n, generator=generator, dtype=torch.float64) + labels) + 3
    for (slope, offset), one in zip(fit_platt(scores, labels).tolist(), scores, strict=True):
        expected_slope, expected_offset = reference(one.numpy(), labels.numpy())
        expected = torch.sigmoid(expected_slope * one + expected_offset)
        torch.testing.assert_close(torch.sigmoid(slope * one + offset), expected, rtol=0, atol=1e-3)


def test_a_score_that_tells_nothing_becomes_the_share_of_positives():
    labels = torch.tensor([1, 0, 0, 0] * 25)
    slope, offset = fit_platt(torch.full((1, 100), 7.0), labels)[0].tolist()
    probability = torch.tensor(slope * 7 + offset).sigmoid().item()
    assert probability == pytest.approx((25 * 26 / 27 + 75 / 77) / 100, abs=1e-6)


def test_scores_that_separate_the_labels_stay_finite():
    line = fit_platt(torch.tensor([[-1e4, -1e4, 1e4, 1e4], [1.0, 2.0, -1.0, -2.0]]), torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(line).all()
    assert line[0, 0] > 0 > line[1, 0], "one that is turned round is turned back"
    assert torch.isfinite(fit_platt(torch.randn(1, 5), torch.ones(5))).all(), "one label alone"


def test_the_area_under_the_curve_with_ties():
    assert area_under_curve(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([0, 0, 1, 1])) == (1 + 1 + 1 + 0.5) / 4
    assert area_under_curve(torch.tensor([1.0, 2.0]), torch.tensor([1, 1])) == 0.5
    generator = torch.Generator().manual_seed(0)
    scores, labels = (torch.randint(0, n, (50,), generator=generator) for n in (9, 2))
    assert area_under_curve(scores.float(), labels) == pytest.approx(roc_auc_score(labels, scores))


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


def test_a_single_teacher_without_common_labels_agrees_with_none():
    model = make_student(make_model(), teachers=["bank"], train=False)
    model.add_classification_head("insurance", num_labels=5)
    model.train_adapter("insurance")
    assert rank_teachers(model, active_block(model), [make_batch(labels=None)]).scores == {"bank": 0.0}


def test_padding_of_a_decoder_does_not_count():
    model = make_student(make_model("t5"), head="seq2seq_lm", student_start="random", teacher_selection=2).double()
    model.delete_head("bank")  # else the heads are compared
    batch = make_batch(labels="tokens")
    longer = {**batch, "labels": torch.nn.functional.pad(batch["labels"], (0, 9), value=-100)}
    found = [rank_teachers(model, active_block(model), [inputs]) for inputs in (batch, longer)]
    assert found[0].what == "cosine"
    assert found[0].scores == pytest.approx(found[1].scores, rel=1e-5)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_examples_without_a_label_do_not_count(num_labels):
    model = with_teachers(make_model())
    for name in TEACHERS:
        model.add_classification_head(name, num_labels=num_labels, overwrite_ok=True)
    model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, student_start="teachers"))
    model.train_adapter("insurance")
    batch, block = make_batch(8), active_block(model)
    labelled = rank_teachers(model, block, [{name: value[2:] for name, value in batch.items()}])
    batch["labels"][:2] = -100
    assert rank_teachers(model, block, [batch]) == labelled
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="^The teachers cannot be compared: all labels are -100"):
        rank_teachers(model, block, [batch])


def test_a_batch_without_a_labelled_token_does_not_count():
    model = make_student(make_model(), head="tagging", student_start="random")
    batch, block = make_batch(labels="tokens"), active_block(model)
    batch["labels"] = batch["labels"].clamp(max=1)
    without = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert rank_teachers(model, block, [batch, without]) == rank_teachers(model, block, [batch])
    with pytest.raises(ValueError, match="^The teachers cannot be compared: all labels are -100"):
        rank_teachers(model, block, [without])
    with pytest.raises(
        ValueError, match="^The teachers of 'insurance' cannot be weighed: half of the batches have no lab"
    ):
        had.weigh_teachers(model, [batch, without], steps=2)
