"""Examples that a trainer reads, as inputs of the model with adapters."""

import pytest
import torch
from tiny_models import make_batch, make_dataset, make_model, make_student
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, WeightedRandomSampler
from trainings import trainer_for
from transformers import Trainer
from wrapped_models import Classifier, Passing

import hf_adapter_distillation as had


def test_a_plain_batch_is_the_input_of_the_model(trainer_args):
    trainer = trainer_for(make_student(make_model()), trainer_args())
    batch = next(trainer._batches(make_dataset()))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_a_batch_of_a_wrapper_is_read_where_it_calls_the_model(trainer_args):
    model = Classifier(make_student(make_model(kind="base", dropout=True)))
    trainer = trainer_for(model, trainer_args(per_device_eval_batch_size=16))
    before = model.state_dict()["norm.running_mean"].clone()
    (batch,) = trainer._batches(make_dataset())
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(batch["input_ids"], torch.tensor(make_dataset()["input_ids"]))
    assert torch.equal(model.norm.running_mean, before), "it ran in evaluation mode"
    assert model.training


def test_a_loss_that_counts_items_gets_their_number_where_a_batch_is_read(trainer_args):
    def summed(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    model = Classifier(make_student(make_model(kind="base")))
    trainer = trainer_for(model, trainer_args(), compute_loss_func=summed)
    (batch,) = trainer._batches(make_dataset(4))
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_the_number_of_items_is_not_read_as_an_input(trainer_args):
    model = Passing(make_student(make_model("llama", "causal_lm"), head=None))
    trainer = trainer_for(model, trainer_args())
    assert trainer.model_accepts_loss_kwargs
    (batch,) = trainer._batches(make_dataset(4, "tokens"))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


def test_a_wrapper_may_pass_its_inputs_on(trainer_args):
    trainer = trainer_for(Passing(make_student(make_model())), trainer_args(max_steps=2))
    trainer.train()
    assert trainer.state.log_history[1]["distillation_loss"] > 0


def test_several_data_sets_are_read_in_the_shares_of_their_sizes(trainer_args):
    several = {"one": make_dataset(12), "other": make_dataset(4, seed=1)}
    trainer = trainer_for(make_student(make_model()), trainer_args(), train_dataset=make_dataset())
    drawn = trainer._examples()._replace(train=several).draw(8)
    assert [len(batch["labels"]) for batch in drawn()] == [6, 2]


class SamplingTrainer(Trainer):
    """Samples the whole data set, as for unbalanced classes."""

    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0] * 16, 16)


class LoadingTrainer(Trainer):
    """Loads the whole data set, and keeps its loader."""

    def get_train_dataloader(self):
        if "loader" not in vars(self):
            sampler = WeightedRandomSampler([1.0] * 16, 16)
            self.loader = DataLoader(self.train_dataset.with_format("torch"), 4, sampler=sampler)
        return self.loader


@pytest.mark.parametrize("base", [SamplingTrainer, LoadingTrainer])
@pytest.mark.parametrize("is_below", [True, False])
def test_the_halves_need_no_sampler_or_loader_of_the_users_own(base, is_below, trainer_args):
    class Mine(*((had.DistillationMixin, base) if is_below else (base, had.DistillationTrainer))):
        """Both."""

    dataset = make_dataset()
    args = trainer_args(weighing_steps=16)
    trainer = Mine(make_student(make_model(), student_start="weighted"), args, train_dataset=dataset)
    before = set(vars(trainer))
    labelled = trainer._labelled()
    rows = [tuple(row.tolist()) for half in labelled.halves for batch in half() for row in batch["input_ids"]]
    assert sorted(rows) == sorted(map(tuple, dataset["input_ids"]))
    assert set(vars(trainer)) == before
    assert trainer.train_dataset is dataset
    trainer.train()
    assert trainer.distillation.weights is not None
    assert isinstance(trainer.callback_handler.train_dataloader.batch_sampler.sampler, WeightedRandomSampler)


def test_a_batch_without_a_labelled_token_adds_nothing_to_the_weighing(trainer_args):
    model = make_student(make_model("llama", "causal_lm"), head=None, student_start="weighted")
    dataset = make_dataset(labels="tokens")
    trainer = had.DistillationTrainer(model, trainer_args(), train_dataset=dataset)
    batch = make_batch(labels="tokens")
    assert trainer._task_loss(batch).item() > 0
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert trainer._task_loss(batch).item() == 0.0
