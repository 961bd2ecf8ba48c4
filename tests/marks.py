"""Marks of tests."""

import pytest

from hf_adapter_distillation._compat import COMPILES

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the marks of the long form of a test
needs_compiler = pytest.mark.skipif(not COMPILES, reason="the compiler of this torch cannot trace adapters")


def in_turn(cases, values):
    """Return all cases with all values; the short form of a test takes one value for each case, in turn."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*case, value, marks=() if i % len(values) == j else LONG)
        for i, case in enumerate(cases)
        for j, value in enumerate(values)
    ]
