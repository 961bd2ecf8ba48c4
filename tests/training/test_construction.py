"""What Trainer reads of a model at its construction: whether the loss counts items, and the names of the labels."""

import pytest
import torch
from tiny_models import make_dataset, make_model, make_student
from trainings import gradients, trainer_for
from transformers import Trainer
from wrapped_models import Passing

import hf_adapter_distillation as had
from hf_adapter_distillation.training.construction import shown_to_trainer

TOKENS = make_dataset(8, "tokens").map(lambda row: {"attention_mask": [1] * 8, "labels": row["input_ids"]})


def llama(**kwargs):
    return make_student(make_model("llama", "causal_lm", **kwargs), head=None)


class MeanTrainer(Trainer):
    """Takes the mean over a micro-batch, and says so as the documentation of `Trainer.compute_loss` asks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class CountingTrainer(MeanTrainer):
    """Says that its loss counts items, whatever the model."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True


@pytest.mark.parametrize("last", ["bert", "llama"])  # whose signature adapters shows for all models
@pytest.mark.parametrize(
    ("base", "family", "counts"),
    [
        (Trainer, "llama", True),
        (Trainer, "bert", False),
        (MeanTrainer, "llama", False),
        (CountingTrainer, "bert", True),
    ],
)
def test_the_other_base_may_say_whether_the_loss_counts_items(base, family, counts, last, trainer_args):
    class Mine(had.DistillationMixin, base):
        """Both."""

    model = llama() if family == "llama" else make_student(make_model())
    make_model(last, {"bert": "classification", "llama": "causal_lm"}[last])
    assert Mine(model, trainer_args(), train_dataset=TOKENS).model_accepts_loss_kwargs is counts
    assert "accepts_loss_kwargs" not in vars(model)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_model_may_say_that_its_loss_is_a_mean(is_wrapped, trainer_args):
    model = Passing(llama()) if is_wrapped else llama()
    assert trainer_for(model, trainer_args(), train_dataset=TOKENS).model_accepts_loss_kwargs
    model.accepts_loss_kwargs = False
    assert not trainer_for(model, trainer_args(), train_dataset=TOKENS).model_accepts_loss_kwargs
    assert model.accepts_loss_kwargs is False


def test_a_mean_of_micro_batches_is_not_multiplied(trainer_args, monkeypatch):
    class Mine(had.DistillationMixin, MeanTrainer):
        """Both."""

    monkeypatch.setattr(had, "DistillationTrainer", Mine)
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = llama(dtype=torch.float64).double()
        results.append(gradients(model, trainer_args, batch_size, accumulation, train_dataset=TOKENS)[0])
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-9, atol=1e-12)


class NoLabelsTrainer(Trainer):
    """Needs no labels, and says so as trl's `RewardTrainer` does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.can_return_loss, self.label_names = True, []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs)[0].square().mean()
        return (loss, {}) if return_outputs else loss


def test_a_trainer_without_labels_evaluates(trainer_args):
    class Mine(had.DistillationMixin, NoLabelsTrainer):
        """Both."""

    dataset = make_dataset(labels=None)
    model = make_student(make_model(kind="base"), head=None)
    trainer = Mine(model, trainer_args(remove_unused_columns=False), train_dataset=dataset, eval_dataset=dataset)
    assert trainer.label_names == []
    assert trainer.evaluate()["eval_loss"] > 0


def test_label_names_of_the_arguments_are_kept(trainer_args):
    for names in ([], ["scores"]):
        assert trainer_for(make_student(make_model()), trainer_args(label_names=names)).label_names == names


def test_a_quantized_model_is_one_again_after_the_construction():
    model = make_model()
    model.is_quantized = True
    with shown_to_trainer(model, None):
        assert not model.is_quantized
    assert model.is_quantized
