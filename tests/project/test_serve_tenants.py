"""The service of many tenants: mixed batches, the queue, HTTP, the page, and the students that it takes."""

import asyncio
import importlib
import json
import re
import shutil
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from adapters import AdapterSetup, AutoAdapterModel, BatchSplit, Fuse
from paths import ROOT
from tiny_models import noisy
from torch.nn.functional import normalize as normalized
from transformers import AutoTokenizer, BertModel, set_seed

TestClient = pytest.importorskip("fastapi.testclient").TestClient
pytest.importorskip("uvicorn")

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "serving")]

import demo_students  # noqa: E402
import serve_tenants  # noqa: E402
from faq_data import Faq, Tenant  # noqa: E402
from faq_embeddings import EmbeddingPlatform, tokenized  # noqa: E402
from tenant_batches import Batcher, BatchFailedError, BusyError, Waiting, take_batch  # noqa: E402
from tenant_model import Question, TenantModel, UnreadableError, load_tenant_model  # noqa: E402

FAQS = {
    "bank": ["is my card gone", "what do i pay", "how is the card"],
    "post": ["when does the parcel leave"],
    "rail": ["when does the train leave", "<b>how is the weather</b>"],
}
QUESTIONS = [
    Question("rail", "the train"),
    Question("bank", "card gone"),
    Question("rail", "weather how is the weather when does the train leave the parcel"),
    Question("post", "parcel"),
    Question("bank", "pay"),
]


LABELLED = {"bank": {1: ["pay the parcel", "pay"]}}  # queries of some FAQs


def tenants_of(names):
    return [Tenant(n, [Faq(f, train=LABELLED.get(n, {}).get(i, [])) for i, f in enumerate(FAQS[n])]) for n in names]


def make_students(encoder, configs):
    """A tiny embedding model with an adapter for each tenant, told apart by their weights."""
    set_seed(0)
    platform = EmbeddingPlatform(encoder)
    for name, config in configs.items():
        platform.model.add_adapter(name, config=config)
        noisy(platform.model, name, 1.0)
    return platform


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    """The tiny BERT with weights that make its embeddings depend on the texts."""
    folder = tmp_path_factory.mktemp("encoder")
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    set_seed(0)
    model = BertModel.from_pretrained(tiny_encoder)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def students(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    platform = make_students(encoder, dict.fromkeys(FAQS, "double_seq_bn"))
    for tenant in tenants_of(FAQS):
        platform.model.save_adapter(str(folder / tenant.name), tenant.name)
        faqs = [{"question": faq.question, "queries": faq.train} for faq in tenant.faqs]
        (folder / tenant.name / "faqs.json").write_text(json.dumps(faqs))
    return folder


@pytest.fixture(scope="module")
def tenants(students, encoder):
    """In float64, where rounding cannot hide a mistake."""
    loaded = load_tenant_model(str(students), encoder)
    loaded.encoder.double()
    return TenantModel(loaded.platform, tenants_of(FAQS))


@contextmanager
def counted(model):
    """A list with an entry for each forward pass of a model."""
    calls = []
    handle = model.register_forward_hook(lambda module, args, output: calls.append(len(calls)))
    try:
        yield calls
    finally:
        handle.remove()


def alone(tenants, question):
    """The cosines of a question with the FAQs of its tenant, each text alone, without BatchSplit and padding."""
    tenants.platform.model.set_active_adapters(question.tenant)
    tokenizer, queries = tenants.encoder.tokenizer, LABELLED.get(question.tenant, {})

    def embed(text):
        return normalized(tenants.encoder(dict(tokenizer(text, return_tensors="pt")))["sentence_embedding"])[0]

    texts = [[faq, *queries.get(number, [])] for number, faq in enumerate(FAQS[question.tenant])]
    faqs = torch.stack([torch.stack([embed(text) for text in of_faq]).mean(0) for of_faq in texts])
    return (normalized(faqs) @ embed(question.text)).tolist()


def by_faq(found):
    """The scores of an answer in the order of the FAQs; they fall from the first to the last."""
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    return [one.score for one in sorted(found)]


def test_a_mixed_batch_gives_the_scores_of_each_question_alone(tenants):
    wanted = [alone(tenants, question) for question in QUESTIONS]
    assert all(min(abs(a - b) for a, b in combinations(scores, 2)) > 1e-6 for scores in wanted if len(scores) > 1)
    with counted(tenants.encoder) as calls:
        found = tenants.answer(QUESTIONS)
    assert len(calls) == 1, "one pass for all questions, and none for FAQs"
    for of_question, scores in zip(found, wanted, strict=True):
        assert by_faq(of_question) == pytest.approx(scores, abs=1e-10)
    for i in range(len(QUESTIONS)):  # whatever else is in the batch
        batch = QUESTIONS[i:] + QUESTIONS[: i // 2]
        for question, of_question in zip(batch, tenants.answer(batch), strict=True):
            assert by_faq(of_question) == pytest.approx(wanted[QUESTIONS.index(question)], abs=1e-10)


def test_each_tenant_stands_once_in_the_batchsplit(tenants):
    tenants.answer(QUESTIONS)
    setup = tenants.platform.model.active_adapters
    assert (setup.children, setup.batch_sizes) == (["bank", "post", "rail"], [2, 1, 2])


def test_the_batches_of_students_are_checked_when_they_are_loaded(students, encoder, monkeypatch):
    checked = []
    monkeypatch.setattr(TenantModel, "check", lambda self: checked.append(list(self.faqs)))
    load_tenant_model(str(students), encoder)
    assert checked == [list(FAQS)]


def test_loaded_students_answer_as_the_saved_ones(students, encoder):
    loaded = load_tenant_model(str(students), encoder)
    saved = TenantModel(make_students(encoder, dict.fromkeys(FAQS, "double_seq_bn")), tenants_of(FAQS))
    for of_saved, of_loaded in zip(saved.answer(QUESTIONS), loaded.answer(QUESTIONS), strict=True):
        assert by_faq(of_saved) == pytest.approx(by_faq(of_loaded), abs=1e-6)


# What BatchSplit of adapters 1.3.0 does not do: docs/how_to/serve.md


def check(encoder, configs):
    platform = make_students(encoder, {f"student{n}": config for n, config in enumerate(configs)})
    platform.encoder.double()
    faqs = [Faq(faq) for faq in FAQS["bank"]]
    TenantModel(platform, [Tenant(f"student{n}", faqs) for n in range(len(configs))]).check()


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
def test_methods_that_share_a_batch(configs, encoder):
    check(encoder, configs)


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
def test_students_that_would_change_each_others_scores_are_named(configs, encoder):
    with pytest.raises(
        ValueError, match=r"^Student 'student\d' has other embeddings in a batch with others; serve stud"
    ):
        check(encoder, configs)


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
def test_students_in_other_places_say_why_they_share_no_batch(configs, encoder):
    with pytest.raises(ValueError, match=r"^The students cannot share a batch \((KeyError|TypeError): .*; serve"):
        check(encoder, configs)


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


def test_the_scripts_of_the_guide_exist():
    page = (ROOT / "docs" / "how_to" / "serve.md").read_text()
    scripts = re.findall(r"^python (examples/serving/\w+\.py)", page, flags=re.M)
    assert len(scripts) == 2
    assert all((ROOT / script).is_file() for script in scripts)


def test_embeddings_that_are_nan_are_found_at_the_start(encoder):
    platform = make_students(encoder, {"bank": "seq_bn", "rail": "seq_bn"})
    next(p for name, p in platform.model.named_parameters() if ".rail." in name).data[0] = float("nan")
    with pytest.raises(ValueError, match="Student 'rail' gives embeddings that are NaN; train it anew"):
        TenantModel(platform, tenants_of(["bank", "rail"])).check()


# The queue


def test_batches_are_full_and_in_the_order_of_arrival():
    queue = deque(Waiting(Question("t", str(n)), 0.0, None) for n in range(5))
    batches = []
    while queue:
        batches.append([entry.question.text for entry in take_batch(queue, 2)])
    assert batches == [["0", "1"], ["2", "3"], ["4"]]


def with_batcher(score, use, **kwargs):
    """Runs a coroutine beside a batcher."""
    settings = {"max_batch": 2, "wait": 0.05, "max_waiting": 9, **kwargs}

    async def main():
        batcher = Batcher(score, **settings)
        task = asyncio.create_task(batcher.run())
        try:
            return await asyncio.wait_for(use(batcher), 20)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    return asyncio.run(main())


def echo(seen):
    def score(questions):
        seen.append([question.text for question in questions])
        return [[float(question.text)] for question in questions]

    return score


def test_questions_are_answered_in_batches_each_with_its_own_answer():
    seen = []

    async def use(batcher):
        return await asyncio.gather(*(batcher.ask(Question("t", str(n))) for n in range(5)))

    answers = with_batcher(echo(seen), use)
    assert [answer.found for answer in answers] == [[float(n)] for n in range(5)]
    assert seen == [["0", "1"], ["2", "3"], ["4"]]
    assert [answer.batched for answer in answers] == [2, 2, 2, 2, 1]


def test_a_full_batch_waits_for_nobody_and_a_lone_question_not_for_long():
    async def full(batcher):
        return await asyncio.gather(*(batcher.ask(Question("t", "1")) for _ in range(2)))

    async def lone(batcher):
        start = asyncio.get_running_loop().time()
        await batcher.ask(Question("t", "1"))
        return asyncio.get_running_loop().time() - start

    with_batcher(echo([]), full, wait=3600.0)
    assert 0.2 <= with_batcher(echo([]), lone, wait=0.2) < 5


def test_later_questions_join_the_first_ones_batch():
    seen = []

    async def use(batcher):
        first = asyncio.create_task(batcher.ask(Question("t", "1")))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batcher.ask(Question("t", "2")))

    with_batcher(echo(seen), use, wait=0.5)
    assert seen == [["1", "2"]]


def test_a_failed_batch_fails_only_the_question_that_fails_alone():
    def score(questions):
        if any(question.text == "bad" for question in questions):
            raise RuntimeError("no memory")
        return [[1.0] for _ in questions]

    async def use(batcher):
        texts = ["good", "bad", "good", "good"]
        failed = await asyncio.gather(*(batcher.ask(Question("t", text)) for text in texts), return_exceptions=True)
        return failed, await batcher.ask(Question("t", "good"))

    answers, later = with_batcher(score, use)
    assert [isinstance(answer, BatchFailedError) for answer in answers] == [False, True, False, False]
    assert [answer.batched for answer in answers if not isinstance(answer, Exception)] == [1, 2, 2]
    assert later.found == [1.0]


def test_a_question_without_tokens_fails_alone_among_those_of_other_tenants(tenants):
    async def use(batcher):
        asked = [*QUESTIONS, Question("bank", "\ud800")]
        return await asyncio.gather(*(batcher.ask(question) for question in asked), return_exceptions=True)

    *answers, bad = with_batcher(tenants.answer, use, max_batch=6)
    assert isinstance(bad, UnreadableError)
    for answer, question in zip(answers, QUESTIONS, strict=True):
        assert by_faq(answer.found) == pytest.approx(alone(tenants, question), abs=1e-10)


def test_the_end_of_the_service_ends_the_second_try_of_a_batch():
    started = threading.Event()

    def score(questions):
        if len(questions) > 1:
            raise RuntimeError("no memory")
        started.set()
        time.sleep(0.2)
        return [[1.0]]

    async def main():
        batcher = Batcher(score, 2, 3600.0, 9)
        task = asyncio.create_task(batcher.run())
        asked = [asyncio.create_task(batcher.ask(Question("t", "1"))) for _ in range(2)]
        await asyncio.to_thread(started.wait, 20)
        task.cancel()
        answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)
        assert [type(answer) for answer in answers] == [BatchFailedError] * 2

    asyncio.run(main())


def test_who_has_gone_is_not_answered():
    seen = []

    async def use(batcher):
        gone = asyncio.create_task(batcher.ask(Question("t", "1")))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher.ask(Question("t", "2"))

    assert with_batcher(echo(seen), use).batched == 1
    assert seen == [["2"]]


def test_more_questions_than_may_wait_are_told_so():
    async def use(batcher):
        asked = [asyncio.create_task(batcher.ask(Question("t", "1"))) for _ in range(3)]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = with_batcher(echo([]), use, max_waiting=2)
    assert [type(answer) for answer in answers[:2]] == [type(answers[0])] * 2
    assert isinstance(answers[2], BusyError)


def test_the_end_of_the_service_leaves_nobody_waiting():
    async def main():
        batcher = Batcher(echo([]), 4, 3600.0, 9)
        task = asyncio.create_task(batcher.run())
        asked = asyncio.create_task(batcher.ask(Question("t", "1")))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(BatchFailedError):
            await asyncio.wait_for(asked, 5)

    asyncio.run(main())


def test_a_batch_that_runs_at_the_end_of_the_service_is_told_so():
    started = threading.Event()

    def score(questions):
        started.set()
        time.sleep(0.2)
        return [[1.0]]

    async def main():
        batcher = Batcher(score, 4, 0.0, 9)
        task = asyncio.create_task(batcher.run())
        asked = asyncio.create_task(batcher.ask(Question("t", "1")))
        await asyncio.to_thread(started.wait, 20)
        task.cancel()
        with pytest.raises(BatchFailedError):
            await asyncio.wait_for(asked, 5)

    asyncio.run(main())


# HTTP


def make_client(tenants, **kwargs):
    return TestClient(serve_tenants.make_app(tenants, serve_tenants.Arguments(students="", **kwargs)))


def post(client, content):
    return client.post("/answer", content=content, headers={"content-type": "application/json"})


def ask(client, question):
    return client.post("/answer", json={"tenant": question.tenant, "question": question.text})


def test_questions_of_three_tenants_are_answered_in_one_batch(tenants):
    wanted = [alone(tenants, question) for question in QUESTIONS]
    with (
        make_client(tenants, max_batch=len(QUESTIONS), wait_ms=20_000) as client,
        ThreadPoolExecutor(len(QUESTIONS)) as users,
        counted(tenants.encoder) as calls,
    ):
        answers = [answer.json() for answer in users.map(lambda question: ask(client, question), QUESTIONS)]
    assert len(calls) == 1
    for question, scores, answer in zip(QUESTIONS, wanted, answers, strict=True):
        assert answer["tenant"] == question.tenant
        assert answer["batched"] == len(QUESTIONS)
        ranked = [(row["faq"], row["score"]) for row in answer["answers"]]
        best_first = sorted(zip(FAQS[question.tenant], scores, strict=True), key=lambda pair: -pair[1])
        assert [faq for faq, _ in ranked] == [faq for faq, _ in best_first]
        assert [score for _, score in ranked] == pytest.approx([score for _, score in best_first], abs=1e-10)
        assert answer["milliseconds"] > 0


def test_what_cannot_be_answered_says_so_in_one_line(tenants):
    with make_client(tenants, wait_ms=0) as client:
        cases = [
            (Question("zoo", "where"), 404, "Tenant 'zoo' is unknown; GET /tenants lists all."),
            (Question("bank", " \n"), 422, "The question is empty; type one."),
            (Question("bank", "x" * 1001), 422, "The question has 1001 characters; ask in 1000 at most."),
        ]
        for question, status, detail in cases:
            answer = ask(client, question)
            assert (answer.status_code, answer.json()) == (status, {"detail": detail})
        assert ask(client, Question("bank", "x" * 1000)).status_code == 200
        for body in ({"tenant": "bank"}, {"tenant": "bank", "question": 1}, [], "bank"):
            answer = client.post("/answer", json=body)
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith("body")
        assert client.post("/answer", content=b"{").status_code == 422
        assert client.get("/answer").status_code == 405


UNREADABLE = {"detail": "The question is not a text that the model can read; type it again."}


@pytest.mark.parametrize("text", ["\ud800", "my card \udfff is gone", "\ude00\ud83d", "a" * 999 + "\ud83d"])
def test_half_a_character_is_refused_before_it_waits(text, tenants, monkeypatch):
    monkeypatch.setattr(serve_tenants.Batcher, "ask", None)
    with make_client(tenants, wait_ms=0) as client:
        answer = post(client, json.dumps({"tenant": "bank", "question": text}))
        assert (answer.status_code, answer.json()) == (422, UNREADABLE)
        answer = post(client, json.dumps({"tenant": text, "question": "my card"}))
        assert (answer.status_code, "\n" in answer.json()["detail"]) == (404, False)


def test_a_question_that_only_the_tokenizer_refuses_gets_a_422_and_the_others_an_answer(tenants, monkeypatch):
    def refuse(encoder, texts):
        if "odd" in texts:
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")  # as tokenizers does
        return tokenized(encoder, texts)

    monkeypatch.setattr("tenant_model.tokenized", refuse)
    asked = [*QUESTIONS, Question("bank", "odd")]
    with make_client(tenants, max_batch=len(asked), wait_ms=20_000) as client, ThreadPoolExecutor(len(asked)) as users:
        *answers, bad = users.map(lambda question: ask(client, question), asked)
    assert [answer.status_code for answer in answers] == [200] * len(QUESTIONS)
    assert (bad.status_code, bad.json()) == (422, UNREADABLE)


@pytest.mark.parametrize("text", ["\0", "\ufffe", "\u200b\u202e", "e" + "\u0301" * 999, "😀" * 1000, "[SEP] [PAD]"])
def test_valid_text_is_answered(text, tenants):
    with make_client(tenants, wait_ms=0) as client:
        assert ask(client, Question("bank", text)).status_code == 200


def test_a_body_over_the_limit_is_refused_whole_or_in_pieces(tenants):
    body = json.dumps({"tenant": "bank", "question": "😀" * 1000}).encode()  # 12 bytes a character
    full = body + b" " * (serve_tenants.MAX_BYTES - len(body))
    detail = {"detail": f"The body has more than {serve_tenants.MAX_BYTES} bytes; ask a shorter question."}
    with make_client(tenants, wait_ms=0) as client:
        for content in (full, iter([full[:9], full[9:]])):
            assert post(client, content).status_code == 200
        for content in (full + b" ", iter([full, b" "]), iter([b" " * 1000] * 1000)):
            answer = post(client, content)
            assert (answer.status_code, answer.json()) == (413, detail)
        assert client.get("/tenants").status_code == 200


def test_a_body_over_the_limit_is_not_read_to_its_end():
    received, sent = [], []

    async def receive():
        received.append(1)
        return {"type": "http.request", "body": b" " * 1000, "more_body": True}

    async def send(message):
        sent.append(message)

    asyncio.run(serve_tenants.BodyLimit(None)({"type": "http"}, receive, send))
    assert len(received) == serve_tenants.MAX_BYTES // 1000 + 1
    assert sent[0]["status"] == 413


def test_the_service_goes_on_after_a_failed_batch(tenants, monkeypatch, caplog):
    with make_client(tenants, wait_ms=0) as client:
        with monkeypatch.context() as patch:
            patch.setattr(tenants, "activate", lambda *args: 1 / 0)
            answer = ask(client, QUESTIONS[0])
        assert (answer.status_code, answer.json()) == (
            500,
            {"detail": "The batch of this question failed; ask again."},
        )
        assert "A batch of 1 questions failed" in caplog.text
        assert "ZeroDivisionError" in caplog.text
        assert ask(client, QUESTIONS[0]).status_code == 200


def test_the_queue_is_that_of_the_arguments(tenants, monkeypatch):
    made = []
    monkeypatch.setattr(serve_tenants, "Batcher", lambda *args: made.append(args))
    make_client(tenants, max_batch=7, wait_ms=20.0, max_waiting=3)
    assert made == [(tenants.answer, 7, 0.02, 3)]


def test_a_service_that_is_full_answers_so(tenants, monkeypatch):
    async def ask_nothing(self, question):
        raise BusyError

    monkeypatch.setattr(Batcher, "ask", ask_nothing)
    with make_client(tenants) as client:
        answer = ask(client, QUESTIONS[0])
    assert (answer.status_code, answer.json()["detail"]) == (503, "Too many questions wait; ask again in a moment.")
    assert answer.headers["retry-after"] == "1"


def test_the_tenants_are_listed(tenants):
    with make_client(tenants) as client:
        assert client.get("/tenants").json() == [{"name": name, "faqs": len(faqs)} for name, faqs in FAQS.items()]


def test_the_page_is_served_and_names_no_outside_address(tenants):
    with make_client(tenants) as client:
        answer = client.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    page = answer.text
    assert not re.search(r"//\w|@import|url\(|<script [^>]*src|<link [^>]*href=\"(?!data:,)", page)
    assert "innerHTML" not in page
    assert "insertAdjacentHTML" not in page
    assert "textContent" in page
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert set(re.findall(r'at\("(\w+)"\)', page)) <= set(re.findall(r' id="(\w+)"', page))
    assert f'maxlength="{serve_tenants.MAX_CHARACTERS}"' in page


# The command


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    return module.main()


def test_the_command_serves_a_folder_of_students(students, encoder, monkeypatch):
    served = []
    monkeypatch.setattr(serve_tenants.uvicorn, "run", lambda app, **kwargs: served.append((app, kwargs)))
    run_main(monkeypatch, serve_tenants, "--students", students, "--model", encoder, "--port", "0")
    ((app, kwargs),) = served
    assert kwargs == {"host": "127.0.0.1", "port": 0}
    with TestClient(app) as client:
        assert [tenant["name"] for tenant in client.get("/tenants").json()] == list(FAQS)


def rewrite(name, text):
    return lambda folder: (folder / "rail" / name).write_text(text)


def of_another_model(key, value):
    def change(folder):
        path = folder / "rail" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return change


def with_head(folder):
    (folder / "rail" / "head_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "--students .* is no folder; examples/serving/demo_students.py writes one"),
        (lambda folder: [shutil.rmtree(path) for path in folder.iterdir()], "--students .* holds no students; give"),
        (lambda folder: (folder / "rail" / "faqs.json").unlink(), "rail holds no faqs.json; write the tenant's FAQs"),
        (rewrite("faqs.json", "{"), r"rail/faqs.json is no JSON \(Expecting .*; write a JSON list of"),
        (rewrite("faqs.json", "[]"), "rail/faqs.json is no list of FAQs; write a JSON list of"),
        (rewrite("faqs.json", '["a"]'), "rail/faqs.json is no list of FAQs; write"),
        (rewrite("faqs.json", '[{"question": "", "queries": []}]'), "rail/faqs.json is no list of FAQs; write"),
        (rewrite("faqs.json", '[{"question": "a", "queries": ["\\ud800"]}]'), r"holds '\\ud800', which is not valid"),
        (rewrite("faqs.json", '{"a": 1}'), "rail/faqs.json is no list of FAQs; write"),
        (of_another_model("hidden_size", 384), "Student .*rail' was made for hidden_size 384, the model has 16; use"),
        (of_another_model("model_type", "gpt2"), "Student .*rail' was made for model_type 'gpt2', the model has 'ber"),
        (lambda folder: (folder / "rail" / "adapter_config.json").unlink(), "Student .*rail' holds no adapter_config"),
        (with_head, "Student .*rail' has a head, as a cross-encoder's student; train it as an embedding model's"),
        (lambda folder: (folder / "rail").rename(folder / "a.b"), "would be named 'a.b'; rename the folder"),
    ],
)  # fmt: skip
def test_wrong_students_are_named_in_one_line(change, message, students, encoder, tmp_path, monkeypatch):
    folder = tmp_path / "students"
    shutil.copytree(students, folder)
    change(folder)
    monkeypatch.setattr(serve_tenants, "make_app", None)
    with pytest.raises(SystemExit, match=f"^serve_tenants.py: .*{message}") as caught:
        run_main(monkeypatch, serve_tenants, "--students", folder, "--model", encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_batch", "0"], "--max_batch 0 is out of range; it must be at least 1"),
        (["--wait_ms", "-1"], "--wait_ms -1.0 is out of range; it must be at least 0"),
        (["--wait_ms", "nan"], "--wait_ms nan is out of range"),
        (["--max_waiting", "0"], "--max_waiting 0 is out of range"),
        (["--device", "cuda"], "--device cuda finds no GPU"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, students, monkeypatch):
    monkeypatch.setattr(serve_tenants, "make_app", None)
    with pytest.raises(SystemExit, match=f"^serve_tenants.py: .*{message}") as caught:
        run_main(monkeypatch, serve_tenants, "--students", students, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_with_what_installs_it(package, monkeypatch):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "serve_tenants")
    wanted = rf"^serve_tenants.py: {package}\S* is missing; install it with pip install fastapi uvicorn\.$"
    with pytest.raises(SystemExit, match=wanted):
        importlib.import_module("serve_tenants")


# The demo


@pytest.fixture
def data(tmp_path):
    """Three tenants of two FAQs."""
    queries = [f"how is the {thing}" for thing in "card train parcel weather day pay".split()]
    faqs = [{"question": f"what is {name}", "queries": queries} for name in ("my card", "the weather")]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"tenants": [{"name": name, "faqs": faqs} for name in ("bank", "rail", "post")]}))
    return path


def test_the_demo_writes_students_that_are_served(data, encoder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "outputs" / "students"
    (tmp_path / "outputs" / "students.partial" / "old").mkdir(parents=True)  # of a run that was killed
    arguments = ["--teachers", "2", "--students", "1", "--shots", "1", "--quick"]
    command = ["--data", data, "--model", encoder, "--output", output, *arguments]
    monkeypatch.setitem(demo_students.faq_retrieval.QUICK, "embeddings", {"teacher_steps": 1, "steps": 2})
    run_main(monkeypatch, demo_students, *command)
    assert f"python examples/serving/serve_tenants.py --students {output}" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["students"]
    assert sorted(path.name for path in output.iterdir()) == ["bank", "post", "rail"]
    saved = {path.name: json.loads((path / "adapter_config.json").read_text()) for path in output.iterdir()}
    assert [name for name, config in saved.items() if "distillation" in config] == ["post"]
    with make_client(load_tenant_model(str(output), encoder), wait_ms=0) as client:
        answer = ask(client, Question("post", "how is my card")).json()
    assert {row["faq"] for row in answer["answers"]} == {"what is my card", "what is the weather"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teachers", "0"], "--teachers 0 is out of range; it must be at least 1"),
        (["--students", "2", "--teachers", "2"], "--teachers 2 and --students 2 are more than the 3 tenants of"),
        (["--teachers", "1", "--students", "1", "--shots", "6"], "6 training queries are too many"),
        (["--output", "."], "--output . is there already; choose another folder or remove it"),
        (["--data", "missing.json"], "--data missing.json does not exist"),
    ],
)
def test_wrong_arguments_of_the_demo_train_nothing(arguments, message, data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_students.demo_embeddings, "train_teachers", None)
    with pytest.raises(SystemExit, match=f"^demo_students.py: {message}") as caught:
        run_main(monkeypatch, demo_students, "--data", data, "--output", tmp_path / "new", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
