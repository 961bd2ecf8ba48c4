"""What the objectives compute in a forward pass, against the same in plain steps, and what must not change them."""

import gc

import adapters
import pytest
import torch
from adapters import AdapterSetup, AutoAdapterModel, Stack
from model_state import changed, configure, snapshot
from tiny_models import (
    ALL_OBJECTIVES,
    CONFIGS,
    HEADS,
    TEACHERS,
    distillation_of,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    of_head,
    with_teachers_of_their_own_scores,
)
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from trainings import gradients, trainer_for
from transformers import AlbertConfig, AutoModelForSeq2SeqLM

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.logit_losses import CrossTaskLoss
from hf_adapter_distillation.method.losses import CosineLoss, FeatureLoss, token_weights
from hf_adapter_distillation.method.training_pass import DualFusedPass, StudentPass, TrainingPass

CARRIERS = ["student", "fused", "mixed", "dual"]


def in_float64(family="bert", dropout=False, **kwargs):
    model = make_model(family, dtype=torch.float64, dropout=dropout)
    return make_student(model, student_start="random", **kwargs).double()


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
    configure(model, calibration=calibration, weight=0.7)
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
    torch.testing.assert_close(output.loss, task_loss)
    torch.testing.assert_close(record.added, 0.7 * (2 * logits + 3 * cross_task).detach())
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
    for name in [*ALL_OBJECTIVES, None]:
        model = with_teachers_of_their_own_scores(in_float64(carrier=carrier, objective=name or ALL_OBJECTIVES))
        torch.manual_seed(2)  # of the probes, and of what is drawn
        for fusion in fusions_of(model, "insurance"):
            if fusion.task_specific is not None:
                fusion.task_specific.projection.reset_parameters()
                fusion.task_specific.classifier.reset_parameters()
        distillation = distillation_of(model)
        configure(model, calibration=torch.ones(3, 2, dtype=torch.float64))
        torch.manual_seed(3)
        output = model.train()(**make_batch())
        record = distillation.take_record()
        values[name] = record
        probes = record.terms.get("probe_loss", 0)
        parts = distillation.settings.weight * record.distillation_loss + record.fusion_regularization
        torch.testing.assert_close(record.added, parts + probes)
        assert output.loss.isfinite()
    whole, of_logits = values[None], 0.0
    if carrier == "dual":  # its own match of the logits is in each of them once
        of_logits = values["features"].distillation_loss - whole.terms["distillation_loss/features"]
    for name in ALL_OBJECTIVES:
        torch.testing.assert_close(
            whole.terms[f"distillation_loss/{name}"], values[name].distillation_loss - of_logits
        )
    expected = (
        sum(weight * whole.terms[f"distillation_loss/{name}"] for name, weight in ALL_OBJECTIVES.items()) + of_logits
    )
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


def test_layer_weights_of_another_number_of_layers_are_refused_before_anything_is_added():
    model = make_model("t5")
    message = r"^layer_weights has 2 numbers, but the model has 4 layers; give one for each layer\.$"
    with pytest.raises(ValueError, match=message):
        model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, layer_weights=[1, 2]))
    assert "insurance" not in model.adapters_config


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


@pytest.mark.parametrize("head", HEADS)
def test_soft_labels_of_any_head(head):
    """Of classes, of each token that is no padding, of spans, of the words of an answer, and of choices."""
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
            mask = batch["attention_mask"].bool()
            if head == "causal_lm":  # the logits at a token predict the next one
                mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
            divergence = (token_weights(mask.double()) * divergence).sum(1)
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


ADDITIVE = {
    name: weight for name, weight in ALL_OBJECTIVES.items() if name != "cross_task"
}  # whose pairs are of one batch


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
        model = with_teachers_of_their_own_scores(in_float64(carrier=carrier, objective=ALL_OBJECTIVES))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        output = model.train()(**make_batch())
        output.loss.backward()
        found.append(
            (
                distillation_of(model).record.added,
                {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    (loss, grads), (other_loss, other_grads) = found
    torch.testing.assert_close(loss, other_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-9, atol=1e-12)


def test_the_order_of_the_teachers_changes_nothing():
    losses = []
    for order in (["work", "bank", "travel"], ["travel", "work", "bank"]):  # a new order makes a new fusion
        model = with_teachers_of_their_own_scores(in_float64(objective=ALL_OBJECTIVES))
        torch.manual_seed(0)
        block = had.AdapterDistillation("insurance", order)
        model.train_adapter(block)
        model.train()(**make_batch())
        losses.append(distillation_of(model).take_record().added)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_the_student_alone_runs_in_evaluation():
    model = with_teachers_of_their_own_scores(in_float64(objective=ALL_OBJECTIVES))
    model.eval()
    batch = make_batch()
    with torch.no_grad():
        distilled = model(**batch).logits
        model.set_active_adapters(Stack("insurance"))
        torch.testing.assert_close(model(**batch).logits, distilled, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "loss"), [("features", FeatureLoss()), ("cosine", CosineLoss())])
def test_objectives_of_layers_match_what_the_layers_put_out(name, loss, monkeypatch):
    seen = []
    match = StudentPass.match

    def keep(self, student, target):
        seen.append(loss(student.output, target, self.token_weights(student.fusion, student.output)[0]).detach())
        match(self, student, target)

    monkeypatch.setattr(StudentPass, "match", keep)
    model = in_float64(objective=name)
    model.train()(**make_batch())
    assert len(seen) == 2
    torch.testing.assert_close(distillation_of(model).take_record().distillation_loss, torch.stack(seen).mean())


def test_cross_task_of_one_label_trains(trainer_args):
    model, _ = of_head("classification", objective="cross_task", head_config={"num_labels": 1, "multilabel": True})
    data = make_dataset().map(lambda row: {"labels": [float(row["labels"])]})
    trainer = trainer_for(model.float(), trainer_args(), train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-2]["distillation_loss"] > 0


def test_soft_labels_with_smoothed_ones(trainer_args):
    """The smoothed labels are the task's; the teachers' soft labels join them."""
    model = with_teachers_of_their_own_scores(make_student(make_model(), objective={"logits": 1.0, "features": 1.0}))
    trainer = trainer_for(model, trainer_args(label_smoothing_factor=0.1))
    trainer.train()
    last = [log for log in trainer.state.log_history if "distillation_loss/logits" in log][-1]
    added = last["distillation_loss"] + last["fusion_regularization"]
    assert last["loss"] == pytest.approx(last["task_loss"] + added, abs=1e-3)


@pytest.mark.parametrize("reduction_factor", [16, 1])
def test_a_step_leaves_nothing_to_the_garbage_collector(reduction_factor):
    """A graph in a reference cycle would hold its memory until the collector runs, in the middle of a later step."""
    model = make_student(make_model(), config=f"seq_bn[reduction_factor={reduction_factor}]").train()
    batch = make_batch()

    def step():
        model(**batch).loss.backward()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_layers_that_both_passes_of_dual_ran_are_matched():
    """Layerdrop draws the layers of each pass anew; no layer is matched with another one."""
    model = AutoModelForSeq2SeqLM.from_config(CONFIGS["bart"](encoder_layerdrop=0.5, decoder_layerdrop=0.5))
    adapters.init(model)
    model = make_student(model, carrier="dual", student_start="random").train()
    matched = []
    match = TrainingPass.match

    def note(self, student, target):
        matched.append((student.fusion.location, student.call))
        return match(self, student, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingPass, "match", note)
        for seed in range(6):
            torch.manual_seed(seed)
            output = model(**make_batch(labels="tokens"))
            assert output.loss.isfinite()
    assert 0 < len(matched) < 6 * len(fusions_of(model, "insurance"))


@pytest.mark.parametrize(("family", "head"), [("bert", "classification"), ("gpt2", "causal_lm")])
def test_predictions_need_one_active_head(family, head):
    model = make_student(make_model(family), head=head, objective="logits")
    model.active_head = ["insurance", "bank"]
    message = r"^The objectives of predictions need one active head, not \['insurance', 'bank'\]"
    with pytest.raises(ValueError, match=message):
        model.train()(**make_batch(labels="classification" if family == "bert" else "tokens"))


def test_each_run_of_a_shared_layer_is_matched_with_the_same_run():
    config = AlbertConfig(
        vocab_size=60,
        embedding_size=16,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = make_student(AutoAdapterModel.from_config(config), carrier="dual", student_start="random").train()
    fused, matched = [], []
    with pytest.MonkeyPatch.context() as patch:
        keep, match = DualFusedPass.match, TrainingPass.match
        patch.setattr(DualFusedPass, "match", lambda self, student, out: fused.append(out) or keep(self, student, out))
        patch.setattr(
            TrainingPass, "match", lambda self, student, out: matched.append(out) or match(self, student, out)
        )
        model(**make_batch())
    assert len(fused) == len(matched) == 3
    assert all(torch.equal(one, other) for one, other in zip(fused, matched, strict=True))
