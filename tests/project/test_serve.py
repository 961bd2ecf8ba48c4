"""The service over HTTP: requests, limits, the page in Chromium, the commands, and the whole of it on Ray Serve."""

import asyncio
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import ModuleType

import pytest
import served_students
from paths import ROOT
from served_students import FAQS, QUESTIONS, alone, write_student, write_students

TestClient = pytest.importorskip("fastapi.testclient").TestClient
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

import demo_students  # noqa: E402
import http_app  # noqa: E402
import ray_cluster  # noqa: E402
import serve  # noqa: E402
from metrics import Metrics  # noqa: E402
from student_folder import UNREADABLE, Question  # noqa: E402
from tenant_service import load_service  # noqa: E402

WITHOUT_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="it needs ray[serve]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def encoder(tiny_encoder, tmp_path_factory):
    return served_students.uneven_encoder(tiny_encoder, tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    return write_students(tmp_path_factory.mktemp("students"), encoder)


@pytest.fixture(scope="module")
def service(saved, encoder):
    return load_service(str(saved), encoder, 8)


def make_client(students, service=None, ask=None, max_waiting=256):
    metrics = Metrics() if service is None else service.metrics
    ask = ask or http_app.OneByOne(service, max_waiting).ask
    return TestClient(http_app.make_app(ask, students, metrics))


def post(client, content):
    return client.post("/answer", content=content, headers={"content-type": "application/json"})


def ask(client, question):
    return client.post("/answer", json={"tenant": question.tenant, "question": question.text})


def assert_answered(answer, question, scores, tolerance=1e-6):
    assert answer["tenant"] == question.tenant
    ranked = {row["faq"]: row["score"] for row in answer["answers"]}
    assert ranked == pytest.approx(scores, abs=tolerance)
    assert list(ranked) == sorted(scores, key=scores.get, reverse=True)
    assert answer["milliseconds"] > 0


# HTTP


def test_questions_of_three_tenants_are_answered(saved, encoder, service):
    with make_client(saved, service) as client, ThreadPoolExecutor(len(QUESTIONS)) as users:
        answers = [answer.json() for answer in users.map(lambda question: ask(client, question), QUESTIONS)]
    for answer, question, scores in zip(answers, QUESTIONS, alone(saved, encoder, QUESTIONS), strict=True):
        assert_answered(answer, question, scores)


def test_what_cannot_be_answered_says_so_in_one_line(saved, service):
    with make_client(saved, service) as client:
        cases = [
            (Question("zoo", "where"), 404, "Tenant 'zoo' is unknown; GET /tenants lists all."),
            (Question("../bank", "where"), 404, "Tenant '../bank' is unknown; GET /tenants lists all."),
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
            assert answer.json()["detail"].endswith(f"; {http_app.FORM}.")
        assert client.post("/answer", content=b"{").status_code == 422
        answer = post(client, b"\xff")
        assert (answer.status_code, answer.json()) == (400, {"detail": f"The body cannot be read; {http_app.FORM}."})
        assert client.get("/answer").status_code == 405


@pytest.mark.parametrize("text", ["\ud800", "my card \udfff is gone", "\ude00\ud83d", "a" * 999 + "\ud83d"])
def test_half_a_character_is_refused_before_it_waits(text, saved):
    with make_client(saved, ask=pytest.fail) as client:
        answer = post(client, json.dumps({"tenant": "bank", "question": text}))
        assert (answer.status_code, answer.json()) == (422, {"detail": UNREADABLE})
        answer = post(client, json.dumps({"tenant": text, "question": "my card"}))
        assert (answer.status_code, "\n" in answer.json()["detail"]) == (404, False)


def test_a_question_that_only_the_tokenizer_refuses_gets_a_422(saved, service, monkeypatch):
    def refuse(encoder, texts):
        raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")  # as tokenizers does

    with make_client(saved, service) as client:
        assert ask(client, QUESTIONS[0]).status_code == 200
        monkeypatch.setattr("tenant_service.tokenized", refuse)
        answer = ask(client, QUESTIONS[0])
    assert (answer.status_code, answer.json()) == (422, {"detail": UNREADABLE})


@pytest.mark.parametrize("text", ["\0", "\ufffe", "\u200b\u202e", "e" + "\u0301" * 999, "😀" * 1000, "[SEP] [PAD]"])
def test_valid_text_is_answered(text, saved, service):
    with make_client(saved, service) as client:
        assert ask(client, Question("bank", text)).status_code == 200


def test_a_body_over_the_limit_is_refused_whole_or_in_pieces(saved, service):
    body = json.dumps({"tenant": "bank", "question": "😀" * 1000}).encode()  # 12 bytes a character
    full = body + b" " * (http_app.MAX_BYTES - len(body))
    detail = {"detail": f"The body has more than {http_app.MAX_BYTES} bytes; ask a shorter question."}
    with make_client(saved, service) as client:
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

    asyncio.run(http_app.BodyLimit(None)({"type": "http"}, receive, send))
    assert len(received) == http_app.MAX_BYTES // 1000 + 1
    assert sent[0]["status"] == 413


@contextmanager
def held(service, monkeypatch):
    """A service whose answers wait for an event."""
    started, go, answer = threading.Event(), threading.Event(), service.answer

    def answer_later(questions):
        started.set()
        assert go.wait(20)
        return answer(questions)

    with monkeypatch.context() as patch:
        patch.setattr(service, "answer", answer_later)
        try:
            yield started, go
        finally:
            go.set()


def test_a_service_that_is_full_answers_so_and_loses_nothing(saved, service, monkeypatch):
    with (
        held(service, monkeypatch) as (started, go),
        make_client(saved, service, max_waiting=1) as client,
        ThreadPoolExecutor(3) as users,
    ):
        first = users.submit(ask, client, QUESTIONS[0])
        assert started.wait(20)
        others = [users.submit(ask, client, question) for question in QUESTIONS[1:3]]
        (done,), (second,) = wait(others, 20, FIRST_COMPLETED)
        answer = done.result()
        assert (answer.status_code, second.done()) == (503, False)
        assert answer.json() == {"detail": "Too many questions wait; ask again in a moment."}
        assert answer.headers["retry-after"] == "1"
        go.set()
        assert [user.result().status_code for user in (first, second)] == [200, 200]
        assert ask(client, QUESTIONS[2]).status_code == 200
        assert 'tenant_requests_total{status="503"} 1' in client.get("/metrics").text


def test_the_tenants_are_listed_a_damaged_one_too(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "students")
    (tmp_path / "students" / "rail" / "faqs.json").write_text("[" * 100_000)
    (tmp_path / "students" / os.fsdecode(b"\xff")).mkdir()
    with make_client(tmp_path / "students", ask=pytest.fail) as client:
        assert client.get("/tenants").json() == [
            {"name": "bank", "faqs": 3},
            {"name": "post", "faqs": 1},
            {"name": "rail", "faqs": 0},
        ]
        shutil.rmtree(tmp_path / "students")
        assert client.get("/tenants").json() == []


def test_refused_requests_are_counted_too(saved):
    with make_client(saved, ask=pytest.fail) as client:
        for content in (b"{", b"\xff", b" " * (http_app.MAX_BYTES + 1), b'{"tenant": "zoo", "question": "where"}'):
            post(client, content)
        client.get("/answer")
        lines = client.get("/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("tenant_requests_total")]
    assert sorted(counts) == [f'tenant_requests_total{{status="{status}"}} 1' for status in (400, 404, 413, 422)]
    assert "tenant_request_seconds_count 4" in lines


def test_requests_are_counted_in_the_format_of_prometheus():
    metrics = Metrics()
    for status in (200, 404, 200):
        metrics.add("tenant_requests_total", labels=f'{{status="{status}"}}')
    metrics.observe("tenant_request_seconds", 0.03)
    metrics.observe("tenant_request_seconds", 9.0)
    lines = metrics.text().splitlines()
    assert "# TYPE tenant_requests_total counter" in lines
    assert "# TYPE tenant_request_seconds histogram" in lines
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['tenant_requests_total{status="200"}'] == "2"
    assert [values[f'tenant_request_seconds_bucket{{le="{le}"}}'] for le in (0.025, 0.05, 5.0, "+Inf")] == list("0112")
    assert (values["tenant_request_seconds_sum"], values["tenant_request_seconds_count"]) == ("9.03", "2")


# The page


def test_the_page_is_served_and_names_no_outside_address(saved):
    with make_client(saved) as client:
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
    assert f'maxlength="{http_app.MAX_CHARACTERS}"' in page


# Fills in the page in a frame, as a user does, and leaves what it shows in the document.
DRIVER = """<iframe id="frame" src="/"></iframe><pre id="shown"></pre><script>
const wait = async what => { while (!what()) await new Promise(done => setTimeout(done, 20)); };
const shown = [];
document.getElementById("frame").onload = async () => {
  const page = document.getElementById("frame").contentDocument, at = id => page.getElementById(id);
  await wait(() => at("tenant").options.length);
  shown.push([...at("tenant").options].map(option => option.value));
  for (const [tenant, question] of QUESTIONS) {
    at("tenant").value = tenant;
    at("question").value = question;
    at("ask").click();
    await wait(() => at("status").textContent && !at("ask").disabled);
    shown.push([[...at("answers").querySelectorAll("li > span:first-child")].map(faq => faq.textContent),
                at("status").className, at("status").textContent]);
  }
  document.getElementById("shown").textContent = JSON.stringify(shown);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="it needs Chromium")
def test_the_page_asks_and_shows_in_chromium(saved, service, tmp_path):
    asked = [["rail", "the train"], ["bank", "card"], ["bank", " "], ["post", "parcel"]]
    app = http_app.make_app(http_app.OneByOne(service, 9).ask, saved, Metrics())
    page = DRIVER.replace("QUESTIONS", json.dumps(asked))
    app.get("/driver", response_class=http_app.HTMLResponse)(lambda: page)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={tmp_path} --virtual-time-budget=20000"
        command = [CHROMIUM, *flags.split(), "--dump-dom", f"http://127.0.0.1:{port}/driver"]
        dom = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=90).stdout
    finally:
        server.should_exit = True
        thread.join(20)
    shown = re.search(r'<pre id="shown">(.+?)</pre>', dom, flags=re.S)[1]
    tenants, train, card, empty, parcel = json.loads(shown.replace("&lt;", "<").replace("&gt;", ">"))
    assert tenants == list(FAQS)
    assert sorted(train[0]) == sorted(FAQS["rail"]), "FAQs are shown as text, never as HTML"
    assert sorted(card[0]) == sorted(FAQS["bank"])
    assert re.fullmatch(r"[\d.]+ ms", card[2])
    assert empty == [[], "error", "The question is empty; type one."]
    assert parcel[:2] == [FAQS["post"], ""]


# The commands


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    return module.main()


def test_the_scripts_of_the_guide_exist():
    page = (ROOT / "docs" / "how_to" / "serve.md").read_text()
    scripts = re.findall(r"^python (examples/platform/\w+\.py)", page, flags=re.M)
    assert len(scripts) >= 2
    assert all((ROOT / script).is_file() for script in scripts)


def test_the_command_serves_a_folder_of_students_without_ray(saved, encoder, monkeypatch):
    served = []
    monkeypatch.setattr(serve.uvicorn, "run", lambda app, **kwargs: served.append((app, kwargs)))
    monkeypatch.setitem(sys.modules, "ray", None)
    run_main(monkeypatch, serve, "--students", saved, "--model", encoder, "--port", "0", "--engine", "local")
    ((app, kwargs),) = served
    assert kwargs == {"host": "127.0.0.1", "port": 0}
    with TestClient(app) as client:
        assert [tenant["name"] for tenant in client.get("/tenants").json()] == list(FAQS)
        assert ask(client, QUESTIONS[0]).status_code == 200
        assert "tenant_passes_total 1" in client.get("/metrics").text


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "--students .* is no folder; examples/platform/demo_students.py writes one"),
        (lambda folder: [shutil.rmtree(path) for path in folder.iterdir()], "--students .* holds no students; give"),
        (
            lambda folder: [(path / "faqs.json").unlink() for path in folder.iterdir()],
            "None of the first 3 tenants can be served. Tenant 'bank' cannot be served: .*bank holds no faqs.json",
        ),
    ],
)
def test_wrong_students_are_named_in_one_line(change, message, engine, saved, encoder, tmp_path, monkeypatch):
    folder = tmp_path / "students"
    shutil.copytree(saved, folder)
    change(folder)
    monkeypatch.setattr(serve, "make_app", None)
    monkeypatch.setitem(sys.modules, "ray_engine", None if engine == "local" else ModuleType("ray_engine"))
    with pytest.raises(SystemExit, match=f"^serve.py: .*{message}") as caught:
        run_main(monkeypatch, serve, "--students", folder, "--model", encoder, "--engine", engine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_batch", "0"], "--max_batch 0 is out of range; it must be at least 1"),
        (["--wait_ms", "-1"], "--wait_ms -1.0 is out of range; it must be at least 0"),
        (["--wait_ms", "nan"], "--wait_ms nan is out of range"),
        (["--max_waiting", "0"], "--max_waiting 0 is out of range"),
        (["--max_replicas", "0"], "--max_replicas 0 is out of range"),
        (["--max_loaded", "4"], "--max_loaded 4 is out of range; it must be at least --max_batch"),
        (["--engine", "spark"], "--engine spark is unknown; choose ray or local"),
        (["--device", "cuda"], "--device cuda finds no GPU"),
        (["--device", "tpu"], "--device tpu is unknown; choose cpu or cuda"),
        (["--port", "65536"], "--port 65536 is out of range; it must be at most 65535"),
        (
            ["--model", "no/such/model", "--engine", "local"],
            "--model no/such/model cannot be loaded .*; give the folder or Hub id",
        ),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, message, saved, monkeypatch):
    monkeypatch.setattr(serve, "make_app", None)
    with pytest.raises(SystemExit, match=f"^serve.py: .*{message}") as caught:
        run_main(monkeypatch, serve, "--students", saved, *arguments)
    assert "\n" not in str(caught.value)


def test_without_ray_the_other_engine_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray_engine", raising=False)
    with pytest.raises(
        SystemExit, match=r"^serve.py: ray is .*'ray\[default,serve\]', or serve with --engine local.$"
    ):
        run_main(monkeypatch, serve, "--students", saved)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_is_named_with_what_installs_it(package, monkeypatch):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "serve")
    wanted = rf"^serve.py: {package}\S* is missing; install it with pip install fastapi uvicorn\.$"
    with pytest.raises(SystemExit, match=wanted):
        importlib.import_module("serve")


# Ray Serve


@contextmanager
def served_by_ray(folder, encoder, log, *arguments):
    """The command with Ray in a process of its own, which never outlives the test; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "examples" / "platform" / "serve.py"
    command = [sys.executable, script, "--students", folder, "--model", encoder, "--port", port, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while "Serving on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@WITHOUT_RAY
@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.timeout(480)
def test_ray_serves_many_tenants_in_one_batch_while_they_change(saved, encoder, tmp_path):
    students, log = tmp_path / "students", tmp_path / "log"
    shutil.copytree(saved, students)
    asked = [*QUESTIONS, *QUESTIONS[:3]]
    settings = "--max_batch 8 --max_loaded 8 --wait_ms 2000 --max_waiting 12".split()
    with served_by_ray(students, encoder, log, *settings) as url, ThreadPoolExecutor(48) as users:
        with httpx.Client(base_url=url, timeout=60) as client:

            def ask_all(questions):
                return list(users.map(lambda question: ask(client, question), questions))

            answers = [answer.json() for answer in ask_all(asked)]
            assert {answer["batched"] for answer in answers} == {8}
            for answer, question, scores in zip(answers, asked, alone(saved, encoder, asked), strict=True):
                assert_answered(answer, question, scores)
            write_student(students, encoder, "work")  # a tenant is added
            (students / "rail" / "faqs.json").write_text("{")  # and one is damaged
            asked = [Question("work", "the train"), *QUESTIONS, *QUESTIONS[:2]]
            kinds = [answer.status_code for answer in ask_all(asked)]
            assert kinds == [500 if question.tenant == "rail" else 200 for question in asked]
            write_student(students, encoder, "slow", faqs=["how is the card"] * 10_000)  # to load
            answers = ask_all([Question("slow", "the train"), *QUESTIONS[1:2] * 47])
            assert {answer.status_code for answer in answers} == {200, 503}
            full = next(answer for answer in answers if answer.status_code == 503)
            assert full.json() == {"detail": "Too many questions wait; ask again in a moment."}
            assert full.headers["retry-after"] == "1"
            assert post(client, b" " * (http_app.MAX_BYTES + 1)).status_code == 413
            assert 'tenant_requests_total{status="503"}' in client.get("/metrics").text
            assert client.get("/").text == http_app.PAGE.read_text()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "--address 127.0.0.1:9: no Ray cluster answers there; start one"),
        ("127.0.0.1:{port}", "--address 127.0.0.1:{port}: no Ray cluster answers there; start one"),
        ("nowhere", "--address nowhere is no address of a cluster; give HOST:PORT"),
        ("ray://127.0.0.1:10001", "--address ray://127.0.0.1:10001 is no address of a cluster; give HOST:PORT"),
    ],
    ids=["no port", "another service", "no address", "a client's address"],
)
def test_an_address_without_a_cluster_is_named(address, message, saved, encoder, monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setitem(sys.modules, "ray_engine", ModuleType("ray_engine"))
    monkeypatch.setattr(ray_cluster, "ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address, message = (text.format(port=other.getsockname()[1]) for text in (address, message))
        with pytest.raises(SystemExit, match=f"^serve.py: {re.escape(message)}"):
            run_main(monkeypatch, serve, "--students", saved, "--model", encoder, "--address", address)


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
    assert f"python examples/platform/serve.py --students {output}" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["students"]
    assert sorted(path.name for path in output.iterdir()) == ["bank", "post", "rail"]
    saved = {path.name: json.loads((path / "adapter_config.json").read_text()) for path in output.iterdir()}
    assert [name for name, config in saved.items() if "distillation" in config] == ["post"]
    with make_client(output, load_service(str(output), encoder, 2)) as client:
        answer = ask(client, Question("post", "how is my card")).json()
    assert {row["faq"] for row in answer["answers"]} == {"what is my card", "what is the weather"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teachers", "0"], "--teachers 0 is out of range; it must be at least 1"),
        (["--students", "2", "--teachers", "2"], "--teachers 2 and --students 2 are more than the 3 tenants of"),
        (["--teachers", "1", "--students", "1", "--shots", "6"], "--shots 6 is out of range: .* has 6 queries in all"),
        (["--seed", "-1"], "--seed -1 is out of range; it must be from 0"),
        (
            ["--teachers", "1", "--students", "1", "--output", "/proc/nowhere/students"],
            "The folder of --output, /proc/nowhere cannot be written",
        ),
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
