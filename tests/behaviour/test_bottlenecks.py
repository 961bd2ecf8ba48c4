"""Bottleneck adapters of each kind as teachers and students."""

import logging

import pytest
import torch
from adapter_kinds import LORAS
from adapters import (
    AdapterPlusConfig,
    AdapterSetup,
    BnConfig,
    CompacterConfig,
    DoubleSeqBnConfig,
    ParBnConfig,
    SeqBnConfig,
)
from marks import in_turn
from model_state import changed, snapshot
from tiny_models import TEACHERS, copy_weights, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layer_match import bounded_losses
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update, compose_distillation
from hf_adapter_distillation.method.losses import FeatureLoss, token_weights

SMALL = {"reduction_factor": 8}
KINDS = {
    "seq_bn": SeqBnConfig(**SMALL),
    "double_seq_bn": DoubleSeqBnConfig(**SMALL),
    "seq_bn_inv": "seq_bn_inv",
    "par_bn": ParBnConfig(**SMALL),
    "scaled_par_bn": "scaled_par_bn",
    "compacter": CompacterConfig(**SMALL),
    "compacter++": "compacter++[reduction_factor=8]",
    "compacter, W shared": CompacterConfig(**SMALL, shared_W_phm=True),
    "adapter_plus": AdapterPlusConfig(**SMALL, stochastic_depth=0.0),
    "gated": SeqBnConfig(**SMALL, use_gating=True),
    "gated, parallel": ParBnConfig(**SMALL, use_gating=True),
    "norm before": SeqBnConfig(**SMALL, ln_before=True),
    "norm after": SeqBnConfig(**SMALL, ln_after=True),
    "norm after, with the residual": DoubleSeqBnConfig(**SMALL, ln_after=True, adapter_residual_before_ln=True),
    "norm after, with the other residual": SeqBnConfig(**SMALL, ln_after=True, adapter_residual_before_ln=True),
    "norm after, parallel": ParBnConfig(**SMALL, ln_after=True, adapter_residual_before_ln=True),
    "in both places": BnConfig(True, True, 4, "relu", original_ln_before=True, residual_before_ln="post_add"),
}


@pytest.mark.parametrize("kind", [*KINDS, *LORAS])
def test_teachers_that_are_the_student_fuse_to_the_student(kind):
    """Whatever the attention: the fused output is what stock adapters compute, and nothing is left to learn."""
    config = {**KINDS, **LORAS}[kind]
    model = make_student(make_model(), config=config, carrier="fused", student_start="random")
    noisy(model, "insurance")
    copy_weights(model, "insurance", TEACHERS)
    model = model.double().train()
    batch = make_batch()
    fused = model(**batch)
    record = distillations(model.adapters_config)["insurance"].record
    assert record.distillation_loss is not None
    assert record.distillation_loss < 1e-12
    model.set_active_adapters("insurance")
    for _, layer in adapter_layers(model, "insurance"):
        layer.adapter_modules["insurance"].eval()  # the fused output has no dropout
    torch.testing.assert_close(fused.logits, model(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_what_stock_adapters_add(kind):
    model = make_student(make_model(), config=KINDS[kind], train=False)
    noisy(model, "bank")
    model = model.double().eval()
    seen = []
    for _, layer in adapter_layers(model, "bank"):

        def note(adapter, inputs, kwargs, output):
            parallel = adapter.__class__.__name__ == "ParallelAdapter"
            added = output[0] if parallel else output[0] - kwargs["residual_input"]
            seen.append((added, adapter_update(adapter, inputs[0], kwargs["residual_input"])))

        layer.adapters["bank"].register_forward_hook(note, with_kwargs=True)
    with AdapterSetup("bank"):
        model(**make_batch())
    assert len(seen) == len(adapter_layers(model, "bank")) > 0
    for added, update in seen:
        assert added.abs().max() > 1e-3
        torch.testing.assert_close(update, added, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "start"), in_turn(KINDS, ["random", "teachers"]))
def test_both_stages(kind, start, trainer_args, tmp_path):
    model = make_student(make_model(), config=KINDS[kind], student_start=start)
    before = snapshot(model)
    args = trainer_args(num_train_epochs=5, keep_fusion=True, learning_rate=3e-3)
    trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset())
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all(".insurance." in name for name in moved), moved
    logs = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs[-1] < logs[0]

    model.eval()
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    stock = make_model().eval()
    stock.load_adapter(str(tmp_path / "insurance"), set_active=True)
    batch = make_batch()
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("par_bn", "seq_bn"),
        ("seq_bn", "par_bn"),
        ("compacter", "par_bn"),
        ("gated", "double_seq_bn"),
        ("norm after, with the residual", "seq_bn"),
        ("seq_bn_inv", "double_seq_bn"),
        ("norm after, with the other residual", "in both places"),
    ],
)
def test_a_teacher_of_another_kind_reads_its_own_input(teacher, student, monkeypatch):
    """With one teacher the fused output is its update, wherever the student stands."""
    model = make_model()
    model.add_adapter("bank", config=KINDS[teacher])
    noisy(model, "bank")
    config = had.DistillationConfig(["bank"], student_start="random")
    model.add_adapter("insurance", config=KINDS[student], distill_from=config)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    noisy(model, "insurance")
    model = model.double()
    calls = []

    def spy(layer, block, state, lvl=0):
        result = compose_distillation(layer, block, state, lvl)
        if "bank" in layer.adapters:
            of_student, of_teacher = (
                layer.compose_single(name, layer.pre_block(name, state)) for name in ("insurance", "bank")
            )
            read = layer.pre_block("insurance", state).hidden_states
            calls.append([added_by(layer, "insurance", of_student), added_by(layer, "bank", of_teacher), read])
        return result

    def added_by(layer, name, state):
        parallel = layer.adapters[name].__class__.__name__ == "ParallelAdapter"
        return state.hidden_states if parallel else state.hidden_states - state.adapter_residual

    monkeypatch.setattr("hf_adapter_distillation.registration.compose_distillation", spy)
    batch = make_batch()
    model(**batch)
    weights = token_weights(batch["attention_mask"].double())
    expected = bounded_losses([FeatureLoss.match(u, fused, weights, h) for u, fused, h in calls]).mean()
    record = distillations(model.adapters_config)["insurance"].record
    torch.testing.assert_close(record.distillation_loss, expected.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("carrier", ["student", "fused"])
def test_no_gradient_flows_through_teachers_that_explain_the_student(carrier, monkeypatch):
    """With the carrier `student` the teachers' inputs and residuals are out of the graph, whatever their kind."""
    model = make_model()
    kinds = {"bank": "par_bn", "travel": "norm after, with the residual", "insurance": "double_seq_bn"}
    for name, kind in kinds.items():
        config = had.DistillationConfig(["bank", "travel"], carrier=carrier) if name == "insurance" else None
        model.add_adapter(name, config=KINDS[kind], distill_from=config)
        noisy(model, name)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    in_graph = []

    def spy(adapter, hidden_states, residual):
        if adapter.name != "insurance":
            tensors = [t for t in (hidden_states, residual) if isinstance(t, torch.Tensor)]
            in_graph.append(any(tensor.requires_grad for tensor in tensors))
        return adapter_update(adapter, hidden_states, residual)

    monkeypatch.setattr("hf_adapter_distillation.method.layers.adapter_update", spy)
    model(**make_batch())
    assert len(in_graph) == 2 + 4
    assert any(in_graph) == (carrier == "fused")


def test_dropped_paths_of_the_student_are_not_matched():
    """A path that is dropped in a step says nothing about what the student knows."""
    model = make_student(make_model(), student_start="random")
    noisy(model, "insurance")
    copy_weights(model, "insurance", TEACHERS)
    for _, layer in adapter_layers(model, "insurance"):
        layer.adapters["insurance"].DropPath = torch.nn.Dropout(1.0)
    model.train()(**make_batch())
    assert distillations(model.adapters_config)["insurance"].record.distillation_loss < 1e-8


def test_an_invertible_adapter_starts_at_the_average_of_the_teachers():
    model = make_student(make_model(), config="seq_bn_inv", train=False)
    invertible = model.base_model.invertible_adapters
    average = torch.stack([invertible[name].F[0].weight for name in TEACHERS]).mean(0)
    torch.testing.assert_close(invertible["insurance"].F[0].weight, average)


@pytest.mark.parametrize("kind", ["gated", "gated, parallel", "norm after", "par_bn", "adapter_plus"])
def test_only_a_student_that_ends_in_its_up_projection_is_fitted(kind, trainer_args):
    model = make_student(make_model(), config=KINDS[kind])
    trainer = had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset())
    before = snapshot(model)
    trainer.fit_start()
    assert bool(changed(model, before)) == (kind in ("par_bn", "adapter_plus"))


def test_compacters_are_not_averaged(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_adapter_distillation"):
        model = make_student(make_model(), config=KINDS["compacter"], train=False)
    assert "'insurance' starts at random weights: the average of the teachers' factors" in caplog.text
    assert distillations(model.adapters_config)["insurance"].start_digests == frozenset()
