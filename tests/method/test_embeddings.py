"""The objective that matches the similarities of embeddings."""

import pytest
import torch
from embedding_models import PAIRS, TEXTS, embedding_model
from model_state import changed, snapshot
from sentence_transformers import losses
from tiny_models import TEACHERS, make_model, make_student
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.integrations.sentence_transformers import (
    SentenceTransformerDistillationTrainer,
    SentenceTransformerDistillationTrainingArguments,
)
from hf_adapter_distillation.method.embeddings import SimilarityLoss, mean_pooling
from hf_adapter_distillation.method.layers import adapter_layers, adapter_update


def by_hand(student, teachers, temperature):
    """The loss of embeddings, text by text."""
    total = 0.0
    for i in range(len(student)):
        others = [j for j in range(len(student)) if j != i]

        def log_softmax(embeddings, i=i, others=others):
            cosines = [torch.cosine_similarity(embeddings[i], embeddings[j], dim=0) for j in others]
            return (20 * torch.stack(cosines) / temperature).log_softmax(dim=0)

        ours, theirs = log_softmax(student), log_softmax(teachers)
        total = total + (theirs.exp() * (theirs - ours)).sum()
    return temperature**2 * total / len(student)


def test_the_loss_by_hand():
    student, teachers = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    for temperature in (0.5, 2.0):
        loss = SimilarityLoss(temperature)(student, teachers)
        torch.testing.assert_close(loss, by_hand(student, teachers.detach(), temperature), rtol=1e-12, atol=1e-12)
    assert SimilarityLoss()(teachers * 3, teachers) < 1e-12  # lengths do not matter
    assert SimilarityLoss()(student[:1], teachers[:1]) == 0
    (gradient,) = torch.autograd.grad(SimilarityLoss()(student, student.flip(0).detach()), student)
    assert gradient.norm() > 0


def ensemble_embeddings(encoder, weights):
    """The embeddings of a model whose layers add the weighted sum of the teachers' updates, by hooks."""
    hooks = []
    for _, layer in adapter_layers(encoder[0].auto_model, "insurance"):

        def mix(module, inputs, kwargs, output, adapters=layer.adapters):
            updates = [weights[name] * adapter_update(adapters[name], inputs[0], inputs[0]) for name in TEACHERS]
            return kwargs["residual_input"] + torch.stack(updates).sum(0), *output[1:]

        hooks.append(layer.adapters["insurance"].register_forward_hook(mix, with_kwargs=True))
    embeddings = torch.tensor(encoder.encode(TEXTS))
    for hook in hooks:
        hook.remove()
    return embeddings


@pytest.mark.parametrize(("pooling", "scale"), [("mean", 1), ("max", 2)])
def test_texts_without_labels_follow_the_ensemble(pooling, scale, tiny_encoder, tmp_path):
    """The loss of the first step, by the pooling of the model, and what it trains."""
    encoder = embedding_model(
        tmp_path, tiny_encoder, pooling=pooling, dropout=0.0, objective="similarity", student_start="random"
    )
    weights = {name: scale * weight for name, weight in {"bank": 0.5, "travel": 0.2, "work": 0.1}.items()}
    transformer = encoder[0].auto_model
    for _, layer in adapter_layers(transformer, "insurance"):
        layer.distillation_fusion["insurance"].set_weights(weights)
    expected = by_hand(torch.tensor(encoder.encode(TEXTS)), ensemble_embeddings(encoder, weights), 2.0)
    assert expected > 1e-4
    args = SentenceTransformerDistillationTrainingArguments(
        str(tmp_path / "training"), per_device_train_batch_size=4, max_steps=1, distillation_start=0.0, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, logging_steps=1, distillation_weight=1e3,
        dataloader_pin_memory=False, learning_rate=1e-2, keep_fusion=True,
    )  # fmt: skip
    trainer = SentenceTransformerDistillationTrainer(
        encoder, args, train_dataset=PAIRS.select(range(4)), loss=losses.MultipleNegativesRankingLoss(encoder),
        distillation_dataset=PAIRS.select(range(4)).select_columns("anchor"),
    )  # fmt: skip
    before, seen = snapshot(encoder), []
    take = trainer._distil_unlabelled
    trainer._distil_unlabelled = lambda *args: seen.append(take(*args)) or seen[0]
    trainer.train()
    torch.testing.assert_close(seen[0], 1e3 * expected.to(seen[0]), rtol=1e-4, atol=1e-5)
    assert all(".insurance." in name for name in changed(encoder, before))


def test_whole_layers_have_an_ensemble_too():
    """Prefixes are fused as whole layers, which run again in the ensemble."""
    model = make_student(
        make_model(kind="base"), config="prefix_tuning", objective="similarity", student_start="random"
    )
    model.train()
    output = model(input_ids=torch.randint(3, 20, (3, 6)), attention_mask=torch.ones(3, 6))
    loss = had.distillation_of(model).take_record().distillation_loss
    assert loss > 0
    mean_pooling(output["last_hidden_state"], torch.ones(3, 6)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "insurance" in n)


def test_a_model_with_a_head_has_no_embeddings(trainer_args):
    with pytest.raises(ValueError, match="The objective 'similarity' needs embeddings, but a .* has a head; take"):
        trainer_for(make_student(make_model(), objective="similarity"), trainer_args())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_cosines(dtype):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 64, generator=generator) + 0.3 * torch.randn(16, 64, generator=generator)
    ensemble = student + 0.02 * torch.randn(16, 64, generator=generator)
    exact = SimilarityLoss()(student.double(), ensemble.double())
    with torch.autocast("cpu", dtype):
        loss = SimilarityLoss()(student, ensemble)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
