"""The folder with the students of all tenants, and what is asked and answered. It needs no torch.

A student is a folder as `save_adapter` writes it, with a file `faqs.json`: the tenant's FAQs, each with its question
and labelled queries. The name of the folder is the tenant's.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from inputs import is_unicode, read_json  # noqa: E402

FAQS_NAME = "faqs.json"
BUSY = 503  # the status of what may succeed in a moment
UNREADABLE = "The question is not a text that the model can read; type it again."


class Question(NamedTuple):
    """What a user of a tenant asks."""

    tenant: str
    text: str


class Answer(NamedTuple):
    """All FAQs of the tenant with their scores, the best one first, and the questions in the forward pass."""

    found: list[tuple[str, float]]
    batched: int


class Failure(NamedTuple):
    """A question that has no answer: the HTTP status, and the reason in one line."""

    status: int
    detail: str


def unknown(tenant: str) -> Failure:
    """Return the failure of a question of a tenant that does not exist."""
    return Failure(404, f"Tenant {tenant[:80]!r} is unknown; GET /tenants lists all.")


def folder_of(students: Path, tenant: str) -> Path | None:
    """Return the folder of a tenant, or `None`; a name that leads elsewhere is no tenant."""
    if tenant.startswith(".") or "/" in tenant or os.sep in tenant or not tenant:
        return None
    try:
        return students / tenant if (students / tenant).is_dir() else None
    except (OSError, ValueError):  # too long, a NUL, or half a character
        return None


def tenants_in(students: Path) -> list[str]:
    """Return the names of the tenants in a folder, none if it is gone; names that start with a dot are not served."""
    paths = students.iterdir() if students.is_dir() else []
    return sorted(
        path.name for path in paths if not path.name.startswith(".") and is_unicode(path.name) and path.is_dir()
    )


def read_faqs(folder: Path) -> list[tuple[str, list[str]]]:
    """Read the FAQs of a student: the question of each, and its labelled queries.

    Raises:
        ValueError: If the file is missing or holds anything else.
    """
    path = folder / FAQS_NAME
    form = 'a JSON list of {"question": text, "queries": list of texts}'
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FAQS_NAME}; write the tenant's FAQs there, {form}.")
    content = read_json(path, list, f"write {form}")
    try:
        faqs = [(faq["question"], faq["queries"]) for faq in content]
        texts = [text for question, queries in faqs for text in (question, *queries)]
    except (KeyError, TypeError):
        faqs, texts = [], []
    are_lists = all(isinstance(queries, list) for _, queries in faqs)
    if not faqs or not are_lists or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{path} is no list of FAQs; write {form}.")
    for text in texts:
        if not is_unicode(text):
            raise ValueError(f"{path} holds {text[:80]!r}, which is not valid Unicode; write the text of the FAQ.")
    return faqs
