"""The service without HTTP and queues: answers questions of many tenants from one frozen encoder.

`TenantService.answer` takes questions of any tenants, and answers them in as few forward passes as the students allow:
one, if their adapters have one config. `serve.py` runs it with Ray Serve or alone.
"""

import logging
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from batched_adapters import ALONE  # noqa: E402
from faq_embeddings import EmbeddingPlatform, search, tokenized  # noqa: E402
from metrics import Metrics  # noqa: E402
from student_folder import UNREADABLE, Answer, Failure, Question, tenants_in  # noqa: E402
from student_pool import Student, StudentPool  # noqa: E402

logger = logging.getLogger(__name__)
FIRST = 8  # students of the pool that are tried at the start


class UnreadableError(ValueError):
    """The tokenizer cannot read a question."""


class TenantService:
    """One encoder with the students of many tenants. Only one thread may use it.

    Args:
        platform: The encoder.
        students: The folder with a folder for each tenant, as `student_folder` describes it.
        max_loaded: The number of students in memory, at most.
        metrics: Where to count; by default its own.
    """

    def __init__(
        self, platform: EmbeddingPlatform, students: str | Path, max_loaded: int = 64, metrics: Metrics | None = None
    ) -> None:
        self.metrics = metrics or Metrics()
        self.encoder = platform.encoder.eval().requires_grad_(False)
        self.pool = StudentPool(platform, Path(students), max_loaded, self.metrics)

    def answer(self, questions: Sequence[Question]) -> list[Answer | Failure]:
        """Answer questions of any tenants, at most `max_loaded` of them.

        A question that fails gets a `Failure`, and the others their answers.
        """
        self.metrics.add("tenant_questions_total", len(questions))
        students = self.pool.get(dict.fromkeys(question.tenant for question in questions))
        outcomes = dict(enumerate(students[question.tenant] for question in questions))
        ready = [number for number, student in outcomes.items() if isinstance(student, Student)]

        def group(number: int) -> tuple[str, ...]:
            adapter = outcomes[number].adapter
            return (adapter.way, adapter.config, *([str(number)] if adapter.way == ALONE else []))

        ready.sort(key=lambda number: (group(number), questions[number].tenant))
        for _, numbers in groupby(ready, key=group):
            of_group = list(numbers)
            found = self._answer([questions[n].text for n in of_group], [outcomes[n] for n in of_group])
            outcomes.update(zip(of_group, found, strict=True))
        return list(outcomes.values())

    def _answer(self, texts: list[str], students: list[Student]) -> list[Answer | Failure]:
        """Answer questions in one forward pass; if it fails, one by one, so that only the faulty one fails."""
        try:
            embeddings = self._embed(texts, students)
        except Exception as error:  # of the tokenizer or the model, on one of the questions
            if len(texts) > 1:
                logger.warning("A batch of %d questions failed; each is tried alone", len(texts), exc_info=error)
                return [self._answer([text], [of])[0] for text, of in zip(texts, students, strict=True)]
            if isinstance(error, UnreadableError):
                return [Failure(422, UNREADABLE)]
            logger.error("A question failed", exc_info=error)
            return [Failure(500, "The model failed on this question; ask again.")]
        answers: list[Answer | Failure] = []
        for embedding, student in zip(embeddings, students, strict=True):
            if not embedding.isfinite().all():
                answers.append(Failure(500, "The model gives NaN for this question; ask another one."))
                continue
            (found,) = search(embedding[None], student.embeddings, top_k=len(student.faqs))
            answers.append(Answer([(student.faqs[number], score) for number, score in found], len(texts)))
        return answers

    @torch.inference_mode()
    def _embed(self, texts: list[str], students: list[Student]) -> torch.Tensor:
        """Return the normalised embeddings of texts, (n_texts, d), each by its student; a tenant's stand together."""
        try:
            batch = tokenized(self.encoder, texts)
        except Exception as error:  # a tokenizer raises whatever it likes, also a bare Exception
            raise UnreadableError(f"The tokenizer cannot read one of {len(texts)} questions.") from error
        self.pool.adapters.activate([student.adapter for student in students])
        self.metrics.add("tenant_passes_total")
        return nn.functional.normalize(self.encoder(dict(batch))["sentence_embedding"], dim=-1)

    def check_start(self) -> None:
        """Load the first student that can be served; one tenant's damaged student does not keep the others waiting.

        Raises:
            ValueError: If none of the first few can be served.
        """
        failures = []
        for tenant in tenants_in(self.pool.students)[:FIRST]:
            student = self.pool.get([tenant])[tenant]
            if isinstance(student, Student):
                return
            failures.append(student.detail)
        raise ValueError(f"None of the first {len(failures)} tenants can be served. {failures[0]}")

    @torch.inference_mode()
    def check_health(self) -> None:
        """Run the encoder without a student.

        Raises:
            RuntimeError: If it fails, or gives NaN.
        """
        self.pool.platform.model.set_active_adapters(None)
        if not self.encoder(dict(tokenized(self.encoder, ["a question"])))["sentence_embedding"].isfinite().all():
            raise RuntimeError("The encoder gives NaN.")


def load_service(
    students: str, base: str | None, max_loaded: int, device: str = "cpu", metrics: Metrics | None = None
) -> TenantService:
    """Load an encoder, and the first student to see that it suits.

    Args:
        students: The folder with one folder for each student; its name is the tenant's.
        base: Id or path of the encoder; None for the packaged MiniLM.
        max_loaded: The number of students in memory, at most.
        device: "cpu" or "cuda".
        metrics: Where to count.

    Raises:
        ValueError: If the folder is missing or empty, or none of its first students can be served.
        OSError: If the encoder cannot be loaded.
    """
    if not Path(students).is_dir():
        raise ValueError(f"--students {students} is no folder; examples/platform/demo_students.py writes one.")
    if not tenants_in(Path(students)):
        raise ValueError(f"--students {students} holds no students; give each one a folder made by save_adapter.")
    service = TenantService(EmbeddingPlatform(base, device=device), students, max_loaded, metrics)
    service.check_start()
    return service
