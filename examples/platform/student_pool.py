"""The students in memory, out of a folder with the students of all tenants.

A student is loaded when its first question arrives, and again when its files change. The least recently used one is
evicted.
"""

import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from batched_adapters import LoadedAdapter, TenantAdapters  # noqa: E402
from faq_data import Faq, Tenant  # noqa: E402
from faq_embeddings import EmbeddingPlatform, labelled_queries  # noqa: E402
from metrics import Metrics  # noqa: E402
from student_folder import BUSY, Failure, folder_of, read_faqs, unknown  # noqa: E402

logger = logging.getLogger(__name__)
TRIES = 3  # to load a student whose files change meanwhile

Stamp = tuple[tuple[str, int, int, int], ...]  # the name, time, size and inode of each file


class Student(NamedTuple):
    """A student in memory, with the FAQs of its tenant and their embeddings, (n_faqs, d)."""

    adapter: LoadedAdapter
    faqs: list[str]
    embeddings: torch.Tensor


def stamp_of(folder: Path) -> Stamp:
    """Return what changes when a file of a student is written or replaced."""
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size, stat.st_ino) for name, stat in stats))


class StudentPool:
    """The students in memory, of one base model. Only one thread may use it.

    Args:
        platform: The base model.
        students: The folder with a folder for each tenant.
        max_loaded: The number of students in memory, at most.
        metrics: Counts what is loaded and evicted.
    """

    def __init__(self, platform: EmbeddingPlatform, students: Path, max_loaded: int, metrics: Metrics) -> None:
        self.platform, self.students, self.max_loaded, self.metrics = platform, students, max_loaded, metrics
        self.adapters = TenantAdapters(platform.model)
        # By tenant, the least recently used one first. A damaged student is kept, too, and not read for each question.
        self.loaded: OrderedDict[str, tuple[Stamp, Student | Failure]] = OrderedDict()

    def get(self, tenants: Collection[str]) -> dict[str, Student | Failure]:
        """Return the students of the tenants of a batch, and a failure for each one that cannot be served.

        Args:
            tenants: The names, at most `max_loaded`.
        """
        assert len(set(tenants)) <= self.max_loaded
        return {tenant: self._get(tenant, keep=tenants) for tenant in tenants}

    def _get(self, tenant: str, keep: Collection[str]) -> Student | Failure:
        folder = folder_of(self.students, tenant)
        if folder is None:
            self._drop(tenant)
            return unknown(tenant)
        for _ in range(TRIES):
            try:
                stamp = stamp_of(folder)
            except OSError:
                return unknown(tenant)  # it was removed just now
            if tenant not in self.loaded or self.loaded[tenant][0] != stamp:
                self._drop(tenant)
                self._evict(keep)
                outcome = self._load(tenant, folder)
                if isinstance(outcome, Failure) and outcome.status == BUSY:
                    return outcome
                self.loaded[tenant] = stamp, outcome
                if not folder.is_dir() or stamp_of(folder) != stamp:
                    continue  # it may have files of two students
            self.loaded.move_to_end(tenant)
            return self.loaded[tenant][1]
        return Failure(BUSY, f"Tenant {tenant!r} is being replaced; ask again in a moment.")

    def _load(self, tenant: str, folder: Path) -> Student | Failure:
        adapter = None
        label = f"Student {str(folder)!r}"
        try:
            faqs = [Faq(question, train=queries) for question, queries in read_faqs(folder)]
            if (folder / "head_config.json").is_file():
                raise ValueError(
                    f"{label} has a head, as a cross-encoder's student; train it as an embedding model's."
                )
            adapter = self.adapters.load(folder, label)
            embeddings = self._embed_faqs(Tenant(tenant, faqs))
            if not embeddings.isfinite().all():
                raise ValueError(f"{label} gives embeddings that are NaN; train it anew.")
            adapter = self.adapters.finish(adapter)
        except Exception as error:  # whatever layers make of a damaged adapter, it harms no other tenant
            if adapter is not None:
                self.adapters.remove(adapter)
            self.metrics.add("tenant_load_failures_total")
            logger.warning("Tenant %r cannot be served", tenant, exc_info=error)
            if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
                return Failure(BUSY, f"Tenant {tenant!r} could not be loaded ({type(error).__name__}); ask again.")
            reason = str(error).splitlines()[0] if isinstance(error, ValueError) else type(error).__name__
            return Failure(500, f"Tenant {tenant!r} cannot be served: {reason}")
        self.metrics.add("tenant_loads_total")
        return Student(adapter, [faq.question for faq in faqs], embeddings)

    def _embed_faqs(self, tenant: Tenant) -> torch.Tensor:
        """Return the centroids of a tenant's FAQs by the active adapter, (n_faqs, d)."""
        n_queries = max(len(faq.train) for faq in tenant.faqs)
        with torch.inference_mode():
            centroids = self.platform.faq_embeddings(tenant, labelled_queries(tenant, "train", n_queries))
        return nn.functional.normalize(centroids, dim=-1)

    def _evict(self, keep: Collection[str]) -> None:
        """Make room for one student; those of the running batch stay."""
        while len(self.loaded) >= self.max_loaded:
            self._drop(next(tenant for tenant in self.loaded if tenant not in keep))
            self.metrics.add("tenant_evictions_total")

    def _drop(self, tenant: str) -> None:
        _, student = self.loaded.pop(tenant, (None, None))
        if isinstance(student, Student):
            self.adapters.remove(student.adapter)
