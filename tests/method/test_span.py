import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adapter_distillation.method.losses import FeatureLoss, token_weights
from hf_adapter_distillation.method.span import Span


def random_span(batch=2, seq_len=4, d=10, m=2, k=6, dtype=torch.float64):
    shapes = {
        "student_columns": (d, m),
        "student": (batch, seq_len, m),
        "columns": (d, k),
        "fused": (batch, seq_len, k),
    }
    tensors = {name: torch.randn(shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    return Span(names=("bank", "travel"), attention=torch.ones(batch, seq_len, 2), **tensors)


def random_mask(batch, seq_len):
    mask = torch.rand(batch, seq_len) < 0.7
    mask[0] = False  # a sequence of padding only
    return mask


def both_matches(span, weights, hidden_states):
    """The match of the combinations and of the updates, each with its gradients."""
    inputs = [span.student_columns, span.student, span.columns, span.fused]
    updates = span.student @ span.student_columns.T, span.fused @ span.columns.T
    for match in (span.match(weights, hidden_states), FeatureLoss.match(*updates, weights, hidden_states)):
        factors = torch.arange(1, len(match.error) + 1, dtype=match.error.dtype)
        yield match, torch.autograd.grad((factors * match.error).sum(), inputs)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(2, 3), st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(0, 99)
)
def test_the_combinations_match_as_the_updates_do(batch, seq_len, d, m, k, seed):
    torch.manual_seed(seed)
    weights = token_weights(random_mask(batch, seq_len).double())
    hidden_states = torch.randn(batch, seq_len, 7, dtype=torch.float64)
    (match, gradients), (wanted, expected) = both_matches(random_span(batch, seq_len, d, m, k), weights, hidden_states)
    torch.testing.assert_close(tuple(match), tuple(wanted), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
    assert match.error.requires_grad
    assert not any(part.requires_grad for part in match[1:])


def test_an_update_equal_to_the_fused_one_has_no_error_below_zero():
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        span = random_span(d=300, m=6, dtype=dtype)
        span = span._replace(student_columns=span.columns, student=span.fused)
        match = span.match(token_weights(torch.ones(2, 4)), torch.randn(2, 4, 5))
        assert 0 <= match.error.min()
        assert (match.error <= tolerance * match.power).all()


def test_autocast_computes_the_match_in_float32():
    torch.manual_seed(0)
    span, weights, hidden_states = random_span(dtype=torch.float32), torch.full((2, 4), 0.25), torch.randn(2, 4, 5)
    wanted = span.match(weights, hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        match = span.match(weights, hidden_states)
        of_half = span._replace(fused=span.fused.bfloat16()).match(weights, hidden_states)
    torch.testing.assert_close(tuple(match), tuple(wanted))
    assert of_half.error.dtype == torch.float32
    torch.testing.assert_close(of_half.error, wanted.error, rtol=0.1, atol=0)
