"""Examples that a trainer reads, as inputs of the model with adapters."""

import torch
from tiny_models import make_dataset, make_model, make_student
from trainings import trainer_for
from wrapped_models import Classifier


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


def test_several_data_sets_are_read_in_the_shares_of_their_sizes(trainer_args):
    several = {"one": make_dataset(12), "other": make_dataset(4, seed=1)}
    trainer = trainer_for(make_student(make_model()), trainer_args(), train_dataset=make_dataset())
    drawn = trainer._examples()._replace(train=several).draw(8)
    assert [len(batch["labels"]) for batch in drawn()] == [6, 2]
