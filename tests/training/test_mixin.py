"""The two-stage training."""

import pytest
import torch
from adapters import AdapterTrainer, Stack
from marks import LONG, needs_compiler
from messages import one_line
from model_state import changed, snapshot
from tiny_models import TEACHERS, make_dataset, make_model, make_student, noisy
from trainings import EachStep, StopAt, trainer_for
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations


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


def test_without_stage_2_it_is_plain_adapter_training(trainer_args):
    model, plain = (make_student(make_model(), student_start="average") for _ in range(2))
    trainer_for(model, trainer_args(distillation_start=1.0)).train()
    plain.train_adapter(Stack("insurance"))
    AdapterTrainer(model=plain, args=trainer_args(), train_dataset=make_dataset()).train()
    ours, stock = dict(model.named_parameters()), dict(plain.named_parameters())
    names = [name for name in ours if "insurance" in name and "distillation_fusion" not in name]
    assert names
    assert all(torch.equal(ours[name], stock[name]) for name in names)


def test_the_other_base_may_have_arguments_of_its_own_before_and_between(trainer_args):
    class Scaled(Trainer):
        def __init__(self, factor, model=None, reference=None, args=None, **kwargs):
            super().__init__(model, args, **kwargs)
            self.factor, self.reference = factor, reference

        def compute_loss(self, *args, **kwargs):
            return self.factor * super().compute_loss(*args, **kwargs)

    class ScaledDistillation(had.DistillationMixin, Scaled):
        pass

    class OfNetwork(Trainer):
        def __init__(self, network, **kwargs):
            super().__init__(network, **kwargs)

    class OfNetworkDistillation(had.DistillationMixin, OfNetwork):
        pass

    model, data = make_student(make_model()), make_dataset()
    assert OfNetworkDistillation(model, trainer_args(), train_dataset=data).model is model
    trainer = ScaledDistillation(factor=0.5, model=model, reference="r", args=trainer_args(), train_dataset=data)
    assert (trainer.factor, trainer.reference) == (0.5, "r")
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps


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


@pytest.mark.parametrize("is_fitted", [False, True])
def test_the_teachers_are_those_that_the_student_has_by_then(is_fitted, trainer_args):
    """A teacher is deleted between two trainings, and the student is added again, while another is active."""
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(max_steps=1))
    trainer.train()
    model.delete_adapter("bank")
    if is_fitted:
        trainer.fit_start()
    trainer.train()
    assert [teacher.name for teacher in trainer.distillation.run.teachers] == ["travel", "work"]
    settings = had.DistillationConfig(["work"], student_start="teachers")
    model.add_adapter("insurance", config="seq_bn", overwrite_ok=True, distill_from=settings)
    model.train_adapter("insurance")
    if is_fitted:
        trainer.fit_start()
    model.set_active_adapters("travel")
    trainer.train()
    assert [teacher.name for teacher in trainer.distillation.run.teachers] == ["work"]
    assert trainer.block == had.AdapterDistillation("insurance", ["work"])


def test_a_start_that_was_fitted_before_is_noted(trainer_args):
    """By `fit_start`, or before the checkpoint from which the training is resumed."""
    noted = []
    for calls in range(4):
        trainer = trainer_for(make_student(make_model()), trainer_args(max_steps=1, save_strategy="steps"))
        for _ in range(calls % 3):
            trainer.fit_start()
        trainer.train(resume_from_checkpoint=calls == 3)
        noted.append(trainer.distillation.run.settings["start_explained"])
    assert 0 < noted[0] < 1
    assert noted == [noted[0]] * 4
    trainer.train()
    assert "start_explained" not in trainer.distillation.run.settings


def test_no_examples_are_named(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args(), train_dataset=make_dataset().select([]))
    with pytest.raises(ValueError, match=one_line(start="train_dataset has no examples; give it some (trl drops")):
        trainer.train()


def test_the_student_stands_on_what_it_was_trained_on_last(trainer_args):
    model = make_student(make_model())
    for name in ("german", "english"):
        model.add_adapter(name)
    model.train_adapter(Stack("german", had.AdapterDistillation("insurance", TEACHERS)))
    trainer = trainer_for(model, trainer_args(max_steps=1))
    model.train_adapter(Stack("english", had.AdapterDistillation("insurance", TEACHERS)))
    trainer.train()
    assert trainer.block.children == ["english", "insurance"]
    trainer.train()
    assert trainer.block.children == ["english", "insurance"]


def test_a_student_that_was_added_again_is_checked_again(trainer_args):
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(max_steps=1, label_smoothing_factor=0.1))
    settings = had.DistillationConfig(TEACHERS, student_start="teachers", carrier="dual")
    model.add_adapter("insurance", config="seq_bn", overwrite_ok=True, distill_from=settings)
    model.train_adapter("insurance")
    with pytest.raises(ValueError, match="The carrier 'dual' needs the model's own loss in both of its passes"):
        trainer.train()
    for name in TEACHERS:
        with pytest.warns(UserWarning, match="was a teacher of 'insurance'"):
            model.delete_adapter(name)
    with pytest.raises(ValueError, match="No teachers are given for 'insurance': name at least one adapter to dist"):
        trainer.train()


def test_evaluation_loss_is_the_students_task_loss(trainer_args):
    model = make_student(make_model())
    trainer = trainer_for(model, trainer_args(distillation_start=0.0), eval_dataset=make_dataset(seed=1))
    loss = trainer.evaluate()["eval_loss"]
    model.set_active_adapters("insurance")
    plain = AdapterTrainer(model=model, args=trainer_args(), eval_dataset=make_dataset(seed=1))
    assert plain.evaluate()["eval_loss"] == loss


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


@needs_compiler
@pytest.mark.timeout(900)  # which a busy machine may need to compile
@pytest.mark.parametrize(
    ("carrier", "start"),
    [
        ("student", "random"),
        pytest.param("mixed", "random", marks=LONG),
        pytest.param("student", "weighted", marks=LONG),
    ],
)
def test_a_compiled_model_is_compiled_once_for_each_stage(carrier, start, trainer_args):
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        arguments = trainer_args(torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None)
        trainer = trainer_for(make_student(make_model(), carrier=carrier, student_start=start), arguments)
        losses.append(trainer.train().training_loss)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch._dynamo.reset()


# Checkpoints


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


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_run_that_is_resumed_after_its_last_step_takes_no_more(is_stream, trainer_args):
    ends, steps, dataset = [], [], make_dataset()
    for resume in (None, True):
        args = trainer_args(max_steps=3, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")  # of 4
        note = EachStep(lambda args, state, control, **kwargs: steps.append(state.global_step))
        data = dataset.to_iterable_dataset() if is_stream else dataset
        model = make_student(make_model())
        trainer_for(model, args, train_dataset=data, callbacks=[note]).train(resume_from_checkpoint=resume)
        ends.append(snapshot(model))
    assert steps == [1, 2, 3]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_two_runs_with_the_same_seed_are_bitwise_equal(trainer_args):
    models = [make_student(make_model(dropout=True), carrier="mixed") for _ in range(2)]
    for model in models:
        trainer_for(model, trainer_args()).train()
    first, second = (snapshot(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


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
    with pytest.raises(TypeError, match="must be DistillationTrainingArguments, .* not TrainingArguments"):
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
    with pytest.warns(UserWarning, match="'bank' was a teacher of 'insurance'"):
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


def test_a_changed_teacher_is_an_error(trainer_args):
    model = make_student(make_model())

    def change(args, state, control, **kwargs):
        noisy(model, "travel")

    with pytest.raises(RuntimeError, match="The weights of teacher 'travel' changed in training"):
        trainer_for(model, trainer_args(max_steps=1), callbacks=[EachStep(change)]).train()


def test_alias():
    assert had.AdapterDistillationTrainer is had.DistillationTrainer


# Beside others


def test_evaluation_runs_the_trainers_own_student(trainer_args):
    model = make_student(make_model())
    dataset = make_dataset(seed=1)
    trainer = trainer_for(model, trainer_args(), eval_dataset=dataset)
    trainer.train()
    loss, logits = trainer.evaluate()["eval_loss"], trainer.predict(dataset).predictions
    model.set_active_adapters("bank")
    model.active_head = "travel"
    assert trainer.evaluate()["eval_loss"] == loss
    assert (trainer.predict(dataset).predictions == logits).all()
    assert (model.active_adapters, model.active_head) == (Stack("bank"), "travel")
    assert trainer.distillation.run.evaluation["eval_loss"] == pytest.approx(loss, abs=1e-6)


def test_a_run_that_is_resumed_with_more_steps_stays_in_stage_2(trainer_args, tmp_path):
    def resumed(max_steps, checkpoint=None):
        args = trainer_args(output_dir=str(tmp_path / str(max_steps)), max_steps=max_steps, save_strategy="steps")
        args.save_steps = 3
        trainer = trainer_for(make_student(make_model()), args)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        return trainer.first_distillation_step

    assert resumed(8) == 4
    assert resumed(20, "8/checkpoint-6") == 4
    assert resumed(40, "20/checkpoint-9") == 4
    assert resumed(16, "8/checkpoint-3") == 8  # it was in stage 1


def test_the_provenance_has_the_batch_size_that_fitted(trainer_args):
    model = make_student(make_model())
    forward = model.forward

    def limited(*args, **kwargs):
        if model.training and len(kwargs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(*args, **kwargs)

    model.forward = limited
    args = trainer_args(auto_find_batch_size=True, max_steps=2, remove_unused_columns=False)
    trainer = trainer_for(model, args)
    trainer.train()
    assert trainer.distillation.run.settings["batch_size"] == 2
