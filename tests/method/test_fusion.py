import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_adapter_distillation import TeacherFusion
from hf_adapter_distillation.method.fusion import MINIMAL_WEIGHT
from hf_adapter_distillation.method.stacking import StackedAdapters


def reference(fusion, hidden_states, updates):
    """The attention over teachers, one token after the other."""
    fused, attention = torch.empty_like(hidden_states), hidden_states.new_empty(updates.shape[:3])
    for b, t in torch.cartesian_prod(*map(torch.arange, hidden_states.shape[:2])).tolist():
        query = fusion.query.weight @ hidden_states[b, t] + fusion.query.bias
        scores = [query @ (fusion.key.weight @ update) for update in updates[b, t]]
        weights = torch.stack(scores).softmax(0)
        value = torch.eye(updates.shape[3]).double() if fusion.value is None else fusion.value.weight
        fused[b, t] = sum(w * (value @ u) for w, u in zip(weights, updates[b, t], strict=True))
        attention[b, t] = weights
    return fused, attention


RANKS = st.sampled_from([None, 1, 3])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), RANKS, st.integers(0, 10**6))
def test_equals_the_equation(batch, seq_len, n_teachers, hidden, rank, seed):
    torch.manual_seed(seed)
    fusion = TeacherFusion(hidden, dtype=torch.float64, rank=rank)
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
    assert attention.dtype == torch.float32
    assert not attention.requires_grad


def test_size_does_not_depend_on_the_teachers():
    fusion = TeacherFusion(8)
    assert sum(p.numel() for p in fusion.parameters()) == 3 * 8 * 8 + 8
    for n in (1, 30):
        assert fusion(torch.randn(1, 1, 8), torch.randn(1, 1, n, 8))[0].shape == (1, 1, 8)


def test_size_with_a_rank_has_no_square_of_the_width():
    fusion = TeacherFusion(8, 16, rank=2)
    assert sum(p.numel() for p in fusion.parameters()) == 2 * (8 + 16) + 2


def test_order_of_teachers_does_not_matter():
    torch.manual_seed(0)
    fusion = TeacherFusion(8, dtype=torch.float64)
    hidden_states, updates = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4, 8).double()
    order = torch.tensor([2, 0, 3, 1])
    fused, attention = fusion(hidden_states, updates)
    other, other_attention = fusion(hidden_states, updates[:, :, order])
    torch.testing.assert_close(fused, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention[..., order], other_attention, rtol=1e-12, atol=1e-12)


# The stacked form against the plain one


def make_stack(n, width, hidden, dtype=torch.float64, live=False):
    shapes = {"down_weight": (n * width, hidden), "down_bias": (n * width,), "up": (hidden, n * width + n)}
    tensors = {name: torch.randn(shape, dtype=dtype).requires_grad_(live) for name, shape in shapes.items()}
    names = tuple(f"adapter{i}" for i in range(n))
    return StackedAdapters(names=names, **tensors, activation=nn.SiLU())


def updates_of(stacked, hidden_states):
    """The update of each adapter of a stack, one after the other."""
    n, m = len(stacked.names), stacked.down_weight.shape[0] // len(stacked.names)
    updates = []
    for i in range(n):
        rows = slice(i * m, (i + 1) * m)
        z = nn.functional.silu(hidden_states @ stacked.down_weight[rows].T + stacked.down_bias[rows])
        updates.append(z @ stacked.up[:, rows].T + stacked.up[:, n * m + i])
    return updates


def both_forms(fusion, hidden_states, stacks, autocast=False):
    """(fused, attention, gradients) of the stacked and of the plain form."""
    weight = torch.cos(torch.arange(hidden_states.numel())).view_as(hidden_states).to(hidden_states.dtype)
    live = [tensor for s in stacks for tensor in (s.down_weight, s.down_bias, s.up) if tensor.requires_grad]
    inputs = [t for t in (hidden_states, *fusion.parameters(), *live) if t.requires_grad]

    def stacked_form():
        return fusion.fuse_stacked(hidden_states, stacks, [s.features(hidden_states) for s in stacks])

    def plain_form():
        return fusion(hidden_states, torch.stack([u for s in stacks for u in updates_of(s, hidden_states)], dim=2))

    for form in (stacked_form, plain_form):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            fused, attention = form()
        yield fused, attention, torch.autograd.grad((fused * weight).sum(), inputs)


def random_fusion(hidden, dtype=torch.float64, rank=None):
    fusion = TeacherFusion(hidden, dtype=dtype, rank=rank)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    return fusion


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(1, 10),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    RANKS,
    st.integers(0, 10**6),
)
def test_the_stacked_form_equals_the_plain_one(batch, seq_len, hidden, shapes, reaches_input, student, rank, seed):
    torch.manual_seed(seed)
    stacks = [make_stack(n, width, hidden) for n, width in shapes]
    if student:
        stacks.append(make_stack(1, 2, hidden, live=True))
    hidden_states = torch.randn(batch, seq_len, hidden, dtype=torch.float64, requires_grad=reaches_input)
    stacked, plain = both_forms(random_fusion(hidden, rank=rank), hidden_states, stacks)
    torch.testing.assert_close(stacked, plain, rtol=1e-10, atol=1e-10)


class Shapes(TorchDispatchMode):
    """Notes the size of each tensor that is computed, and the shapes of matrix products."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.products.append(tuple(result.shape))
        return result


# What Q, K and V are multiplied with first, and (tokens, hidden size, teachers, width) at which that is the cheapest.
ORDERS = {
    ("states", "states"): (4, 16, 8, 4),
    ("states", "up-projections"): (8, 16, 1, 7),
    ("each other", "states"): (64, 8, 40, 4),
    ("each other", "up-projections"): (20, 16, 6, 2),
    ("up-projections", "states"): (64, 8, 6, 3),
    ("up-projections", "up-projections"): (64, 16, 2, 4),
}
orders = pytest.mark.parametrize(("tokens", "hidden", "n", "width"), ORDERS.values(), ids=map(" ".join, ORDERS))


@pytest.mark.parametrize(
    ("order", "shape", "reaches_input"),
    [
        *((order, shape, False) for order, shape in ORDERS.items()),
        # A gradient to the hidden states passes through all columns, unless these meet a query of their own.
        (("each other", "states"), ORDERS["up-projections", "states"], True),
    ],
)
def test_products_are_taken_in_the_cheapest_order(order, shape, reaches_input):
    tokens, hidden, n, width = shape
    fusion, stacked = random_fusion(hidden), make_stack(n, width, hidden)
    hidden_states = torch.randn(1, tokens, hidden, dtype=torch.float64, requires_grad=reaches_input)
    features = [stacked.features(hidden_states)]
    with Shapes() as shapes:
        fusion.fuse_stacked(hidden_states, [stacked], features)
    columns = n * width + n
    through_up = shapes.products.count((hidden, columns))  # K U and Q^T K U, and V U
    query_key = "each other" if (hidden, hidden) in shapes.products else "states"
    if through_up >= 2:
        query_key, through_up = "up-projections", through_up - 2
    assert (query_key, "up-projections" if through_up else "states") == order


@pytest.mark.parametrize(("tokens", "n"), [(4, 40), (64, 1)])
def test_with_a_rank_no_product_has_the_square_of_the_width(tokens, n):
    """The hidden states meet the query first, and with many tokens and few teachers the up-projections the key."""
    hidden, rank, width = 16, 2, 2
    fusion, stacked = random_fusion(hidden, rank=rank), make_stack(n, width, hidden)
    hidden_states = torch.randn(1, tokens, hidden, dtype=torch.float64)
    features = [stacked.features(hidden_states)]
    with Shapes() as shapes:
        fusion.fuse_stacked(hidden_states, [stacked], features)
    assert (hidden, hidden) not in shapes.products
    assert ((rank, n * width + n) in shapes.products) == (n == 1)  # K U


@pytest.mark.parametrize("reaches_input", [False, True])
@orders
def test_each_order_of_the_products_is_exact(tokens, hidden, n, width, reaches_input):
    torch.manual_seed(0)
    stacks = [make_stack(n, width, hidden), make_stack(1, width, hidden, live=True)]
    hidden_states = torch.randn(1, tokens, hidden, dtype=torch.float64, requires_grad=reaches_input)
    stacked, plain = both_forms(random_fusion(hidden), hidden_states, stacks)
    torch.testing.assert_close(stacked, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@orders
def test_lower_precision_is_near_float64(tokens, hidden, n, width, dtype, tolerance):
    torch.manual_seed(0)
    fusion, stacked = random_fusion(hidden), make_stack(n, width, hidden)
    stacked = stacked._replace(
        up=stacked.up * (hidden * width) ** -0.5, down_weight=stacked.down_weight * hidden**-0.5
    )
    hidden_states = torch.randn(1, tokens, hidden, dtype=torch.float64)
    _, exact = both_forms(fusion, hidden_states, [stacked])
    copy = StackedAdapters(*(t.to(dtype) if isinstance(t, torch.Tensor) else t for t in stacked))
    got, _ = both_forms(fusion.float(), hidden_states.float(), [copy], autocast=dtype == torch.bfloat16)
    names = ["fused", "attention", *(name for name, _ in fusion.named_parameters())]
    for name, value, wanted in zip(names, (*got[:2], *got[2]), (*exact[:2], *exact[2]), strict=True):
        # The gradient of the bias is a sum over tokens whose terms cancel.
        factor = 2 if name == "query.bias" else 1
        assert (value.double() - wanted).norm() <= factor * tolerance * wanted.norm(), name


@pytest.mark.parametrize("reaches_input", [False, True])
def test_no_tensor_has_the_size_of_the_updates(reaches_input):
    tokens, hidden, n, width = 30, 16, 12, 2
    fusion, stacked = random_fusion(hidden), make_stack(n, width, hidden)
    hidden_states = torch.randn(1, tokens, hidden, dtype=torch.float64, requires_grad=reaches_input)
    with Shapes() as shapes:
        fused, _ = fusion.fuse_stacked(hidden_states, [stacked], [stacked.features(hidden_states)])
        fused.sum().backward()
    assert shapes.largest <= (tokens * (n * width + n))
    assert shapes.largest < math.prod((tokens, n, hidden)) / 4
    with Shapes() as shapes:
        fusion(hidden_states, torch.stack(updates_of(stacked, hidden_states), dim=2))
    assert shapes.largest >= tokens * n * hidden, "the plain form must be seen to have it"
    assert all(not tensor.requires_grad for tensor in (stacked.down_weight, stacked.down_bias, stacked.up))


# Weights of the teachers, with a null teacher


def weighted_reference(fusion, hidden_states, updates, weights):
    """As `reference`, with the logarithms of the weights, and with a null teacher of score 0 and update 0.

    A sum above 1 is a scale, which leaves the smallest weight to the null teacher.
    """
    fused, attention = torch.empty_like(hidden_states), hidden_states.new_empty(updates.shape[:3])
    scale = max(1.0, sum(weights))
    shares_at_start = [*(weight / scale for weight in weights), max(1 - sum(weights) / scale, MINIMAL_WEIGHT)]
    logs = torch.tensor(shares_at_start, dtype=torch.float64).log()
    for b, t in torch.cartesian_prod(*map(torch.arange, hidden_states.shape[:2])).tolist():
        query = fusion.query.weight @ hidden_states[b, t] + fusion.query.bias
        scores = [query @ (fusion.key.weight @ update) for update in updates[b, t]]
        shares = (torch.stack([*scores, torch.zeros_like(scores[0])]) + logs).softmax(0)[:-1]
        fused[b, t] = sum(scale * w * (fusion.value.weight @ u) for w, u in zip(shares, updates[b, t], strict=True))
        attention[b, t] = shares
    return fused, attention


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3), st.data())
def test_weighted_attention_equals_the_equation(batch, shapes, data):
    """Plain and stacked, with gradients; the names of the stacks are in another order than those of the weights."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    hidden, seq_len, names = 6, 3, []
    stacks = [make_stack(n, width, hidden) for n, width in shapes]
    for number, stacked in enumerate(stacks):
        stacks[number] = stacked._replace(names=tuple(f"{number}.{name}" for name in stacked.names))
        names += stacks[number].names
    factor = data.draw(st.sampled_from([1.0, 3.0]))  # of weights that sum to more than 1
    values = factor * torch.rand(len(names) + 1).double().softmax(0)
    weights = dict(zip(names, values.tolist()[:-1], strict=True))
    fusion = random_fusion(hidden)
    fusion.set_weights(dict(reversed(weights.items())))
    hidden_states = torch.randn(batch, seq_len, hidden, dtype=torch.float64, requires_grad=True)
    updates = torch.stack([u for s in stacks for u in updates_of(s, hidden_states)], dim=2)
    inputs = [hidden_states, *fusion.parameters()]
    forms = [
        fusion(hidden_states, updates, fusion.log_weights_of(names)),
        fusion.fuse_stacked(hidden_states, stacks, [s.features(hidden_states) for s in stacks]),
        weighted_reference(fusion, hidden_states, updates, [weights[name] for name in names]),
    ]
    probe = torch.randn_like(forms[0][0])
    results = [(*form, torch.autograd.grad((form[0] * probe).sum(), inputs, retain_graph=True)) for form in forms]
    assert results[2][1].sum(-1).min() < 1
    for result in results[:2]:
        torch.testing.assert_close(
            result, (*results[2][:1], results[2][1].detach(), results[2][2]), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_attention_starts_at_the_weights(dtype):
    """Of the adapters that a place has, and of the student with the mean weight of its teachers."""
    torch.manual_seed(0)
    fusion = TeacherFusion(8, dtype=dtype)
    weights = {"bank": 0.6, "travel": 0.1, "work": 0.0}
    fusion.set_weights(weights)
    tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    null = 1 - 0.7
    for names in (["bank", "travel", "work"], ["travel", "bank"], ["bank", "insurance"]):
        of_names = torch.tensor([weights.get(name, 0.7 / 3) for name in names], dtype=torch.float64)
        expected = of_names / (of_names.sum() + null)
        states, updates = torch.randn(2, 3, 8, dtype=dtype), 1e-3 * torch.randn(2, 3, len(names), 8, dtype=dtype)
        fused, attention = fusion(states, updates, fusion.log_weights_of(names))
        assert fused.isfinite().all()
        wanted = expected.to(attention).expand_as(attention)
        torch.testing.assert_close(attention, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(fusion.weights_of(names).double(), expected, rtol=1e-4, atol=1e-5)
    assert fusion.weights() == pytest.approx(weights, abs=2e-6)
    fusion.set_weights({"bank": 1.2, "travel": 0.4})
    assert fusion.weights() == pytest.approx({"bank": 1.2, "travel": 0.4}, abs=2e-6)
    torch.testing.assert_close(fusion.weights_of(["bank", "travel"]).tolist(), [1.2, 0.4], rtol=1e-4, atol=1e-5)
    assert "log_weights" not in fusion.state_dict()


def test_without_weights_attention_sums_to_one():
    fusion = random_fusion(8)
    hidden_states, updates = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4, 8).double()
    assert fusion.log_weights_of(["a", "b", "c", "d"]) is None
    query = fusion.query(hidden_states) @ fusion.key.weight
    scores = torch.einsum("btd,btnd->btn", query, updates)
    assert torch.equal(fusion(hidden_states, updates)[1], scores.softmax(dim=-1).detach())
    assert fusion.weights_of(["a", "b", "c"]).tolist() == [1 / 3] * 3
    assert fusion.weights() == {}
