"""The gradients of a step of each trainer against plain autograd in float64."""

import pytest
import torch
from embedding_models import PAIRS, SCORED, cross_encoder, embedding_model
from marks import LONG
from own_trainers import Twice, Weighted, two_columns, two_sided, weighted
from plain_gradients import reference_gradients
from sentence_transformers import losses
from sentence_transformers.cross_encoder import losses as cross_encoder_losses
from tiny_models import make_dataset, make_model, make_student
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, pad
from transformers import TrainerCallback, set_seed
from wrapped_models import Classifier

import hf_adapter_distillation as had
from hf_adapter_distillation.integrations import sentence_transformers as embeddings

WEIGHT, REGULARIZATION, BATCH = 0.7, 0.3, 4


class TupleClassifier(Classifier):
    """Reads and puts out tuples."""

    def forward(self, input_ids, attention_mask, labels=None):
        output = super().forward(input_ids, attention_mask, labels, return_dict=False)
        return output["loss"], output["logits"]


def student_of(kind, family="bert"):
    return make_student(make_model(family, kind, dtype=torch.float64), student_start="random").double()


def without_padding(row):
    """The reference has no masks of a decoder."""
    tokens = [max(token, 3) for token in row["input_ids"]]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens}


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def embedded(loss):
    def task_loss(model, batch):
        features, labels = embeddings.SentenceTransformerDistillationTrainer.collect_features(None, dict(batch))
        return loss(model)(features, labels)

    return task_loss


def pairs_loss(model, batch):
    batch = dict(batch)
    labels = batch.pop("label")
    tokens = model.preprocess(list(zip(*batch.values(), strict=True)))
    return binary_cross_entropy_with_logits(model(tokens)["scores"].view(-1), labels.to(torch.float64))


def no_dropout(make, folder, encoder, **kwargs):
    return make(folder, encoder, dropout=0.0, dtype=torch.float64, student_start="random", **kwargs)


def of_sentences(loss, dataset, forward=None):
    """A setting of sentence embeddings; a loss with a gradient cache has a `forward` without one."""
    model = lambda folder, encoder: no_dropout(embedding_model, folder, encoder)  # noqa: E731
    run = None if forward is None else embedded(forward)
    return embeddings.SentenceTransformerDistillationTrainer, model, dataset, loss, embedded(loss), run


RANKING = losses.MultipleNegativesRankingLoss
OWN = (lambda model, batch: model(**batch)["loss"],)
SETTINGS = {  # the trainer, its model, data and loss, and what the reference needs
    "trainer": (had.DistillationTrainer, lambda *_: student_of("flex"), make_dataset(), None, *OWN),
    "static head": (had.DistillationTrainer, lambda *_: student_of("classification"), make_dataset(), None, *OWN),
    "seq2seq": (
        had.Seq2SeqDistillationTrainer,
        lambda *_: student_of("seq2seq_lm", "bart"), make_dataset(labels="tokens").map(without_padding), None, *OWN,
    ),
    "own loss": (
        Weighted, lambda *_: student_of("flex"), make_dataset(), None,
        lambda model, batch: weighted(model(**without_labels(batch)).logits, batch["labels"]),
    ),
    "tuples": (
        had.DistillationTrainer, lambda *_: TupleClassifier(student_of("base")), make_dataset(), None,
        lambda model, batch: model(**batch)[0],
    ),
    "two passes": (Twice, lambda *_: student_of("base"), two_sided(), None, two_columns),
    "ranking": of_sentences(RANKING, PAIRS),
    "cached ranking": of_sentences(
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), PAIRS, RANKING
    ),
    "scores": of_sentences(losses.CoSENTLoss, SCORED),
    "matryoshka": of_sentences(lambda model: losses.MatryoshkaLoss(model, RANKING(model), [16, 8]), PAIRS),
    "cached matryoshka": of_sentences(
        lambda model: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), [16, 8]
        ),
        PAIRS, lambda model: losses.MatryoshkaLoss(model, RANKING(model), [16, 8]),
    ),
    "cross-encoder": (
        embeddings.CrossEncoderDistillationTrainer,
        lambda folder, encoder: no_dropout(cross_encoder, folder, encoder), SCORED.rename_column("score", "label"),
        cross_encoder_losses.BinaryCrossEntropyLoss, pairs_loss,
    ),
}  # fmt: skip
ARGUMENTS = {
    "seq2seq": had.Seq2SeqDistillationTrainingArguments,
    "cross-encoder": embeddings.CrossEncoderDistillationTrainingArguments,
}


def build(name, folder, encoder):
    """A model with a fusion off its start, where its regularisation has a gradient."""
    set_seed(0)
    model = SETTINGS[name][1](folder, encoder)
    generator = torch.Generator().manual_seed(7)
    for key, parameter in model.named_parameters():
        if "distillation_fusion" in key:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        elif key.startswith(("norm.", "head.")):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
            module.train = lambda mode=True: None
    return model


def padded(inputs, columns):
    """Padding on the right of each tensor of tokens."""
    tokens = ("input_ids", "attention_mask", "token_type_ids")
    return {k: pad(v, (0, columns)) if columns and k.endswith(tokens) else v for k, v in inputs.items()}


def gradients_of_trainer(name, model, folder, accumulation=1, checkpointing=False, padding=0):
    """The gradients of the first step, its micro-batches and its log."""
    found, batches = {}, []

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    cls, _, dataset, loss, *_ = SETTINGS[name]
    arguments = ARGUMENTS.get(name, had.DistillationTrainingArguments)
    if cls is embeddings.SentenceTransformerDistillationTrainer:
        arguments = embeddings.SentenceTransformerDistillationTrainingArguments
    args = arguments(
        str(folder), max_steps=1, per_device_train_batch_size=BATCH, gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing, distillation_start=0.0, distillation_weight=WEIGHT,
        fusion_regularization=REGULARIZATION, max_grad_norm=0.0, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
        remove_unused_columns=name != "two passes", keep_fusion=True,
    )  # fmt: skip
    kwargs = {} if loss is None else {"loss": loss(model)}
    trainer = cls(model, args, train_dataset=dataset, callbacks=[Grab()], **kwargs)
    step = trainer.training_step

    def training_step(model, inputs, *args):
        batches.append(dict(inputs))
        return step(model, padded(inputs, padding), *args)

    trainer.training_step = training_step
    trainer.train()
    return found, batches, trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("accumulation", "checkpointing"),
    [(1, False), (4, True), pytest.param(4, False, marks=LONG), pytest.param(1, True, marks=LONG)],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_the_reference(name, accumulation, checkpointing, tiny_encoder, tmp_path):
    model, alone = (build(name, tmp_path / side, tiny_encoder) for side in ("model", "alone"))
    found, batches, log = gradients_of_trainer(name, model, tmp_path, accumulation, checkpointing)
    assert len(batches) == accumulation
    task_loss, *forward = SETTINGS[name][4:]
    wanted = reference_gradients(alone, batches, task_loss, WEIGHT, REGULARIZATION, *forward)
    assert found.keys() == wanted.keys()
    assert any("distillation_fusion" in key for key in found)
    assert any(".adapters.insurance." in key for key in found)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item(), msg=key)
        assert gradient.any(), key
    terms = WEIGHT * log["distillation_loss"] + log["fusion_regularization"]
    assert log["loss"] == pytest.approx(log["task_loss"] + terms, abs=2e-4)


@pytest.mark.parametrize("name", ["own loss", "tuples", "two passes", "ranking", "cached ranking"])
def test_padding_of_any_trainer_changes_nothing(name, tiny_encoder, tmp_path):
    plain, padded = (
        gradients_of_trainer(name, build(name, tmp_path / str(n), tiny_encoder), tmp_path, padding=n)[0]
        for n in (0, 3)
    )
    assert plain.keys() == padded.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(padded[key], gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item(), msg=key)
