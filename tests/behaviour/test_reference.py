"""Terms and gradients of a training pass against an independent one, for drawn teachers, carriers and masks."""

import pytest
import torch
from adapters import LoRAConfig, SeqBnConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import LONG
from reference import Reference
from tiny_models import VOCABULARY, make_model, noisy
from transformers import AutoModel

import hf_adapter_distillation as had

MODELS = ["bert", "gpt2"]
BOTTLENECKS = st.builds(
    lambda reduction, scaling, activation, left_out: SeqBnConfig(
        reduction_factor=reduction, scaling=scaling, non_linearity=activation, leave_out=left_out
    ),
    st.sampled_from([2, 8, 32]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.sampled_from(["relu", "gelu", "swish"]),
    st.sampled_from([[], [], [0], [1]]),
)
LORAS = st.builds(
    lambda rank, alpha, places, left_out: LoRAConfig(r=rank, alpha=alpha, attn_matrices=places, leave_out=left_out),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 4]),
    st.sampled_from([["q", "v"], ["v"], ["q", "k", "v"]]),
    st.sampled_from([[], [], [0], [1]]),
)


@st.composite
def cases(draw, family):
    kinds = BOTTLENECKS if family == "gpt2" else draw(st.sampled_from([BOTTLENECKS, LORAS]))
    configs = draw(st.lists(kinds, min_size=3, max_size=6))
    configs[-1] = type(configs[-1])(
        **{**configs[-1].to_dict(), "leave_out": []} | ({} if kinds is BOTTLENECKS else {"attn_matrices": ["q", "v"]})
    )
    batch, seq_len = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7]))
    lengths = draw(st.lists(st.integers(0, seq_len), min_size=batch, max_size=batch))
    carrier = draw(st.sampled_from(["student", "fused", "mixed"]))
    return configs, lengths, seq_len, carrier, draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-3, 0.3, 1.0]))


def compare(family, case):
    configs, lengths, seq_len, carrier, seed, scale = case
    names = [f"t{i}" for i in range(len(configs) - 1)] + ["insurance"]
    model = make_model(family, "base", dtype=torch.float64)
    torch.manual_seed(seed)
    for name, config in zip(names, configs, strict=True):
        how = {"distill_from": had.DistillationConfig(names[:-1], carrier=carrier, student_start="random")}
        model.add_adapter(name, config=config, **(how if name == "insurance" else {}))
        noisy(model, name, scale if name == "t0" else 0.3)
    model = model.double()
    model.train_adapter("insurance")
    for name, parameter in model.named_parameters():
        if ".distillation_fusion." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    had.distillation_of(model).settings = had.StageSettings(weight=0.7, regularization=0.01, fused_probability=0.0)
    mask = (torch.arange(seq_len) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": torch.randint(3, VOCABULARY, mask.shape), "attention_mask": mask}

    plain = AutoModel.from_config(model.config)
    settings_of = dict(zip(names, (config.to_dict() for config in configs), strict=True))
    reference = Reference(model, plain, settings_of, carrier)
    states, distillation, regularization = reference.forward(inputs)
    read = torch.randn_like(states) * mask.unsqueeze(-1)
    total = (states * read).sum() + 0.7 * distillation + 0.01 * regularization
    trained = {name: p for name, p in reference.parameters.items() if p.requires_grad}
    expected = torch.autograd.grad(total, trained.values(), allow_unused=True, materialize_grads=True)

    output = model(**inputs).last_hidden_state
    torch.testing.assert_close(output[mask.bool()], states[mask.bool()], rtol=1e-9, atol=1e-10)
    (output * read).sum().backward()
    record = had.distillation_of(model).take_record()
    torch.testing.assert_close(record.distillation_loss, distillation.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(record.fusion_regularization, 0.01 * regularization.detach(), rtol=1e-8, atol=1e-10)
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == trained.keys()
    for (name, parameter), gradient in zip(((n, parameters[n]) for n in trained), expected, strict=True):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(own, gradient, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("n", [12, pytest.param(400, marks=LONG)])
def test_terms_and_gradients_are_those_of_the_equations(family, n):
    @settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases(family))
    def check(case):
        compare(family, case)

    check()
