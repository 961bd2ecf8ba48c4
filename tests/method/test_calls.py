"""Several calls of a model in a step, and several of a base model in one forward pass, against the plain sum."""

import adapters
import pytest
import torch
from marks import in_turn
from model_state import configure
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy
from torch import nn
from transformers import BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import hf_adapter_distillation as had
from hf_adapter_distillation.method import forward
from hf_adapter_distillation.method.distillation import distillation_of

SETTINGS = {"weight": 0.7, "regularization": 0.01}


class BiEncoder(BertPreTrainedModel):
    """A model of its own, which calls its encoder for queries and for FAQs."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.post_init()

    def embed(self, ids, mask):
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, input_ids=None, attention_mask=None, faq_ids=None, faq_mask=None, return_dict=None):
        scores = self.embed(input_ids, attention_mask) @ self.embed(faq_ids, faq_mask).T / 5
        loss = nn.functional.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[1])
        return SequenceClassifierOutput(loss=loss, logits=scores)


def with_student(model, **config):
    """The model in double precision, with teachers and a student that is trained."""
    adapters.init(model)
    for name in TEACHERS:
        model.add_adapter(name, config="seq_bn")
        noisy(model, name)
    model.add_adapter("insurance", config="seq_bn", distill_from=had.DistillationConfig(TEACHERS, **config))
    noisy(model, "insurance")
    model.double().train_adapter("insurance")
    return model.train()


def make_bi_encoder(checkpointing=False, **config):
    torch.manual_seed(0)
    model = with_student(BiEncoder(make_model().config), **config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def texts(number, length, seed, padded=None):
    ids = torch.randint(3, 60, (number, length), generator=torch.Generator().manual_seed(seed))
    ids = nn.functional.pad(ids, (0, (padded or length) - length))
    return ids, (ids > 0).long()


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("distillation_fusion" in name for name in found)
    assert any(".insurance." in name for name in found)
    return found


def headless(**config):
    """A student on a BERT without heads."""
    model = with_student(BertModel(make_model().config), **config)
    configure(model, **SETTINGS)
    return model


def plain_terms(model, run):
    """The graph of the terms of each forward pass of a function, and what it returns."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            forward, "carry", lambda output, terms, *args, **kwargs: (found.append(terms), (output, terms * 1.0))[1]
        )
        result = run(model)
    distillation_of(model).begin_step()
    return found, result


def pooled(model, batch):
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def contrast(vectors, others):
    return nn.functional.cross_entropy(vectors @ others.T, torch.arange(len(vectors)))


def two_batches():
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in (texts(4, 9, 1), texts(4, 6, 2, padded=11))]


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("carrier", ["student", "fused"])
def test_two_forward_passes_of_a_step_share_the_terms(carrier, scale):
    """An encoder without a head or a loss: a contrast of the pooled states of both passes."""
    model = headless(carrier=carrier)
    terms, loss = plain_terms(model, lambda model: contrast(*(pooled(model, batch) for batch in two_batches())))
    (loss + (scale or 1.0) * (terms[0] + terms[1]) / 2).backward()
    expected = gradients(model)
    model.zero_grad()
    configure(model, scale=scale)
    contrast(*(pooled(model, batch) for batch in two_batches())).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


def test_one_pass_of_all_sequences_is_two_of_its_parts():
    batch = make_batch(6, labels=None)
    records, found = [], []
    for sizes in ([6], [4, 2]):
        model = headless()
        parts = [{name: value.split(sizes)[i] for name, value in batch.items()} for i in range(len(sizes))]
        torch.cat([pooled(model, part) for part in parts]).square().mean().backward()
        records.append(distillation_of(model).take_record())
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-13)
    whole, parts = records
    torch.testing.assert_close(parts.distillation_loss, whole.distillation_loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.added, whole.added, rtol=1e-9, atol=0)
    assert parts.attention.keys() == whole.attention.keys()


def test_a_pass_without_gradients_counts_for_nothing():
    batch, found = make_batch(4, labels=None), []
    for looks in (False, True):
        model = headless()
        if looks:
            with torch.no_grad():
                pooled(model, make_batch(3, labels=None))
        pooled(model, batch).square().mean().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient)


def test_a_gradient_cache_equals_the_batch():
    """Mini-batches that run without a graph, then each forward and backward in turn."""
    batch = make_batch(6, labels=None)
    model = headless()
    contrast(vectors := pooled(model, batch), vectors.roll(1, 0)).backward()
    expected, record = gradients(model), distillation_of(model).take_record()
    model = headless()
    configure(model, sequences=6, scale=1.0)
    parts = [{name: value[i : i + 2] for name, value in batch.items()} for i in (0, 2, 4)]
    for _ in range(2):  # the second step begins anew
        model.zero_grad()
        with torch.no_grad():
            vectors = torch.cat([pooled(model, part) for part in parts])
        vectors.requires_grad_()
        contrast(vectors, vectors.roll(1, 0)).backward()
        for part, gradient in zip(parts, vectors.grad.split(2), strict=True):
            (pooled(model, part) * gradient).sum().backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)
    of_parts = distillation_of(model).take_record()
    torch.testing.assert_close(of_parts.added, record.added, rtol=1e-9, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_call_of_the_encoder_has_its_own_mask(checkpointing):
    """Padding of the queries, of the FAQs, or of both to one length changes neither terms nor gradients."""
    results = []
    for queries, faqs in ((5, 12), (5, 16), (16, 16)):
        model = make_bi_encoder(checkpointing, carrier="fused")
        configure(model, **SETTINGS)
        ids, mask = texts(4, 5, 1, queries)
        faq_ids, faq_mask = texts(4, 12, 2, faqs)
        model(input_ids=ids, attention_mask=mask, faq_ids=faq_ids, faq_mask=faq_mask).loss.backward()
        results.append((distillation_of(model).take_record().distillation_loss, gradients(model)))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-10, atol=0)
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-8, atol=1e-12)


def test_checkpointed_calls_equal_plain_ones():
    found = []
    for checkpointing in (False, True):
        model = make_bi_encoder(checkpointing)
        ids, mask = texts(4, 5, 1, 16)
        faq_ids, faq_mask = texts(4, 12, 2, 16)
        model(input_ids=ids, attention_mask=mask, faq_ids=faq_ids, faq_mask=faq_mask).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        if "embeddings" not in name:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-13)


def test_calls_with_different_numbers_of_sequences_are_weighted_by_them():
    model = make_bi_encoder()
    ids, mask = texts(6, 5, 1)
    faq_ids, faq_mask = texts(2, 12, 2)
    model(input_ids=ids, attention_mask=mask, faq_ids=faq_ids, faq_mask=faq_mask)
    record = distillation_of(model).take_record()
    of_calls = []
    for one, other in ((ids, mask), (faq_ids, faq_mask)):
        model.bert(one, other)
        of_calls.append(distillation_of(model).take_record())
    expected = (6 * of_calls[0].distillation_loss + 2 * of_calls[1].distillation_loss) / 8
    torch.testing.assert_close(record.distillation_loss, expected, rtol=1e-10, atol=0)
    place = next(iter(record.attention))
    weights = (6 * of_calls[0].attention[place].weights + 2 * of_calls[1].attention[place].weights) / 8
    torch.testing.assert_close(record.attention[place].weights, weights)


def test_an_error_in_a_call_leaves_no_context_behind():
    model = make_bi_encoder()
    batch = dict(zip(("input_ids", "attention_mask"), texts(4, 5, 1), strict=True))
    faq_ids, faq_mask = texts(4, 12, 2)
    with pytest.raises(IndexError):
        model(**batch, faq_ids=faq_ids + 1000, faq_mask=faq_mask)
    assert adapters.context.ForwardContext.get_context() is None
    model(**batch, faq_ids=faq_ids, faq_mask=faq_mask).loss.backward()
    assert gradients(model)


# Losses that are computed from the output of a model with a head


def own_loss(logits, labels):
    return nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0], dtype=logits.dtype))


WAYS = {
    "loss of the model": lambda model, batch: model(**batch).loss,
    "labels popped": lambda model, batch: own_loss(
        model(**{name: value for name, value in batch.items() if name != "labels"}).logits, batch["labels"]
    ),
    "labels passed, loss ignored": lambda model, batch: own_loss(model(**batch).logits, batch["labels"]),
    "loss and logits": lambda model, batch: (out := model(**batch)).loss + own_loss(out.logits, batch["labels"]),
    "tuple": lambda model, batch: model(**batch, return_dict=False)[0],
    "tuple, its logits": lambda model, batch: own_loss(model(**batch, return_dict=False)[1], batch["labels"]),
    "hidden states": lambda model, batch: model(**batch, output_hidden_states=True).hidden_states[-1].square().mean(),
    "the last layer but one": lambda model, batch: (
        model(**batch, output_hidden_states=True).hidden_states[-2].square().mean()
    ),
}
OBJECTIVES = {
    "features": {"features": 1.0},
    "predictions": {"features": 1.0, "logits": 2.0, "cross_task": 0.5},
}


@pytest.mark.parametrize(
    ("way", "objective", "scale"), in_turn([(way, name) for way in WAYS for name in OBJECTIVES], [None, 0.25])
)
def test_each_loss_distils(way, objective, scale):
    model = make_student(make_model(), objective=OBJECTIVES[objective]).double()
    model.train_adapter("insurance")
    noisy(model, "insurance")
    configure(model, **SETTINGS)
    batch = make_batch(4)
    terms, loss = plain_terms(model.train(), lambda model: WAYS[way](model, batch))
    ((loss if scale is None else scale * loss) + (scale or 1.0) * terms[0]).backward()
    expected = gradients(model)
    model.zero_grad()
    configure(model, scale=scale)
    found = WAYS[way](model, batch)
    (found if scale is None else scale * found).backward()
    torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


def test_terms_follow_the_models_own_loss_through_accumulation_and_scaling():
    """A loop that divides the loss by the micro-batches, or has a GradScaler, need not know the terms."""
    batch, found = make_batch(4), []
    for factor in (1.0, 2.0**12 / 4):
        model = make_student(make_model()).double()
        model.train_adapter("insurance")
        (factor * model.train()(**batch).loss).backward()
        found.append({name: gradient / factor for name, gradient in gradients(model).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("way", ["loss of the model", "labels passed, loss ignored", "tuple"])
def test_both_passes_of_dual_are_trained(way):
    model = make_student(make_model(), carrier="dual").double()
    model.train_adapter("insurance")
    noisy(model, "insurance")
    configure(model, **SETTINGS)
    batch = make_batch(4)
    terms, loss = plain_terms(model.train(), lambda model: WAYS[way](model, batch))
    assert len(terms) == 2
    (loss + terms[0] + terms[1]).backward()
    expected = gradients(model)
    model.zero_grad()
    WAYS[way](model, batch).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-13)


def test_a_step_without_a_pass_is_an_error():
    model = make_student(make_model())
    model.eval()(**make_batch())
    with pytest.raises(RuntimeError, match="^No forward pass with the teachers went before, so nothing was distilled"):
        distillation_of(model).take_record()


def test_a_training_that_never_sets_the_settings_is_told_once(caplog):
    model = make_student(make_model()).train()
    for _ in range(2):
        model(**make_batch()).loss.backward()
    messages = [record.message for record in caplog.records if "is distilled from its teachers" in record.message]
    assert len(messages) == 1
    assert "with weight 1." in messages[0]
    assert "\n" not in messages[0]
    caplog.clear()
    model = make_student(make_model()).train()
    distillation_of(model).settings = had.StageSettings()
    model(**make_batch()).loss.backward()
    assert not any("is distilled from" in record.message for record in caplog.records)
