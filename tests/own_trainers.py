"""Trainers of a user, with both stages, and data for them."""

import torch
from tiny_models import make_dataset
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import Trainer

import hf_adapter_distillation as had


class WeightedTrainer(Trainer):
    """Ignores the model's own loss, as for unbalanced classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = weighted(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


def weighted(logits, labels):
    return cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0], dtype=logits.dtype))


class TwiceTrainer(Trainer):
    """Embeds two columns of a batch, with paddings of their own, by one model."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = two_columns(model, inputs)
        return (loss, {}) if return_outputs else loss


def two_columns(model, inputs):
    first, second = (
        model(inputs[f"{side}_input_ids"], attention_mask=inputs[f"{side}_attention_mask"])[0][:, 0]
        for side in ("left", "right")
    )
    return (cosine_similarity(first, second) - inputs["labels"]).square().mean()


class Weighted(had.DistillationMixin, WeightedTrainer):
    """Both."""


class Twice(had.DistillationMixin, TwiceTrainer):
    """Both."""


def two_sided():
    sides = {"left": make_dataset(16), "right": make_dataset(16, seed=3)}
    columns = {f"{side}_{name}": sides[side][name] for side in sides for name in ("input_ids", "attention_mask")}
    return make_dataset(16).select_columns("labels").add_column("row", list(range(16))).map(
        lambda row: {name: values[row["row"]] for name, values in columns.items()}, remove_columns="row"
    )  # fmt: skip
