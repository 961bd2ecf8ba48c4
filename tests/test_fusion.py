import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapter_distillation import TeacherFusion


def reference(fusion, hidden_states, updates):
    """The attention over teachers, one token after the other."""
    fused, attention = torch.empty_like(hidden_states), hidden_states.new_empty(updates.shape[:3])
    for b, t in torch.cartesian_prod(*map(torch.arange, hidden_states.shape[:2])).tolist():
        query = fusion.query.weight @ hidden_states[b, t] + fusion.query.bias
        scores = [query @ (fusion.key.weight @ update) for update in updates[b, t]]
        weights = torch.stack(scores).softmax(0)
        fused[b, t] = sum(w * (fusion.value.weight @ u) for w, u in zip(weights, updates[b, t], strict=True))
        attention[b, t] = weights
    return fused, attention


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_equals_the_equation(batch, seq_len, n_teachers, hidden, seed):
    torch.manual_seed(seed)
    fusion = TeacherFusion(hidden, dtype=torch.float64)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    hidden_states = torch.randn(batch, seq_len, hidden, dtype=torch.float64, requires_grad=True)
    updates = torch.randn(batch, seq_len, n_teachers, hidden, dtype=torch.float64, requires_grad=True)
    inputs = [hidden_states, updates, *fusion.parameters()]
    (fused, attention), (wanted, wanted_attention) = (
        f(hidden_states, updates) for f in (fusion, lambda *a: reference(fusion, *a))
    )
    torch.testing.assert_close(fused, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(attention, wanted_attention.detach(), rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(fused)
    grads, expected = (torch.autograd.grad((out * weight).sum(), inputs) for out in (fused, wanted))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-10)


def test_starts_as_a_convex_combination():
    torch.manual_seed(0)
    fusion = TeacherFusion(8)
    updates = torch.randn(2, 3, 4, 8)
    fused, attention = fusion(torch.randn(2, 3, 8), updates)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(fused, (attention.unsqueeze(-1) * updates).sum(2))


def test_attention_is_float32_and_detached_under_autocast():
    fusion = TeacherFusion(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, attention = fusion(torch.randn(2, 3, 8), torch.randn(2, 3, 4, 8))
    assert attention.dtype == torch.float32 and not attention.requires_grad


def test_size_does_not_depend_on_the_teachers():
    fusion = TeacherFusion(8)
    assert sum(p.numel() for p in fusion.parameters()) == 3 * 8 * 8 + 8
    for n in (1, 30):
        assert fusion(torch.randn(1, 1, 8), torch.randn(1, 1, n, 8))[0].shape == (1, 1, 8)


def test_order_of_teachers_does_not_matter():
    torch.manual_seed(0)
    fusion = TeacherFusion(8, dtype=torch.float64)
    hidden_states, updates = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4, 8).double()
    order = torch.tensor([2, 0, 3, 1])
    fused, attention = fusion(hidden_states, updates)
    other, other_attention = fusion(hidden_states, updates[:, :, order])
    torch.testing.assert_close(fused, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention[..., order], other_attention, rtol=1e-12, atol=1e-12)
