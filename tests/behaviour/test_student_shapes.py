"""Students of other shapes than their teachers', and students on top of a language adapter."""

import math

import pytest
import torch
from adapters import LoRAConfig, Stack
from model_state import changed, snapshot
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, noisy
from without_package import logits_without_package

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers

SETTINGS = {"max_steps": 10, "distillation_start": 0.2, "distillation_weight": 20.0, "learning_rate": 2e-2}


def train(model, args, **kwargs):
    """Trains, checks the terms that were logged, and returns the parameters that moved."""
    before = snapshot(model)
    trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset(8))
    trainer.train(**kwargs)
    logs = [log for log in trainer.state.log_history if "task_loss" in log]
    assert [log["stage"] for log in logs] == [1] * 2 + [2] * 8
    assert all(math.isfinite(log["task_loss"]) for log in logs)
    losses = [log["distillation_loss"] for log in logs[2:]]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2]), losses
    return changed(model, before)


def logits_of(model, setup):
    model.set_active_adapters(setup)
    model.eval()
    with torch.no_grad():
        return model(**make_batch()).logits


def save(model, folder, *names):
    for name in names:
        model.save_adapter(str(folder / name), name)


def fresh_model(folder, *names, family="bert"):
    """A model that has the saved adapters alone."""
    model = make_model(family)
    for name in names:
        model.load_adapter(str(folder / name))
    return model


# Shapes: the configs of the teachers, that of the student, and the teachers that are fused at each location.

SHAPES = {
    "narrower": (["seq_bn[reduction_factor=2]"] * 3, "seq_bn[reduction_factor=8]", [3, 3]),
    "wider": (["seq_bn[reduction_factor=16]"] * 3, "seq_bn[reduction_factor=2]", [3, 3]),
    "student leaves out a layer": (["seq_bn"] * 3, "seq_bn[leave_out=[0]]", [3]),
    "teachers leave out a layer": (["seq_bn[leave_out=[1]]"] * 3, "seq_bn", [3]),
    "teachers leave out different layers": (
        ["seq_bn[leave_out=[0]]", "seq_bn[leave_out=[1]]", "seq_bn"], "seq_bn", [2, 2]
    ),
    "all leave out a layer": (["seq_bn[leave_out=[0]]"] * 3, "seq_bn[leave_out=[0]]", [3]),
    "double student": (["seq_bn"] * 3, "double_seq_bn", [3, 3]),
    "double teachers": (["double_seq_bn"] * 3, "seq_bn", [3, 3]),
    "LoRA of another rank": ([LoRAConfig(r=r) for r in (2, 4, 8)], LoRAConfig(r=1), [3] * 4),
    "LoRA of a higher rank": ([LoRAConfig(r=2)] * 3, LoRAConfig(r=8), [3] * 4),
    "LoRA at fewer projections": (
        [LoRAConfig(attn_matrices=["q", "k", "v"])] * 3, LoRAConfig(attn_matrices=["k"]), [3] * 2
    ),
    "LoRA at other projections": (
        [LoRAConfig(attn_matrices=["q", "v"]), LoRAConfig(attn_matrices=["k", "v"]), LoRAConfig(attn_matrices=["v"])],
        LoRAConfig(attn_matrices=["q", "v"], intermediate_lora=True, r=4), [1, 1, 3, 3],
    ),
    "LoRA that leaves out a layer": ([LoRAConfig()] * 3, LoRAConfig(leave_out=[1]), [3] * 2),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_student_of_another_shape(shape, trainer_args, tmp_path):
    configs, student_config, fused = SHAPES[shape]
    model = make_model()
    for name, config in zip(TEACHERS, configs, strict=True):
        model.add_adapter(name, config=config)
        noisy(model, name)
        model.add_classification_head(name)
    config = had.DistillationConfig(TEACHERS, student_start="random")
    model.add_adapter("insurance", config=student_config, distill_from=config)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    model.train()
    model(**make_batch())
    attention = distillations(model.adapters_config)["insurance"].record.attention
    assert sorted(len(row.names) for row in attention.values()) == fused

    layers = {name: layer for name, layer in adapter_layers(model, "insurance")}
    moved = train(model, trainer_args(**SETTINGS))
    assert all(".insurance." in name for name in moved)
    for name, layer in layers.items():  # those without a teacher learn from the task
        of_layer = {id(parameter) for parameter in layer.adapter_modules["insurance"].parameters()}
        assert any(id(p) in of_layer for key, p in model.named_parameters() if key in moved), name

    expected = logits_of(model, "insurance")
    save(model, tmp_path, "insurance")
    assert torch.equal(logits_of(fresh_model(tmp_path, "insurance"), "insurance"), expected)


@pytest.mark.parametrize(("teacher", "student"), [
    ("seq_bn[leave_out=[0]]", "seq_bn[leave_out=[1]]"),
    (LoRAConfig(leave_out=[1]), LoRAConfig(leave_out=[0])),
    ("seq_bn", "seq_bn[leave_out=[0,1]]"),
])  # fmt: skip
def test_a_teacher_without_a_layer_of_the_student_is_refused(teacher, student):
    model = make_model()
    model.add_adapter("bank", config=teacher)
    with pytest.raises(ValueError, match="'bank' has no layer in common with the student; let the"):
        model.add_adapter("insurance", config=student, distill_from=["bank"])
    assert "insurance" not in model.adapters_config
    model.add_adapter("insurance", config=student)
    with pytest.raises(ValueError, match="'bank' has no layer in common with the student"):
        model.train_adapter(had.AdapterDistillation("insurance", ["bank"]))


# A language adapter below the student

LORA = LoRAConfig(r=4)
STACKS = {  # the configs of the language adapter, of the student and its teachers, and the family
    "seq_bn": ("seq_bn", "seq_bn", "bert"),
    "invertible": ("seq_bn_inv", "seq_bn", "bert"),
    "invertible, double": ("double_seq_bn_inv", "double_seq_bn", "bert"),
    "invertible in a decoder": ("seq_bn_inv", "seq_bn", "gpt2"),
    "LoRA": (LORA, LORA, "bert"),
    "LoRA below a bottleneck": (LORA, "seq_bn", "bert"),
    "shared parameters": ("compacter[reduction_factor=4]", "seq_bn", "bert"),
    "prompt": ("prompt_tuning", "seq_bn", "bert"),
    "prefixes": ("prefix_tuning", "seq_bn", "bert"),
}


def with_language(language="seq_bn_inv", config="seq_bn", family="bert", start="random"):
    model = make_model(family)
    model.add_adapter("german", config=language)
    noisy(model, "german", std=0.1)
    for name in TEACHERS:
        model.add_adapter(name, config=config)
        noisy(model, name)
        model.add_classification_head(name)
    model.add_adapter("insurance", config=config, distill_from=had.DistillationConfig(TEACHERS, student_start=start))
    model.add_classification_head("insurance")
    return model


@pytest.mark.parametrize("case", STACKS)
def test_student_on_a_language_adapter(case, trainer_args, tmp_path):
    model = with_language(*STACKS[case])
    model.train_adapter(had.AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS))
    moved = train(model, trainer_args(**SETTINGS, save_strategy="steps", save_steps=4))
    assert moved
    assert all(".insurance." in name for name in moved), moved
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".german." in name)
    setup = Stack("german", "insurance")
    assert model.active_adapters == setup
    expected = logits_of(model, setup)
    assert not torch.allclose(logits_of(model, "insurance"), expected), "the language adapter counts"
    save(model, tmp_path, "german", "insurance")
    fresh = fresh_model(tmp_path, "german", "insurance", family=STACKS[case][2])
    fresh.active_head = "insurance"
    assert torch.equal(logits_of(fresh, setup), expected)

    resumed = with_language(*STACKS[case])
    resumed.train_adapter(had.AdapterDistillation(setup, teachers=TEACHERS))
    trainer = had.DistillationTrainer(
        resumed, trainer_args(**SETTINGS, save_strategy="no"), train_dataset=make_dataset(8)
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-4"))
    assert torch.equal(logits_of(resumed, setup), expected)


@pytest.mark.parametrize("language", ["seq_bn_inv", LORA])
def test_the_language_adapter_runs_below_student_and_teachers_in_stage_2(language):
    model = with_language(language)
    setup = Stack("german", "insurance")
    losses = {}
    for student in (setup, "insurance"):
        model.train_adapter(had.AdapterDistillation(student, teachers=TEACHERS))
        model.train()
        logits = model(**make_batch()).logits
        losses[str(student)] = distillations(model.adapters_config)["insurance"].record.distillation_loss
        assert torch.equal(logits, logits_of(model, student))
    assert not torch.allclose(*losses.values()), "the teachers read what the language adapter passes on"


def test_a_student_on_a_language_adapter_starts_at_its_teachers(trainer_args):
    """The fit of the start reads what the language adapter passes on."""
    losses = {}
    for start in ("average", "teachers"):
        model = with_language(start=start)
        model.train_adapter(had.AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS))
        before = logits_of(model, model.active_adapters)
        args = trainer_args(max_steps=1, distillation_start=0.0, learning_rate=0.0)
        trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset())
        trainer.train()
        losses[start] = trainer.state.log_history[0]["distillation_loss"]
        assert torch.equal(logits_of(model, Stack("german", "insurance")), before) == (start == "average")
    assert losses["teachers"] < 0.5 * losses["average"], losses


def by_block(model):
    model.train_adapter(had.AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS))


def by_block_in_stack(model):
    model.train_adapter(Stack("german", had.AdapterDistillation("insurance", teachers=TEACHERS)))


def by_active_adapters(model):
    """The recipe of adapters for MAD-X, train the task adapter and activate the stack, with the block in its place."""
    model.train_adapter("insurance")
    model.active_adapters = Stack("german", model.active_adapters)


def by_names(model):
    """The recipe as it stands in the docs of adapters."""
    model.train_adapter("insurance")
    model.active_adapters = Stack("german", "insurance")


@pytest.mark.parametrize("way", [by_block_in_stack, by_active_adapters, by_names])
def test_the_ways_to_write_a_stack_train_the_same(way, trainer_args):
    models = []
    for prepare in (by_block, way):
        model = with_language()
        prepare(model)
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".german." in name)
        train(model, trainer_args(**SETTINGS))
        assert model.active_adapters == Stack("german", "insurance")
        models.append(model)
    assert not changed(models[1], snapshot(models[0]))


def test_deleting_a_teacher_keeps_the_language_adapter():
    model = with_language()
    by_active_adapters(model)
    with pytest.warns(UserWarning, match="'bank' was a teacher"):
        model.delete_adapter("bank")
    assert model.active_adapters == had.AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS[1:])
    for teacher in ("travel", "work"):
        with pytest.warns(UserWarning, match=f"'{teacher}' was a teacher"):
            model.delete_adapter(teacher)
    assert model.active_adapters == Stack("german", "insurance")


def test_stacks_that_cannot_be_trained(trainer_args):
    with pytest.raises(ValueError, match=r"student 'a' stands twice in Stack\[a, a\]; only frozen adapters go below"):
        had.AdapterDistillation(Stack("a", "a"), teachers=["b"])
    model = with_language()
    on_top = Stack(had.AdapterDistillation("insurance", teachers=TEACHERS), "german")
    with pytest.raises(ValueError, match="'german' is stacked on top of the student 'insurance'.*must come last"):
        model.train_adapter(on_top)
    model.train_adapter(Stack("german", "insurance"))  # of adapters: plain training of both
    with pytest.raises(ValueError, match=r"german.* is trainable, .* call model.train_adapter\('insurance'\) last"):
        had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset())
    model.train_adapter(Stack("insurance"))
    with pytest.raises(ValueError, match=r"No distilled student is active \(the active setup is Stack\[insurance\]\)"):
        had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset())


def test_a_saved_stack_is_loaded_where_this_package_is_not_installed(trainer_args, tmp_path):
    model = with_language()
    make_model().save_pretrained(str(tmp_path / "base"))
    by_block(model)
    model.save_adapter_setup(str(tmp_path / "setup"), model.active_adapters, head_setup="insurance")
    batch = make_batch()
    del batch["labels"]
    torch.save(batch, tmp_path / "batch.pt")
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    case = [str(tmp_path / "base"), str(tmp_path / "setup"), False, True, False]
    (logits,) = logits_without_package(tmp_path, [case])
    assert torch.equal(logits, expected)
