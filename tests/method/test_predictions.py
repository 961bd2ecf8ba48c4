"""What the teachers predict once must be what they would predict beside each batch."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student
from torch.nn.functional import pad
from transformers import AutoTokenizer, DataCollatorWithPadding, TrainerCallback

import hf_adapter_distillation as had
from hf_adapter_distillation.method import forward
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.predictions import PredictionCache, example_keys
from hf_adapter_distillation.training import preparation

OBJECTIVE = {"features": 1.0, "logits": 1.0, "cross_task": 1.0}


class Beside:
    """How often the teachers predict beside a batch."""

    def __init__(self, monkeypatch):
        self.times = 0
        original = forward.teacher_logits

        def counted(*args):
            self.times += 1
            return original(*args)

        monkeypatch.setattr(forward, "teacher_logits", counted)


@pytest.fixture
def beside(monkeypatch):
    return Beside(monkeypatch)


def ragged(n=12, seed=0):
    """Examples of different lengths."""
    rows = make_dataset(n, seed=seed)
    lengths = [sum(mask) for mask in rows["attention_mask"]]
    ids = [row[:length] for row, length in zip(rows["input_ids"], lengths, strict=True)]
    return Dataset.from_dict(
        {"input_ids": ids, "attention_mask": [[1] * n for n in lengths], "labels": rows["labels"]}
    )


def trained(trainer_args, collator, callbacks=None, model=None, dataset=None, extra=None, resume=None, **kwargs):
    if model is None:
        model = make_student(make_model(), objective=OBJECTIVE, student_start="random").double()
    trainer = had.DistillationTrainer(
        model,
        trainer_args(**{"distillation_start": 0.0, "num_train_epochs": 3} | kwargs),
        distillation_dataset=extra,
        train_dataset=ragged() if dataset is None else dataset,
        data_collator=collator,
        callbacks=callbacks,
    )
    trainer.train(resume)
    assert trainer.distillation.settings.predictions is None
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def collator(tiny_encoder):
    return DataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_encoder))


def same(first, second, tolerance):
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], rtol=0, atol=tolerance) for name in first)


@pytest.mark.parametrize("extra", [False, True])
def test_a_training_is_the_same_and_no_teacher_predicts_beside_it(extra, trainer_args, collator, beside, monkeypatch):
    extra = ragged(8, seed=1).remove_columns("labels") if extra else None
    once = trained(trainer_args, collator, extra=extra)
    assert beside.times == 0
    monkeypatch.setattr("hf_adapter_distillation.training.preparation.predict", lambda *args: None)
    anew = trained(trainer_args, collator, extra=extra)
    assert beside.times == (18 if extra else 9)
    same(once, anew, 1e-10)


def test_a_resumed_training_is_bitwise_the_same(trainer_args, collator, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    kwargs = {"save_strategy": "steps", "save_steps": 2}
    unbroken = trained(trainer_args, collator, **kwargs, output_dir=str(tmp_path / "unbroken"))
    trained(trainer_args, collator, callbacks=[Stop()], **kwargs)
    resumed = trained(trainer_args, collator, resume=str(tmp_path / "training" / "checkpoint-4"), **kwargs)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.parametrize("why", ["read once", "a stream", "too much", "another augmentation"])
def test_what_is_not_worth_keeping_is_predicted_beside_each_batch(why, trainer_args, collator, beside, monkeypatch):
    kwargs = {"max_steps": 3}
    if why == "a stream":
        kwargs = {"dataset": ragged().to_iterable_dataset(), "max_steps": 9}
    elif why == "too much":
        monkeypatch.setattr(preparation, "MAX_BYTES", 12 * 3 * 2 * 8 - 1)
        kwargs = {}
    elif why == "another augmentation":
        kwargs = {}
        original = collator

        def collator(examples):
            batch = original(examples)
            batch["input_ids"] = batch["input_ids"].clone()
            batch["input_ids"][:, 0] = torch.randint(3, 60, (len(examples),))
            return batch

    trained(trainer_args, collator, **kwargs)
    assert beside.times == (3 if why == "read once" else 9)


def test_predictions_of_tokens_are_not_kept(trainer_args, beside):
    model = make_student(make_model(), head="tagging", objective="logits")
    trained(trainer_args, None, model=model, dataset=make_dataset(8, labels="tokens").map(limited), num_train_epochs=2)
    assert beside.times == 4


def limited(row):
    return {"labels": [min(label, 1) for label in row["labels"]]}


def test_a_training_that_fails_forgets_them(trainer_args, collator):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            assert distillations(model.adapters_config)["insurance"].settings.predictions is not None
            raise RuntimeError("a fault")

    model = make_student(make_model(), objective="logits")
    with pytest.raises(RuntimeError, match="a fault"):
        trained(trainer_args, collator, callbacks=[Fail()], model=model)
    assert distillations(model.adapters_config)["insurance"].settings.predictions is None


def test_each_process_predicts_its_share(trainer_args, collator):
    """Two processes in turn, whose shares are put together as all of them are."""
    whole, shares = {}, []

    def of_process(trainer, index, processes):
        accelerator = SimpleNamespace(process_index=index, num_processes=processes, autocast=nullcontext)
        batches = trainer._examples().batches(trainer.train_dataset)
        parts = preparation._predictions(trainer.model, trainer.block, trainer.train_dataset, batches, accelerator)
        return {key: row for keys, logits in parts for key, row in zip(keys, logits, strict=True)}

    model = make_student(make_model(), objective="logits")
    args = trainer_args(per_device_eval_batch_size=5)
    trainer = had.DistillationTrainer(model, args, train_dataset=ragged(), data_collator=collator)
    whole = of_process(trainer, 0, 1)
    shares = [of_process(trainer, index, 2) for index in (0, 1)]
    assert [len(share) for share in shares] == [7, 5]
    assert len(whole) == 12
    assert shares[0].keys() | shares[1].keys() == whole.keys()
    assert all(torch.equal(row, whole[key]) for share in shares for key, row in share.items())
    assert next(iter(whole.values())).shape == (len(TEACHERS), 2)


# Keys


def test_a_key_stands_for_what_the_model_is_given():
    batch = make_batch(6)
    keys = example_keys(batch)
    assert len(set(keys)) == 6
    assert example_keys({}) == []
    other_labels = batch | {"labels": 1 - batch["labels"]}
    longer = {name: pad(value, (0, 3)) if value.dim() == 2 else value for name, value in batch.items()}
    assert example_keys(other_labels) == example_keys(longer) == keys
    order = torch.tensor([3, 1, 2, 0, 5, 4])
    assert example_keys({name: value[order] for name, value in batch.items()}) == [keys[i] for i in order]
    shifted = {name: pad(value, (1, 0)) if value.dim() == 2 else value for name, value in batch.items()}
    assert not set(example_keys(shifted)) & set(keys)
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][2, 0] += 1
    assert [a == b for a, b in zip(example_keys(changed), keys, strict=True)] == [True, True, False, True, True, True]
    with_image = batch | {"pixel_values": torch.rand(6, 3, 2, 2, dtype=torch.bfloat16)}
    assert not set(example_keys(with_image)) & set(keys)
    for_all = batch | {"head_mask": torch.ones(2, 4)}
    assert not set(example_keys(for_all)) & set(keys)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_teachers_predict_beside_batches_padded_on_the_left_in_another_way(family, trainer_args, beside, monkeypatch):
    """BERT counts positions from the left, and the heads of adapters find their token by its place.

    In six of nine batches each example is padded as it was when the teachers predicted it.
    """

    def collator(rows):
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name):
            return torch.tensor([[0] * (longest - len(row[name])) + row[name] for row in rows])

        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": padded("input_ids"), "attention_mask": padded("attention_mask"), "labels": labels}

    def run():
        torch.manual_seed(0)
        model = make_student(make_model(family), objective={"logits": 1.0}, student_start="random").double()
        return trained(trainer_args, collator, model=model)

    once = run()
    assert beside.times == 3
    monkeypatch.setattr("hf_adapter_distillation.training.preparation.predict", lambda *args: None)
    same(once, run(), 1e-10)


def test_known_examples_are_found_in_any_order():
    batch = make_batch(4)
    logits = torch.rand(4, 3, 2)
    cache = PredictionCache(logits, example_keys(batch))
    order = torch.tensor([2, 0])
    found = cache.get({name: value[order] for name, value in batch.items()})
    assert torch.equal(found, logits[order].transpose(0, 1))
    assert cache.get(make_batch(4, seed=3)) is None
    assert cache.get({}) is None
