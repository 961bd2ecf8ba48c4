"""The trainers of transformers with both stages, and trainers that a user composes."""

from dataclasses import dataclass

import pytest
import torch
from model_state import changed, snapshot
from tiny_models import TEACHERS, make_dataset, make_model, make_student
from torch import nn
from torch.utils.data import DataLoader
from trainings import StopAt
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed
from wrapped_models import Classifier

import hf_adapter_distillation as had


@dataclass
class MyArguments(had.DistillationArgumentsMixin, TrainingArguments):
    """Arguments of a user with another default."""

    learning_rate: float = 3e-3
    margin: float = 1.0


class TheirTrainer(Trainer):
    """A trainer of a user with a loss of its own, on columns that the model does not take."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weight, labels, _ = inputs.pop("weight"), inputs.pop("labels"), inputs.pop("text", None)
        outputs = model(**inputs)
        states = outputs["last_hidden_state"] if "last_hidden_state" in outputs else outputs["logits"][:, None]
        logits = states[:, 0, :2]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (weight * losses).mean()
        return (loss, outputs) if return_outputs else loss


class MyTrainer(had.DistillationMixin, TheirTrainer):
    """Both."""


def weighted_dataset(n=16):
    dataset = make_dataset(n)
    return dataset.add_column("weight", [0.5 + i / n for i in range(n)]).add_column("text", ["a"] * n)


def collate(examples):
    batch = default_data_collator([{k: v for k, v in one.items() if k != "text"} for one in examples])
    return {**batch, "text": [one["text"] for one in examples]}


def arguments(tmp_path, cls=MyArguments, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "distillation_start": 0.5,
        "dataloader_pin_memory": False, "learning_rate": 1e-2,
    }  # fmt: skip
    return cls(str(tmp_path / "training"), **{**defaults, **kwargs})


def classifier(**kwargs):
    set_seed(0)
    return Classifier(make_student(make_model(kind="base", dropout=True), **kwargs))


def test_arguments_keep_the_defaults_of_their_other_base(tmp_path):
    args = MyArguments(str(tmp_path), margin=2.0, distillation_weight=0.5, use_cpu=True)
    assert (args.learning_rate, args.margin, args.distillation_weight, args.keep_fusion) == (3e-3, 2.0, 0.5, False)
    with pytest.raises(ValueError, match="distillation_weight=-1 is out of range"):
        MyArguments(str(tmp_path), distillation_weight=-1, use_cpu=True)
    with pytest.raises(TypeError, match="^DistillationArgumentsMixin needs training arguments as its second base"):
        had.DistillationArgumentsMixin()


@pytest.mark.parametrize("selection", ["all", 2])
@pytest.mark.parametrize("kind", ["base", "flex"])
def test_a_trainer_with_its_own_loss_and_columns(kind, selection, tmp_path):
    model = make_student(make_model(kind=kind), teacher_selection=selection)
    before = snapshot(model)
    args = arguments(tmp_path, remove_unused_columns=False, keep_fusion=True, analysis=True)
    dataset = weighted_dataset()
    trainer = MyTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, data_collator=collate)
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all(".insurance." in name for name in moved)
    assert any("distillation_fusion" in name for name in moved) or selection == 2, "the fusion is another then"
    assert len(trainer.block.teachers) == (len(TEACHERS) if selection == "all" else 2)
    assert trainer.evaluate()["eval_loss"] > 0
    assert (tmp_path / "training" / "analysis" / "teacher_attention.csv").is_file()


def test_a_wrapper_around_the_model_is_trained_and_its_own_weights_are_resumed(tmp_path):
    def run(folder, seed, resume=None, callbacks=()):
        model = classifier()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += seed
        args = arguments(tmp_path / folder, had.DistillationTrainingArguments, save_strategy="steps", save_steps=3)
        trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset(), callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.model_with_adapters is model.encoder
        return model.state_dict()

    unbroken = run("unbroken", 0)
    run("killed", 0, callbacks=[StopAt(6)])
    resumed = run("killed", 1, resume=str(tmp_path / "killed" / "training" / "checkpoint-6"))
    assert any("norm.running_mean" in name for name in unbroken)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_student_in_a_wrapper_starts_at_the_mean_update(tmp_path):
    model = classifier()
    start = snapshot(model)
    trainer = had.DistillationTrainer(
        model, arguments(tmp_path, had.DistillationTrainingArguments), train_dataset=make_dataset()
    )
    trainer.fit_start()
    alone = make_student(make_model(kind="base", dropout=True))
    args = arguments(tmp_path, remove_unused_columns=False)
    MyTrainer(alone, args, train_dataset=weighted_dataset(), data_collator=collate).fit_start()
    moved = changed(model, start)
    assert moved
    assert all("adapter_up" in name for name in moved)
    for name, value in alone.named_parameters():
        torch.testing.assert_close(dict(model.encoder.named_parameters())[name], value)


def test_data_of_a_loader_of_the_users_own(tmp_path):
    class OwnData(had.DistillationTrainer):
        def get_train_dataloader(self):
            return DataLoader(make_dataset().with_format("torch"), 4, shuffle=True)

    model = make_student(make_model(), teacher_selection=2)
    trainer = OwnData(model, arguments(tmp_path, had.DistillationTrainingArguments))
    start = snapshot(model)
    trainer.train()
    assert len(trainer.block.teachers) == 2
    assert any("adapter_up" in name for name in changed(model, start))
    assert trainer.state.global_step == 8


def test_a_stream_of_the_users_own_says_what_cannot_be_done(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from make_dataset().with_format("torch")

    class OwnData(had.DistillationTrainer):
        def get_train_dataloader(self):
            return DataLoader(Once(), 4)

    args = arguments(tmp_path, had.DistillationTrainingArguments, max_steps=2)
    with pytest.raises(ValueError, match="teacher_selection=2 reads examples before the training; pass a train_data"):
        OwnData(make_student(make_model(), teacher_selection=2), args).train()


def test_a_model_without_a_loss_is_named_at_construction(tmp_path):
    args = arguments(tmp_path, had.DistillationTrainingArguments)
    with pytest.raises(ValueError, match="^BertModel has no head and so no loss; override compute_loss, pass"):
        had.DistillationTrainer(make_student(make_model(kind="base")), args, train_dataset=make_dataset())


@pytest.mark.parametrize(("family", "kind"), [("bert", "base"), ("t5", "seq2seq_lm")])
def test_no_column_of_the_model_is_dropped(family, kind, tmp_path):
    """Adapters hides the signatures of these models, by which Trainer takes columns for unused."""
    dataset = make_dataset(labels="tokens").add_column("text", ["a"] * 16)
    trainer = MyTrainer(make_student(make_model(family, kind=kind)), arguments(tmp_path), train_dataset=dataset)
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


def test_generated_text_is_that_of_the_student(tmp_path):
    set_seed(0)
    model = make_student(make_model("t5", kind="seq2seq_lm"))
    args = arguments(
        tmp_path, had.Seq2SeqDistillationTrainingArguments, predict_with_generate=True, generation_max_length=6
    )
    dataset = make_dataset(8, labels="tokens")
    trainer = had.Seq2SeqDistillationTrainer(model, args, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    generated = torch.tensor(trainer.predict(dataset).predictions)
    inputs = {name: torch.tensor(dataset[name]) for name in ("input_ids", "attention_mask")}
    alone = model.eval().generate(**inputs, max_length=6)
    assert torch.equal(generated[:, : alone.shape[1]], alone)
    model.set_active_adapters("bank")
    assert (trainer.predict(dataset).predictions == generated.numpy()).all(), "evaluation runs the student"
