"""What the objectives need of the heads."""

import math

import pytest
import torch
from messages import exactly
from tiny_models import distillation_of, make_batch, make_model, make_student, of_head
from trainings import trainer_for

from hf_adapter_distillation.method.heads import (
    are_alike,
    kind_of_labels,
    predicts_next,
    shifts_labels,
    states_of_heads,
)


def refused(trainer, message):
    """The whole message, before the first step."""
    with pytest.raises(ValueError, match=exactly(message)):
        trainer.train()
    assert trainer.state.global_step == 0


def test_objectives_of_predictions_need_a_head_of_each_teacher(trainer_args):
    model = make_student(make_model(kind="classification"), objective="logits")
    refused(
        trainer_for(model, trainer_args()),
        "The objective 'logits' needs a head for each teacher, but a BertForSequenceClassification has one for all; "
        "use AutoAdapterModel, or choose 'features'.",
    )
    model = make_student(make_model(), objective={"features": 1.0, "cross_task": 1.0})
    model.delete_head("travel")
    refused(
        trainer_for(model, trainer_args()),
        "The objective 'cross_task' needs a head of teacher 'travel', which has none on this model; "
        "load it with its head, or choose 'features'.",
    )


def test_a_model_without_a_head_predicts_no_next_token():
    assert not predicts_next(make_model("gpt2"), "insurance")


LABELS = {0: "yes", 1: "no", 2: "perhaps"}


@pytest.mark.parametrize("head", ["classification", "tagging"])
@pytest.mark.parametrize(
    ("of_teacher", "order"),
    [
        ({0: "perhaps", 1: "yes", 2: "no"}, [1, 2, 0]),
        (LABELS, [0, 1, 2]),
        ({0: "perhaps", 1: "yes", 2: "other"}, [0, 1, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_rows_of_labels_are_put_in_the_order_of_the_student(head, of_teacher, order):
    model = make_model()
    for name, labels in (("bank", of_teacher), ("insurance", LABELS)):
        getattr(model, f"add_{head}_head")(name, num_labels=3, layers=2, id2label=labels)
    bank = model.heads["bank"]
    (state,) = states_of_heads(model.heads["insurance"], [bank])
    for key, value in bank.state_dict().items():
        assert torch.equal(state[key], value[order] if key.startswith("4.") else value)


@pytest.mark.parametrize(
    ("of_teacher", "alike"),
    [
        (LABELS, True),
        ({0: "perhaps", 1: "yes", 2: "no"}, True),
        ({0: "perhaps", 1: "yes", 2: "other"}, False),
        ({0: "rail", 1: "bus", 2: "tram"}, False),
        ({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}, True),
        (None, True),
    ],
)
def test_heads_with_other_labels_are_not_alike(of_teacher, alike):
    model = make_model()
    for name, labels in (("bank", of_teacher), ("insurance", LABELS)):
        model.add_classification_head(name, num_labels=3, id2label=labels)
    assert are_alike([model.heads["insurance"], model.heads["bank"]]) == alike
    assert are_alike([model.heads["bank"], model.heads["insurance"]]) == alike
    assert not are_alike([model.heads["insurance"], None])


@pytest.mark.parametrize(
    ("head", "settings", "described"),
    [
        ("classification", {"num_labels": 3}, "classification with 3 labels"),
        ("classification", {"num_labels": 1}, "classification with 1 label"),
        ("classification", {"multilabel": True}, "multilabel_classification with 2 labels"),
        ("classification", {"id2label": {0: "no", 1: "yes"}}, "classification with 2 labels: no, yes"),
        ("tagging", {}, "tagging with 2 labels"),
        ("causal_lm", {}, "causal_lm"),
    ],
)
def test_objectives_of_predictions_need_common_labels(head, settings, described, trainer_args):
    model = make_student(make_model(), objective="logits", student_start="random")
    getattr(model, f"add_{head}_head")("work", overwrite_ok=True, **settings)
    model.train_adapter("insurance")
    own = ": LABEL_0, LABEL_1" if "id2label" in settings else ""
    refused(
        trainer_for(model, trainer_args()),
        "The objective 'logits' needs teachers with the labels of 'insurance' "
        f"(classification with 2 labels{own}), but 'work' has others ({described}); leave it out, or choose "
        "'features'.",
    )


@pytest.mark.parametrize(
    ("head", "config", "described"),
    [
        ("classification", {"num_labels": 1}, "classification with 1 label"),
        ("classification", {"num_labels": 3}, "classification with 3 labels"),
        ("classification", {"num_labels": 2, "multilabel": True}, "multilabel_classification with 2 labels"),
        ("tagging", {"num_labels": 2}, "tagging with 2 labels"),
    ],
)
def test_cross_task_needs_two_classes(head, config, described, trainer_args):
    model, _ = of_head(head, objective="cross_task", head_config=config)
    refused(
        trainer_for(model, trainer_args()),
        f"The objective 'cross_task' needs a head with two classes or one label, but that of 'insurance' is "
        f"{described}; choose 'logits' or 'features'.",
    )


@pytest.mark.parametrize("head", ["qa", "causal_lm", "multiple_choice"])
def test_task_specific_needs_labels_that_a_layer_can_tell_apart(head, trainer_args):
    model, _ = of_head(head, objective="task_specific")
    refused(
        trainer_for(model, trainer_args()),
        "The objective 'task_specific' needs a head for classes, labels or values of sequences or tokens, which "
        "'insurance' has not; choose 'features'.",
    )


def test_training_loops_of_ones_own_are_told_the_same():
    """Where no trainer looks before the first step."""
    model = make_student(make_model(), objective="logits", student_start="random", train=False)
    model.delete_head("work")
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    with pytest.raises(ValueError, match=r"^The objective 'logits' needs a head of teacher 'work', which has none"):
        model.train()(**make_batch())
    model.delete_head("insurance")
    model.active_head = "bank"
    with pytest.raises(ValueError, match=r"^'insurance' has no head; add one of that name"):
        model.train()(**make_batch())
    model = make_student(make_model(), objective="task_specific", student_start="random", train=False)
    model.train_adapter("insurance")
    model.add_classification_head("insurance")
    message = (
        "The objective 'task_specific' needs the head of 'insurance' in train_adapter; add one for classes, labels or "
        "values, and call model.train_adapter('insurance') again."
    )
    model.train()
    with pytest.raises(ValueError, match=exactly(message)):
        model(**make_batch())
    model.train_adapter("insurance")
    assert model.train()(**make_batch()).loss.isfinite()


KINDS = {  # the head, its config, the labels of four examples of eight tokens, and their kind
    "classes": ("classification", {"num_labels": 3}, torch.tensor([0, 1, 2, 0]), "classes"),
    "classes in a column": ("classification", {"num_labels": 3}, torch.tensor([[0], [1], [2], [0]]), "classes"),
    "several labels as integers": (
        "classification", {"num_labels": 8, "multilabel": True}, torch.arange(32).reshape(4, 8) % 2, "labels"
    ),
    "one value in a column": (
        "classification", {"num_labels": 1}, torch.tensor([[0.5], [1.0], [2.0], [0.0]]), "values"
    ),
    "tokens": ("tagging", {"num_labels": 3}, torch.arange(32).reshape(4, 8) % 3, "tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", KINDS)
def test_the_head_says_of_which_kind_labels_are(case):
    head, config, labels, kind = KINDS[case]
    model, batch = of_head(head, head_config=config, objective="task_specific")
    model(**batch | {"labels": labels})
    assert kind_of_labels(model, "insurance") == kind
    record = distillation_of(model).take_record()
    losses = {"classes": math.log(3), "labels": math.log(2), "values": (0.25 + 1 + 4) / 4, "tokens": math.log(3)}
    assert record.terms["probe_loss"].item() == pytest.approx(losses[kind], rel=0.4)


def test_labels_of_sequences_are_not_taken_for_those_of_a_decoder():
    """Several labels for each sequence, as many as it has tokens, are no mask of the decoder's padding."""
    model = make_student(make_model("bart", dtype=torch.float64), train=False, student_start="random").double()
    model.delete_head("bank")
    model.add_classification_head("insurance", num_labels=8, multilabel=True)
    model.double()
    model.train_adapter("insurance")
    batch, losses = make_batch(), []
    batch["input_ids"][:, 0] = 2  # the head of BART reads the end of the sequence
    for labels in (torch.ones(4, 8), torch.ones(4, 8).long()):
        model(**batch | {"labels": labels})
        losses.append(distillation_of(model).take_record().distillation_loss)
    assert torch.equal(*losses)
    assert not shifts_labels(model)
    assert shifts_labels(make_model("bart", "seq2seq_lm"))
    assert not shifts_labels(make_model("bart", "classification"))
