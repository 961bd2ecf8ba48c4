import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapter_distillation.method.losses import FeatureLoss, token_weights
from hf_adapter_distillation.method.low_rank import LowRankUpdates, is_cheaper, keeps_digits


def random_updates(batch=2, seq_len=4, d=10, m=2, k=6, dtype=torch.float64):
    shapes = (d, m), (batch, seq_len, m), (d, k), (batch, seq_len, k)
    return LowRankUpdates(*(torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes))


def random_mask(batch, seq_len):
    mask = torch.rand(batch, seq_len) < 0.7
    mask[0] = False  # a sequence of padding only
    return mask


def both_matches(low_rank, weights, hidden_states):
    """The match of low-rank updates and of the updates, each with its gradients."""
    updates = (
        low_rank.student_coefficients @ low_rank.student_columns.T,
        low_rank.fused_coefficients @ low_rank.teacher_columns.T,
    )
    for match in (low_rank.match(weights, hidden_states), FeatureLoss.match(*updates, weights, hidden_states)):
        factors = torch.arange(1, len(match.error) + 1, dtype=match.error.dtype)
        yield match, torch.autograd.grad((factors * match.error).sum(), low_rank)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 3), st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99)
)
def test_low_rank_updates_match_as_the_updates_do(batch, seq_len, d, m, k, seed):
    torch.manual_seed(seed)
    weights = token_weights(random_mask(batch, seq_len).double())
    hidden_states = torch.randn(batch, seq_len, 7, dtype=torch.float64)
    low_rank = random_updates(batch, seq_len, d, m, k)
    (match, gradients), (wanted, expected) = both_matches(low_rank, weights, hidden_states)
    torch.testing.assert_close(tuple(match), tuple(wanted), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert match.error.requires_grad
    assert not any(part.requires_grad for part in match[1:])


def test_near_updates_differ_by_little_and_never_by_less_than_nothing():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        _, _, columns, coefficients = random_updates(d=300, m=6, dtype=dtype)
        low_rank = LowRankUpdates(columns, coefficients, columns, coefficients)
        match = low_rank.match(token_weights(torch.ones(2, 4)), torch.randn(2, 4, 5))
        assert (match.error <= tolerance * match.power).all()
        assert match.error.min() >= 0


def test_autocast_computes_the_match_in_float32():
    torch.manual_seed(0)
    low_rank, weights = random_updates(dtype=torch.float32), torch.full((2, 4), 0.25)
    hidden_states = torch.randn(2, 4, 5)
    wanted = low_rank.match(weights, hidden_states)
    half = low_rank._replace(fused_coefficients=low_rank.fused_coefficients.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        match, of_half = (each.match(weights, hidden_states) for each in (low_rank, half))
    torch.testing.assert_close(tuple(match), tuple(wanted))
    assert of_half.error.dtype == torch.float32
    torch.testing.assert_close(of_half.error, wanted.error, rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("n_columns", "n_own", "tokens", "cheaper"),
    [(12, 1, 100, True), (40, 1, 100, False), (12, 1, 5, False), (12, 12, 100, False), (2, 2, 100, False)],
)
def test_low_rank_is_cheaper_for_few_columns_and_many_tokens(n_columns, n_own, tokens, cheaper):
    """For more than the student has, whose features are computed once more."""
    assert is_cheaper(n_columns, n_own, 64, 64, tokens) == cheaper


def test_tf32_loses_the_digits_of_a_difference():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert keeps_digits(torch.device("cuda")) != allowed
            assert keeps_digits(torch.device("cpu"))
    finally:
        matmul.allow_tf32 = before
