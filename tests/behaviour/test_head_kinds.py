"""Both stages with each kind of head, of flex models and static ones, and with several heads on one model."""

import math

import adapters
import pytest
import torch
import transformers
from datasets import Dataset
from model_state import changed, snapshot
from tiny_models import CONFIGS, TEACHERS, make_batch, make_model, noisy

import hf_adapter_distillation as had

N_EXAMPLES = 8
CHOICES = 3

# How a head is added to a flex model.
FLEX = {
    "one of three labels": lambda model, name: model.add_classification_head(name, num_labels=3),
    "several labels": lambda model, name: model.add_classification_head(name, num_labels=3, multilabel=True),
    "regression": lambda model, name: model.add_classification_head(name, num_labels=1),
    "pairs, one label": lambda model, name: model.add_classification_head(name, num_labels=1),
    "pairs, two labels": lambda model, name: model.add_classification_head(name, num_labels=2),
    "tagging": lambda model, name: model.add_tagging_head(name, num_labels=5),
    "multiple choice": lambda model, name: model.add_multiple_choice_head(name, num_choices=CHOICES),
    "question answering": lambda model, name: model.add_qa_head(name),
    "dependency parsing": lambda model, name: model.add_dependency_parsing_head(name, num_labels=3),
    "masked LM": lambda model, name: model.add_masked_lm_head(name),
    "causal LM": lambda model, name: model.add_causal_lm_head(name),
    "seq2seq LM": lambda model, name: model.add_seq2seq_lm_head(name),
}

# The class and the settings of a static model.
SEQUENCE = transformers.AutoModelForSequenceClassification
STATIC = {
    "one of three labels": (SEQUENCE, {"num_labels": 3}),
    "several labels": (SEQUENCE, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "regression": (SEQUENCE, {"num_labels": 1}),
    "pairs, one label": (SEQUENCE, {"num_labels": 1}),
    "pairs, two labels": (SEQUENCE, {"num_labels": 2}),
    "tagging": (transformers.AutoModelForTokenClassification, {"num_labels": 5}),
    "multiple choice": (transformers.AutoModelForMultipleChoice, {}),
    "question answering": (transformers.AutoModelForQuestionAnswering, {}),
    "masked LM": (transformers.AutoModelForMaskedLM, {}),
    "causal LM": (transformers.AutoModelForCausalLM, {}),
    "seq2seq LM": (transformers.AutoModelForSeq2SeqLM, {}),
}

FAMILIES = {"causal LM": "gpt2", "seq2seq LM": "bart"}  # the others: bert
CASES = [("flex", head) for head in FLEX] + [("static", head) for head in STATIC]


def make(kind, head):
    family = FAMILIES.get(head, "bert")
    if kind == "flex":
        return make_model(family)
    transformers.set_seed(0)
    model_class, settings = STATIC[head]
    settings = {**settings, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | (
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0} if family != "bert" else {}
    )
    model = model_class.from_config(CONFIGS[family](**settings))
    adapters.init(model)
    return model


def data_for(head):
    batch = make_batch(N_EXAMPLES, labels="none")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    generator = torch.Generator().manual_seed(1)

    def draw(high, *shape):
        return torch.randint(0, high, shape or (N_EXAMPLES,), generator=generator)

    if head.startswith("pairs"):
        batch["token_type_ids"] = (torch.arange(ids.shape[1]) >= 2).long() * mask
    if head in ("one of three labels", "pairs, two labels"):
        batch["labels"] = draw(3 if head.startswith("one") else 2)
    elif head in ("regression", "pairs, one label"):
        batch["labels"] = draw(2).float()
    elif head == "several labels":
        batch["labels"] = draw(2, N_EXAMPLES, 3).float()
    elif head == "tagging":
        batch["labels"] = torch.where(mask == 1, draw(5, *ids.shape), -100)
    elif head == "multiple choice":
        batch = {
            name: torch.stack([value.roll(i, dims=0) for i in range(CHOICES)], 1) for name, value in batch.items()
        }
        batch["labels"] = draw(CHOICES)
    elif head == "question answering":
        batch["start_positions"], batch["end_positions"] = draw(3), draw(3)
    elif head == "dependency parsing":
        # The first token stands for the root; a word ends where the next one starts, 0 is padding.
        batch = {name: value[:, :8].clamp(min=1) for name, value in batch.items()}
        batch["word_starts"] = torch.tensor([1, 2, 3, 5, 7, 0, 0, 0]).repeat(N_EXAMPLES, 1)
        batch["labels_arcs"] = torch.tensor([3, 1, 2, 1, 0, 0, 0, 0]).repeat(N_EXAMPLES, 1)
        batch["labels_rels"] = draw(3, N_EXAMPLES, 8)
    else:
        labelled = torch.arange(ids.shape[1]) % (2 if head == "masked LM" else 1) == 0
        batch["labels"] = torch.where(labelled & (mask == 1), ids, -100)
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()}).with_format("torch")


def predictions(model, batch):
    model.eval()
    with torch.no_grad():
        output = model(**{name: value.clone() for name, value in batch.items()})
    found = {name: value for name, value in output.items() if name.endswith(("logits", "preds"))}
    assert found
    return found


def train(model, args, dataset, **kwargs):
    """Trains, checks the terms that were logged, and returns the parameters that moved."""
    before = snapshot(model)
    trainer = had.DistillationTrainer(model, args, train_dataset=dataset, **kwargs)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "task_loss" in log]
    assert [log["stage"] for log in logs] == [1] * 2 + [2] * 8
    assert all(math.isfinite(log["task_loss"]) and log["task_loss"] > 0 for log in logs)
    losses = [log["distillation_loss"] for log in logs[2:]]
    assert sum(losses[-2:]) < 0.97 * sum(losses[:2]), losses
    return changed(model, before)


SETTINGS = {"max_steps": 10, "distillation_start": 0.2, "distillation_weight": 20.0, "learning_rate": 1e-2}


@pytest.mark.parametrize(("kind", "head"), CASES, ids=[f"{head}, {kind}" for kind, head in CASES])
def test_both_stages(kind, head, trainer_args, tmp_path):
    model = make(kind, head)
    for name in TEACHERS:
        model.add_adapter(name, config="seq_bn")
        noisy(model, name)
        if kind == "flex":
            FLEX[head](model, name)
    config = had.DistillationConfig(TEACHERS, student_start="random")
    model.add_adapter("insurance", config="seq_bn", distill_from=config)
    if kind == "flex":
        FLEX[head](model, "insurance")
    model.train_adapter("insurance")
    settings = dict(SETTINGS)
    if head == "dependency parsing":  # forward does not name these columns, nor does the head its labels
        settings |= {"remove_unused_columns": False, "label_names": ["labels_arcs", "labels_rels"]}
    dataset = data_for(head)
    moved = train(model, trainer_args(**settings), dataset)

    of_base = {id(parameter) for parameter in model.base_model.parameters()}
    heads = {name for name, p in model.named_parameters() if id(p) not in of_base}
    own_head = {name for name in heads if kind == "static" or name.startswith("heads.insurance.")}
    assert {name for name in moved if ".insurance." not in name} <= own_head, moved
    assert any(".adapters.insurance." in name for name in moved)
    assert moved & own_head or not own_head, "the head of the student learns (one that is the embeddings is frozen)"
    if kind == "flex":
        assert model.active_head == "insurance"
        assert heads > own_head or not heads

    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    fresh = make(kind, head)
    fresh.load_adapter(str(tmp_path / "insurance"), set_active=True)
    assert list(fresh.adapters_config) == ["insurance"]
    batch = dataset[:4]
    expected, found = predictions(model, batch), predictions(fresh, batch)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_of_several_kinds_of_heads_the_students_alone_is_active_and_trained(trainer_args):
    """The teachers' tasks need other heads than the student's, and a head that was added last is active."""
    model = make_model()
    for name, head in zip(TEACHERS, ("question answering", "tagging", "several labels"), strict=True):
        model.add_adapter(name, config="seq_bn")
        noisy(model, name)
        FLEX[head](model, name)
    model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, student_start="random"))
    FLEX["one of three labels"](model, "insurance")
    FLEX["masked LM"](model, "last")
    assert model.active_head == "last"
    model.train_adapter("insurance")
    dataset = data_for("one of three labels")
    moved = train(model, trainer_args(**SETTINGS), dataset)
    assert {name.split(".")[1] for name in moved if name.startswith("heads.")} == {"insurance"}
    assert model.active_head == "insurance"
    logits = predictions(model, dataset[:4])["logits"]
    assert torch.equal(logits, predictions(model, {**dataset[:4], "labels": torch.zeros(4).long()})["logits"])
    assert logits.shape == (4, 3)


def test_labels_of_another_name_are_asked_for(trainer_args):
    model = make_model()
    for name in ("bank", "insurance"):
        model.add_adapter(name, config="seq_bn", distill_from=["bank"] if name == "insurance" else None)
        FLEX["dependency parsing"](model, name)
    model.train_adapter("insurance")
    trainer = had.DistillationTrainer(
        model, trainer_args(remove_unused_columns=False), train_dataset=data_for("dependency parsing")
    )
    with pytest.raises(ValueError, match=r"no labels \(labels\), only .*labels_arcs.*name the columns .*label_names"):
        trainer.train()
