"""The HTTP side of the service: checks requests, and answers them by any engine, the page and the counters too."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from inputs import is_unicode  # noqa: E402
from metrics import Metrics  # noqa: E402
from student_folder import (  # noqa: E402
    BUSY,
    UNREADABLE,
    Answer,
    Failure,
    Question,
    folder_of,
    read_faqs,
    tenants_in,
    unknown,
)

if TYPE_CHECKING:
    from tenant_service import TenantService  # which needs torch

PAGE = Path(__file__).with_name("serve.html")
MAX_CHARACTERS = 1000  # of a question; the model reads only the first tokens of a longer one
MAX_BYTES = 16 * 1024  # of a body: room for a tenant and a question, with each character escaped as \ud83d\ude00
RETRY_AFTER = 1  # seconds until the queue is likely to have room
FORM = 'send {"tenant": text, "question": text} as application/json'
FULL = Failure(BUSY, "Too many questions wait; ask again in a moment.")

Ask = Callable[[Question], Awaitable[Answer | Failure]]


class Asked(BaseModel):
    """The body of `POST /answer`."""

    tenant: str
    question: str


class RankedFaq(BaseModel):
    """An FAQ with its score, the cosine of its embedding with the question's."""

    faq: str
    score: float


class Answered(BaseModel):
    """The answer: all FAQs of the tenant, the best one first."""

    tenant: str
    answers: list[RankedFaq]
    milliseconds: float
    batched: int


class TenantInfo(BaseModel):
    """A tenant in the list of `GET /tenants`; one whose FAQs cannot be read has 0."""

    name: str
    faqs: int


class OneByOne:
    """The engine without Ray: one thread answers one question after another.

    Args:
        service: Answers the questions.
        max_waiting: Questions that wait, at most; more are refused.
    """

    def __init__(self, service: "TenantService", max_waiting: int) -> None:
        self.service, self.max_waiting, self.waiting = service, max_waiting, 0
        self.thread = ThreadPoolExecutor(1, "model")

    async def ask(self, question: Question) -> Answer | Failure:
        """Wait for the answer to a question."""
        if self.waiting > self.max_waiting:  # the first of them is running
            return FULL
        self.waiting += 1
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self.service.answer, [question])
        finally:
            self.waiting -= 1
        return answers[0]


def read_question(asked: Asked, students: Path) -> Question | Failure:
    """Check the body of `POST /answer`; return a failure if the tenant is unknown, or no model can read the text."""
    if folder_of(students, asked.tenant) is None:
        return unknown(asked.tenant)
    question = asked.question.strip()
    if not question:
        return Failure(422, "The question is empty; type one.")
    if len(question) > MAX_CHARACTERS:
        return Failure(422, f"The question has {len(question)} characters; ask in {MAX_CHARACTERS} at most.")
    if not is_unicode(question):
        return Failure(422, UNREADABLE)
    return Question(asked.tenant, question)


def tenant_info(students: Path, tenant: str) -> TenantInfo:
    """Return a line of `GET /tenants`."""
    try:
        return TenantInfo(name=tenant, faqs=len(read_faqs(students / tenant)))
    except (OSError, ValueError):
        return TenantInfo(name=tenant, faqs=0)


class RequestCounter:
    """Middleware that counts and times the answers to `POST /answer`, refused ones too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and look at the status of its answer."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", "/answer"):
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.add("tenant_requests_total", labels=f'{{status="{message["status"]}"}}')
                self.metrics.observe("tenant_request_seconds", time.perf_counter() - start)
            await send(message)

        await self.app(scope, receive, count)


class BodyLimit:
    """Middleware that reads a body before the service does, and answers with 413 when it grows over `MAX_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_BYTES:
                detail = f"The body has more than {MAX_BYTES} bytes; ask a shorter question."
                await JSONResponse({"detail": detail}, 413)(scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)


def make_app(ask: Ask, students: Path, metrics: Metrics) -> FastAPI:
    """Return the application.

    Args:
        ask: Answers a question: an engine.
        students: The folder with a folder for each tenant.
        metrics: Counts the requests; `GET /metrics` shows all that it counts.
    """
    page = PAGE.read_text(encoding="utf-8")
    # The pages of /docs and /redoc would load scripts from elsewhere.
    app = FastAPI(title="FAQ tenants", docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestCounter, metrics=metrics)  # the last one is the outermost

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{place}: {first['msg']}; {FORM}."}, status_code=422)

    @app.exception_handler(400)
    async def explain_unreadable(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": f"The body cannot be read; {FORM}."}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> str:
        return metrics.text()

    @app.get("/tenants")
    def list_tenants() -> list[TenantInfo]:
        return [tenant_info(students, tenant) for tenant in tenants_in(students)]

    @app.post("/answer")
    async def answer(asked: Asked) -> Answered:
        start = time.perf_counter()
        question = read_question(asked, students)
        outcome = question if isinstance(question, Failure) else await ask(question)
        seconds = time.perf_counter() - start
        if isinstance(outcome, Failure):
            headers = {"Retry-After": str(RETRY_AFTER)} if outcome.status == BUSY else None
            raise HTTPException(outcome.status, outcome.detail, headers)
        answers = [RankedFaq(faq=faq, score=score) for faq, score in outcome.found]
        return Answered(tenant=asked.tenant, answers=answers, milliseconds=1000 * seconds, batched=outcome.batched)

    return app
