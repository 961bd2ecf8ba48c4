"""Anything at all as input: it works, or one line says what is wrong and the model is what it was."""

import pytest
import torch
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import LONG
from model_state import everything, snapshot
from saved_teachers import FILES, files_of_a_teacher, write
from tiny_models import TEACHERS, make_batch, with_teachers

from hf_adapter_distillation import AdapterDistillation
from hf_adapter_distillation.composition import find_block


def examples(short, long):
    """The number of examples, and that of the long form."""
    return pytest.mark.parametrize("n", [short, pytest.param(long, marks=LONG)])


def fuzz(n, **strategies):
    """Calls a function with n examples, the same ones each time; in its place comes the number of calls."""

    def run(function):
        calls = 0

        @settings(max_examples=n, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(**strategies)
        def counted(**drawn):
            nonlocal calls
            calls += 1
            function(**drawn)

        counted()
        return calls

    return run


def one_line(error):
    return str(error) and "\n" not in str(error)


def refusal(call, *args, errors=(TypeError, ValueError), **kwargs):
    """Return the error of a call, or None if it works."""
    try:
        call(*args, **kwargs)
    except errors as error:
        return error
    return None


THINGS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(["bank", ".."]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    max_leaves=4,
)


@examples(150, 10_000)
def test_any_distill_from(n, record_property):
    model = with_teachers()
    before = everything(model)

    @fuzz(n, value=THINGS.filter(lambda value: value is not None and value not in (["bank"], ("bank",))))
    def attempt(value):
        with pytest.raises((TypeError, ValueError)) as caught:
            model.add_adapter("insurance", distill_from=value)
        assert "eacher" in str(caught.value)
        assert one_line(caught.value)
        assert everything(model) == before

    record_property("cases", attempt)


@examples(120, 3000)
def test_any_damaged_file(n, tmp_path_factory, record_property):
    """A flipped bit of a number, or of a word that nobody reads, may pass; all else is a named error."""
    saved, attempts = files_of_a_teacher(tmp_path_factory.mktemp("saved")), tmp_path_factory.mktemp("damaged")
    at, bit = st.floats(0, 0.999), st.integers(0, 7)

    @fuzz(n, name=st.sampled_from(FILES), cut=st.none() | st.floats(0, 1), at=at, bit=bit)
    def attempt(name, cut, at, bit):
        content = bytearray(saved[name])
        if cut is None:
            content[int(at * len(content))] ^= 1 << bit
        else:
            content = content[: int(cut * len(content))]
        parent = attempts / str(len(list(attempts.iterdir())))
        parent.mkdir()
        folder = write(parent / "bank", {**saved, name: bytes(content)})
        model = with_teachers(teachers=["work"])
        before, weights = everything(model), snapshot(model)
        if error := refusal(model.add_adapter, "insurance", distill_from=["work", str(folder)], errors=ValueError):
            assert one_line(error)
            assert str(folder) in str(error)
            assert everything(model) == before
        now = dict(model.named_parameters())
        assert all(torch.equal(now[key], value) for key, value in weights.items())

    record_property("cases", attempt)


# Compositions

NAMES = st.sampled_from([*TEACHERS, "insurance", "no\npe"])
BLOCKS = {
    "Stack": Stack,
    "Fuse": Fuse,
    "Parallel": Parallel,
    "Average": Average,
    "Split": lambda *children: Split(*children, splits=4),
    "BatchSplit": lambda *children: BatchSplit(*children, batch_sizes=2),
}
DISTILLED = st.tuples(
    NAMES | st.tuples(st.just("Stack"), st.lists(NAMES, min_size=1, max_size=3)),
    st.lists(NAMES, min_size=1, max_size=3, unique=True),
)
NESTED = st.recursive(
    NAMES | DISTILLED | st.just(("insurance", TEACHERS[:2])),
    lambda inner: st.tuples(st.sampled_from(list(BLOCKS)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=5,
)


def build(drawn):
    if isinstance(drawn, str):
        return drawn
    first, rest = drawn
    if isinstance(first, str) and first in BLOCKS:
        return BLOCKS[first](*map(build, rest))
    return AdapterDistillation(build(first), rest)


def with_student():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS[:2])
    model.add_classification_head("insurance")
    return model


@examples(150, 10_000)
def test_any_block(n, record_property):
    @fuzz(n, student=THINGS | st.lists(st.text(), max_size=3).map(lambda names: Stack(*names)), teachers=THINGS)
    def attempt(student, teachers):
        if error := refusal(AdapterDistillation, student, teachers):
            assert one_line(error)
            return
        block = AdapterDistillation(student, teachers)
        assert block.teachers
        assert isinstance(block.student, str)

    record_property("cases", attempt)


@pytest.mark.filterwarnings("ignore:Passing list objects for adapter activation:FutureWarning")
@pytest.mark.parametrize("call", ["train_adapter", "set_active_adapters"])
@examples(200, 8000)
def test_any_composition(call, n, record_property):
    """Those without a distillation block are adapters' own matter."""
    models, worked = [with_student()], []

    @fuzz(n, drawn=NESTED, listed=st.booleans())
    def attempt(drawn, listed):
        if error := refusal(build, drawn):
            assert one_line(error)
            return
        setup = build(drawn)
        if find_block(setup) is None:
            return
        model = models[-1]
        before = everything(model)
        if error := refusal(getattr(model, call), [setup] if listed else setup):
            assert one_line(error)
            assert everything(model) == before
            return
        worked.append(setup)
        for training in (True, False):
            assert model.train(training)(**make_batch()).loss.isfinite()
        models.append(with_student())

    record_property("cases", attempt)
    assert len(worked) > n / 200
