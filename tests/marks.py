"""Marks of tests."""

import pytest

from hf_adapter_distillation._compat import COMPILES

LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]  # the marks of the long form of a test
needs_compiler = pytest.mark.skipif(not COMPILES, reason="the compiler of this torch cannot trace adapters")
