"""LoRA teachers and students."""

import pytest
import torch
from adapter_kinds import EVERYWHERE, LORAS
from adapters import AdapterSetup, LoRAConfig
from marks import in_turn
from model_state import changed, snapshot
from tiny_models import TEACHERS, copy_weights, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method import layers
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layer_match import bounded_losses
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update, compose_distillation
from hf_adapter_distillation.method.losses import FeatureLoss, token_weights
from hf_adapter_distillation.method.stacking import stack
from hf_adapter_distillation.student.warm_start import average_lora


def loras(model, name):
    return [layer.loras[name] for _, layer in adapter_layers(model, name)]


@pytest.mark.parametrize("kind", LORAS)
def test_the_update_is_what_stock_adapters_add(kind):
    model = make_student(make_model(), config=LORAS[kind], train=False).double().eval()
    seen = []
    for _, layer in adapter_layers(model, "bank"):
        layer.loras["bank"].register_forward_hook(
            lambda lora, inputs, output: seen.append((output[0], adapter_update(lora, inputs[1], 0.0)))
        )
    with AdapterSetup("bank"):
        model(**make_batch())
    assert len(seen) == len(loras(model, "bank")) > 0
    for added, update in seen:
        assert added.abs().max() > 1e-3
        torch.testing.assert_close(update, added, rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_the_formulas(monkeypatch):
    """With projections of different input and output widths, and teachers of different ranks."""
    model = make_model()
    for name, rank in zip(TEACHERS, (2, 4, 4), strict=True):
        model.add_adapter(name, config=LoRAConfig(**EVERYWHERE, r=rank, alpha=3))
        noisy(model, name)
    model.add_adapter("insurance", config=LoRAConfig(**EVERYWHERE, r=3), distill_from=TEACHERS)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    noisy(model, "insurance")
    model, calls = model.double(), []

    def spy(layer, block, state, lvl=0):
        calls.append((layer, state.layer_input))
        return compose_distillation(layer, block, state, lvl)

    monkeypatch.setattr("hf_adapter_distillation.registration.compose_distillation", spy)
    batch = make_batch()
    model(**batch)
    losses, widths = [], set()
    for layer, h in calls:
        fusion, own = layer.distillation_fusion["insurance"], layer.loras["insurance"]
        u = h @ own.lora_A.T @ own.lora_B.T * own.lora_alpha / own.r
        updates = [h @ t.lora_A.T @ t.lora_B.T * 3 / t.r for t in (layer.loras[name] for name in TEACHERS)]
        q = h @ fusion.query.weight.T + fusion.query.bias
        a = torch.stack([(q * (x @ fusion.key.weight.T)).sum(-1) for x in updates], -1).softmax(-1)
        fused = sum(a[..., n : n + 1] * (x @ fusion.value.weight.T) for n, x in enumerate(updates))
        losses.append(FeatureLoss.match(u, fused, token_weights(batch["attention_mask"].double()), h))
        widths.add((h.shape[-1], u.shape[-1]))
    assert widths == {(32, 32), (32, 37), (37, 32)}
    assert len(losses) == 10
    record = distillations(model.adapters_config)["insurance"].record
    torch.testing.assert_close(
        record.distillation_loss, bounded_losses(losses).mean().detach(), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
def test_the_stacked_form_is_that_of_single_teachers(carrier, monkeypatch):
    gradients = []
    for stacked in (True, False):
        if not stacked:
            monkeypatch.setattr(layers, "group_alike", lambda *args: None)
        model = make_student(make_model(), config=LORAS["everywhere"], carrier=carrier, student_start="random")
        noisy(model, "insurance")
        model = model.double()
        torch.manual_seed(0)
        model(**make_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-10)


CASES = [
    ("bert", "classification", "default"),
    ("bert", "classification", "everywhere"),
    ("bert", "classification", "dropout"),
    ("distilbert", "classification", "everywhere"),
    ("llama", "causal_lm", "everywhere"),
    ("t5", "seq2seq_lm", "default"),
    ("bart", "seq2seq_lm", "default"),
]


@pytest.mark.parametrize(("family", "head", "kind", "start"), in_turn(CASES, ["random", "teachers"]))
def test_both_stages(family, head, kind, start, trainer_args, tmp_path):
    model = make_student(make_model(family), config=LORAS[kind], head=head, student_start=start)
    before = snapshot(model)
    args = trainer_args(
        max_steps=40,
        keep_fusion=True,
        learning_rate=1e-2,
        distillation_weight=10.0,
        save_strategy="steps",
        save_steps=35,
    )
    dataset = make_dataset(labels="classification" if head == "classification" else "tokens")
    trainer = had.DistillationTrainer(model, args, train_dataset=dataset)
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all(".insurance." in name for name in moved), moved
    logs = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs[-1] < logs[0]

    final = snapshot(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-35"))
    assert not changed(model, final), "the resumed run ends elsewhere"

    model.eval()
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    stock = make_model(family).eval()
    stock.load_adapter(str(tmp_path / "insurance"), set_active=True)
    batch = make_batch(labels="classification" if head == "classification" else "tokens")
    assert torch.equal(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize(("family", "cross"), [("t5", "EncDecAttention"), ("bart", "encoder_attn")])
def test_keys_and_values_of_cross_attention_follow_the_mask_of_the_encoder(family, cross):
    model = make_student(make_model(family), config=LORAS["everywhere"], head="seq2seq_lm")
    layers = adapter_layers(model, "insurance")
    in_decoder = {name for name, layer in layers if layer.distillation_fusion["insurance"].in_decoder}
    of_encoder = {name for name, layer in layers if cross in name and layer.attn_key in ("k", "v")}
    assert len(of_encoder) == 4
    assert in_decoder == {name for name, _ in layers if name.startswith("decoder")} - of_encoder


def test_dropout_of_the_student_is_not_matched():
    model = make_student(make_model(), config=LORAS["dropout"], student_start="random")
    noisy(model, "insurance")
    copy_weights(model, "insurance", TEACHERS)
    model.train()(**make_batch())
    assert distillations(model.adapters_config)["insurance"].record.distillation_loss < 1e-8


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_the_average_is_the_best_of_its_rank(rank):
    torch.manual_seed(0)

    def module(rank, alpha):
        model = make_model()
        model.add_adapter("a", config=LoRAConfig(r=rank, alpha=alpha))
        noisy(model, "a")
        return loras(model.double(), "a")[0]

    teachers = [module(3, 6), module(2, 1)]
    student = module(rank, 5)
    mean = sum(t.lora_B @ t.lora_A * t.lora_alpha / t.r for t in teachers) / 2
    average_lora(student, teachers, [1 / len(teachers)] * len(teachers))
    left, sizes, right = torch.linalg.svd(mean.detach())
    best = left[:, :rank] * sizes[:rank] @ right[:rank]
    torch.testing.assert_close(student.lora_B @ student.lora_A * 5 / rank, best, rtol=1e-9, atol=1e-9)


def test_teachers_of_lower_rank_leave_the_student_able_to_learn():
    model = make_model()
    model.add_adapter("bank", config=LoRAConfig(r=2, alpha=2))  # B is zero, as before a training
    model.add_adapter("insurance", config=LoRAConfig(r=4, alpha=4), distill_from=["bank"])
    for student in loras(model, "insurance"):
        assert student.lora_A.any(dim=1).all()
        assert not student.lora_B.any()
    noisy(model, "bank")
    model.add_adapter("insurance", config=LoRAConfig(r=4, alpha=4), distill_from=["bank"], overwrite_ok=True)
    for student in loras(model, "insurance"):
        assert student.lora_A.any(dim=1).all()
        assert student.lora_B[:, :2].all()
        assert not student.lora_B[:, 2:].any()


def test_the_student_starts_at_the_mean_of_its_teachers_weight_changes(trainer_args):
    model = make_model()
    model.add_adapter("bank", config=LoRAConfig(r=3, alpha=3))
    noisy(model, "bank")
    settings = had.DistillationConfig(["bank"], student_start="teachers")
    model.add_adapter("insurance", config=LoRAConfig(r=4, alpha=4), distill_from=settings)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    for student, teacher in zip(loras(model, "insurance"), loras(model, "bank"), strict=True):
        torch.testing.assert_close(student.lora_B @ student.lora_A, teacher.lora_B @ teacher.lora_A)
    assert distillations(model.adapters_config)["insurance"].start_digests
    trainer = had.DistillationTrainer(model, trainer_args(distillation_start=None), train_dataset=make_dataset())
    before = snapshot(model)
    trainer.fit_start()
    assert not changed(model, before)
    assert trainer.distillation_start == 0


def test_stacked_loras_have_no_biases():
    model = make_student(make_model(), config="lora", train=False)
    stacked = stack({name: loras(model, name)[0] for name in TEACHERS})
    assert stacked.down_bias is None
    assert stacked.activation is None
    assert len(stacked.down_weight) == 3 * 8
    assert not stacked.up[:, 3 * 8 :].any()
