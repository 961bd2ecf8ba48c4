from hf_adapter_distillation.student.provenance import is_hub_id


def test_what_has_the_form_of_a_hub_id():
    assert all(map(is_hub_id, ("me/faq", "me/faq@v1", "some-one/faq_2.0@0123abc")))
    assert not any(map(is_hub_id, ("faq", "faq@v1", "./faq", "a/b/c", "../faq", "me/", "@v1", "")))
