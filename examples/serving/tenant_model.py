"""Many tenants on one frozen encoder: their students, and the answers to questions of different tenants in one batch.

A student is a folder as `save_adapter` writes it, with a file `faqs.json`: the tenant's FAQs, each with its text and
labelled queries. `TenantModel` embeds questions of any tenants in one forward pass, and finds their FAQs among the
tenant's embeddings.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import BatchSplit
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from faq_data import Faq, Tenant  # noqa: E402
from faq_embeddings import EmbeddingPlatform, Found, labelled_queries, search, tokenized  # noqa: E402

from hf_adapter_distillation.teachers.loading import load_saved_adapter, name_from_folder  # noqa: E402

ROUNDING = 1000  # of embeddings that were computed in two batches, in units of their data type's precision


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
    """One encoder with the students of all tenants, and the embeddings of their FAQs.

    Args:
        platform: The encoder with an adapter for each tenant, of the tenant's name.
        tenants: The tenants, whose training queries are part of the FAQs' centroids.
    """

    def __init__(self, platform: EmbeddingPlatform, tenants: list[Tenant]) -> None:
        self.platform = platform
        self.encoder = platform.encoder.eval().requires_grad_(False)
        self.faqs = {tenant.name: [faq.question for faq in tenant.faqs] for tenant in tenants}
        self.embeddings = {tenant.name: self.embed_faqs(tenant) for tenant in tenants}

    def embed_faqs(self, tenant: Tenant) -> torch.Tensor:
        """Return the centroids of a tenant's FAQs by its student, (n_faqs, d)."""
        self.activate([tenant.name], [len(tenant.faqs)])
        n_queries = max(len(faq.train) for faq in tenant.faqs)
        return self.platform.faq_embeddings(tenant, labelled_queries(tenant, "train", n_queries))

    def activate(self, tenants: list[str], sizes: list[int]) -> None:
        """Set the model up for a batch: the first `sizes[0]` questions belong to `tenants[0]`, and so on."""
        split = BatchSplit(*tenants, batch_sizes=sizes)
        self.platform.model.set_active_adapters(split if len(tenants) > 1 else tenants[0])

    @torch.inference_mode()
    def embed(self, questions: list[Question]) -> torch.Tensor:
        """Embed questions of any tenants, in any order, in one forward pass.

        Returns:
            The normalised embeddings, (n_questions, d).

        Raises:
            UnreadableError: If the tokenizer cannot read one of the questions.
        """
        order = sorted(range(len(questions)), key=lambda i: questions[i].tenant)
        groups = groupby(questions[i].tenant for i in order)
        sizes = {tenant: len(list(members)) for tenant, members in groups}
        try:
            batch = tokenized(self.encoder, [questions[i].text for i in order])
        except Exception as error:  # a tokenizer raises whatever it likes, also a bare Exception
            raise UnreadableError(f"The tokenizer cannot read one of {len(questions)} questions.") from error
        self.activate(list(sizes), list(sizes.values()))
        embeddings = self.encoder(dict(batch))["sentence_embedding"]  # (n_questions, d), by tenant
        in_order = torch.empty_like(embeddings)
        in_order[order] = embeddings
        return nn.functional.normalize(in_order, dim=-1)

    def answer(self, questions: list[Question]) -> list[list[Found]]:
        """Find the FAQs of each question among those of its tenant, all of them, the best one first.

        Raises:
            UnreadableError: If the tokenizer cannot read one of the questions.
        """
        found = []
        for question, embedding in zip(questions, self.embed(questions), strict=True):
            faqs = self.embeddings[question.tenant]
            found += search(embedding[None], faqs, top_k=len(faqs))
        return found

    def check(self) -> None:
        """Compare a batch of all tenants with each of them alone.

        BatchSplit lets the first or last student of a batch decide for all in several places, without an error.

        Raises:
            ValueError: If a student's embedding in the batch differs or is NaN.
        """
        questions = [Question(tenant, faqs[0]) for tenant, faqs in self.faqs.items()]
        alone = torch.cat([self.embed([question]) for question in questions])
        for question, embedding in zip(questions, alone, strict=True):
            if not embedding.isfinite().all():
                raise ValueError(f"Student {question.tenant!r} gives embeddings that are NaN; train it anew.")
        remedy = "serve students of one adapter config, of a method that docs/how_to/serve.md lists."
        try:
            together = self.embed(questions)
        except Exception as error:  # whatever layers make of a student that they do not know
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"The students cannot share a batch ({reason}); {remedy}") from error
        tolerance = ROUNDING * torch.finfo(alone.dtype).eps
        for question, embedding, other in zip(questions, alone, together, strict=True):
            if not torch.allclose(embedding, other, rtol=tolerance, atol=tolerance):
                raise ValueError(f"Student {question.tenant!r} has other embeddings in a batch with others; {remedy}")


def read_faqs(folder: Path) -> list[Faq]:
    """Read the FAQs of a student.

    Raises:
        ValueError: If the file is missing or holds anything else.
    """
    path = folder / "faqs.json"
    form = 'a JSON list of {"question": text, "queries": list of texts}'
    if not path.is_file():
        raise ValueError(f"{folder} holds no faqs.json; write the tenant's FAQs there, {form}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); write {form}.") from error
    try:
        faqs = [Faq(faq["question"], train=list(faq["queries"])) for faq in content]
    except (KeyError, TypeError):
        faqs = []
    texts = [text for faq in faqs for text in (faq.question, *faq.train)]
    if not faqs or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} is no list of FAQs; write {form}.")
    for text in texts:
        if not is_unicode(text):
            raise ValueError(f"{path} holds {text[:80]!r}, which is not valid Unicode; write the text of the FAQ.")
    return faqs


def load_tenant_model(students: str, base: str | None, device: str = "cpu") -> TenantModel:
    """Load an encoder and all students of a folder.

    Args:
        students: The folder, with one folder for each student; its name is the tenant's.
        base: Id or path of the encoder; None for the packaged MiniLM.
        device: "cpu" or "cuda".

    Returns:
        The model; its batches have been checked.

    Raises:
        ValueError: If a folder is missing or wrong, a student was made for another base model, or the students cannot
            share a batch.
        OSError: If the encoder cannot be loaded.
    """
    if not Path(students).is_dir():
        raise ValueError(f"--students {students} is no folder; examples/serving/demo_students.py writes one.")
    folders = sorted(path for path in Path(students).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"--students {students} holds no students; give each one a folder made by save_adapter.")
    tenants = [Tenant(folder.name, read_faqs(folder)) for folder in folders]
    platform = EmbeddingPlatform(base, device=device)
    for folder in folders:
        label = f"Student {str(folder)!r}"
        name = name_from_folder(folder, label)
        if (folder / "head_config.json").is_file():
            raise ValueError(f"{label} has a head, as a cross-encoder's student; train it as an embedding model's.")
        load_saved_adapter(platform.model, folder, name, label)
    platform.model.to(device)  # adapters are loaded on the CPU
    model = TenantModel(platform, tenants)
    model.check()
    return model
