"""Labelled batches that a user passes, and the loss of the model."""

import pytest
from messages import exactly
from model_state import everything
from tiny_models import make_batch, make_model, make_student
from transformers import BatchEncoding

import hf_adapter_distillation as had


def test_batches_without_a_loss_of_the_model():
    model, batch = make_student(make_model()), make_batch()
    before = everything(model)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    no_loss = "BertAdapterModel puts out no loss; give the batches labels, or pass loss=..."
    no_dict = "BertAdapterModel puts out a tuple; leave out return_dict=False, or pass loss=..."
    no_inputs = "A batch is a list, not a dict of inputs; pass a loss=... that reads it."
    cases = [
        ([unlabelled], ValueError, no_loss),
        ([{**batch, "return_dict": False}], ValueError, no_dict),
        ([list(batch.values())], TypeError, no_inputs),
        (batch, TypeError, "batches is one batch, a dict; put it into a list: [batch]."),
        (BatchEncoding(batch), TypeError, "batches is one batch, a BatchEncoding; put it into a list: [batch]."),
    ]
    for batches, kind, message in cases:
        with pytest.raises(kind, match=exactly(message)):
            had.weigh_teachers(model, batches)
        assert everything(model) == before
