import copy
import pickle

import pytest
from adapters import Fuse, Parallel, Stack
from adapters.composition import AdapterCompositionBlock, parse_composition
from messages import exactly
from model_state import everything
from tiny_models import TEACHERS, make_model, make_student, with_teachers

from hf_adapter_distillation import AdapterDistillation
from hf_adapter_distillation.composition import find_block


def test_only_the_student_is_a_child():
    block = AdapterDistillation("insurance", teachers=TEACHERS)
    assert isinstance(block, Stack)
    assert block.flatten() == {"insurance"}
    assert block.first() == block.last() == block.student == "insurance"
    assert block.teachers == tuple(TEACHERS)
    assert block.parallel_channels == 1


def test_student_above_a_language_adapter():
    block = AdapterDistillation(Stack("german", "insurance"), teachers=TEACHERS)
    assert block.children == ["german", "insurance"]
    assert block.student == "insurance"


def test_equality_hash_and_repr():
    block = AdapterDistillation("a", ["b", "c"])
    assert block == AdapterDistillation("a", ("b", "c"))
    assert hash(block) == hash(AdapterDistillation("a", ("b", "c")))
    assert block != AdapterDistillation("a", ["b"])
    assert block != AdapterDistillation("x", ["b", "c"])
    assert block != Stack("a")
    assert Stack("a") != block
    assert repr(block) == "AdapterDistillation[a; teachers: b, c]"


def test_copies_are_equal():
    block = AdapterDistillation("a", ["b", "c"])
    assert copy.deepcopy(block) == block
    assert pickle.loads(pickle.dumps(block)) == block


def test_saved_as_a_plain_stack():
    saved = AdapterDistillation("a", ["b"]).to_dict()
    assert saved == Stack("a").to_dict()
    assert type(AdapterCompositionBlock.from_dict(saved)) is Stack


def test_nesting():
    block = AdapterDistillation("a", ["b"])
    assert parse_composition(block) is block
    assert parse_composition(Stack("l", block)).children[1] is block
    for outer in (Fuse, Parallel):
        with pytest.raises(ValueError, match="Cannot nest"):
            parse_composition(outer("x", block))


BLOCK = AdapterDistillation("bank", ["work"])


@pytest.mark.parametrize(
    "setup",
    [
        Fuse("travel", BLOCK),
        Parallel("travel", BLOCK),
        Stack(Fuse("travel", "work"), BLOCK),
        Stack(Stack("travel", BLOCK)),
        Fuse(Stack("travel", BLOCK), "work"),
    ],
    ids=str,
)
@pytest.mark.parametrize("call", ["train_adapter", "set_active_adapters"])
def test_a_block_stands_alone_or_last_in_a_stack(call, setup):
    model = with_teachers()
    before = everything(model)
    message = (
        f"AdapterDistillation[bank; teachers: work] stands inside {setup}; "
        "only a Stack may hold it, after names of adapters."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        getattr(model, call)(setup)
    assert everything(model) == before


@pytest.mark.parametrize("block", [BLOCK, AdapterDistillation("insurance", ["work", "bank"])], ids=str)
def test_a_block_that_would_not_distil_is_not_activated(block):
    model = make_student(make_model(), train=False)
    before = everything(model)
    message = f"{block} is not prepared; call model.train_adapter with it, which makes it active."
    with pytest.raises(ValueError, match=exactly(message)):
        model.active_adapters = block
    assert everything(model) == before
    model.train_adapter(block)
    model.active_adapters = None
    model.active_adapters = block
    assert model.active_adapters == block


def test_find_block():
    block = AdapterDistillation("a", ["b"])
    assert find_block(block) is block
    assert find_block(Stack("l", block)) is block
    assert find_block(Fuse("m", Stack("l", block))) is block
    assert find_block(Stack("l", "a")) is None
    assert find_block(None) is None


@pytest.mark.parametrize(
    ("student", "teachers", "error", "message"),
    [
        ("a", [], ValueError, "No teachers are given for 'a'"),
        ("a", ["b", "b"], ValueError, "Teacher 'b' is given twice"),
        ("a", ["b", "a"], ValueError, "'a' cannot be its own teacher"),
        ("a", "b", TypeError, r"write \['b'\]"),
        ("a", [1], TypeError, "not 1"),
        ("a", [""], TypeError, "not ''"),
        ("a", None, TypeError, "not None"),
        (Stack(Fuse("x", "y"), "a"), ["b"], TypeError, "The student must be"),
        (Fuse("x", "y"), ["b"], TypeError, "The student must be"),
        (3, ["b"], TypeError, "The student must be an adapter name or a Stack of adapter names, not 3"),
        ("", ["b"], TypeError, "The student must be"),
        (Stack("a\n", "a\n"), ["b"], ValueError, r"'a\\n' stands twice in Stack\[a\\n, a\\n\];"),
    ],
)
def test_bad_blocks(student, teachers, error, message):
    with pytest.raises(error, match=message):
        AdapterDistillation(student, teachers)


def test_setup_of_a_distilled_student_saves_the_student_alone(tmp_path):
    model = make_student(make_model())
    model.save_adapter_setup(str(tmp_path / "setup"), model.active_adapters)
    assert {path.name for path in (tmp_path / "setup").iterdir()} == {"insurance", "adapter_setup.json"}
