"""What the objectives compute in a forward pass, against the same in plain steps, and what must not change them."""

import pytest
import torch
from adapters import AdapterSetup, Stack
from conftest import (
    TEACHERS,
    changed,
    exactly,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    needs_compiler,
    snapshot,
)
from test_trainer import gradients, trainer_for
from torch.nn.functional import cross_entropy, kl_div, mse_loss

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layer_pass import DistillationPass
from hf_adapter_distillation.method.losses import CosineLoss, CrossTaskLoss, FeatureLoss, token_weights
from hf_adapter_distillation.student.fusions import fusions_of

ALL = {"features": 1.0, "cosine": 0.5, "task_specific": 0.7, "logits": 0.3, "cross_task": 0.2}
CARRIERS = ["student", "fused", "mixed", "dual"]


def in_float64(family="bert", dropout=False, **kwargs):
    model = make_model(family, dtype=torch.float64, dropout=dropout)
    return make_student(model, student_start="random", **kwargs).double()


def distillation_of(model):
    return distillations(model.adapters_config)["insurance"]


def with_teachers_of_their_own_scores(model):
    """Heads that tell the teachers apart."""
    torch.manual_seed(1)
    for name in TEACHERS:
        for parameter in model.heads[name].parameters():
            parameter.data = torch.randn_like(parameter)
    return model


def predictions(model, batch):
    """The teachers' logits, (n_teachers, batch, 2), as adapters computes them without this package."""
    found = []
    with torch.no_grad():
        for name in TEACHERS:
            with AdapterSetup(Stack(name), head_setup=name):
                found.append(model.eval()(**batch).logits)
    return torch.stack(found)


@pytest.mark.parametrize("dropout", [False, True])
def test_predictions_are_matched_with_each_teachers_own_head(dropout):
    """The teachers run without the dropout that the student runs with."""
    model = with_teachers_of_their_own_scores(
        in_float64(dropout=dropout, objective={"logits": 2.0, "cross_task": 3.0}, temperature=1.5)
    )
    distillation, batch = distillation_of(model), make_batch(labels="classification")
    calibration = torch.tensor([[0.5, 1.0], [2.0, 0.0], [-1.0, 0.3]], dtype=torch.float64)
    distillation.calibration, distillation.weight = calibration, 0.7
    teachers = predictions(model, batch)
    modes = {name: module.training for name, module in model.train().named_modules()}
    output = model(**batch)
    assert {name: module.training for name, module in model.named_modules()} == modes
    record = distillation.take_record()

    soft = (teachers / 1.5).softmax(-1).mean(0)
    logits = 1.5**2 * kl_div((output.logits / 1.5).log_softmax(-1), soft, reduction="batchmean")
    calibrated = calibration[:, :1] * (teachers[..., 1] - teachers[..., 0]) + calibration[:, 1:]
    own = output.logits[:, 1] - output.logits[:, 0]
    cross_task = CrossTaskLoss(1.5)(own, calibrated, batch["labels"])
    torch.testing.assert_close(record.terms["distillation_loss/logits"], logits.detach())
    torch.testing.assert_close(record.terms["distillation_loss/cross_task"], cross_task.detach())
    task_loss = cross_entropy(output.logits, batch["labels"])
    torch.testing.assert_close(output.loss, task_loss + 0.7 * (2 * logits + 3 * cross_task))
    assert not record.attention, "nothing is fused for objectives of predictions alone"
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and (p.grad != 0).any()}
    assert trained
    assert all(".insurance." in name for name in trained)
    assert not any("distillation_fusion" in name for name in trained)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_sum_is_that_of_the_weighted_objectives(carrier):
    """Each objective alone, on the same model and the same random numbers."""
    values = {}
    for name in [*ALL, None]:
        model = with_teachers_of_their_own_scores(in_float64(carrier=carrier, objective=name or ALL))
        torch.manual_seed(2)  # of the probes, and of what is drawn
        for fusion in fusions_of(model, "insurance"):
            if fusion.task_specific is not None:
                fusion.task_specific.projection.reset_parameters()
                fusion.task_specific.classifier.reset_parameters()
        distillation = distillation_of(model)
        distillation.calibration = torch.ones(3, 2, dtype=torch.float64)
        torch.manual_seed(3)
        output = model.train()(**make_batch())
        record = distillation.take_record()
        values[name] = record
        probes = record.terms.get("probe_loss", 0)
        fused_task_loss = record.fused_task_loss or 0
        parts = distillation.weight * record.distillation_loss + record.fusion_regularization
        torch.testing.assert_close(record.added, parts + probes + fused_task_loss)
        assert output.loss.isfinite()
    whole, of_logits = values[None], 0.0
    if carrier == "dual":  # its own match of the logits is in each of them once
        of_logits = values["features"].distillation_loss - whole.terms["distillation_loss/features"]
    for name in ALL:
        torch.testing.assert_close(
            whole.terms[f"distillation_loss/{name}"], values[name].distillation_loss - of_logits
        )
    expected = sum(weight * whole.terms[f"distillation_loss/{name}"] for name, weight in ALL.items()) + of_logits
    torch.testing.assert_close(whole.distillation_loss, expected)


@pytest.mark.parametrize(("config", "level"), [("seq_bn", "adapter"), ("ia3", "layer"), ("lora", "adapter")])
def test_layer_weights(config, level):
    """The weighted mean of the layers' losses; a layer with weight 0 is matched by nothing."""
    records = []
    for weights in (None, [1, 1], [1, 3], [0, 2]):
        model = in_float64(
            config=config, level=level, objective={"features": 1.0, "cosine": 1.0}, layer_weights=weights
        )
        model.train()(**make_batch())
        records.append(distillation_of(model).take_record())
    plain, even, third, last = records
    torch.testing.assert_close(plain.layer_losses, even.layer_losses)
    per_layer = len(plain.layer_losses) // 2
    losses = plain.layer_losses.view(2, per_layer).mean(dim=1)
    torch.testing.assert_close(third.distillation_loss, (losses[0] + 3 * losses[1]) / 4)
    torch.testing.assert_close(last.distillation_loss, losses[1])


def test_layers_of_encoder_and_decoder_have_weights_of_their_own():
    losses = []
    for weights in (None, [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]):
        model = in_float64("t5", head="seq2seq_lm", layer_weights=weights)
        batch = make_batch(labels="tokens")
        model.train()(**batch)
        losses.append(distillation_of(model).take_record().distillation_loss)
    torch.testing.assert_close(losses[0], torch.stack(losses[1:]).mean())
    assert len({loss.item() for loss in losses}) == 5
    with pytest.raises(ValueError, match=r"^layer_weights has 2 numbers, but the model has 4 layers\.$"):
        in_float64("t5", head="seq2seq_lm", layer_weights=[1, 2])


def test_the_probe_of_each_layer_is_trained_by_the_task_and_the_student_by_the_match(trainer_args):
    model = make_student(make_model(), objective="task_specific", student_start="random")
    before = snapshot(model)
    trainer = trainer_for(model, trainer_args(distillation_start=0.0, keep_fusion=True))
    trainer.train()
    moved = changed(model, before)
    probes = {name for name in before if ".task_specific." in name}
    assert len(probes) == 2 * 3
    assert probes <= moved
    assert not any(f".{name}." in changed_name for changed_name in moved for name in TEACHERS)
    logs = [log for log in trainer.state.log_history if "probe_loss" in log]
    assert len(logs) == 8
    assert all(0 < log["task_specific_ratio"] < 1 for log in logs)
    for log in logs:
        added = log["distillation_loss"] + log["fusion_regularization"] + log["probe_loss"]
        assert log["loss"] == pytest.approx(log["task_loss"] + added, abs=1e-3)


HEADS = {
    "classification": {"num_labels": 3},
    "tagging": {"num_labels": 3},
    "qa": {},
    "causal_lm": {},
    "multiple_choice": {"num_choices": 2},
}


def of_head(head, **kwargs):
    """A student on a model with heads of one kind, and a batch for it."""
    model = make_model("gpt2" if head == "causal_lm" else "bert", dtype=torch.float64)
    config = kwargs.pop("head_config", HEADS.get(head, {}))
    for teacher in TEACHERS:
        model.add_adapter(teacher, config="seq_bn")
        getattr(model, f"add_{head}_head")(teacher, **config)
    settings = had.DistillationConfig(TEACHERS, student_start="random", **kwargs)
    model.add_adapter("insurance", config="seq_bn", distill_from=settings)
    getattr(model, f"add_{head}_head")("insurance", **config)
    model = with_teachers_of_their_own_scores(model.double())
    model.train_adapter("insurance")
    batch = make_batch(labels=None)
    mask = batch["attention_mask"]
    if head == "qa":
        batch |= {"start_positions": torch.tensor([0, 1, 2, 0]), "end_positions": torch.tensor([1, 2, 2, 1])}
    elif head == "multiple_choice":
        batch = {name: torch.stack([value, value.flip(0)], 1) for name, value in batch.items()}
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    elif head == "classification":
        batch["labels"] = torch.tensor([0, 1, 2, 0])
    else:
        batch["labels"] = torch.where(mask == 1, batch["input_ids"] % 3, -100)
    return model, batch


@pytest.mark.parametrize("head", HEADS)
def test_soft_labels_of_any_head(head):
    """Of classes, of each token that is no padding, of spans, of words and of choices."""
    model, batch = of_head(head, objective="logits", temperature=1.0)
    output = model.train()(**batch)
    record = distillation_of(model).take_record()
    names = [name for name in output if name.endswith("logits")]
    expected = []
    for name in names:
        teachers = []
        for teacher in TEACHERS:
            with AdapterSetup(Stack(teacher), head_setup=teacher), torch.no_grad():
                teachers.append(model.eval()(**batch)[name].softmax(-1))
        divergence = kl_div(output[name].log_softmax(-1), sum(teachers) / 3, reduction="none").sum(-1)
        if divergence.dim() == 2 and name == "logits":
            divergence = (token_weights(batch["attention_mask"]) * divergence).sum(1)
        expected.append(divergence.mean())
    assert len(names) == (2 if head == "qa" else 1)
    torch.testing.assert_close(record.distillation_loss, torch.stack(expected).mean().detach())


def test_values_and_single_labels_are_matched_as_what_they_are():
    model, batch = of_head("classification", objective="logits", head_config={"num_labels": 1})
    batch["labels"] = torch.rand(4, dtype=torch.float64)
    output = model.train()(**batch)
    teachers = torch.stack([_run(model, batch, name) for name in TEACHERS])
    record = distillation_of(model).take_record()
    torch.testing.assert_close(record.distillation_loss, mse_loss(output.logits, teachers.mean(0)).detach())

    several = {"num_labels": 3, "multilabel": True}
    model, batch = of_head("classification", objective="logits", head_config=several, temperature=1.0)
    batch["labels"] = torch.randint(0, 2, (4, 3)).double()
    output = model.train()(**batch)
    soft = torch.stack([_run(model, batch, name) for name in TEACHERS]).sigmoid().mean(0)
    own = output.logits.sigmoid()
    divergence = soft * (soft / own).log() + (1 - soft) * ((1 - soft) / (1 - own)).log()
    record = distillation_of(model).take_record()
    torch.testing.assert_close(record.distillation_loss, divergence.mean().detach())


def _run(model, batch, teacher):
    with AdapterSetup(Stack(teacher), head_setup=teacher), torch.no_grad():
        return model.eval()(**batch).logits


# Invariances


ADDITIVE = {name: weight for name, weight in ALL.items() if name != "cross_task"}  # whose pairs are of one batch


@pytest.mark.parametrize("carrier", ["student", "fused", "dual"])
def test_micro_batches_add_up_to_the_batch(carrier, trainer_args):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = with_teachers_of_their_own_scores(in_float64(carrier=carrier, objective=ADDITIVE))
        results.append(gradients(model, trainer_args, batch_size, accumulation, train_dataset=make_dataset(8)))
    (expected, log), (found, other) = results
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12)
    for term in ("task_loss", "distillation_loss", "distillation_loss/logits", "probe_loss"):
        assert other[term] == pytest.approx(log[term], abs=2e-6)


@pytest.mark.parametrize("carrier", ["student", "fused", "dual"])
def test_gradient_checkpointing_changes_nothing(carrier):
    found = []
    for checkpointing in (False, True):
        model = with_teachers_of_their_own_scores(in_float64(carrier=carrier, objective=ALL))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        output = model.train()(**make_batch())
        output.loss.backward()
        found.append((output.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other_loss, other_grads) = found
    torch.testing.assert_close(loss, other_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-9, atol=1e-12)


def test_the_order_of_the_teachers_changes_nothing():
    losses = []
    for order in (["work", "bank", "travel"], ["travel", "work", "bank"]):  # a new order makes a new fusion
        model = with_teachers_of_their_own_scores(in_float64(objective=ALL))
        torch.manual_seed(0)
        block = had.AdapterDistillation("insurance", order)
        model.train_adapter(block)
        losses.append(model.train()(**make_batch()).loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_the_student_alone_runs_in_evaluation():
    model = with_teachers_of_their_own_scores(in_float64(objective=ALL))
    model.eval()
    batch = make_batch()
    with torch.no_grad():
        distilled = model(**batch).logits
        model.set_active_adapters(Stack("insurance"))
        torch.testing.assert_close(model(**batch).logits, distilled, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "loss"), [("features", FeatureLoss()), ("cosine", CosineLoss())])
def test_objectives_of_layers_match_what_the_layers_put_out(name, loss, monkeypatch):
    seen = []
    gather = DistillationPass.gather

    def keep(self, fusion, student_output, fused):
        seen.append(loss(student_output, fused.output, self.weights(fusion, student_output)[0]).detach())
        gather(self, fusion, student_output, fused)

    monkeypatch.setattr(DistillationPass, "gather", keep)
    model = in_float64(objective=name)
    model.train()(**make_batch())
    assert len(seen) == 2
    torch.testing.assert_close(distillation_of(model).take_record().distillation_loss, torch.stack(seen).mean())


# What objectives need


def refused(trainer):
    with pytest.raises(ValueError, match="objective") as caught:
        trainer.train()
    assert trainer.state.global_step == 0
    return str(caught.value)


def test_objectives_of_predictions_need_a_head_of_each_teacher(trainer_args):
    model = make_student(make_model(kind="classification"), objective="logits")
    assert refused(trainer_for(model, trainer_args())) == (
        "The objective 'logits' needs a head for each teacher, but a BertForSequenceClassification has one for all; "
        "use AutoAdapterModel, or choose 'features'."
    )
    model = make_student(make_model(), objective={"features": 1.0, "cross_task": 1.0})
    model.delete_head("travel")
    assert refused(trainer_for(model, trainer_args())) == (
        "The objective 'cross_task' needs a head of teacher 'travel', which has none on this model; "
        "load it with its head, or choose 'features'."
    )


@pytest.mark.parametrize(
    ("head", "settings", "described"),
    [
        ("classification", {"num_labels": 3}, "classification with 3 labels"),
        ("classification", {"num_labels": 1}, "classification with 1 label"),
        ("classification", {"multilabel": True}, "multilabel_classification with 2 labels"),
        ("classification", {"id2label": {0: "no", 1: "yes"}}, "classification with 2 labels"),
        ("tagging", {}, "tagging with 2 labels"),
        ("causal_lm", {}, "causal_lm"),
    ],
)
def test_objectives_of_predictions_need_common_labels(head, settings, described, trainer_args):
    model = make_student(make_model(), objective="logits", student_start="random")
    getattr(model, f"add_{head}_head")("work", overwrite_ok=True, **settings)
    model.train_adapter("insurance")
    assert refused(trainer_for(model, trainer_args())) == (
        "The objective 'logits' needs teachers with the labels of 'insurance' (classification with 2 labels), but "
        f"'work' has others ({described}); leave it out, or choose 'features'."
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
    assert refused(trainer_for(model, trainer_args())) == (
        f"The objective 'cross_task' needs a head with two classes or one label, but that of 'insurance' is "
        f"{described}; choose 'logits' or 'features'."
    )


def test_cross_task_of_one_label_trains(trainer_args):
    model, _ = of_head("classification", objective="cross_task", head_config={"num_labels": 1, "multilabel": True})
    data = make_dataset().map(lambda row: {"labels": [float(row["labels"])]})
    trainer = trainer_for(model.float(), trainer_args(), train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-2]["distillation_loss"] > 0


@pytest.mark.parametrize("head", ["qa", "causal_lm", "multiple_choice"])
def test_task_specific_needs_labels_that_a_layer_can_tell_apart(head, trainer_args):
    model, _ = of_head(head, objective="task_specific")
    assert refused(trainer_for(model, trainer_args())) == (
        "The objective 'task_specific' needs a head for classes, labels or values of sequences or tokens, which "
        "'insurance' has not; choose 'features'."
    )


@pytest.mark.parametrize("objective", ["cross_task", "task_specific"])
@pytest.mark.parametrize("setting", ["label_smoothing_factor", "compute_loss_func"])
def test_labels_that_the_model_does_not_see_are_refused(objective, setting, trainer_args):
    model = make_student(make_model(), objective=objective)
    kwargs = {"compute_loss_func": cross_entropy} if setting == "compute_loss_func" else {}
    args = trainer_args(label_smoothing_factor=0.0 if kwargs else 0.1)
    message = (
        f"The objective {objective!r} needs the labels in the model's own forward; leave out label_smoothing_factor "
        "and compute_loss_func, or choose another objective."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, args, **kwargs)


def test_soft_labels_with_smoothed_ones(trainer_args):
    """The smoothed labels are the task's; the teachers' soft labels join them."""
    model = with_teachers_of_their_own_scores(make_student(make_model(), objective={"logits": 1.0, "features": 1.0}))
    trainer = trainer_for(model, trainer_args(label_smoothing_factor=0.1))
    trainer.train()
    last = [log for log in trainer.state.log_history if "distillation_loss/logits" in log][-1]
    added = last["distillation_loss"] + last["fusion_regularization"]
    assert last["loss"] == pytest.approx(last["task_loss"] + added, abs=1e-3)


@needs_compiler
def test_compiled_code_and_predictions_are_refused(trainer_args):
    model = make_student(make_model(), objective="logits")
    message = "torch_compile=True is not supported with the objective 'logits'; leave it out."
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, trainer_args(torch_compile=True))


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
    with pytest.raises(ValueError, match=exactly(message)):
        model.train()(**make_batch())
    model.train_adapter("insurance")
    assert model.train()(**make_batch()).loss.isfinite()
