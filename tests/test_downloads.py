"""Hub ids, and messages of one line."""

from hf_adapter_distillation.downloads import is_hub_id, one_line, suggestion


def test_what_has_the_form_of_a_hub_id():
    assert all(map(is_hub_id, ("me/faq", "me/faq@v1", "some-one/faq_2.0@0123abc")))
    assert not any(map(is_hub_id, ("faq", "faq@v1", "./faq", "a/b/c", "../faq", "me/", "@v1", "")))


def test_messages_of_one_line():
    assert one_line(OSError("No space\n\tleft.")) == "No space left."
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert suggestion("bnak", ["travel", "bank"]) == "did you mean 'bank'?"
    assert suggestion("xyz", ["bank"]) == ""
