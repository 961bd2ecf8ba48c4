"""The two-stage training."""

import json
import logging
import warnings

import adapters
import pytest
import torch
from adapters import AdapterTrainer, Stack
from conftest import TEACHERS, changed, make_dataset, make_model, make_student, needs_compiler, noisy, snapshot
from transformers import BertConfig, BertModel, TrainerCallback, TrainingArguments

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.student.provenance import read_provenance


class EachStep(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function(args, state, control, **kwargs)


class StopAt(TrainerCallback):
    """Stops as a kill would, after the checkpoint of a step."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


def trainer_for(model, args, **kwargs):
    kwargs.setdefault("train_dataset", make_dataset())
    return had.DistillationTrainer(model=model, args=args, **kwargs)


@pytest.mark.parametrize("kind", ["flex", "classification"])
@pytest.mark.parametrize("carrier", ["student", "fused", "mixed", "dual"])
def test_training_moves_the_student_and_nothing_of_the_teachers(kind, carrier, trainer_args):
    model = make_student(make_model(kind=kind), carrier=carrier)
    before = snapshot(model)
    trainer_for(model, trainer_args(keep_fusion=True)).train()
    moved = changed(model, before)
    head = "heads.insurance." if kind == "flex" else "classifier."
    parts = (".adapters.insurance.", ".distillation_fusion.insurance.", head)
    assert all(any(part in f".{name}" or name.startswith(part) for part in parts) for name in moved)
    for part in parts:
        assert any(part in f".{name}" or name.startswith(part) for name in moved), part
    assert all(f".adapters.{teacher}." not in name for teacher in TEACHERS for name in moved)


def test_the_stage_switches_at_the_right_step(trainer_args):
    model = make_student(make_model(), carrier="mixed")
    fusion = next(p for name, p in model.named_parameters() if "distillation_fusion" in name)
    start, seen = fusion.detach().clone(), []

    def note(args, state, control, **kwargs):
        distillation = distillations(model.adapters_config)["insurance"]
        moved = not torch.equal(fusion, start)
        seen.append(
            (state.global_step - 1, distillation.enabled, moved, round(distillation.fused_probability.item(), 6))
        )

    args = trainer_args(max_steps=10, distillation_start=0.55, keep_fusion=True, weight_decay=0.1, warmup_steps=0)
    trainer_for(model, args, callbacks=[EachStep(note)]).train()
    assert [step for step, enabled, _, _ in seen if enabled] == [6, 7, 8, 9]
    assert [step for step, _, moved, _ in seen if moved] == [6, 7, 8, 9]
    assert [p for step, enabled, _, p in seen if enabled] == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)


@pytest.mark.parametrize(("start", "first"), [(0.0, 0), (1.0, 8)])
def test_the_ends_of_distillation_start(start, first, trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(distillation_start=start))
    trainer.train()
    assert trainer.first_distillation_step == first
    stages = {log["stage"] for log in trainer.state.log_history if "stage" in log}
    assert stages == ({2} if start == 0 else {1})


@pytest.mark.parametrize(
    ("start", "config", "first"),
    [("teachers", "seq_bn", 0), ("average", "seq_bn", 0), ("random", "seq_bn", 4), ("teachers", "double_seq_bn", 4)],
)
def test_a_student_that_starts_at_its_teachers_has_no_stage_1_by_default(start, config, first, trainer_args):
    model = make_student(make_model(), train=False, student_start=start)
    distill_from = had.DistillationConfig(TEACHERS, student_start=start)
    model.add_adapter("insurance", config=config, distill_from=distill_from, overwrite_ok=True)
    model.add_classification_head("insurance", overwrite_ok=True)
    model.train_adapter("insurance")
    trainer = trainer_for(model, trainer_args(distillation_start=None))
    trainer.train()
    assert trainer.state.max_steps == 8
    assert trainer.first_distillation_step == first
    assert trainer.distillation.training["distillation_start"] == first / 8


def test_without_stage_2_it_is_plain_adapter_training(trainer_args):
    model, plain = (make_student(make_model(), student_start="average") for _ in range(2))
    trainer_for(model, trainer_args(distillation_start=1.0)).train()
    plain.train_adapter(Stack("insurance"))
    AdapterTrainer(model=plain, args=trainer_args(), train_dataset=make_dataset()).train()
    ours, stock = dict(model.named_parameters()), dict(plain.named_parameters())
    names = [name for name in ours if "insurance" in name and "distillation_fusion" not in name]
    assert names
    assert all(torch.equal(ours[name], stock[name]) for name in names)


def test_the_end_leaves_a_plain_active_student(trainer_args):
    model = make_student(make_model())
    trainer_for(model, trainer_args()).train()
    assert model.active_adapters == Stack("insurance")
    assert model.active_head == "insurance"
    assert not any("distillation_fusion" in name for name, _ in model.named_modules())
    kept = make_student(make_model())
    trainer_for(kept, trainer_args(keep_fusion=True)).train()
    assert any("distillation_fusion" in name for name, _ in kept.named_modules())


def test_a_second_train_starts_again(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args())
    first = trainer.train()
    second = trainer.train()
    assert second.training_loss < first.training_loss


@pytest.mark.parametrize(("n", "weight"), [(16, 1.0), (200, 1.0), (400, 0.5), (2000, 0.1)])
def test_the_default_weight_falls_with_the_number_of_examples(n, weight, trainer_args, tmp_path):
    model, dataset = make_student(make_model()), make_dataset(n)
    trainer = trainer_for(model, trainer_args(max_steps=2, distillation_start=0.0), train_dataset=dataset)
    trainer.train()
    assert distillations(model.adapters_config)["insurance"].weight == weight
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    assert read_provenance(str(tmp_path / "insurance"))["distillation_weight"] == weight
    log = trainer.state.log_history[0]
    added = weight * log["distillation_loss"] + log["fusion_regularization"]
    assert log["loss"] == pytest.approx(log["task_loss"] + added, abs=1e-4)


def test_a_stream_counts_what_the_training_reads_of_it(trainer_args):
    stream = make_dataset(16).to_iterable_dataset()
    args = trainer_args(max_steps=100, gradient_accumulation_steps=2)  # batches of 4
    trainer = trainer_for(make_student(make_model()), args, train_dataset=stream)
    trainer.state.max_steps = 100
    assert trainer.distillation_weight == 0.25
    args.distillation_weight = 0.3
    assert trainer.distillation_weight == 0.3


@pytest.mark.parametrize("carrier", ["student", "dual"])
def test_loss_terms_are_logged_and_add_up(carrier, trainer_args):
    trainer = trainer_for(
        make_student(make_model(), carrier=carrier),
        trainer_args(distillation_weight=0.7, gradient_accumulation_steps=2),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 2, 2]
    for log in logs:
        total = log["task_loss"]
        if log["stage"] == 2:
            total += 0.7 * log["distillation_loss"] + log["fusion_regularization"] + log.get("fused_task_loss", 0)
            fused = TEACHERS if carrier == "student" else [*TEACHERS, "insurance"]
            assert sum(log[f"attention/{name}"] for name in fused) == pytest.approx(1, abs=1e-5)
        else:
            assert "distillation_loss" not in log
        assert log["loss"] == pytest.approx(total, abs=1e-4)  # Trainer rounds the loss to 4 places


def test_evaluation_loss_is_the_students_task_loss(trainer_args):
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(distillation_start=0.0), eval_dataset=make_dataset(seed=1))
    loss = trainer.evaluate()["eval_loss"]
    model.set_active_adapters("insurance")
    plain = AdapterTrainer(model=model, args=trainer_args(), eval_dataset=make_dataset(seed=1))
    assert plain.evaluate()["eval_loss"] == loss


def gradients(model, args, batch_size, accumulation, **kwargs):
    """The gradients and the logged values of the first step."""
    found = {}

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    arguments = args(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1,
        distillation_start=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = trainer_for(model, arguments, callbacks=[Grab()], **kwargs)
    trainer.train()
    return found, trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("family", "kind", "labels"),
    [
        ("bert", "flex", "classification"),
        ("bert", "classification", "classification"),
        ("gpt2", "causal_lm", "tokens"),
    ],
)
@pytest.mark.parametrize(("carrier", "smoothing"), [("fused", 0.0), ("fused", 0.1), ("dual", 0.0)])
def test_splits_into_micro_batches_give_the_same_gradients(family, kind, labels, carrier, smoothing, trainer_args):
    """8 x 1 equals 2 x 4. Labels are as many in each micro-batch, so that the task loss itself does not differ."""
    dataset = make_dataset(8, labels)
    if labels == "tokens":
        dataset = dataset.map(lambda row: {"attention_mask": [1] * 8, "labels": row["input_ids"]})
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_student(make_model(family, kind, dtype=torch.float64).double(), carrier=carrier)
        model.double()

        def args(**kwargs):
            return trainer_args(label_smoothing_factor=smoothing, **kwargs)

        results.append(gradients(model, args, batch_size, accumulation, train_dataset=dataset))
    (whole, log), (split, other) = results
    assert whole.keys() == split.keys()
    assert any("distillation_fusion" in name for name in whole)
    for name, grad in whole.items():
        torch.testing.assert_close(grad, split[name], rtol=1e-9, atol=1e-12)
    terms = {"task_loss", "distillation_loss", "fusion_regularization"} | {"fused_task_loss"} & log.keys()
    assert ("fused_task_loss" in terms) == (carrier == "dual")
    for key in terms:
        assert log[key] == pytest.approx(other[key], abs=2e-6), key  # logged with 6 places


def test_a_compute_loss_func_gets_the_terms_too(trainer_args):
    def loss_func(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_student(make_model(dtype=torch.float64))
        model.double()
        results.append(gradients(model, trainer_args, batch_size, accumulation, train_dataset=make_dataset(8),
                                 compute_loss_func=loss_func))  # fmt: skip
    (whole, _), (split, _) = results
    for name, grad in whole.items():
        torch.testing.assert_close(grad, split[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_distillation_reaches_losses_that_are_computed_outside_the_model(how, trainer_args):
    """With the carrier "student" the fusion has no other gradient than that of the distillation loss."""
    kwargs = {}
    if how == "compute_loss_func":
        kwargs[how] = lambda outputs, labels, num_items_in_batch: outputs.logits.square().mean()

    def args(**given):
        return trainer_args(label_smoothing_factor=0.1 if how == "label_smoothing_factor" else 0.0, **given)

    model = make_student(make_model(), student_start="random")
    found, log = gradients(model, args, 8, 1, train_dataset=make_dataset(8), **kwargs)
    fusion = [grad for name, grad in found.items() if "distillation_fusion" in name]
    assert fusion
    assert any(grad.any() for grad in fusion)
    assert log["distillation_loss"] > 0


def test_the_optimizer_sees_the_fusion_in_stage_2_alone(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(max_steps=8, keep_fusion=True))
    trainer.train()
    states = trainer.optimizer.state
    named = dict(trainer.model.named_parameters())
    steps = {"distillation_fusion" in name: int(states[p]["step"]) for name, p in named.items() if p in states}
    assert steps == {False: 8, True: 4}


def test_teachers_stay_in_evaluation_mode(trainer_args):
    model, modes = make_student(make_model()), []

    def note(args, state, control, **kwargs):
        modes.extend(layer.adapters[name].training for name in TEACHERS for _, layer in adapter_layers(model, name))
        assert model.training

    trainer_for(model, trainer_args(), callbacks=[EachStep(note)]).train()
    assert modes
    assert not any(modes)


def test_a_changed_teacher_is_an_error(trainer_args):
    model = make_student(make_model())

    def change(args, state, control, **kwargs):
        noisy(model, "travel")

    with pytest.raises(RuntimeError, match="The weights of teacher 'travel' changed in training"):
        trainer_for(model, trainer_args(max_steps=1), callbacks=[EachStep(change)]).train()


def test_the_fusion_has_a_learning_rate_of_its_own(trainer_args):
    for given, wanted in ((None, 5e-3), (0.03, 0.03)):
        trainer = trainer_for(make_student(make_model()), trainer_args(fusion_learning_rate=given, weight_decay=0.1))
        *groups, fusion = trainer.create_optimizer().param_groups
        assert fusion["lr"] == wanted
        assert fusion["weight_decay"] == 0
        assert sum(p.numel() for p in fusion["params"]) == 2 * (3 * 32 * 32 + 32)
        assert {group["lr"] for group in groups} == {1e-2}
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert sum(len(group["params"]) for group in (*groups, fusion)) == len(trained)


def test_the_table_of_parameters(trainer_args, capsys):
    model = make_student(make_model(), config="double_seq_bn[reduction_factor=0.5]")
    trainer = trainer_for(model, trainer_args(disable_tqdm=False, max_steps=1, logging_strategy="no"))
    lines = trainer.parameter_table().splitlines()
    copied = sum(p.numel() for name, p in model.named_parameters() if any(f".adapters.{t}." in name for t in TEACHERS))
    assert lines[-1] == (
        f"Stage 2 fuses inside the layers, and copies the teachers' weights side by side: {4 * copied / 1e6:.2f} MB."
    )
    assert copied == 50_304
    rows = {line.rsplit(maxsplit=2)[0]: line.rsplit(maxsplit=2)[1:] for line in lines[1:-1]}
    trained = {part for part, (_, count) in rows.items() if count != "0"}
    assert trained == {"student insurance", "fusion (training only)", "head insurance"}
    assert {"base model", "teacher bank", "head bank"} <= set(rows)
    total = sum(int(count.replace(",", "")) for count, _ in rows.values())
    assert total == sum(p.numel() for p in model.parameters())
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("fusion (training only)") == 1


@needs_compiler
@pytest.mark.parametrize("carrier", ["student", "mixed"])
def test_a_compiled_model_is_compiled_once_for_each_stage(carrier, trainer_args):
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        arguments = trainer_args(torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None)
        trainer = trainer_for(make_student(make_model(), carrier=carrier, student_start="random"), arguments)
        losses.append(trainer.train().training_loss)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch._dynamo.reset()


# Checkpoints


def test_a_checkpoint_holds_student_head_and_fusion_alone(trainer_args, tmp_path):
    trainer_for(make_student(make_model()), trainer_args(max_steps=1, save_strategy="steps", save_steps=1)).train()
    checkpoint = tmp_path / "training" / "checkpoint-1"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {
        "insurance/adapter_config.json", "insurance/adapter.safetensors", "insurance/head_config.json",
        "insurance/model_head.safetensors", "distillation_fusion.safetensors", "training_args.bin", "optimizer.pt",
        "scheduler.pt", "rng_state.pth", "trainer_state.json", "checkpoint_digests.json",
    }  # fmt: skip


@pytest.mark.parametrize("stop", [3, 6])
@pytest.mark.parametrize(("kind", "carrier"), [("flex", "mixed"), ("flex", "student"), ("classification", "fused")])
def test_a_resumed_run_is_bitwise_the_unbroken_one(kind, carrier, stop, trainer_args, tmp_path):
    def run(folder, seed, resume=None, callbacks=()):
        model = make_student(make_model(kind=kind, dropout=True), carrier=carrier)
        torch.manual_seed(seed)
        args = trainer_args(output_dir=str(tmp_path / folder), save_strategy="steps", save_steps=3, keep_fusion=True)
        trainer = trainer_for(model, args, callbacks=list(callbacks))
        if seed:  # another start of fusion and student than that of the checkpoint
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 1
        trainer.train(resume_from_checkpoint=resume)
        return dict(model.named_parameters())

    unbroken = run("unbroken", 0)
    run("killed", 0, callbacks=[StopAt(stop)])
    assert not (tmp_path / "killed" / "checkpoint-8").exists()
    resumed = run("killed", 1, resume=str(tmp_path / "killed" / f"checkpoint-{stop}"))
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_two_runs_with_the_same_seed_are_bitwise_equal(trainer_args):
    models = [make_student(make_model(dropout=True), carrier="mixed") for _ in range(2)]
    for model in models:
        trainer_for(model, trainer_args()).train()
    first, second = (snapshot(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_best_model_is_loaded_at_the_end(trainer_args, tmp_path):
    model = make_student(make_model())
    kept = {}

    def worse_from_step_3(args, state, control, **kwargs):
        if state.global_step == 2:
            kept.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    scores = iter([0.1, 0.9, 0.5, 0.2])
    args = trainer_args(
        max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, keep_fusion=True,
        load_best_model_at_end=True, metric_for_best_model="score", distillation_start=0.25,
    )  # fmt: skip
    trainer = trainer_for(
        model, args, eval_dataset=make_dataset(), compute_metrics=lambda prediction: {"score": next(scores)},
        callbacks=[EachStep(worse_from_step_3)],
    )  # fmt: skip
    trainer.train()
    now = dict(model.named_parameters())
    assert kept
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert model.active_head == "insurance"


def checkpoint_of(trainer_args, model=None):
    model = model or make_student(make_model())
    args = trainer_args(max_steps=1, save_strategy="steps", save_steps=1)
    trainer_for(model, args).train()
    return f"{args.output_dir}/checkpoint-1"


def test_resuming_with_other_teachers_is_refused(trainer_args):
    checkpoint = checkpoint_of(trainer_args)
    model = make_student(make_model())
    noisy(model, "travel")
    before = snapshot(model)
    with pytest.raises(ValueError, match="made with other teachers .* different or missing: travel"):
        trainer_for(model, trainer_args()).train(resume_from_checkpoint=checkpoint)
    assert not changed(model, before)
    model = make_student(make_model(), teachers=TEACHERS[:2])
    with pytest.raises(ValueError, match="different or missing: work"):
        trainer_for(model, trainer_args()).train(resume_from_checkpoint=checkpoint)


def test_resuming_from_what_is_no_checkpoint_is_refused(trainer_args, tmp_path):
    trainer = trainer_for(make_student(make_model()), trainer_args())
    with pytest.raises(ValueError, match="is no whole checkpoint: checkpoint_digests.json does not exist"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    checkpoint = checkpoint_of(trainer_args)
    model = make_student(make_model(), config="seq_bn[reduction_factor=8]")
    with pytest.raises(ValueError, match="made with other teachers"):
        trainer_for(model, trainer_args()).train(resume_from_checkpoint=checkpoint)


def test_resuming_a_student_of_another_shape_is_refused_and_changes_nothing(trainer_args):
    def student(factor):
        model = make_student(make_model(), student_start="random", train=False)
        config = f"seq_bn[reduction_factor={factor}]"
        model.add_adapter("insurance", config=config, distill_from=TEACHERS, overwrite_ok=True)
        model.add_classification_head("insurance")
        model.train_adapter("insurance")
        return model

    checkpoint = checkpoint_of(trainer_args, student(8))
    model = student(4)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="does not fit 'insurance': 6 weights are missing, unknown or of another shape"
    ):
        trainer_for(model, trainer_args()).train(resume_from_checkpoint=checkpoint)
    assert not changed(model, before)


# Bad input


def test_bad_trainers(trainer_args, tmp_path):
    dataset = make_dataset()
    with pytest.raises(TypeError, match="must be DistillationTrainingArguments, not TrainingArguments"):
        had.DistillationTrainer(make_student(make_model()), TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="BertModel has no adapters; call adapters.init"):
        trainer_for(BertModel(BertConfig(num_hidden_layers=1)), trainer_args())
    model = make_model()
    with pytest.raises(ValueError, match="No distilled student is active .the active setup is None"):
        trainer_for(model, trainer_args())
    model = make_student(make_model())
    model.set_active_adapters("insurance")
    with pytest.raises(ValueError, match="No distilled student is active"):
        trainer_for(model, trainer_args())
    model = make_student(make_model(), teachers=["bank"])
    with pytest.warns(UserWarning, match="'bank' was a teacher"):
        model.delete_adapter("bank")
    model.train_adapter("insurance")
    with pytest.raises(ValueError, match="whose teachers were all deleted has nothing to learn from"):
        trainer_for(model, trainer_args())
    model = make_student(make_model())
    model.train_adapter("insurance", train_embeddings=True)
    with pytest.raises(
        ValueError, match="embeddings.word_embeddings.weight is trainable, but .* call model.train_adapter"
    ):
        trainer_for(model, trainer_args())
    for outside in ({"args": trainer_args(label_smoothing_factor=0.1)}, {"compute_loss_func": lambda *args: None}):
        with pytest.raises(ValueError, match="The carrier 'dual' needs the model's own loss in both of its passes"):
            trainer_for(make_student(make_model(), carrier="dual"), **{"args": trainer_args(), **outside})
    model = make_student(make_model())
    model.delete_head("insurance")
    distillations(model.adapters_config)["insurance"].config.student_start = "random"
    with pytest.raises(ValueError, match="'insurance' has no head; add one of that name"):
        trainer_for(model, trainer_args(), train_dataset=dataset).train()
    trainer = trainer_for(make_student(make_model()), trainer_args(), train_dataset=dataset.remove_columns("labels"))
    with pytest.raises(ValueError, match=r"The training batches have no labels \(labels\), only input_ids"):
        trainer.train()


def test_alias():
    assert had.AdapterDistillationTrainer is had.DistillationTrainer


# Saving


def test_provenance_of_a_trained_student(trainer_args, tmp_path):
    model = make_student(make_model())
    trainer_for(model, trainer_args()).train()
    model.save_adapter(str(tmp_path / "insurance"), "insurance", meta_dict={"mine": 1})
    saved = json.loads((tmp_path / "insurance" / "adapter_config.json").read_text())
    assert saved["mine"] == 1
    written = saved["distillation"]
    assert [teacher["name"] for teacher in written["teachers"]] == TEACHERS
    assert all(len(teacher["digest"]) == 64 for teacher in written["teachers"])
    assert written["carrier"] == "student"
    assert written["student_start"] == "teachers"
    assert (written["distillation_start"], written["steps"], written["first_distillation_step"]) == (0.5, 8, 4)
    assert written["versions"]["adapters"] == adapters.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in TEACHERS:
            model.delete_adapter(teacher)
    model.save_adapter(str(tmp_path / "later"), "insurance")
    assert json.loads((tmp_path / "later" / "adapter_config.json").read_text())["distillation"] == written
    model.add_adapter("plain")
    model.save_adapter(str(tmp_path / "plain"), "plain")
    assert "distillation" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())


def test_a_teacher_deleted_before_training_is_not_in_the_provenance(trainer_args, tmp_path):
    model = make_student(make_model())
    with pytest.warns(UserWarning, match="keeps 2 others"):
        model.delete_adapter("bank")
    for folder in ("before", "after"):
        model.save_adapter(str(tmp_path / folder), "insurance")
        saved = json.loads((tmp_path / folder / "adapter_config.json").read_text())["distillation"]
        assert [teacher["name"] for teacher in saved["teachers"]] == TEACHERS[1:]
        if folder == "before":
            trainer_for(model, trainer_args()).train()


def test_save_pretrained_leaves_the_fusion_out(tmp_path, caplog):
    model = make_student(make_model())
    logits = model.eval()(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(str(tmp_path / "model"))
        loaded = adapters.AutoAdapterModel.from_pretrained(str(tmp_path / "model"))
    assert "distillation_fusion" not in caplog.text
    loaded.set_active_adapters("insurance")
    assert torch.equal(loaded.eval()(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits, logits)
    assert any("distillation_fusion" in name for name in model.state_dict())
