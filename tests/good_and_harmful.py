"""Teachers of which one knows the task, one has learnt shuffled labels, and one has random weights."""

import copy
from functools import cache
from tempfile import TemporaryDirectory

import torch
from adapters import AdapterTrainer
from datasets import Dataset
from tiny_models import VOCABULARY, make_model, noisy
from transformers import TrainingArguments


def sequences(n, seed, shuffled=False):
    """Sequences, of which those are positive whose first token is in the lower half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (n, 8), generator=generator)
    labels = (input_ids[:, 0] < VOCABULARY // 2).long()
    if shuffled:
        labels = labels[torch.randperm(n, generator=generator)]
    return Dataset.from_dict({"input_ids": input_ids.tolist(), "labels": labels.tolist()})


def good_and_harmful():
    """A new model with the teachers "shuffled", "good" and "random"."""
    return copy.deepcopy(_trained())


@cache
def _trained():
    model = make_model()
    with TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=16, num_train_epochs=6,
            learning_rate=5e-3, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        for seed, name in enumerate(("shuffled", "good", "random")):
            model.add_adapter(name, config="double_seq_bn")
            model.add_classification_head(name)
            if name == "random":
                noisy(model, name)
                continue
            model.train_adapter(name)
            AdapterTrainer(model, args, train_dataset=sequences(512, seed, shuffled=name == "shuffled")).train()
    return model


def batches_of(n, seed=7, size=16):
    """Labelled batches of the task."""
    data = sequences(n, seed).with_format("torch")
    return [data[i : i + size] for i in range(0, n, size)]
