"""Padding does not count in the distillation: neither what stands there nor how much of it there is."""

import pytest
import torch
from tiny_models import TEACHERS, make_batch, make_model, noisy
from torch.nn.functional import pad

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations

EXACT = {"rtol": 0, "atol": 1e-10}
CHOICES = 3

# The family, the kind of model, the head (None where it is static), and what the labels are.
CASES = {
    "encoder": ("bert", "flex", "classification", "classification"),
    "static encoder": ("bert", "classification", None, "classification"),
    "tagger": ("bert", "flex", "tagging", "tags"),
    # RoBERTa counts its positions from input_ids: those of the tokens before the padding stay what they are.
    "roberta": ("roberta", "flex", "classification", "classification"),
    "multiple choice": ("bert", "flex", "multiple_choice", "choice"),
    "decoder": ("gpt2", "flex", "causal_lm", "tokens"),
    "static decoder": ("gpt2", "causal_lm", None, "tokens"),
    "rotary decoder": ("llama", "flex", "causal_lm", "tokens"),
    "static rotary decoder": ("llama", "causal_lm", None, "tokens"),
    "t5": ("t5", "flex", "seq2seq_lm", "tokens"),
    "static t5": ("t5", "seq2seq_lm", None, "tokens"),
    "bart": ("bart", "flex", "seq2seq_lm", "tokens"),
    "static bart": ("bart", "seq2seq_lm", None, "tokens"),
    # Without labels of tokens the decoder reads the inputs of the encoder, shifted.
    "bart classifier": ("bart", "flex", "classification", "classification"),
    "t5 classifier": ("t5", "flex", "classification", "classification"),
}
FROM_LEFT = ["decoder", "static decoder", "rotary decoder", "static rotary decoder"]


def student_of(family, kind, head, carrier="student", config="seq_bn"):
    model = make_model(family, kind, dtype=torch.float64)
    for name in (*TEACHERS, "insurance"):
        distill_from = had.DistillationConfig(TEACHERS, carrier=carrier, student_start="random")
        model.add_adapter(name, config=config, distill_from=distill_from if name == "insurance" else None)
        noisy(model, name)
        if head == "multiple_choice":
            model.add_multiple_choice_head(name, num_choices=CHOICES)
        elif head is not None:
            getattr(model, f"add_{head}_head")(name)
    model.double().train_adapter("insurance")
    return model.double()


def batch_for(family, labels):
    batch = make_batch(labels="classification" if labels in ("classification", "choice") else "tokens")
    mask = batch["attention_mask"]
    if labels == "classification" and family in ("bart", "t5"):  # one end of the sequence in each row
        batch["input_ids"][torch.arange(4), mask.sum(dim=1) - 1] = {"bart": 2, "t5": 1}[family]
    if labels == "tags":
        batch["labels"] = torch.where(mask == 1, batch["labels"] % 2, -100)
    if labels == "choice":
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.stack([batch[name].roll(i, dims=0) for i in range(CHOICES)], dim=1)
    return batch


def longer(batch, n, m, left=False):
    """The batch with n more padded positions, and m in labels of tokens."""
    added = {"input_ids": (n, 0), "attention_mask": (n, 0), "labels": (m, -100)}

    def padded(name, value):
        if name == "labels" and value.dim() == 1:
            return value
        width, filler = added[name]
        return pad(value, (width, 0) if left else (0, width), value=filler)

    return {name: padded(name, value) for name, value in batch.items()}


def refilled(batch, filler):
    return {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], filler)}


def run(model, batch, *args):
    """The distillation loss of a batch, and the gradients of the whole loss."""
    model.train()
    model.zero_grad()
    output = model(*args, **{name: value.clone() for name, value in batch.items()})
    record = distillations(model.adapters_config)["insurance"].record
    output[0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("query" in name and gradient.any() for name, gradient in gradients.items())
    return record.distillation_loss, {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("case", CASES)
def test_neither_content_nor_length_of_padding_counts(case):
    family, kind, head, labels = CASES[case]
    model, batch = student_of(family, kind, head), batch_for(family, labels)
    expected = run(model, batch)
    # The flex model of BART reads its decoder's inputs from those of the encoder, unless they are given.
    of_both_stacks = (3, 5) if kind == "seq2seq_lm" or family == "t5" and head == "seq2seq_lm" else (3, 3)
    for other in (refilled(batch, 7), longer(batch, *of_both_stacks), refilled(longer(batch, *of_both_stacks), 9)):
        torch.testing.assert_close(run(model, other), expected, **EXACT)
    all_count = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert (run(model, all_count)[0] - expected[0]).abs() > 1e-6, "the loss must be able to see padding"


@pytest.mark.parametrize("case", FROM_LEFT)
def test_padding_on_the_left_of_a_decoder_does_not_count(case):
    """With the positions that generation passes, too: GPT-2 counts from the first column, padding or not."""
    family, kind, head, labels = CASES[case]
    model = student_of(family, kind, head)
    right = batch_for(family, labels)
    right["labels"][:, 0] = -100  # which only a padded position would predict
    lengths = right["attention_mask"].sum(dim=1)
    shifts = [right["input_ids"].shape[1] - n for n in lengths.tolist()]
    left = {
        name: torch.stack([row.roll(shift) for row, shift in zip(value, shifts, strict=True)])
        for name, value in right.items()
    }
    expected = run(model, right)
    for other in (left, refilled(left, 7), longer(left, 3, 3, left=True)):
        positions = (other["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        found = run(model, {**other, "position_ids": positions})
        torch.testing.assert_close(found[0], expected[0], **EXACT)
        for name, gradient in found[1].items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=1e-6, atol=1e-8)  # rotations are float32


@pytest.mark.parametrize(("family", "head", "labels"), [
    ("bert", "tagging", "tags"), ("gpt2", "causal_lm", "tokens"), ("bart", "seq2seq_lm", "tokens"),
    ("bert", "qa", "positions"), ("bart", "qa", "positions"), ("bert", "classification", "classification"),
])  # fmt: skip
@pytest.mark.parametrize("carrier", ["fused", "dual"])
def test_padding_does_not_count_with_carriers_that_match_logits(family, head, labels, carrier):
    model = student_of(family, "flex", head, carrier)
    batch = batch_for(family, "classification" if labels == "positions" else labels)
    if labels == "positions":  # within the shortest row
        positions = {"start_positions": batch.pop("labels"), "end_positions": torch.tensor([1, 2, 0, 2])}
        batch |= {name: value.clone() for name, value in positions.items()}
    expected, _ = run(model, batch)
    torch.testing.assert_close(run(model, refilled(batch, 7))[0], expected, **EXACT)


# The forms of a mask


def test_masks_given_by_position():
    """Each family has them at another place."""
    for case, before in {
        "encoder": ("input_ids", "attention_mask"),
        "static encoder": ("input_ids", "attention_mask"),
        "decoder": ("input_ids", "past_key_values", "attention_mask"),
        "static decoder": ("input_ids", "past_key_values", "cache_position", "attention_mask"),
        "rotary decoder": ("input_ids", "attention_mask"),
        "static rotary decoder": ("input_ids", "attention_mask"),
        "t5": ("input_ids", "attention_mask", "decoder_input_ids"),
        "static bart": ("input_ids", "attention_mask"),
    }.items():
        family, kind, head, labels = CASES[case]
        model, batch = student_of(family, kind, head), batch_for(family, labels)
        expected = run(model, batch)
        rest = {name: value for name, value in batch.items() if name not in before}
        torch.testing.assert_close(run(model, rest, *(batch.get(name) for name in before)), expected, **EXACT)


@pytest.mark.parametrize("carrier", ["student", "dual"])
def test_the_decoders_mask_comes_before_its_labels(carrier):
    """By name or by position, of numbers or booleans; the labels leave out a token more, the encoder none."""
    model, batch = student_of("bart", "seq2seq_lm", None, carrier), batch_for("bart", "tokens")
    decoder_mask = batch["attention_mask"].clone()
    batch["attention_mask"] = torch.ones_like(decoder_mask)
    decoder_ids = torch.where(decoder_mask == 1, batch["labels"].clamp(min=3), 0)
    batch["labels"][:, 0] = -100
    by_labels = run(model, {**batch, "decoder_input_ids": decoder_ids})[0]
    inputs = [batch["input_ids"], batch["attention_mask"], decoder_ids]
    expected, _ = run(model, {**batch, "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask})
    assert (by_labels - expected).abs() > 1e-6
    for ids in (decoder_ids, torch.where(decoder_mask == 1, decoder_ids, 9)):
        for mask in (decoder_mask, decoder_mask.bool()):
            found, _ = run(model, {"labels": batch["labels"]}, *inputs[:2], ids, mask)
            torch.testing.assert_close(found, expected, **EXACT)


def test_masks_of_booleans_of_floats_and_of_numbered_sequences():
    model, batch = student_of("gpt2", "causal_lm", None), batch_for("gpt2", "tokens")
    mask = batch.pop("attention_mask")
    expected = run(model, {**batch, "attention_mask": mask})
    # adapters 1.3.0 takes the argmax of a mask given by name, which torch refuses for booleans.
    by_position = {name: value for name, value in batch.items() if name != "input_ids"}
    found = run(model, by_position, batch["input_ids"], None, None, mask.bool())
    torch.testing.assert_close(found, expected, **EXACT)
    for other in (mask.double(), mask * torch.tensor([1, 1, 2, 2, 2, 3, 3, 3])):
        torch.testing.assert_close(run(model, {**batch, "attention_mask": other}), expected, **EXACT)


@pytest.mark.parametrize("case", ["encoder", "decoder", "t5 classifier", "multiple choice"])
def test_without_a_mask_all_tokens_count(case):
    family, kind, head, labels = CASES[case]
    model, batch = student_of(family, kind, head), batch_for(family, labels)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    expected = run(model, batch)
    del batch["attention_mask"]
    torch.testing.assert_close(run(model, batch), expected, **EXACT)


@pytest.mark.parametrize("mask", [True, False])
def test_labels_that_leave_out_the_prompt_leave_it_in_the_distillation(mask):
    """The tokens of a prompt are no padding: the model attends to them, and so do the teachers."""
    model, batch = student_of("gpt2", "flex", "causal_lm"), batch_for("gpt2", "tokens")
    if not mask:
        del batch["attention_mask"]
    expected, _ = run(model, batch)
    batch["labels"][:, :2] = -100
    torch.testing.assert_close(run(model, batch)[0], expected, **EXACT)


@pytest.mark.parametrize("case", ["static encoder", "static decoder", "static rotary decoder"])
def test_a_mask_that_says_who_sees_whom_leaves_no_token_out(case):
    """BERT takes one of (batch, T, T), decoders an additive one of (batch, 1, T, T), 0 where a token is seen."""
    family, kind, head, labels = CASES[case]
    model, batch = student_of(family, kind, head), batch_for(family, labels)
    seen = batch.pop("attention_mask").bool()[:, None, :].expand(4, 8, 8)
    everything = torch.ones_like(seen)
    if family != "bert":
        seen, everything = (mask.tril().unsqueeze(1) for mask in (seen, everything))

    def given(visible):
        if family == "bert":
            return visible.long()
        return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -1e9)

    without_mask = run(model, batch)
    torch.testing.assert_close(run(model, {**batch, "attention_mask": given(everything)}), without_mask, **EXACT)
    loss, gradients = run(model, {**batch, "attention_mask": given(seen)})
    assert (loss - without_mask[0]).abs() > 1e-6
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("hidden", [0.0, -1e9])
def test_an_additive_mask_of_the_padding_alone_is_not_taken_for_weights(hidden):
    """(batch, 1, 1, T): as many numbers as a padding mask has, but 0 where a token is seen."""
    model, batch = student_of("gpt2", "causal_lm", None), batch_for("gpt2", "tokens")
    mask = (batch.pop("attention_mask") == 0)[:, None, None, :].double() * hidden
    loss, gradients = run(model, {**batch, "attention_mask": mask})
    assert torch.isfinite(loss)
    assert loss > 0.5
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
