"""The queue of the service: collect the questions that arrive at about the same time, and answer them in one batch."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from tenant_model import Found, Question, UnreadableError

logger = logging.getLogger(__name__)


class BatchFailedError(RuntimeError):
    """A question failed, in a batch and alone, or the service ended before its batch."""


class BusyError(RuntimeError):
    """Too many questions wait."""


@dataclass(eq=False)
class Waiting:
    """A question that waits for its batch."""

    question: Question
    arrived: float
    future: asyncio.Future


class Answer(NamedTuple):
    """The FAQs of a question, the best one first, and how many questions were in its batch."""

    found: list[Found]
    batched: int


def take_batch(waiting: deque[Waiting], max_batch: int) -> list[Waiting]:
    """Take the first questions out of a queue, up to a number."""
    return [waiting.popleft() for _ in range(min(max_batch, len(waiting)))]


@dataclass
class Batcher:
    """Collects questions and answers them in batches, in one thread beside the event loop.

    Args:
        find: Finds the FAQs of a list of questions.
        max_batch: Questions in a batch, at most.
        wait: How long the first question of a batch waits for others, in seconds.
        max_waiting: Questions that wait, at most; more are refused.
    """

    find: Callable[[list[Question]], list[list[Found]]]
    max_batch: int
    wait: float
    max_waiting: int
    waiting: deque[Waiting] = field(default_factory=deque, init=False)
    running: list[Waiting] = field(default_factory=list, init=False)
    arrival: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def ask(self, question: Question) -> Answer:
        """Wait for the answer to a question.

        Raises:
            BusyError: If too many questions wait.
            UnreadableError: If the tokenizer cannot read the question.
            BatchFailedError: If the model fails for the question alone, too.
        """
        if len(self.waiting) >= self.max_waiting:
            raise BusyError
        loop = asyncio.get_running_loop()
        entry = Waiting(question, loop.time(), loop.create_future())
        self.waiting.append(entry)
        self.arrival.set()
        return await entry.future

    async def collect(self) -> list[Waiting]:
        """Wait for a batch that is full, or whose first question has waited long enough."""
        while not self.waiting:
            self.arrival.clear()
            await self.arrival.wait()
        deadline = self.waiting[0].arrived + self.wait
        while len(self.waiting) < self.max_batch:
            self.arrival.clear()
            try:
                await asyncio.wait_for(self.arrival.wait(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                break
        return take_batch(self.waiting, self.max_batch)

    async def run(self) -> None:
        """Answer batch after batch until it is cancelled; a batch that fails ends nothing but itself."""
        with ThreadPoolExecutor(1, "model") as worker:
            try:
                while True:
                    self.running = await self.collect()
                    await self.answer(self.running, worker)
            finally:
                self.fail([*self.running, *self.waiting], BatchFailedError)
                self.waiting.clear()

    async def answer(self, batch: list[Waiting], worker: ThreadPoolExecutor) -> None:
        """Answer a batch; if that fails, answer its questions one by one, so that only the faulty one fails."""
        batch = [entry for entry in batch if not entry.future.done()]  # a user who has gone costs nothing
        if not batch:
            return
        questions = [entry.question for entry in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(worker, self.find, questions)
        except Exception as error:
            logger.exception("A batch of %d questions failed", len(questions))
            if len(batch) == 1:
                self.fail(batch, UnreadableError if isinstance(error, UnreadableError) else BatchFailedError)
            else:
                for entry in batch:
                    await self.answer([entry], worker)
            return
        for entry, of_entry in zip(batch, found, strict=True):
            if not entry.future.done():
                entry.future.set_result(Answer(of_entry, len(batch)))

    @staticmethod
    def fail(entries: list[Waiting], failure: type[Exception]) -> None:
        """Release waiting questions without an answer."""
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(failure())
