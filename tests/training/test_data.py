"""Stage 2 on examples without labels: which are read, what they add, and that a resumed training reads the same."""

import pytest
import torch
from datasets import DatasetDict
from messages import exactly
from model_state import changed, snapshot
from tiny_models import ALL_OBJECTIVES, make_dataset, make_model, make_student, with_teachers_of_their_own_scores
from torch.nn.functional import cross_entropy
from trainings import StopAt, gradients, trainer_for
from wrapped_models import Classifier


def unlabelled(n=12, seed=5):
    return make_dataset(n, seed=seed).remove_columns("labels")


def batches(trainer, steps, accumulation=1):
    return [
        trainer._unlabelled.next(step, 4, accumulation)["input_ids"]
        for step in range(steps)
        for _ in range(accumulation)
    ]


def test_each_pass_reads_all_examples_in_an_order_of_its_own(trainer_args):
    data = unlabelled(10)
    trainer = trainer_for(make_student(make_model()), trainer_args(), distillation_dataset=data)
    read = torch.cat(batches(trainer, 5)).tolist()  # 5 batches of 4: two passes
    rows = data["input_ids"]
    assert sorted(read[:10]) == sorted(read[10:]) == sorted(rows)
    assert read[:10] != read[10:]
    other = trainer_for(make_student(make_model()), trainer_args(seed=1), distillation_dataset=data)
    assert torch.cat(batches(other, 5)).tolist() != read


def test_the_step_says_what_is_read(trainer_args):
    trainer = trainer_for(
        make_student(make_model()), trainer_args(gradient_accumulation_steps=2), distillation_dataset=unlabelled()
    )
    read = batches(trainer, 4, accumulation=2)
    again = [trainer._unlabelled.next(2, 4, 2)["input_ids"] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(again, read[4:6], strict=True))


def test_a_training_that_begins_again_reads_the_same(trainer_args):
    args = trainer_args(max_steps=1, distillation_start=0.0)
    trainer = trainer_for(make_student(make_model()), args, distillation_dataset=unlabelled())
    collator, read = trainer._unlabelled.collator, []
    trainer._unlabelled.collator = lambda rows: read.append(rows) or collator(rows)
    for _ in range(2):
        trainer.model.train_adapter("insurance")
        trainer.train()
    assert read[0] == read[1]


@pytest.mark.parametrize("carrier", ["student", "fused"])
def test_the_distillation_loss_is_the_mean_of_both(carrier, trainer_args):
    """The same examples without labels change nothing, others add their own terms and nothing to the task."""

    def student():
        objective = {"features": 1.0, "logits": 0.5}
        model = make_student(
            make_model(dtype=torch.float64), carrier=carrier, student_start="random", objective=objective
        )
        return with_teachers_of_their_own_scores(model).double()

    def recorded(model, seed=0, **kwargs):
        return gradients(model, trainer_args, 8, 1, train_dataset=make_dataset(8, seed=seed), **kwargs)

    plain, log = recorded(student())
    same, same_log = recorded(student(), distillation_dataset=make_dataset(8))  # with labels to leave out
    assert same.keys() == plain.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(same[name], grad, rtol=1e-9, atol=1e-12)
    for term in ("loss", "task_loss", "distillation_loss", "fusion_regularization", "distillation_loss/logits"):
        assert same_log[term] == pytest.approx(log[term], abs=2e-6)

    _, other_log = recorded(student(), distillation_dataset=unlabelled(8, seed=9))
    _, alone_log = recorded(student(), seed=9)
    assert other_log["task_loss"] == pytest.approx(log["task_loss"], abs=2e-6)
    both = (log["distillation_loss"] + alone_log["distillation_loss"]) / 2
    assert other_log["distillation_loss"] == pytest.approx(both, abs=2e-6)
    assert log["distillation_loss"] != pytest.approx(alone_log["distillation_loss"], abs=1e-3)


class Masked(Classifier):
    """Allows no class but the first two."""

    def forward(self, input_ids, attention_mask, labels=None, return_dict=True):
        logits = super().forward(input_ids, attention_mask, return_dict=return_dict)["logits"]
        logits = logits.masked_fill(torch.tensor([False, False, True]), float("-inf"))
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


def test_outputs_may_be_infinite(trainer_args):
    """The gradient of the fusion is that of the distillation alone."""
    found = []
    for wrapper in (Classifier, Masked):
        model = wrapper(make_student(make_model(kind="base"), student_start="random"), num_labels=3)
        grads, log = gradients(model, trainer_args, 8, 1, distillation_dataset=unlabelled())
        fusion = {name: grad for name, grad in grads.items() if "distillation_fusion" in name}
        assert all(grad.isfinite().all() for grad in grads.values())
        found.append((fusion, log["distillation_loss"]))
    assert found[0][1] == found[1][1]
    assert found[0][0]
    for name, grad in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], grad)


def test_stage_1_reads_none_of_them(trainer_args, monkeypatch):
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(), distillation_dataset=unlabelled())
    steps = []
    read = trainer._unlabelled.next

    def count(step, *sizes):
        steps.append((trainer.state.global_step, step))
        return read(step, *sizes)

    monkeypatch.setattr(trainer._unlabelled, "next", count)
    trainer.train()
    assert steps == [(4, 0), (5, 1), (6, 2), (7, 3)]


def test_a_resumed_training_reads_what_the_unbroken_one_reads(trainer_args, tmp_path):
    """With all objectives, chosen teachers and micro-batches of which the last of an epoch is alone."""

    def trainer(folder, **kwargs):
        model = make_student(
            make_model(dropout=True),
            carrier="mixed",
            objective=ALL_OBJECTIVES,
            teacher_selection=2,
            student_start="random",
        )
        args = trainer_args(
            output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=1, distillation_start=0.25,
            gradient_accumulation_steps=2, num_train_epochs=2, keep_fusion=True,
        )  # fmt: skip
        return trainer_for(
            with_teachers_of_their_own_scores(model), args, train_dataset=make_dataset(20),
            distillation_dataset=unlabelled(), **kwargs,
        )  # fmt: skip

    unbroken = trainer("unbroken")
    unbroken.train()
    assert unbroken.state.global_step == 6
    for step in (1, 3, 4):
        trainer(f"stopped at {step}", callbacks=[StopAt(step)]).train()
        resumed = trainer(f"stopped at {step}")
        resumed.train(resume_from_checkpoint=True)
        assert not changed(resumed.model, snapshot(unbroken.model)), step
        terms = [[log.get("distillation_loss") for log in t.state.log_history] for t in (resumed, unbroken)]
        assert terms[0] == terms[1]


def test_two_trainings_are_equal(trainer_args):
    models = []
    for _ in range(2):
        models.append(make_student(make_model(dropout=True)))
        trainer_for(models[-1], trainer_args(), distillation_dataset=unlabelled()).train()
    assert not changed(models[1], snapshot(models[0]))
    plain = make_student(make_model(dropout=True))
    trainer_for(plain, trainer_args()).train()
    assert changed(plain, snapshot(models[0]))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from unlabelled()


@pytest.mark.parametrize(
    ("data", "carrier", "message"),
    [
        (
            Stream(), "student",
            "distillation_dataset is a stream, but its examples are drawn in any order; pass one with a length.",
        ),
        (unlabelled().select([]), "student", "distillation_dataset has no examples; leave it out."),
        (
            DatasetDict({"one": unlabelled(), "two": unlabelled()}),
            "student",
            "distillation_dataset must be one data set, not several by their names (one, two); concatenate them.",
        ),
        (
            unlabelled(), "dual",
            "The carrier 'dual' needs labels in both of its passes; leave out distillation_dataset, or choose the "
            "carrier 'mixed'.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(data, carrier, message, trainer_args):
    model = make_student(make_model(), carrier=carrier)
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, trainer_args(), distillation_dataset=data)


def test_a_plain_dataset_of_torch_will_do(trainer_args):
    rows = torch.utils.data.Subset(list(unlabelled()), range(9))
    trainer = trainer_for(make_student(make_model()), trainer_args(), distillation_dataset=rows)
    trainer.train()
    assert [log["stage"] for log in trainer.state.log_history if "stage" in log] == [1] * 4 + [2] * 4


@pytest.mark.parametrize("kind", ["unlabelled", "compute_loss_func"])
def test_teachers_predict_without_labels_that_the_model_does_not_get(kind, trainer_args):
    """Labels of -1, as in the test sets of GLUE, are an IndexError in the loss of a head."""

    def ignoring(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, ignore_index=-1)

    dataset = make_dataset(16)
    relabelled = dataset.remove_columns("labels").add_column("labels", [-1] + dataset["labels"][1:])
    if kind == "unlabelled":
        settings = {"train_dataset": dataset, "distillation_dataset": relabelled}
    else:
        settings = {"train_dataset": relabelled, "compute_loss_func": ignoring}
    model = make_student(make_model(), objective={"features": 1.0, "logits": 1.0})
    trainer = trainer_for(model, trainer_args(distillation_start=0.0), **settings)
    trainer.train()
    assert trainer.state.global_step == 8
