"""Fusion of what whole layers put out: methods without a common update, and mixtures of methods."""

import copy

import pytest
import torch
from adapters import AutoAdapterModel, IA3Config, LoRAConfig, LoReftConfig, PrefixTuningConfig, Stack
from model_state import changed, configure, snapshot
from tiny_models import CONFIGS, TEACHERS, copy_weights, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method import training_pass as passes
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.fusion import TeacherFusion, fusions_of
from hf_adapter_distillation.method.layer_match import bounded_losses
from hf_adapter_distillation.method.losses import FeatureLoss, token_weights
from hf_adapter_distillation.student.warm_start import is_at_average

LOREFT = LoReftConfig(prefix_positions=2, suffix_positions=2)  # adapters' own needs both for another type than float32
MIXTURES = {
    "ia3": (["ia3", "ia3", "ia3"], "ia3"),
    "prefix_tuning": (["prefix_tuning"] * 3, "prefix_tuning"),
    "loreft": ([LOREFT] * 3, LOREFT),
    "mam": (["mam"] * 3, "mam"),
    "unipelt": (["unipelt"] * 3, "unipelt"),
    "dora": (["dora"] * 3, "dora"),
    "vera": (["vera"] * 3, "vera"),
    "mixed": (["seq_bn", "lora", "prefix_tuning"], "seq_bn"),
    "mixed into ia3": ([LOREFT, "ia3", "par_bn"], "ia3"),
}


def make_mixture(teachers, student, family="bert", carrier="student", dtype=torch.float64, model=None, **kw):
    model = model or make_model(family, dtype=dtype)
    for name, config in zip(TEACHERS, teachers, strict=True):
        model.add_adapter(name, config=config)
    distill_from = had.DistillationConfig(TEACHERS, carrier=carrier, student_start="random", **kw)
    model.add_adapter("insurance", config=student, distill_from=distill_from)
    head = "causal_lm" if family in ("gpt2", "llama") else "seq2seq_lm" if family == "t5" else "classification"
    getattr(model, f"add_{head}_head")("insurance")
    for name in (*TEACHERS, "insurance"):
        noisy(model, name, std=0.05)
    model.to(dtype)
    model.train_adapter("insurance")
    for fusion in fusions_of(model, "insurance"):  # else the attention is even and the value the identity
        for parameter in fusion.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def batch_for(model):
    return make_batch(labels="classification" if model.config.model_type == "bert" else "tokens")


def distil(model, batch=None):
    distillation = distillations(model.adapters_config)["insurance"]
    output = model(**(batch or batch_for(model)))
    return output, distillation.take_record()


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_loss_is_that_of_the_outputs_under_each_adapter(mixture, family, monkeypatch):
    if (family, mixture) == ("llama", "vera"):
        pytest.skip("adapters' own VeRA does not run where keys are narrower than queries")
    model = make_mixture(*MIXTURES[mixture], family)
    assert distillations(model.adapters_config)["insurance"].level == "layer"
    compare_with_whole_passes(model, monkeypatch)


def test_layers_run_again_without_the_dropout_of_prefixes(monkeypatch):
    prefixes = PrefixTuningConfig(prefix_length=4, bottleneck_size=8, dropout=0.5)
    compare_with_whole_passes(make_mixture([prefixes] * 3, prefixes), monkeypatch)


@pytest.mark.parametrize("below", ["seq_bn", "prefix_tuning"])
@pytest.mark.parametrize("stacked_by_hand", [False, True])
def test_what_is_stacked_below_the_student_runs_below_the_teachers_too(below, stacked_by_hand, monkeypatch):
    model = make_mixture(*MIXTURES["mixed"])
    model.add_adapter("german", config=below)
    noisy(model, "german", std=0.05)
    model.double()
    if stacked_by_hand:
        model.active_adapters = Stack("german", model.active_adapters)
    else:
        model.train_adapter(had.AdapterDistillation(Stack("german", "insurance"), TEACHERS))
    compare_with_whole_passes(model, monkeypatch, "german")


class Noted(FeatureLoss):
    """The objective `features`, which notes its loss in each layer."""

    def __init__(self, terms):
        super().__init__()
        self.terms = terms

    def match(self, *outputs):
        self.terms.append(super().match(*outputs))
        return self.terms[-1]


def compare_with_whole_passes(model, monkeypatch, *below):
    """Reference: the first layer in whole passes, each with one adapter, which all read the same embeddings."""
    batch, terms = batch_for(model), []
    monkeypatch.setitem(passes.LAYER_LOSSES, "features", Noted(terms))
    _, record = distil(model, batch)
    assert len(terms) == 2
    assert torch.allclose(bounded_losses(terms).mean(), record.distillation_loss)

    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    location, attention = next(iter(record.attention.items()))
    first = model.base_model.get_submodule(location)
    states = []
    first.register_forward_hook(lambda module, args, output: states.append((args[0], output)))

    def run(*names):
        model.set_active_adapters(Stack(*names) if names else None)
        with torch.no_grad():
            model.base_model(**inputs)
        embedded, output = states[-1]  # (B, T, d) each
        return embedded, output if isinstance(output, torch.Tensor) else output[0]

    embedded, without = run(*below)
    update = {name: run(*below, name)[1] - without for name in (*TEACHERS, "insurance")}
    fusion = next(f for f in fusions_of(model, "insurance") if f.location == location)
    query, values = fusion.query(embedded), torch.stack([update[name] for name in TEACHERS], dim=2)
    weights = torch.einsum("btd,btnd->btn", query, values @ fusion.key.weight.T).softmax(dim=-1)
    fused = torch.einsum("btn,btnd->btd", weights, values @ fusion.value.weight.T)
    mask = batch["attention_mask"].double()
    expected = FeatureLoss.match(update["insurance"], fused, token_weights(mask), embedded)
    assert attention.names == tuple(TEACHERS)
    mean = (weights * mask.unsqueeze(-1)).sum(dim=(0, 1)) / mask.sum()
    assert torch.allclose(attention.weights, mean, atol=1e-10)

    for part, expected_part in zip(terms[0], expected, strict=True):
        assert torch.allclose(part, expected_part, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_update_at_the_end_of_a_layer_is_the_same_at_both_levels(family, carrier):
    """In these models nothing follows the output adapter of a layer, so that both levels compute one function."""
    outputs = {}
    for level in ("adapter", "layer"):
        model = make_mixture(["seq_bn"] * 3, "seq_bn", family, carrier, level=level)
        distillation = distillations(model.adapters_config)["insurance"]
        configure(model, fused_probability=1.0)  # else the draws of two runs differ
        for fusion in fusions_of(model, "insurance"):  # the query reads the input of the adapter, or of the layer
            torch.nn.init.zeros_(fusion.query.weight)
        assert distillation.level == level
        model.zero_grad()
        output, record = distil(model)
        output.loss.backward()
        fusions = fusions_of(model, "insurance")
        gradients = [p.grad for fusion in fusions for p in fusion.parameters() if p is not fusion.query.weight]
        if carrier == "fused":  # elsewhere a layer that is run again is matched at detached inputs
            gradients += [p.grad for name, p in model.named_parameters() if ".adapters.insurance." in name]
        outputs[level] = [output.loss, record.added, *gradients]
    tolerance = {"atol": 1e-7, "rtol": 1e-5} if family == "llama" else {"atol": 1e-10, "rtol": 1e-8}
    for inside, whole in zip(*outputs.values(), strict=True):  # the norms of Llama compute in float32
        assert torch.allclose(inside, whole, **tolerance)


def test_each_layer_is_matched_at_the_states_that_it_gets(monkeypatch):
    model, terms = make_mixture(*MIXTURES["mixed"]), []
    monkeypatch.setitem(passes.LAYER_LOSSES, "features", Noted(terms))
    distil(model)
    for layer in range(2):
        own = [p for name, p in model.named_parameters() if f".layer.{layer}." in name and ".insurance." in name]
        for number, term in enumerate(terms):
            gradients = torch.autograd.grad(term.error.sum(), own, allow_unused=True, retain_graph=True)
            assert {gradient is None for gradient in gradients} == {number != layer}


@pytest.mark.parametrize("mixture", [name for name in MIXTURES if name != "mixed into ia3"])
def test_teachers_that_are_the_student_leave_no_loss_whatever_the_dropout(mixture):
    student = MIXTURES[mixture][1]
    model = make_mixture([student] * 3, student, model=make_model(dropout=True, dtype=torch.float64), level="layer")
    copy_weights(model, "insurance", TEACHERS)
    for fusion in fusions_of(model, "insurance"):
        torch.nn.init.eye_(fusion.value.weight)
    _, record = distil(model)
    assert record.distillation_loss < 1e-20
    noisy(model, "work")
    assert distil(model)[1].distillation_loss > 1e-6


@pytest.mark.parametrize("carrier", ["student", "fused", "dual"])
@pytest.mark.parametrize(("family", "mixture"), [("bert", "mixed"), ("llama", "mam"), ("t5", "prefix_tuning")])
def test_gradient_checkpointing_changes_nothing(family, mixture, carrier):
    results = []
    for checkpointing in (False, True):
        model = make_mixture(*MIXTURES[mixture], family, carrier)
        if checkpointing:
            model.gradient_checkpointing_enable()
        output, record = distil(model)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append((output.loss, record.added, gradients))
    (loss, term, plain), (loss_again, term_again, checkpointed) = results
    assert torch.allclose(loss, loss_again, rtol=1e-12)
    assert torch.allclose(term, term_again, rtol=1e-12)
    assert {name for name, grad in plain.items() if grad is None} == {n for n, g in checkpointed.items() if g is None}
    for name, gradient in plain.items():
        assert gradient is None or torch.allclose(gradient, checkpointed[name], atol=1e-12, rtol=1e-9), name


@pytest.mark.parametrize("carrier", ["student", "mixed"])
@pytest.mark.parametrize(("family", "mixture"), [("bert", "mixed"), ("bert", "mixed into ia3"), ("gpt2", "vera")])
def test_both_stages(family, mixture, carrier, trainer_args, tmp_path):
    teachers, student = MIXTURES[mixture]
    if family == "gpt2":  # its merged projections take plain LoRA only
        teachers, student = ["lora", "ia3", "prefix_tuning"], "lora"
    model = make_mixture(teachers, student, family, carrier, dtype=torch.float32)
    before = snapshot(model)
    args = trainer_args(
        max_steps=8, keep_fusion=True, distillation_weight=10.0, distillation_start=0.25, save_strategy="steps",
        save_steps=8,
    )  # fmt: skip
    dataset = make_dataset(labels="classification" if family == "bert" else "tokens")
    trainer = had.DistillationTrainer(model, args, train_dataset=dataset)
    table = trainer.parameter_table().splitlines()[-1]
    assert table.startswith("Stage 2 fuses whole layers, and runs each 5 times more (Teacher '")
    trainer.train()
    moved = changed(model, before)
    assert any("distillation_fusion" in name for name in moved)
    assert {name for name in moved if ".insurance" not in name} == set()
    terms = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert len(terms) == 6
    assert sum(terms[-2:]) < sum(terms[:2])

    model.eval()
    batch = batch_for(model)
    distilled = model(**batch).logits
    model.save_adapter(str(tmp_path / "saved"), "insurance")
    stock = AutoAdapterModel.from_config(model.config)
    stock.load_state_dict({k: v for k, v in model.state_dict().items() if k in stock.state_dict()}, strict=False)
    stock.load_adapter(str(tmp_path / "saved"), set_active=True)
    assert torch.equal(stock.eval()(**batch).logits, distilled), "the student does not need its teachers"


@pytest.mark.parametrize("mixture", ["prefix_tuning", "loreft", "ia3", "unipelt"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(mixture, trainer_args, tmp_path):
    def run(folder, steps, resume=None):
        model = make_mixture(*MIXTURES[mixture], dtype=torch.float32)
        args = trainer_args(output_dir=str(tmp_path / folder), max_steps=6, save_strategy="steps", save_steps=4)
        trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset())
        trainer.train(resume_from_checkpoint=resume)
        return {name: p for name, p in model.named_parameters() if "insurance" in name}

    unbroken = run("whole", 6)
    resumed = run("resumed", 6, resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert unbroken
    assert all(torch.equal(resumed[name], weight) for name, weight in unbroken.items())


def test_evaluation_runs_no_layer_twice(monkeypatch):
    model = make_mixture(*MIXTURES["mixed"])
    calls = []
    monkeypatch.setattr(TeacherFusion, "forward", lambda *args: calls.append(args))
    layer = model.bert.encoder.layer[0].attention
    layer.register_forward_hook(lambda *args: calls.append("layer"))
    with torch.no_grad():
        model(**make_batch())
        model.eval()
        model(**make_batch())
    assert calls == ["layer", "layer"]


def test_a_layer_is_run_again_in_evaluation_mode_and_is_in_training_mode_after_it():
    model = make_mixture(*MIXTURES["mixed"])
    before = {name: module.training for name, module in model.named_modules()}
    modes = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda module, *args: modes.append(module.training))
    distil(model)
    assert modes == [True, False, False, False, False, False]
    assert before == {name: module.training for name, module in model.named_modules()}


def test_prefixes_of_other_lengths_and_interventions_at_other_positions_do_not_meet():
    """What adapters caches in a pass for one adapter must not be read by another one."""
    for configs in (
        [PrefixTuningConfig(prefix_length=n) for n in (2, 5, 9)],
        [LoReftConfig(prefix_positions=n, suffix_positions=1) for n in (1, 2, 3)],
    ):
        losses = []
        for order in ([0, 1, 2], [2, 1, 0]):
            model = make_model(dtype=torch.float64)
            for i in range(3):
                model.add_adapter(TEACHERS[i], config=configs[i])
            model.add_adapter("insurance", config="seq_bn")
            model.add_classification_head("insurance")
            for name in (*TEACHERS, "insurance"):
                torch.manual_seed(len(name))
                noisy(model, name, std=0.05)
            model.double()
            torch.manual_seed(0)
            model.train_adapter(had.AdapterDistillation("insurance", [TEACHERS[i] for i in order]))
            losses.append(distil(model)[1].distillation_loss)
        assert torch.allclose(*losses, rtol=1e-10)
        assert losses[0] > 0


def test_the_student_starts_at_the_average_where_weights_are_not_multiplied():
    model = make_model()
    for i, name in enumerate(TEACHERS):
        model.add_adapter(name, config=IA3Config())
        for place in model.get_adapter(name).values():
            for module in place.values():
                for parameter in module.parameters():
                    torch.nn.init.constant_(parameter, i)
    model.add_adapter("insurance", config=IA3Config(), distill_from=TEACHERS)
    parameters = [p for name, p in model.named_parameters() if ".insurance." in name]
    assert parameters
    assert all((p == 1).all() for p in parameters)


def test_hooks_and_fusions_go_with_the_student():
    model = make_model()
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    make_mixture(*MIXTURES["mixed"], model=model, dtype=torch.float32)
    model.train_adapter("insurance")  # again: no second hook
    layers = [layer for _, layer in model.base_model.iter_layers()]
    assert all(len(layer._forward_hooks) == 2 for layer in layers), "ReFT's of adapters, and ours"
    model.delete_adapter("insurance")
    assert hooks == {name: len(m._forward_hooks) for name, m in model.named_modules() if name in hooks}
    assert not any("distillation_fusion" in name for name, _ in model.named_modules())


def test_two_students_on_one_model_do_not_meet():
    model = make_mixture(*MIXTURES["mixed"])
    _, alone = distil(model)
    model.add_adapter("other", config="ia3", distill_from=["bank"])
    model.add_classification_head("other")
    model.train_adapter("other")
    model.train_adapter("insurance")
    _, again = distil(model)
    assert torch.equal(alone.distillation_loss, again.distillation_loss)


def test_a_copied_model_distils_on_its_own():
    model = make_mixture(*MIXTURES["mixed"])
    _, record = distil(model)
    other = copy.deepcopy(model)
    noisy(model, "bank")  # the copy does not see it
    _, of_other = distil(other)
    assert torch.equal(record.distillation_loss, of_other.distillation_loss)
    assert distil(model)[1].distillation_loss != record.distillation_loss


def test_attention_and_provenance_know_the_level(tmp_path):
    model = make_mixture(*MIXTURES["mixed"])
    table = had.teacher_attention(model, make_dataset(4))
    assert list(table) == ["encoder.layer.0", "encoder.layer.1"]
    assert all(abs(sum(map(float, row.values())) - 1) < 1e-6 for row in table.values())
    provenance = had.student.provenance.Provenance.of(model, distillations(model.adapters_config)["insurance"])
    assert provenance.to_dict()["level"] == "layer"


def test_lora_teachers_in_merged_projections(trainer_args):
    model = make_mixture([LoRAConfig(r=2), LoRAConfig(r=4), LoRAConfig(r=8)], "lora", "gpt2")
    assert distillations(model.adapters_config)["insurance"].level == "layer"
    assert CONFIGS["gpt2"]().n_layer == len(fusions_of(model, "insurance"))


def test_the_average_start_and_levels_of_one_kind_of_student(trainer_args):
    model = make_student(make_model(), level="layer")
    distillation = distillations(model.adapters_config)["insurance"]
    assert (distillation.level, distillation.level_reason) == ("layer", "")
    trainer = had.DistillationTrainer(model, trainer_args(max_steps=1), train_dataset=make_dataset())
    trainer.fit_start()
    assert is_at_average(model, "insurance"), "not fitted: there is no single up-projection to fit"
