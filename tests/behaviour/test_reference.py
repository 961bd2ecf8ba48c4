"""Terms and gradients of a training pass against an independent one, for drawn teachers, carriers and masks."""

import pytest
import torch
from adapters import IA3Config, LoRAConfig, ParBnConfig, SeqBnConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import LONG
from model_state import configure
from reference import Reference
from tiny_models import VOCABULARY, distillation_of, make_model, noisy
from transformers import AutoModel

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import fusions_of

CARRIERS = ["student", "fused", "mixed", "dual"]
LEFT_OUT = st.sampled_from([[], [], [0], [1]])
BOTTLENECKS = st.builds(
    lambda method, reduction, scaling, activation, left_out: method(
        reduction_factor=reduction, scaling=scaling, non_linearity=activation, leave_out=left_out
    ),
    st.sampled_from([SeqBnConfig, SeqBnConfig, ParBnConfig]),
    st.sampled_from([2, 8, 32]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(["relu", "gelu", "swish"]),
    LEFT_OUT,
)


def in_projections(method, family, **kwargs):
    """LoRA or (IA)^3 in some projections; those of the attention of GPT-2 are merged and cannot be fused."""
    places = [["q", "v"], ["v"], ["q", "k", "v"], ["q", "attention.output.dense"], ["attention.output.dense"], []]
    in_attention = st.sampled_from(places if family == "bert" else [[]])
    in_block = st.sampled_from([(True, False), (False, True), (True, True)])
    return st.builds(
        lambda attention, block, left_out, **drawn: method(
            selfattn_lora=bool(attention), attn_matrices=attention or ["q", "v"], intermediate_lora=block[0],
            output_lora=block[1], leave_out=left_out, **drawn,
        ),
        in_attention, in_block, LEFT_OUT, **kwargs,
    )  # fmt: skip


def loras(family):
    return in_projections(LoRAConfig, family, r=st.sampled_from([1, 2, 5]), alpha=st.sampled_from([1, 4]))


@st.composite
def cases(draw, family):
    mixed = st.one_of(BOTTLENECKS, loras(family), in_projections(IA3Config, family))
    kinds = draw(st.sampled_from([mixed, BOTTLENECKS, loras(family)]))
    configs = draw(st.lists(kinds, min_size=3, max_size=6))
    if configs[-1].leave_out:  # in which case each teacher has all layers, since one must be in common
        configs[:-1] = [config.replace(leave_out=[]) for config in configs[:-1]]
    batch, seq_len = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7]))
    lengths = draw(st.lists(st.integers(0, seq_len), min_size=batch, max_size=batch))
    parts = draw(st.lists(st.integers(0, 5), min_size=len(configs), max_size=len(configs)))  # the null teacher's last
    length = draw(st.sampled_from([1, 1, 3]))  # of weights that sum to more than 1
    weights = [length * part / sum(parts) for part in parts[:-1]] if any(parts) else None
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-3, 0.3, 1.0]))
    return configs, lengths, seq_len, weights, draw(st.sampled_from([None, None, 1, 3])), seed, scale


def make_case(family, carrier, case):
    """The model, its reference, and the inputs."""
    configs, lengths, seq_len, weights, rank, seed, scale = case
    names = [f"t{i}" for i in range(len(configs) - 1)] + ["insurance"]
    model = make_model(family, "tagging", dtype=torch.float64)
    model.dropout.p = 0.0
    torch.manual_seed(seed)
    settings = had.DistillationConfig(names[:-1], carrier=carrier, student_start="random", fusion_rank=rank)
    for name, config in zip(names, configs, strict=True):
        how = {"distill_from": settings}
        model.add_adapter(name, config=config, **(how if name == "insurance" else {}))
        noisy(model, name, scale if name == "t0" else 0.3)
    model = model.double()
    model.train_adapter("insurance")
    for name, parameter in model.named_parameters():
        if ".distillation_fusion." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if weights is not None:
        weights = dict(zip(names, weights, strict=False))
        for fusion in fusions_of(model, "insurance"):
            fusion.set_weights(weights)
    configure(model, weight=0.7, regularization=0.01, fused_probability=0.0)
    if carrier == "dual":  # the loss of no token at all is NaN
        lengths = [max(lengths[0], 1), *lengths[1:]]
    mask = (torch.arange(seq_len) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": torch.randint(3, VOCABULARY, mask.shape), "attention_mask": mask}
    inputs["labels"] = torch.where(mask == 1, torch.randint(0, 2, mask.shape), -100)
    configs = dict(zip(names, (config.to_dict() for config in configs), strict=True))
    return model, Reference(model, AutoModel.from_config(model.config), configs, carrier, weights), inputs


def compare(family, carrier, case):
    model, reference, inputs = make_case(family, carrier, case)
    mask, terms = inputs["attention_mask"], reference.forward(inputs)
    read = torch.randn_like(terms.logits) * mask.unsqueeze(-1)
    loss = terms.task_loss if carrier == "dual" else (terms.logits * read).sum()
    trained = {name: p for name, p in reference.parameters.items() if p.requires_grad}
    total = loss + 0.7 * terms.distillation_loss + 0.01 * terms.regularization
    expected = torch.autograd.grad(total, trained.values(), allow_unused=True, materialize_grads=True)

    output = model(**inputs)
    torch.testing.assert_close(output.logits[mask.bool()], terms.logits[mask.bool()], rtol=1e-9, atol=1e-10)
    found = output.loss if carrier == "dual" else (output.logits * read).sum()
    torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-10)
    found.backward()
    record = distillation_of(model).take_record()
    torch.testing.assert_close(record.distillation_loss, terms.distillation_loss.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        record.fusion_regularization, 0.01 * terms.regularization.detach(), rtol=1e-8, atol=1e-10
    )
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == trained.keys()
    for (name, parameter), gradient in zip(((n, parameters[n]) for n in trained), expected, strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # The update of a whole layer is a difference of states, which rounds off digits of a small update.
        torch.testing.assert_close(own, gradient, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("n", [4, pytest.param(100, marks=LONG)])
def test_terms_and_gradients_are_those_of_the_equations(family, carrier, n):
    @settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases(family))
    def check(case):
        compare(family, carrier, case)

    check()
