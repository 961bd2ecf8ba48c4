"""The service of many tenants without HTTP: mixed batches, the pool of students on disk, and isolation."""

import json
import logging
import os
import shutil
import threading
from contextlib import contextmanager
from itertools import combinations

import pytest
import served_students
import torch
from adapters import AdapterSetup, AutoAdapterModel, BatchSplit, Fuse
from served_students import FAQS, QUESTIONS, alone, write_student, write_students
from tiny_models import noisy
from transformers import AutoTokenizer, set_seed

import batched_adapters  # isort: skip
from faq_embeddings import EmbeddingPlatform, tokenized  # isort: skip
from student_folder import UNREADABLE, Answer, Failure, Question, folder_of, tenants_in  # isort: skip
from tenant_service import TenantService, load_service  # isort: skip


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    return served_students.uneven_encoder(tiny_encoder, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    return write_students(tmp_path_factory.mktemp("students"), encoder)


@pytest.fixture
def students(saved, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(saved, tmp_path / "students")
    return tmp_path / "students"


@pytest.fixture(scope="module")
def wanted(saved, encoder):
    return alone(saved, encoder, QUESTIONS)


def exact_service(students, encoder, max_loaded=8):
    """In float64, where rounding cannot hide a mistake."""
    platform = EmbeddingPlatform(encoder)
    platform.encoder.double()
    return TenantService(platform, students, max_loaded)


@contextmanager
def counted(model):
    """A list with an entry for each forward pass of a model."""
    calls = []
    handle = model.register_forward_hook(lambda module, args, output: calls.append(len(calls)))
    try:
        yield calls
    finally:
        handle.remove()


def assert_answers(outcomes, wanted, tolerance=1e-10):
    for outcome, scores in zip(outcomes, wanted, strict=True):
        assert isinstance(outcome, Answer), outcome
        assert dict(outcome.found) == pytest.approx(scores, abs=tolerance)
        falling = [score for _, score in outcome.found]
        assert falling == sorted(falling, reverse=True)


def loads(service):
    return service.metrics.values["tenant_loads_total"][""]


# Mixed batches


def test_a_mixed_batch_gives_the_scores_of_each_question_alone(saved, encoder, wanted):
    service = exact_service(saved, encoder)
    assert all(min(abs(a - b) for a, b in combinations(of.values(), 2)) > 1e-6 for of in wanted if len(of) > 1)
    service.answer(QUESTIONS)  # loads the students
    with counted(service.encoder) as calls:
        outcomes = service.answer(QUESTIONS)
    assert len(calls) == 1, "one pass for all questions, and none for FAQs"
    assert [outcome.batched for outcome in outcomes] == [len(QUESTIONS)] * len(QUESTIONS)
    assert_answers(outcomes, wanted)
    for i in range(len(QUESTIONS)):  # whatever else is in the batch
        batch = QUESTIONS[i:] + QUESTIONS[: i // 2]
        assert_answers(service.answer(batch), [wanted[QUESTIONS.index(question)] for question in batch])


def test_a_batch_in_float32_differs_by_rounding_only(saved, encoder):
    service = load_service(str(saved), encoder, 8)
    wanted = alone(saved, encoder, QUESTIONS, torch.float32)
    assert_answers(service.answer(QUESTIONS), wanted, 1e-6)


ROWS = [
    ["double_seq_bn"] * 3,
    ["seq_bn[reduction_factor=2]"] * 3,
    ["par_bn"] * 3,
    ["seq_bn[leave_out=[0],original_ln_before=False]"] * 3,
]
SPLIT = [
    ["compacter[phm_dim=2,reduction_factor=4,shared_phm_rule=False]"] * 3,
    ["seq_bn[ln_after=True]"] * 3,
    ["lora"] * 3,
    ["ia3"] * 3,
    ["prefix_tuning[flat=True]"] * 3,
    ["mam"] * 3,
]
ALONE = [["seq_bn_inv"] * 3, ["lora[use_dora=True]"] * 3]
MIXED = [
    ["seq_bn", "par_bn", "lora"],
    ["seq_bn", "seq_bn[leave_out=[0]]", "double_seq_bn"],
    ["lora[attn_matrices=['q']]", "lora[r=2]", "seq_bn_inv"],
    ["prefix_tuning[flat=True,prefix_length=5]", "prefix_tuning[flat=True,prefix_length=3]", "seq_bn"],
]


@pytest.mark.parametrize(
    ("configs", "n_passes"),
    [*((c, 1) for c in ROWS + SPLIT), *((c, len(QUESTIONS)) for c in ALONE), *zip(MIXED, [3, 3, 4, 3], strict=True)],
    ids=str,
)
def test_students_of_every_method_answer_as_alone(configs, n_passes, encoder, tmp_path):
    write_students(tmp_path, encoder, dict(zip(FAQS, configs, strict=True)))
    service = exact_service(tmp_path, encoder)
    service.answer(QUESTIONS)
    with counted(service.encoder) as calls:
        outcomes = service.answer(QUESTIONS)
    assert_answers(outcomes, alone(tmp_path, encoder, QUESTIONS))
    assert len(calls) == n_passes
    on_the_model = set(service.pool.platform.model.adapters_config)
    assert all(name.startswith("rows") for name in on_the_model) == (configs in [*ROWS, MIXED[1]])


def test_the_gates_of_a_question_do_not_depend_on_the_batch(encoder, tmp_path):
    """A gate is a mean over all tokens, those of the padding too."""
    write_students(tmp_path, encoder, dict.fromkeys(FAQS, "unipelt"))
    service = exact_service(tmp_path, encoder)
    wanted = [dict(service.answer([question])[0].found) for question in QUESTIONS]
    assert_answers(service.answer(QUESTIONS), wanted)


def test_gathered_weights_equal_batchsplit_in_the_hidden_states(encoder):
    platform = EmbeddingPlatform(encoder)
    set_seed(0)
    adapters = batched_adapters.TenantAdapters(platform.model)
    names, weights = ["bank", "rail"], {}
    for name in names:
        platform.model.add_adapter(name, config="double_seq_bn")
        noisy(platform.model, name, 1.0)
    platform.encoder.double().eval()
    rows = batched_adapters.RowAdapter(platform.model, "rows", platform.model.adapters_config.get("bank"))
    platform.encoder.double()
    for name in names:
        bottlenecks = batched_adapters.bottlenecks(platform.model, name)
        linears = [linear for one in bottlenecks for linear in (one.adapter_down[0], one.adapter_up)]
        weights[name] = [(linear.weight.detach().T, linear.bias.detach()[None]) for linear in linears]
    batch = dict(tokenized(platform.encoder, [question.text for question in QUESTIONS]))
    with torch.no_grad():
        platform.model.set_active_adapters(BatchSplit(*names, batch_sizes=[2, 3]))
        wanted = platform.encoder(dict(batch))["token_embeddings"]
        rows.set_rows([weights["bank"]] * 2 + [weights["rail"]] * 3)
        platform.model.set_active_adapters("rows")
        found = platform.encoder(dict(batch))["token_embeddings"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert adapters.row_adapters == {}


# The pool


def test_the_least_recently_used_student_makes_room(saved, encoder):
    service = exact_service(saved, encoder, max_loaded=2)
    by_tenant = {question.tenant: question for question in QUESTIONS}
    wanted = dict(zip(by_tenant, alone(saved, encoder, by_tenant.values()), strict=True))

    def ask(*tenants):
        questions = [by_tenant[tenant] for tenant in tenants]
        assert_answers(service.answer(questions), [wanted[tenant] for tenant in tenants])
        return list(service.pool.loaded)

    assert ask("bank") == ["bank"]
    assert ask("post") == ["bank", "post"]
    assert ask("bank") == ["post", "bank"]
    assert ask("rail") == ["bank", "rail"], "post was used before bank"
    assert loads(service) == 3
    assert ask("post", "bank") == ["post", "bank"], "the oldest one is in the running batch, and stays"
    assert loads(service) == 4
    assert service.metrics.values["tenant_evictions_total"][""] == 2
    assert list(service.pool.platform.model.adapters_config) == ["rows0"], "evicted weights are nowhere else"


@pytest.mark.parametrize("config", ["double_seq_bn", "lora"])
def test_an_evicted_student_leaves_the_model(config, encoder, tmp_path):
    write_students(tmp_path, encoder, dict.fromkeys(FAQS, config))
    service = exact_service(tmp_path, encoder, max_loaded=1)
    for question, scores in zip(QUESTIONS, alone(tmp_path, encoder, QUESTIONS), strict=True):
        assert_answers(service.answer([question]), [scores])
    assert len(service.pool.platform.model.adapters_config) == 1


def test_tenants_are_added_replaced_and_removed_while_it_serves(students, encoder, wanted):
    service = exact_service(students, encoder)
    question = Question("work", "the train")
    (outcome,) = service.answer([question])
    assert outcome == Failure(404, "Tenant 'work' is unknown; GET /tenants lists all.")
    write_student(students, encoder, "work", faqs=["the day", "the train"])
    (first,) = alone(students, encoder, [question])
    assert_answers(service.answer([question, *QUESTIONS])[:1], [first])
    service.answer([question])
    assert loads(service) == 4, "a student that has not changed is not read again"
    new = students.parent / "new"
    write_student(new, encoder, "work", faqs=["the day", "the train"], seed=7)
    for path in (new / "work").iterdir():
        os.replace(path, students / "work" / path.name)
    (second,) = alone(students, encoder, [question])
    assert second != pytest.approx(first, abs=1e-3)
    assert_answers(service.answer([*QUESTIONS, question])[-1:], [second])
    assert loads(service) == 5
    shutil.rmtree(students / "work")
    outcomes = service.answer([question, *QUESTIONS])
    assert outcomes[0].status == 404
    assert_answers(outcomes[1:], wanted)
    assert "work" not in service.pool.loaded


def test_a_student_that_changes_while_it_is_loaded_is_loaded_again(students, encoder, monkeypatch):
    service = exact_service(students, encoder)
    load, changes = service.pool.adapters.load, ["pay", "card"]

    def load_slowly(folder, label):
        loaded = load(folder, label)
        if changes:
            (folder / "faqs.json").write_text(json.dumps([{"question": changes.pop(), "queries": []}]))
        return loaded

    monkeypatch.setattr(service.pool.adapters, "load", load_slowly)
    (outcome,) = service.answer([Question("rail", "pay")])
    assert [faq for faq, _ in outcome.found] == ["pay"]
    changes[:] = ["a day", "the day", "the weather", "the train"]
    (students / "rail" / "faqs.json").write_text(json.dumps([{"question": "pay", "queries": []}]))
    outcomes = service.answer([Question("rail", "pay"), *QUESTIONS[1:2]])
    assert outcomes[0] == Failure(503, "Tenant 'rail' is being replaced; ask again in a moment.")
    assert isinstance(outcomes[1], Answer)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "../students/bank", "bank/", "/bank", "\0", "\ud800", "x" * 999]
)
def test_a_name_that_leads_elsewhere_is_no_tenant(name, students):
    (students / ".hidden").mkdir()
    assert folder_of(students, name) is None
    assert folder_of(students, "bank") == students / "bank"
    assert tenants_in(students) == list(FAQS)


# Isolation


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


def of_another_model(key, value):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def with_weights(change):
    """Changes the saved weights."""

    def change_file(folder):
        state = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        torch.save(change(state), folder / "pytorch_adapter.bin")

    return change_file


def halved(folder):
    path = folder / "pytorch_adapter.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = [
    (lambda folder: (folder / "faqs.json").unlink(), "rail holds no faqs.json; write the tenant's FAQs"),
    (rewrite("faqs.json", "{"), "rail/faqs.json is no JSON (Expecting"),
    (rewrite("faqs.json", "[]"), "rail/faqs.json is no list of FAQs; write a JSON list of"),
    (rewrite("faqs.json", '["a"]'), "rail/faqs.json is no list of FAQs; write"),
    (rewrite("faqs.json", '[{"question": "", "queries": []}]'), "rail/faqs.json is no list of FAQs; write"),
    (rewrite("faqs.json", '[{"question": "a", "queries": ["\\ud800"]}]'), "holds '\\ud800', which is not valid"),
    (rewrite("faqs.json", '{"a": 1}'), "rail/faqs.json holds no JSON list; write"),
    (of_another_model("hidden_size", 384), "rail' was made for hidden_size 384, the model has 16; use"),
    (of_another_model("model_type", "gpt2"), "rail' was made for model_type 'gpt2', the model has 'bert'"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "rail' holds no adapter_config"),
    (rewrite("head_config.json", "{}"), "rail' has a head, as a cross-encoder's student; train it"),
    (with_weights(lambda state: dict(list(state.items())[1:])), "lacks 1 weights that this model needs"),
    (
        with_weights(lambda state: {key: weight * float("nan") for key, weight in state.items()}),
        "rail' gives embeddings that are NaN; train it anew",
    ),
    (halved, "rail' cannot be loaded: "),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=[reason for _, reason in DAMAGES])
def test_a_damaged_student_harms_no_other_tenant(damage, reason, students, encoder, wanted):
    service = exact_service(students, encoder)
    assert_answers(service.answer(QUESTIONS), wanted)
    whole = students.parent / "whole"
    shutil.copytree(students / "rail", whole)
    damage(students / "rail")
    for _ in range(2):
        outcomes = service.answer(QUESTIONS)
        for outcome, question, scores in zip(outcomes, QUESTIONS, wanted, strict=True):
            if question.tenant != "rail":
                assert_answers([outcome], [scores])
                continue
            assert outcome.status == 500
            assert outcome.detail.startswith("Tenant 'rail' cannot be served: ")
            assert reason in outcome.detail
            assert "\n" not in outcome.detail
    assert service.metrics.values["tenant_load_failures_total"][""] == 1, "it is not read for each question"
    assert not any(name.startswith("student") for name in service.pool.platform.model.adapters_config)
    shutil.rmtree(students / "rail")
    shutil.copytree(whole, students / "rail")
    assert_answers(service.answer(QUESTIONS), wanted)


def test_what_may_succeed_later_is_tried_again(students, encoder, monkeypatch):
    service = exact_service(students, encoder)
    with monkeypatch.context() as patch:
        patch.setattr(service.pool.adapters, "load", lambda *args: (_ for _ in ()).throw(OSError("no such device")))
        (outcome,) = service.answer(QUESTIONS[:1])
    assert outcome == Failure(503, "Tenant 'rail' could not be loaded (OSError); ask again.")
    assert isinstance(service.answer(QUESTIONS[:1])[0], Answer)


def test_a_question_without_tokens_fails_alone_among_those_of_other_tenants(saved, encoder, wanted):
    service = exact_service(saved, encoder)
    outcomes = service.answer([*QUESTIONS, Question("bank", "\ud800")])
    assert outcomes.pop() == Failure(422, UNREADABLE)
    assert_answers(outcomes, wanted)


def test_a_failed_batch_fails_only_the_question_that_fails_alone(saved, encoder, monkeypatch, caplog, wanted):
    service = exact_service(saved, encoder)
    embed = service._embed
    monkeypatch.setattr(service, "_embed", lambda texts, of: 1 / 0 if "pay" in texts else embed(texts, of))
    with caplog.at_level(logging.WARNING):
        outcomes = service.answer(QUESTIONS)
    assert outcomes.pop() == Failure(500, "The model failed on this question; ask again.")
    assert [outcome.batched for outcome in outcomes] == [1] * 4
    assert_answers(outcomes, wanted[:-1])
    assert "A batch of 5 questions failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_an_answer_of_nan_is_a_failure_of_its_question_alone(saved, encoder, monkeypatch):
    service = exact_service(saved, encoder)
    embed = service._embed

    def with_nan_in_the_first_row(texts, students):
        embeddings = embed(texts, students).clone()
        embeddings[0] = float("nan")
        return embeddings

    monkeypatch.setattr(service, "_embed", with_nan_in_the_first_row)
    outcomes = service.answer(QUESTIONS)
    assert [outcome.status for outcome in outcomes if isinstance(outcome, Failure)] == [500]


@pytest.mark.parametrize("config", ["compacter[phm_dim=2,reduction_factor=4]", "vera"])
def test_what_adapters_saves_without_its_shared_weights_is_named(config, encoder, tmp_path):
    write_students(tmp_path, encoder, {"rail": config})
    (outcome,) = exact_service(tmp_path, encoder).answer(QUESTIONS[:1])
    assert outcome.status == 500
    assert "lacks the weights that its layers share" in outcome.detail


# The start and the health


def test_the_start_needs_one_student_that_can_be_served(students, encoder):
    (students / "bank" / "faqs.json").unlink()
    service = load_service(str(students), encoder, 4)
    assert isinstance(service.answer(QUESTIONS[:1])[0], Answer)
    for tenant in ("post", "rail"):
        (students / tenant / "faqs.json").unlink()
    with pytest.raises(ValueError, match="^None of the first 3 tenants can be served. Tenant 'bank' .*faqs.json"):
        load_service(str(students), encoder, 4)


def test_the_health_is_that_of_the_encoder(saved, encoder, wanted):
    service = exact_service(saved, encoder)
    service.check_health()
    assert_answers(service.answer(QUESTIONS[:1]), wanted[:1])
    service.check_health()
    next(service.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="gives NaN"):
        service.check_health()


# What BatchSplit of adapters 1.3.0 does not do: docs/how_to/serve.md


def difference_of_batchsplit(encoder, configs):
    """By how much the rows of a batch differ from the rows of the same batch by each adapter alone."""
    platform, names = EmbeddingPlatform(encoder), [f"student{n}" for n in range(len(configs))]
    set_seed(0)
    for name, config in zip(names, configs, strict=True):
        platform.model.add_adapter(name, config=config)
        noisy(platform.model, name, 1.0)
    platform.encoder.double().eval()
    batch = dict(tokenized(platform.encoder, [faq for faqs in FAQS.values() for faq in faqs]))

    @torch.no_grad()
    def embed(setup):
        platform.model.set_active_adapters(setup)
        return platform.encoder(dict(batch))["sentence_embedding"].chunk(len(names))

    together = embed(BatchSplit(*names, batch_sizes=6 // len(names)))
    return max((together[n] - embed(name)[n]).abs().max().item() for n, name in enumerate(names))


@pytest.mark.parametrize(
    "configs",
    [
        ["double_seq_bn"] * 3,
        ["seq_bn[reduction_factor=2]", "seq_bn[reduction_factor=8]"],
        ["par_bn"] * 2,
        ["compacter[phm_dim=2,reduction_factor=4]"] * 2,
        ["lora", "lora[r=2]"],
        ["ia3"] * 2,
        ["vera"] * 2,
        ["prefix_tuning[flat=True]"] * 2,
        ["mam"] * 2,
        ["unipelt"] * 2,
    ],
    ids=lambda configs: configs[0],
)
def test_methods_that_share_a_batchsplit(configs, encoder):
    assert difference_of_batchsplit(encoder, configs) < 1e-12


@pytest.mark.parametrize(
    "configs",
    [
        ["seq_bn", "par_bn"],
        ["seq_bn", "seq_bn[original_ln_before=False]"],
        ["seq_bn_inv"] * 2,
        ["prompt_tuning"] * 2,
        ["lora[use_dora=True]"] * 2,
        ["prefix_tuning[flat=True,prefix_length=5]", "prefix_tuning[flat=True,prefix_length=3]"],
    ],
    ids=lambda configs: configs[0],
)
def test_students_that_change_each_others_scores_in_a_batchsplit(configs, encoder):
    assert difference_of_batchsplit(encoder, configs) > 1e-6


@pytest.mark.parametrize(
    "configs",
    [
        ["seq_bn", "double_seq_bn"],
        ["double_seq_bn", "seq_bn"],
        ["seq_bn", "lora"],
        ["lora[attn_matrices=['q']]", "lora[attn_matrices=['q','v']]"],
        ["seq_bn", "seq_bn[leave_out=[0]]"],
    ],
    ids=str,
)
def test_students_in_other_places_share_no_batchsplit(configs, encoder):
    with pytest.raises((KeyError, TypeError)):
        difference_of_batchsplit(encoder, configs)


def test_what_the_guide_says_of_batchsplit_is_so(encoder):
    set_seed(0)
    model = AutoAdapterModel.from_pretrained(encoder)
    for name in ("bank", "rail"):
        model.add_adapter(name, config="seq_bn")
        noisy(model, name, 1.0)
        model.add_classification_head(name)
    model.double().eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts = [faq for faqs in FAQS.values() for faq in faqs]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    both = BatchSplit("bank", "rail", batch_sizes=[4, 2])

    model.set_active_adapters("rail")
    with AdapterSetup(both):
        assert [len(output.logits) for output in model(**batch).head_outputs] == [6, 6], "each head answers all"
    model.set_active_adapters(both)
    output = model(**batch, labels=torch.tensor([0, 1, 0, 1, 0, 1]))
    assert [len(output.logits) for output in output.head_outputs] == [4, 2]
    assert output.loss == sum(output.loss for output in output.head_outputs)
    assert both == BatchSplit("bank", "rail", batch_sizes=[1, 5])
    with pytest.raises(ValueError, match="Cannot nest"):
        model.set_active_adapters(BatchSplit(Fuse("bank", "rail"), "bank", batch_sizes=[4, 2]))
    for sizes, error in (([6, 0], IndexError), ([0, 6], IndexError), ([3, 2], IndexError), ((4, 2), TypeError)):
        model.set_active_adapters(BatchSplit("bank", "rail", batch_sizes=sizes))
        with pytest.raises(error):
            model(**batch)
    model.set_active_adapters(BatchSplit("bank", batch_sizes=[6]))
    assert "head_outputs" not in model(**batch)
    other = threading.Thread(target=model.set_active_adapters, args=("rail",))
    other.start()
    other.join()
    assert model.active_adapters.children == ["rail"]
    model.delete_head("bank")
    model.set_active_adapters("rail")
    model.set_active_adapters(both)
    assert model.active_head == "rail"
    assert len(model(**batch).logits) == 6, "the last active head answers all"
