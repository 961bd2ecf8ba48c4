"""Serve many tenants from one encoder: an HTTP service that embeds questions of different tenants in one batch.

    python examples/serving/demo_students.py --quick
    python examples/serving/serve_tenants.py --students outputs/students
    curl -H "content-type: application/json" -d '{"tenant": "bank", "question": "lost my card"}' 127.0.0.1:8000/answer

Open http://127.0.0.1:8000 for a page to ask. `--students` has a folder for each tenant, as `save_adapter` writes it,
with its FAQs in `faqs.json`. A question takes one pass through the encoder, whatever the number of FAQs.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from pydantic import BaseModel
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise SystemExit(
        f"serve_tenants.py: {error.name} is missing; install it with pip install fastapi uvicorn."
    ) from error

from tenant_batches import Batcher, BatchFailedError, BusyError
from tenant_model import Question, TenantModel, UnreadableError, is_unicode, load_tenant_model

PAGE = Path(__file__).with_suffix(".html")
MAX_CHARACTERS = 1000  # of a question; the model reads only the first tokens of a longer one
MAX_BYTES = 16 * 1024  # of a body: room for a tenant and a question, with each character escaped as \ud83d\ude00
RETRY_AFTER = 1  # seconds until the queue is likely to have room
UNREADABLE = "The question is not a text that the model can read; type it again."


@dataclass
class Arguments:
    """The arguments of the service."""

    students: str = field(metadata={"help": "Folder with one folder for each tenant's student."})
    model: str | None = field(default=None, metadata={"help": "Encoder. Default: the packaged MiniLM."})
    max_batch: int = field(default=32, metadata={"help": "Questions in a batch, at most."})
    wait_ms: float = field(default=5.0, metadata={"help": "Milliseconds that a question waits for others, at most."})
    max_waiting: int = field(default=256, metadata={"help": "Questions that wait, at most; more get a 503."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})

    def __post_init__(self) -> None:
        for name, lowest in (("max_batch", 1), ("wait_ms", 0), ("max_waiting", 1)):
            if not getattr(self, name) >= lowest:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least {lowest}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda finds no GPU; leave it out to run on the CPU.")


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
    """A tenant in the list of `GET /tenants`."""

    name: str
    faqs: int


def read_question(asked: Asked, tenants: TenantModel) -> Question:
    """Check the body of `POST /answer`.

    Raises:
        HTTPException: If the tenant is unknown, or the question is empty, too long or not valid Unicode.
    """
    if asked.tenant not in tenants.faqs:
        raise HTTPException(404, f"Tenant {asked.tenant[:80]!r} is unknown; GET /tenants lists all.")
    question = asked.question.strip()
    if not question:
        raise HTTPException(422, "The question is empty; type one.")
    if len(question) > MAX_CHARACTERS:
        raise HTTPException(422, f"The question has {len(question)} characters; ask in {MAX_CHARACTERS} at most.")
    if not is_unicode(question):
        raise HTTPException(422, UNREADABLE)
    return Question(asked.tenant, question)


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


def make_app(tenants: TenantModel, args: Arguments) -> FastAPI:
    """Return the service, an application whose batches run while it lives."""
    batcher = Batcher(tenants.answer, args.max_batch, args.wait_ms / 1000, args.max_waiting)
    page = PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    # The pages of /docs and /redoc would load scripts from elsewhere.
    app = FastAPI(title="FAQ tenants", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"detail": f"{place}: {first['msg']}"}, status_code=422)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/tenants")
    async def list_tenants() -> list[TenantInfo]:
        return [TenantInfo(name=name, faqs=len(faqs)) for name, faqs in tenants.faqs.items()]

    @app.post("/answer")
    async def answer(asked: Asked) -> Answered:
        start = time.perf_counter()
        question = read_question(asked, tenants)
        faqs = tenants.faqs[asked.tenant]
        try:
            found, batched = await batcher.ask(question)
        except BusyError as error:
            headers = {"Retry-After": str(RETRY_AFTER)}
            raise HTTPException(503, "Too many questions wait; ask again in a moment.", headers) from error
        except UnreadableError as error:
            raise HTTPException(422, UNREADABLE) from error
        except BatchFailedError as error:
            raise HTTPException(500, "The batch of this question failed; ask again.") from error
        return Answered(
            tenant=asked.tenant,
            answers=[RankedFaq(faq=faqs[number], score=score) for number, score in found],
            milliseconds=1000 * (time.perf_counter() - start),
            batched=batched,
        )

    return app


def main() -> None:
    """Run the service until it is interrupted."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
        app = make_app(load_tenant_model(args.students, args.model, args.device), args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"serve_tenants.py: {str(error).splitlines()[0]}") from error
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
