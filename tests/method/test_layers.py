"""The layer against a plain reference, and which forward passes distil."""

import copy

import pytest
import torch
from adapters import AdapterSetup, Stack
from marks import LONG, needs_compiler
from model_state import changed, configure, snapshot, take_terms
from tiny_models import CONFIGS, TEACHERS, distillation_of, make_batch, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import TeacherFusion, fusions_of
from hf_adapter_distillation.method.layer_pass import logger
from hf_adapter_distillation.method.layers import (
    FusedLayer,
    adapter_layers,
    adapter_update,
    adapters_of,
    compose_distillation,
)
from hf_adapter_distillation.method.losses import FeatureLoss, token_weights
from hf_adapter_distillation.method.low_rank import LowRankUpdates
from hf_adapter_distillation.method.stacking import StackedAdapters


@pytest.mark.parametrize("family", CONFIGS)
def test_the_modules_of_several_adapters_are_those_that_adapters_returns(family):
    configs = ["double_seq_bn", "seq_bn_inv", "lora[attn_matrices=['q','k','v']]", "mam", "compacter", "prompt_tuning"]
    model, added = make_model(family, "base"), []
    for name, config in zip("abcdef", configs, strict=True):
        try:
            model.add_adapter(name, config=config)
            added.append(name)
        except Exception:  # a method that adapters does not have for the family
            continue

    def weights(places):
        return {
            place: {key: [(name, id(p)) for name, p in module.named_parameters()] for key, module in modules.items()}
            for place, modules in places.items()
        }

    found = adapters_of(model, added)
    assert len(added) >= 3
    for name in added:
        assert weights(found[name]) == weights(model.get_adapter(name))
    for name in added:
        modules = model.base_model.named_modules()
        layers = [(key, m) for key, m in modules if isinstance(m, FusedLayer) and name in m.adapter_modules]
        assert adapter_layers(model, name) == layers


@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_layers_that_run_outside_of_the_model_say_that_nothing_is_distilled(level, caplog):
    model, batch = make_student(make_model(), level=level), make_batch()
    logger.warning_once.cache_clear()

    def warnings_of(run):
        caplog.clear()
        run()
        beginning = "'insurance' is not distilled here: the model is in evaluation mode"
        return [record.message for record in caplog.records if record.message.startswith(beginning)]

    encoder, embedded = model.bert.encoder, model.bert.embeddings(batch["input_ids"])
    assert not warnings_of(lambda: model.train()(**batch))
    assert not warnings_of(lambda: model.eval().bert.encoder(embedded))
    with torch.no_grad():
        assert not warnings_of(lambda: model.train().bert.encoder(embedded))
    assert len(warnings_of(lambda: encoder(embedded))) == 1
    assert not warnings_of(lambda: encoder(embedded)), "once"
    logger.warning_once.cache_clear()
    model.set_active_adapters("bank")
    assert not warnings_of(lambda: encoder(embedded))


def forward_in_stage_2(model, **settings):
    configure(model, **settings)
    model.train()
    output = model(**make_batch())
    return output, distillation_of(model).take_record()


@pytest.mark.parametrize("carrier", ["student", "fused"])
@pytest.mark.parametrize("config", ["seq_bn", "double_seq_bn"])
def test_layers_equal_the_plain_reference(carrier, config, monkeypatch):
    """Each layer's terms, computed anew from its input with the modules' weights in float64."""
    model = make_student(
        make_model(dtype=torch.float64).double(), config=config, carrier=carrier, student_start="random"
    )
    model.double()
    calls = []

    def spy(layer, block, state, lvl=0):
        result = compose_distillation(layer, block, state, lvl)
        calls.append((layer, state, result))
        return result

    monkeypatch.setattr("hf_adapter_distillation.registration.compose_distillation", spy)
    batch = make_batch()
    output, record = forward_in_stage_2(model, weight=0.7, regularization=0.0)
    assert len(calls) == len(adapter_layers(model, "insurance")) > 0
    losses = []
    for layer, state, result in calls:
        student, fusion = layer.adapters["insurance"], layer.distillation_fusion["insurance"]
        h, residual = state.hidden_states, state.hidden_states
        if config == "seq_bn":
            h = state.layer_norm(h + state.input_tensor)

        def update(adapter, h=h):
            down, up = adapter.adapter_down[0], adapter.adapter_up
            return (
                torch.relu(h @ down.weight.T + down.bias) @ up.weight.T + up.bias
                if config == "seq_bn"
                else adapter(h, residual_input=0)[0]
            )

        u = update(student)
        updates = [update(layer.adapters[name]) for name in TEACHERS] + ([u] if carrier == "fused" else [])
        q = h @ fusion.query.weight.T + fusion.query.bias
        scores = torch.stack([(q * (x @ fusion.key.weight.T)).sum(-1) for x in updates], -1)
        a = scores.softmax(-1)
        fused = sum(a[..., n : n + 1] * (x @ fusion.value.weight.T) for n, x in enumerate(updates))
        losses.append(FeatureLoss()(u, fused, token_weights(batch["attention_mask"].double())))
        passed_on = residual + (u if carrier == "student" else fused)
        torch.testing.assert_close(result.hidden_states, passed_on, rtol=1e-10, atol=1e-10)
        names = [*TEACHERS, "insurance"][: len(updates)]
        mask = batch["attention_mask"].bool()
        for n, name in enumerate(names):
            seen = dict(zip(*record.attention[fusion.location], strict=True))
            torch.testing.assert_close(seen[name], a[..., n][mask].mean().detach())
    torch.testing.assert_close(record.distillation_loss, torch.stack(losses).mean().detach(), rtol=1e-10, atol=1e-12)
    model.set_active_adapters("insurance")
    if carrier == "student":
        plain = model(**batch).loss
        assert torch.equal(output.loss, plain)
        torch.testing.assert_close(record.added, 0.7 * record.distillation_loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
def test_evaluation_is_the_plain_student_and_touches_no_teacher(carrier, monkeypatch):
    model = make_student(make_model(), carrier=carrier)
    noisy(model, "insurance")
    touched = []
    features = StackedAdapters.features
    monkeypatch.setattr(StackedAdapters, "features", lambda *args: touched.append(1) or features(*args))
    for name in TEACHERS:
        for _, layer in adapter_layers(model, name):
            layer.adapters[name].adapter_down.register_forward_hook(lambda *a: touched.append(1))
    model.eval()
    batch = make_batch()
    distilled = model(**batch)
    with torch.no_grad():
        model.train()
        no_grad = model(**batch)
    model.eval()
    model.set_active_adapters("insurance")
    plain = model(**batch)
    assert torch.equal(distilled.logits, plain.logits)
    assert torch.equal(no_grad.loss, plain.loss)
    assert not touched
    model.train_adapter("insurance")
    model(**batch)
    assert touched, "the spy must see a training pass"


def test_stage_1_is_plain_training_and_keeps_the_fusion_in_the_graph():
    model = make_student(make_model())
    output, record = forward_in_stage_2(model, enabled=False)
    assert record.distillation_loss is None
    assert record.added == 0
    output.loss.backward()
    fusion = [p for name, p in model.named_parameters() if "distillation_fusion" in name]
    assert fusion
    assert all(p.grad is not None and not p.grad.any() for p in fusion)
    model.set_active_adapters("insurance")
    assert torch.equal(model(**make_batch()).loss, output.loss)


@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
def test_what_the_task_loss_trains(carrier):
    model = make_student(make_model(), carrier=carrier)
    noisy(model, "insurance")  # at the average of the teachers their fusion has no need of queries
    output, _ = forward_in_stage_2(model, weight=0.0, regularization=0.0, fused_probability=1.0)
    output.loss.backward()
    fusion = [p.grad for name, p in model.named_parameters() if "distillation_fusion" in name]
    assert any(grad.any() for grad in fusion) == (carrier != "student")
    assert all(p.grad is None for name, p in model.named_parameters() if any(f".{t}." in name for t in TEACHERS))


def test_distillation_loss_alone_reaches_fusion_and_student_with_the_student_carrier():
    model = make_student(make_model(), student_start="random")
    output, record = forward_in_stage_2(model)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    for part in ("query.weight", "key.weight", "value.weight", "adapters.insurance.adapter_up.weight"):
        assert any(grad.any() for name, grad in grads.items() if part in name), part


@pytest.mark.parametrize(("carrier", "reached"), [("student", True), ("fused", False), ("mixed", False)])
def test_the_student_imitates_a_fixed_target_where_the_task_trains_the_fusion(carrier, reached):
    model = make_student(make_model(), carrier=carrier, student_start="random")
    configure(model, regularization=0.0)
    model.train()
    batch = make_batch()
    del batch["labels"]
    (0.0 * model(**batch).logits.sum()).backward()
    fusion = [p.grad for name, p in model.named_parameters() if "layer.1.output.distillation_fusion" in name]
    assert len(fusion) == 4
    assert any(grad is not None and grad.any() for grad in fusion) == reached


def test_a_teacher_of_another_kind_prepares_its_own_input(monkeypatch):
    """A seq_bn teacher reads the normalised sum with the residual, a double_seq_bn student the raw states."""
    model = make_model()
    model.add_adapter("bank", config="seq_bn")
    noisy(model, "bank")
    model.add_classification_head("bank")
    model.add_adapter("insurance", config="double_seq_bn", distill_from=["bank"])
    model.train_adapter("insurance")
    states, seen = [], []
    features = StackedAdapters.features

    def spy(layer, block, state, lvl=0):
        states.append(state)
        return compose_distillation(layer, block, state, lvl)

    monkeypatch.setattr("hf_adapter_distillation.registration.compose_distillation", spy)
    monkeypatch.setattr(StackedAdapters, "features", lambda *args: seen.append(args[1]) or features(*args))
    forward_in_stage_2(model)
    assert len(seen) == 2
    for state, hidden_states in zip(states[1::2], seen, strict=True):  # the output blocks
        assert torch.equal(hidden_states, state.layer_norm(state.hidden_states + state.input_tensor))
        assert not torch.allclose(hidden_states, state.hidden_states)


@pytest.mark.parametrize("carrier", ["student", "fused"])
@pytest.mark.parametrize("student", ["seq_bn", "double_seq_bn"])
def test_stacked_teachers_equal_teachers_on_their_own(carrier, student, monkeypatch):
    """Loss, gradients and attention of the whole model, with teachers of several kinds and widths."""
    results = []
    for stacked in (True, False):
        if not stacked:
            monkeypatch.setattr("hf_adapter_distillation.method.stacking.can_be_stacked", lambda adapter: False)
        model = make_model()
        for name, config in (("bank", "seq_bn"), ("travel", "double_seq_bn"), ("work", "seq_bn[reduction_factor=4]")):
            model.add_adapter(name, config=config)
            model.add_classification_head(name)
            noisy(model, name)
        config = had.DistillationConfig(TEACHERS, carrier=carrier, student_start="random")
        model.add_adapter("insurance", config=student, distill_from=config)
        model.add_classification_head("insurance")
        noisy(model, "insurance")
        model.double()
        model.train_adapter("insurance")
        output, record = forward_in_stage_2(model, weight=1.0)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        attention = {location: dict(zip(*row, strict=True)) for location, row in record.attention.items()}
        results.append((output.loss, record.added, gradients, attention))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)
    assert any("query" in name and gradient.any() for name, gradient in results[0][2].items())


def test_a_teacher_whose_activation_has_weights_runs_on_its_own():
    model = make_model()
    for name, config in (("bank", "seq_bn[non_linearity='prelu']"), ("travel", "seq_bn")):
        model.add_adapter(name, config=config)
        model.add_classification_head(name)
        noisy(model, name)
    model.add_adapter("insurance", config="seq_bn", distill_from=["bank", "travel"])
    model.train_adapter("insurance")
    output, record = forward_in_stage_2(model)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert [row.names for row in record.attention.values()] == [("bank", "travel")] * 2


def test_a_student_whose_activation_has_weights_is_fused_on_its_own():
    model = make_student(make_model(), train=False)
    config = had.DistillationConfig(TEACHERS, carrier="fused", student_start="random")
    model.add_adapter("insurance", config="seq_bn[non_linearity='prelu']", distill_from=config, overwrite_ok=True)
    model.train_adapter("insurance")
    noisy(model, "insurance")
    output, record = forward_in_stage_2(model)
    output.loss.backward()
    assert [row.names for row in record.attention.values()] == [(*TEACHERS, "insurance")] * 2
    activation = adapter_layers(model, "insurance")[0][1].adapters["insurance"].non_linearity
    assert all(p.grad.any() for p in activation.parameters())
    assert list(activation.parameters())
    plain = record.distillation_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_adapter_distillation.method.stacking.can_be_stacked", lambda adapter: False)
        model.train_adapter("insurance")
        _, alone = forward_in_stage_2(model)
    torch.testing.assert_close(plain, alone.distillation_loss)
    stack_of_student = "hf_adapter_distillation.method.layers.stack"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack_of_student, lambda adapters: pytest.fail("the student must not be stacked"))
        model.train_adapter("insurance")
        forward_in_stage_2(model)


@pytest.mark.parametrize("config", ["seq_bn", "seq_bn[non_linearity='prelu']"])
def test_teachers_of_another_data_type_are_cast(config):
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_student(make_model(), config=config, student_start="random", train=False)
        for name in TEACHERS:
            for _, layer in adapter_layers(model, name):
                layer.adapters[name].bfloat16().to(dtype)
        model.train_adapter("insurance")
        output, record = forward_in_stage_2(model)
        output.loss.backward()
        losses.append(record.added.item())
    assert losses[0] == pytest.approx(losses[1], rel=0 if config == "seq_bn" else 1e-2)


def test_a_teacher_on_another_device_is_refused_before_anything_is_changed():
    model = make_student(make_model(), train=False)
    active = model.active_adapters
    adapter_layers(model, "bank")[1][1].adapters["bank"].to("meta")
    message = r"Teacher 'bank' is on meta, 'insurance' on cpu \(encoder.layer.1.*call model.to\('cpu'\)"
    for setup in ("insurance", had.AdapterDistillation("insurance", teachers=TEACHERS)):
        with pytest.raises(ValueError, match=message):
            model.train_adapter(setup)
    assert model.active_adapters == active
    assert not any("distillation_fusion" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_each_layer_may_be_on_a_device_of_its_own(level):
    model = make_student(make_model(), train=False, level=level, student_start="random")
    model.bert.encoder.layer[1].to("meta")
    model.train_adapter("insurance")
    devices = [next(fusion.parameters()).device.type for fusion in fusions_of(model, "insurance")]
    assert devices == ["cpu", "meta"]


@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
def test_one_token_one_teacher_of_width_one_and_padded_rows_are_finite(carrier):
    model = make_student(make_model(), teachers=["bank"], config="seq_bn[reduction_factor=32]", carrier=carrier)
    configure(model, fused_probability=1.0)
    model.train()
    one_token = {name: value[:1, :1] if value.dim() == 2 else value[:1] for name, value in make_batch().items()}
    padded_row = make_batch()
    padded_row["attention_mask"][1] = 0
    for batch in (one_token, padded_row):
        output = model(**batch)
        output.loss.backward()
        assert torch.isfinite(output.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("carrier", ["student", "fused"])
def test_autocast_softmax_is_float32(carrier, dtype, monkeypatch):
    model = make_student(make_model(), carrier=carrier)
    seen = []
    softmax = torch.Tensor.softmax

    def spy(tensor, *args, **kwargs):
        result = softmax(tensor, *args, **kwargs)
        seen.append(result.dtype)
        return result

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    with torch.autocast("cpu", dtype=dtype):
        output, record = forward_in_stage_2(model)
    output.loss.backward()
    assert seen == [torch.float32] * 2
    assert record.distillation_loss.dtype == torch.float32


LENGTHS = (8, 6, 7, 12, 9)


@needs_compiler
@pytest.mark.timeout(900)  # which a busy machine may need to compile
@pytest.mark.parametrize(
    ("carrier", "lengths"),
    [
        ("mixed", LENGTHS[:1]),
        *(pytest.param(carrier, LENGTHS, marks=LONG) for carrier in ("student", "fused", "mixed", "dual")),
    ],
)
def test_compiled_code_equals_eager_code_at_any_length(carrier, lengths):
    """Without graph breaks, and compiled at most twice: for the first length, and for any."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_student(make_model(), carrier=carrier, student_start="random").train()
    configure(model, fused_probability=torch.tensor(0.5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seq_len in lengths:
        losses, gradients = [], []
        for run in (compiled, model):
            torch.manual_seed(seq_len)
            loss = run(**make_batch(seq_len=seq_len)).loss
            loss.backward()
            losses.append(loss + take_terms(model))
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == min(len(lengths), 2)
    torch._dynamo.reset()


def test_gradient_checkpointing_computes_nothing_more_often_than_it_must(monkeypatch):
    calls = []
    features = StackedAdapters.features
    monkeypatch.setattr(StackedAdapters, "features", lambda *args: calls.append(1) or features(*args))
    counts = []
    for checkpointing in (False, True):
        model = make_student(make_model())
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls.clear()
        output, _ = forward_in_stage_2(model)
        output.loss.backward()
        counts.append(len(calls))
    assert counts == [2, 4]  # once in each of the two layers, and once more in the layer's recomputation


def test_dual_matches_a_fused_pass_and_a_students_pass(monkeypatch):
    fuse = TeacherFusion.fuse_stacked
    model = make_student(make_model().double(), carrier="dual", student_start="random").double()
    output, record = forward_in_stage_2(model, weight=0.7, regularization=0.01)
    seen = {}
    for carrier in ("fused", "student"):
        single = copy.deepcopy(model)
        distillation_of(single).config.carrier = carrier
        updates, targets = [], []
        for _, layer in adapter_layers(single, "insurance"):
            layer.adapters["insurance"].register_forward_hook(lambda *args, u=updates: u.append(args[2][2]))
        monkeypatch.setattr(TeacherFusion, "fuse_stacked", lambda *args, t=targets: t.append(fuse(*args)) or t[-1])
        part, _ = forward_in_stage_2(single, weight=0.0, regularization=0.0)
        seen[carrier] = part, updates, [target for target, _ in targets]
    monkeypatch.undo()
    fused, student = seen["fused"], seen["student"]
    weights = token_weights(make_batch()["attention_mask"].double())
    matched = [FeatureLoss()(u, f, weights) for u, f in zip(student[1], fused[2], strict=True)]
    logits = (student[0].logits - fused[0].logits).square().mean()
    torch.testing.assert_close(record.distillation_loss, (torch.stack(matched).mean() + logits).detach())
    torch.testing.assert_close(record.fused_task_loss, fused[0].loss.detach())
    torch.testing.assert_close(output.loss, student[0].loss + fused[0].loss)
    torch.testing.assert_close(record.added, 0.7 * record.distillation_loss + record.fusion_regularization)
    assert torch.equal(output.logits, student[0].logits)
    gradients = []
    for weight in (0.0, 0.7):  # the fused pass is a fixed target: matching moves the student alone
        model.zero_grad()
        forward_in_stage_2(model, weight=weight)[0].loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    moved = {name for name, grad in gradients[0].items() if not torch.equal(grad, gradients[1][name])}
    assert any("adapters.insurance" in name for name in moved)
    assert not any("distillation_fusion" in name for name in moved)


def test_dual_without_a_loss_of_the_model_is_refused():
    model = make_student(make_model(), carrier="dual").train()
    batch = make_batch()
    del batch["labels"]
    with pytest.raises(ValueError, match="The carrier 'dual' needs the loss of the model's output"):
        model(**batch)


def test_mixed_draws_between_student_and_fused():
    model = make_student(make_model(), carrier="mixed", student_start="random")
    losses = {}
    for p in (0.0, 1.0):
        output, record = forward_in_stage_2(model, weight=0.0, regularization=0.0, fused_probability=p)
        losses[p] = output.loss.item()
    for p, carrier in ((0.0, "student"), (1.0, "fused")):
        other = copy.deepcopy(model)
        distillation_of(other).config.carrier = carrier
        output, _ = forward_in_stage_2(other, weight=0.0, regularization=0.0)
        assert output.loss.item() == losses[p]
    assert losses[0.0] != losses[1.0]


def test_teachers_in_another_order_give_the_same_loss():
    losses = []
    for teachers in (TEACHERS, TEACHERS[::-1]):
        model = make_student(make_model().double(), student_start="random")
        model.double()
        distillation_of(model).config.teachers = teachers
        model.train_adapter("insurance")
        losses.append(forward_in_stage_2(model)[1].added)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


def test_mixture_of_reduction_factors_and_locations():
    model = make_model()
    for name, config in (
        ("bank", "double_seq_bn"),
        ("travel", "seq_bn[reduction_factor=4]"),
        ("work", "seq_bn[reduction_factor=2]"),
    ):
        model.add_adapter(name, config=config)
        model.add_classification_head(name)
        noisy(model, name)
    model.add_adapter("insurance", config="double_seq_bn[reduction_factor=8]", distill_from=TEACHERS)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    output, record = forward_in_stage_2(model)
    output.loss.backward()
    teachers_at = {location: set(row.names) for location, row in record.attention.items()}
    assert sorted(map(len, teachers_at.values())) == [1, 1, 3, 3]  # attention blocks have one teacher, outputs all
    assert all(abs(row.weights.sum() - 1) < 1e-6 for row in record.attention.values())
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("carrier", ["mixed", "dual"])
def test_gradient_checkpointing_changes_nothing(carrier):
    results = []
    for checkpointing in (False, True):
        model = make_student(make_model().double(), carrier=carrier, student_start="random")
        model.double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        configure(model, fused_probability=0.5)
        output = model(**make_batch())
        output.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "embeddings" not in name}
        results.append((output.loss + take_terms(model), grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-10, atol=1e-12)


LOW_RANK_CONFIGS = ["seq_bn", "par_bn", "double_seq_bn", "lora[r=2,alpha=6,dropout=0.3,intermediate_lora=True]"]


def student_of_rank(config, low_rank, monkeypatch, **settings):
    """A student with noisy weights, and whether its updates are low-rank updates, whatever that costs."""
    monkeypatch.setattr("hf_adapter_distillation.method.layers.is_cheaper", lambda *args: low_rank)
    model = make_student(
        make_model(dtype=torch.float64), config=config, student_start="random", fusion_rank=3, **settings
    )
    noisy(model, "insurance")
    return model.double()


@pytest.mark.parametrize("objective", ["features", {"features": 1.0, "cosine": 0.5}])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", LOW_RANK_CONFIGS)
def test_low_rank_updates_equal_the_updates(config, checkpointing, objective, monkeypatch):
    """Losses, gradients and attention of the whole model, with weights of layers and of teachers."""
    results, matches = [], []
    match = LowRankUpdates.match
    monkeypatch.setattr(LowRankUpdates, "match", lambda *args: matches.append(args) or match(*args))
    for low_rank in (True, False):
        matches.clear()
        model = student_of_rank(config, low_rank, monkeypatch, objective=objective)
        fusions = fusions_of(model, "insurance")
        for number, fusion in enumerate(fusions):
            fusion.set_weights({"bank": 0.9, "travel": 0.3, "work": 0.2})  # more than 1 together
            fusion.layer_weight = 1.0 + number
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        output, record = forward_in_stage_2(model, weight=0.7)
        output.loss.backward()
        matches_low_rank = low_rank and objective == "features"
        assert len(matches) == matches_low_rank * len(fusions) * (1 + checkpointing)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        attention = {location: dict(zip(*row, strict=True)) for location, row in record.attention.items()}
        results.append((output.loss, record.added, record.layer_losses, attention, gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    assert any("distillation_fusion" in name and gradient.any() for name, gradient in results[0][-1].items())


@pytest.mark.parametrize("low_rank", [True, False])
def test_low_rank_updates_keep_no_tensor_of_the_size_of_an_update(low_rank, monkeypatch):
    """The backward pass of projections with 37 outputs, of LoRA with dropout, has no more than a plain student's."""
    config = "lora[r=2,dropout=0.1,intermediate_lora=True,selfattn_lora=False]"
    model, kept, computed = student_of_rank(config, low_rank, monkeypatch), [], []
    spy = lambda *args: computed.append(args) or adapter_update(*args)  # noqa: E731
    monkeypatch.setattr("hf_adapter_distillation.method.layers.adapter_update", spy)
    for enabled in (True, False):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=tensors: s.append(t) or t, lambda t: t):
            forward_in_stage_2(model, enabled=enabled)
        size = 37 * make_batch()["input_ids"].numel()
        kept.append(len({t.data_ptr() for t in tensors if t.numel() == size and t.shape[-1] == 37}))
    assert (kept[0] > kept[1]) == (not low_rank)
    assert bool(computed) == (not low_rank), "the student's update is not computed once more"


def test_language_adapter_below_the_student_is_frozen_and_runs():
    model = make_student(make_model(), train=False)
    model.add_adapter("german", config="seq_bn")
    noisy(model, "german")
    model.train_adapter(had.AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS))
    model.add_classification_head("insurance", overwrite_ok=True)
    before = snapshot(model)
    output, record = forward_in_stage_2(model, weight=1.0)
    output.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert changed(model, before)
    assert not any("german" in name for name in changed(model, before))
    model.eval()
    block_logits = model(**make_batch()).logits
    model.set_active_adapters(Stack("german", "insurance"))
    assert torch.equal(model(**make_batch()).logits, block_logits)


def test_the_weights_of_the_tokens_are_made_once_for_all_layers(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "hf_adapter_distillation.method.layer_pass.token_weights", lambda m: calls.append(m) or token_weights(m)
    )
    forward_in_stage_2(make_student(make_model(), config="double_seq_bn"))
    assert len(calls) == 1
    assert calls[0].shape == make_batch()["attention_mask"].shape


def test_two_models_do_not_mix_their_losses():
    first, second = make_student(make_model(seed=0)), make_student(make_model(seed=1))
    alone, record = forward_in_stage_2(first)
    forward_in_stage_2(second)
    again, other = forward_in_stage_2(first)
    assert torch.equal(alone.loss, again.loss)
    assert torch.equal(record.added, other.added)


@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_a_pass_without_adapters_is_the_base_model_in_training_too(level):
    model, batch = make_student(make_model(), level=level, carrier="fused"), make_batch()
    with AdapterSetup(None, head_setup="insurance"):
        in_training, alone = model.train()(**batch).logits, model.eval()(**batch).logits
    assert torch.equal(in_training, alone)
    assert distillation_of(model).record is None
