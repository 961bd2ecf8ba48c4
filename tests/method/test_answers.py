"""The teachers' distributions over the vocabulary, against a plain reference token by token in float64."""

import gc
import weakref

import adapters
import pytest
import torch
from adapters import AdapterSetup, Stack
from messages import exactly
from model_state import changed, configure, snapshot
from tiny_models import (
    CONFIGS,
    TEACHERS,
    VOCABULARY,
    distillation_of,
    make_batch,
    make_dataset,
    make_model,
    make_student,
    noisy,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode
from trainings import trainer_for
from transformers import AutoModelForMaskedLM

from hf_adapter_distillation.method import answers
from hf_adapter_distillation.method.answers import AnswerMixture, answer_loss
from hf_adapter_distillation.method.logit_losses import LogitLoss
from hf_adapter_distillation.method.weights import TeacherWeights

OF_PLACES = {"here": {"bank": 0.4, "travel": 0.1, "work": 0.2}, "there": dict.fromkeys(TEACHERS, 0.1)}
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
SHARES = [0.5, 0.2, 0.3]  # the means 0.25, 0.1 and 0.15
KINDS = {  # and the number of tokens between logits and their labels
    "gpt2": (("gpt2", "causal_lm"), 1),
    "llama": (("llama", "causal_lm"), 1),
    "bart": (("bart", "seq2seq_lm"), 0),
    "masked words": (None, 0),
    "heads of the teachers": (("gpt2", "flex"), 1),
}


def a_student(kind, **kwargs):
    """A student that is not at its start, whose head is frozen if the teachers share it."""
    made, _ = KINDS[kind]
    if made is None:
        model = AutoModelForMaskedLM.from_config(CONFIGS["bert"](**dict.fromkeys(NO_DROPOUT, 0.0)))
        adapters.init(model)
    else:
        model = make_model(*made)
    settings = {"objective": "logits", "student_start": "random", "config": "lora", "head": "causal_lm"} | kwargs
    model = make_student(model, **settings).double()
    noisy(model, "insurance")
    if kind != "heads of the teachers":
        of_base = {id(parameter) for parameter in model.base_model.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in of_base:
                parameter.requires_grad_(False)
    return model


def an_answer():
    """A batch whose labels are the last tokens of each row, and none in the last row."""
    batch = make_batch(labels="tokens")
    batch["labels"][:, :2] = -100
    batch["labels"][-1] = -100
    return batch


def kullback_leibler(first, second):
    return sum(p * (p / q).log() for p, q in zip(first, second, strict=True))


def of_token(soft, own, beta):
    """The generalised divergence of two distributions, by its definition."""
    if beta in (0, 1):
        return kullback_leibler(soft, own) if beta == 0 else kullback_leibler(own, soft)
    mixture = beta * soft + (1 - beta) * own
    return beta * kullback_leibler(soft, mixture) + (1 - beta) * kullback_leibler(own, mixture)


def reference(model, batch, counted, temperature, beta):
    """The loss of the student, with its graph."""
    has_heads = hasattr(model, "heads")
    teachers = []
    for name in TEACHERS:
        with AdapterSetup(Stack(name), head_setup=name if has_heads else None), torch.no_grad():
            teachers.append(model.eval()(**batch).logits)
    with AdapterSetup(Stack("insurance"), head_setup="insurance" if has_heads else None):
        student = model(**batch).logits
    rows = []
    for row, positions in enumerate(counted):
        losses = []
        for t in positions:
            each = zip(SHARES, teachers, strict=True)
            soft = sum(share * (logits[row, t] / temperature).softmax(-1) for share, logits in each)
            losses.append(temperature**2 * of_token(soft, (student[row, t] / temperature).softmax(-1), beta))
        rows.append(sum(losses) / len(losses) if losses else student.sum() * 0)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradients_are_those_of_the_definition(kind, has_labels, monkeypatch):
    monkeypatch.setattr(answers, "CHUNK", 3 * VOCABULARY)
    beta, shift = {"gpt2": 0.0, "llama": 1.0}.get(kind, 0.3), KINDS[kind][1]
    model, batch = a_student(kind, temperature=1.5, beta=beta), an_answer()
    distillation_of(model).weights = TeacherWeights(OF_PLACES, gain=0.5)
    configure(model, weight=2.0)
    counted = batch["labels"] != -100
    counted = [[t - shift for t in row.nonzero().flatten().tolist()] for row in counted]
    assert [len(row) for row in counted][-1] == 0
    if not has_labels:
        counted = [row.nonzero().flatten().tolist() for row in batch["attention_mask"]]
        batch["decoder_input_ids" if kind == "bart" else "labels"] = batch.pop("labels").clamp(min=0)
        if kind != "bart":
            del batch["labels"]
        else:
            counted = [list(range(8))] * 4  # the inputs of the decoder have no mask
    expected = reference(model, batch, counted, 1.5, beta)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(2.0 * expected, trained, allow_unused=True)

    output = model.train()(**batch)
    record = distillation_of(model).take_record()
    torch.testing.assert_close(record.distillation_loss, expected.detach(), rtol=1e-9, atol=1e-12)
    zero = 0.0 * output["logits"].sum()
    found = torch.autograd.grad(zero, trained, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 1e-7 for gradient in wanted)
    for parameter, gradient, other in zip(trained, found, wanted, strict=True):
        gradient, other = (torch.zeros_like(parameter) if g is None else g for g in (gradient, other))
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-12)


class Alive(TorchDispatchMode):
    """The largest number of elements of tensors with a vocabulary that are alive at once, of distinct storages."""

    def __init__(self):
        super().__init__()
        self.most, self.seen = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, torch.Tensor) and value.shape[-1:] == (VOCABULARY,):
                storage = value.untyped_storage()
                self.seen[storage.data_ptr()] = (weakref.ref(value), value.numel())
        self.most = max(self.most, sum(size for ref, size in self.seen.values() if ref() is not None))
        return output


@pytest.mark.parametrize("kind", ["llama", "heads of the teachers"])
def test_the_logits_of_all_teachers_are_not_in_memory_at_once(kind, monkeypatch):
    """The peak is the same for eight teachers as for two: logits of the student and of a teacher, and the mixture."""
    monkeypatch.setattr(answers, "CHUNK", VOCABULARY)
    peaks, size = [], 4 * 8 * VOCABULARY
    for n_teachers in (2, 8):
        model = a_student(kind, teachers=[f"t{i}" for i in range(n_teachers)])
        gc.collect()
        with Alive() as alive:
            output = model.train()(**an_answer())
        assert output.loss.requires_grad
        peaks.append(alive.most)
    assert peaks[0] == peaks[1]
    assert 2 * size < peaks[0] < 5 * size


def test_a_training_moves_the_student_alone_towards_its_teachers(trainer_args):
    """The loss on the answer falls; the base model, its head and the teachers are bitwise the same."""
    model = a_student("llama", beta=0.5)
    before = snapshot(model)
    args = trainer_args(max_steps=8, distillation_start=0.0, distillation_weight=1e4, learning_rate=3e-2)
    trainer = trainer_for(model, args, train_dataset=make_dataset(labels="tokens"))
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all(".insurance." in name for name in moved)
    losses = [log["distillation_loss"] for log in trainer.state.log_history if "distillation_loss" in log]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_shared_head_must_be_frozen(trainer_args):
    model = a_student("masked words")
    name = "cls.predictions.transform.dense.weight"
    model.get_parameter(name).requires_grad_(True)
    message = (
        f"The objective 'logits' needs a frozen head, with which all teachers predict; '{name}' is trained: "
        f"call model.get_parameter('{name}').requires_grad_(False) after train_adapter."
    )
    trainer = trainer_for(model, trainer_args(max_steps=1), train_dataset=make_dataset(labels="tokens"))
    with pytest.raises(ValueError, match=exactly(message)):
        trainer.train()


def test_labels_outside_the_model_say_too_little(trainer_args):
    message = "The objective 'logits' needs the labels in the model's own forward; leave out label_smoothing_factor"
    with pytest.raises(ValueError, match=message):
        trainer_for(a_student("gpt2"), trainer_args(label_smoothing_factor=0.1))


def test_a_batch_without_answers_counts_as_zero_with_a_graph():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    mixture = AnswerMixture(torch.zeros(2, 3, dtype=torch.bool), temperature=1.0)
    mixture.add(logits, 1.0)
    loss = answer_loss(logits, mixture, LogitLoss())
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0
