"""Both stages on each family of models, with flex and static heads."""

import pytest
import torch
from marks import in_turn
from model_state import changed, snapshot
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation._compat import heads_of, loss_counts_items
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers

CASES = [
    ("bert", "flex", "classification"),
    ("bert", "classification", "classification"),
    ("bert", "flex", "tagging"),
    ("roberta", "flex", "classification"),
    ("roberta", "classification", "classification"),
    ("distilbert", "flex", "classification"),
    ("distilbert", "classification", "classification"),
    ("gpt2", "flex", "classification"),
    ("gpt2", "flex", "causal_lm"),
    ("gpt2", "causal_lm", "causal_lm"),
    ("t5", "flex", "seq2seq_lm"),
    ("t5", "seq2seq_lm", "seq2seq_lm"),
    ("bart", "flex", "seq2seq_lm"),
    ("bart", "flex", "classification"),
    ("bart", "seq2seq_lm", "seq2seq_lm"),
]


def dataset_for(family, head):
    if family == "bart" and head == "classification":  # reads the state of the last <eos>
        dataset = make_dataset()
        ids = [row[:-1] + [2] for row in dataset["input_ids"]]
        return dataset.remove_columns("input_ids").add_column("input_ids", ids)
    return make_dataset(labels="classification" if head == "classification" else "tokens")


@pytest.mark.parametrize(("family", "kind", "head", "carrier"), in_turn(CASES, ["student", "mixed", "dual"]))
def test_both_stages(family, kind, head, carrier, trainer_args, tmp_path):
    model = make_model(family, kind)
    if kind == "flex" and head == "tagging":
        head_labels = {"num_labels": 60}
        for teacher in TEACHERS:
            model.add_adapter(teacher, config="double_seq_bn")
            noisy(model, teacher)
            model.add_tagging_head(teacher, **head_labels)
        model.add_adapter(
            "insurance", config="double_seq_bn", distill_from=had.DistillationConfig(TEACHERS, carrier=carrier)
        )
        model.train_adapter("insurance")
    else:
        make_student(model, head=head, carrier=carrier, config="double_seq_bn", student_start="random")
    before = snapshot(model)
    args = trainer_args(
        num_train_epochs=5, keep_fusion=True, distillation_weight=1.0, save_strategy="steps", save_steps=18,
        learning_rate=3e-3,
    )  # fmt: skip
    trainer = had.DistillationTrainer(model, args, train_dataset=dataset_for(family, head))
    trainer.train()
    moved = changed(model, before)
    own = ("insurance", "classifier.", "score.", "pre_classifier.")
    assert moved
    assert all(any(part in name for part in own) for name in moved), moved
    logs = [log for log in trainer.state.log_history if "distillation_loss" in log]
    assert logs[-1]["distillation_loss"] < logs[0]["distillation_loss"]
    assert len(distillations(model.adapters_config)["insurance"].config.teachers) == 3

    final = snapshot(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "training" / "checkpoint-18"))
    assert not changed(model, final), "the resumed run ends elsewhere"


def test_flexible_heads_by_name():
    model = make_student(make_model())
    assert heads_of(model) is model.heads
    assert "insurance" in heads_of(model)
    assert heads_of(make_model(kind="classification")) == heads_of(make_model(kind="base")) == {}


def test_which_losses_count_items():
    counted = {(family, kind): loss_counts_items(make_model(family, kind)) for family, kind, _ in CASES}
    assert {case for case, counts in counted.items() if counts} == {("gpt2", "causal_lm")}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoders_follow_their_own_padding(family):
    """What stands behind the end of the labels does not change the loss, in a decoder as long as the encoder."""
    model = make_student(make_model(family).double(), head="seq2seq_lm", student_start="random").double()
    in_decoder = {layer.distillation_fusion["insurance"].in_decoder for _, layer in adapter_layers(model, "insurance")}
    assert in_decoder == {False, True}
    batch = make_batch(labels="tokens")
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    batch["labels"][:, 5:] = -100
    losses = []
    for filler in (7, 9):
        decoder_input_ids = torch.cat([torch.full((4, 1), 2), batch["labels"][:, :-1].clamp(min=3)], dim=1)
        decoder_input_ids[:, 5:] = filler
        model.train()
        model(**batch, decoder_input_ids=decoder_input_ids)
        losses.append(distillations(model.adapters_config)["insurance"].record.distillation_loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_padding_of_an_encoder_does_not_count():
    model = make_student(make_model().double(), student_start="random").double()
    model.train()
    losses = []
    batch = make_batch()
    for filler in (7, 9):
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], filler)
        model(**batch)
        losses.append(distillations(model.adapters_config)["insurance"].record.distillation_loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
