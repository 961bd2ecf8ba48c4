"""The rows of the table of embeddings: quality, speed and stored size of each way to answer a tenant's queries."""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from adapters import AdapterCompositionBlock, Fuse
from datasets import Dataset
from faq_cross_encoder import stored_megabytes
from faq_data import Tenant
from faq_embeddings import EmbeddingPlatform
from retrieval_metric import RetrievalMetric
from safetensors.torch import save_file

TIMED_QUERIES = 12
Scores = Callable[[Sequence[str]], torch.Tensor]  # of queries with each FAQ, (n_queries, n_faqs)


class Way(NamedTuple):
    """A way to answer queries: the adapters that are active, and what computes the scores."""

    setup: AdapterCompositionBlock | None
    scores: Scores


class Rows:
    """The rows of the table, one for each way to answer the queries of a tenant.

    Args:
        platform: The platform.
        tenant: The tenant.
        test: The test queries, with the number of the right FAQ as `label`.
        folder: Where each way gets a folder with all that is stored for the tenant.
    """

    def __init__(self, platform: EmbeddingPlatform, tenant: Tenant, test: Dataset, folder: Path) -> None:
        self.platform, self.tenant, self.test, self.folder = platform, tenant, test, folder
        self.metric = RetrievalMetric()
        self.rows: dict[str, dict[str, float]] = {}
        self.ways: dict[str, Way] = {}

    def add_cosine(
        self,
        method: str,
        seconds: float,
        labelled: Dataset | None,
        adapter: str | None = None,
        fusion: Fuse | None = None,
    ) -> None:
        """Add a row for the active adapters, by the cosine of a query with the embedding of each FAQ.

        Args:
            method: The name of the row.
            seconds: The time of the training; the time to embed the FAQs is added.
            labelled: Queries for the centroids of the FAQs; None for the questions alone.
            adapter: The adapter that is stored for the tenant.
            fusion: The fusion that is stored for the tenant.
        """
        began = time.perf_counter()
        faqs = self.platform.faq_embeddings(self.tenant, labelled)
        seconds += time.perf_counter() - began
        path = self.add(method, seconds, lambda queries: self.platform.encode(queries) @ faqs.T, {"faqs": faqs})
        if adapter is not None:
            self.platform.model.save_adapter(str(path / adapter), adapter)
        if fusion is not None:
            self.platform.model.save_adapter_fusion(str(path / "fusion"), fusion)
        self.rows[method]["MB"] = stored_megabytes(path)

    def add(self, method: str, seconds: float, scores: Scores, stored: dict[str, torch.Tensor]) -> Path:
        """Add a row for scores that the active adapters give, and return the folder with the stored tensors."""
        path = self.folder / method.replace(" ", "_").replace(",", "")
        shutil.rmtree(path, ignore_errors=True)  # of an earlier run
        path.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path / "tensors.safetensors")
        self.ways[method] = Way(self.platform.model.active_adapters, scores)
        quality = self.quality(scores(self.test["query"]))
        self.rows[method] = {**quality, "MB": stored_megabytes(path), "onboard_s": seconds}
        return path

    def quality(self, scores: torch.Tensor) -> dict[str, float]:
        """Return the metrics of the scores of the test queries, (n_queries, n_faqs)."""
        right = torch.zeros_like(scores, dtype=torch.long)
        right[torch.arange(len(scores)), self.test["label"]] = 1
        query_ids = torch.arange(len(scores)).repeat_interleave(scores.shape[1])
        lists = {"predictions": scores.flatten(), "references": right.flatten(), "query_ids": query_ids}
        return self.metric.compute(**{name: values.tolist() for name, values in lists.items()})

    def take_times(self) -> None:
        """Add the queries per second of each way, by the median time of a query alone; the ways take turns."""
        times: dict[str, list[float]] = {method: [] for method in self.ways}
        for query in self.test["query"][:: max(1, len(self.test) // TIMED_QUERIES)]:
            for method, way in self.ways.items():
                self.platform.model.set_active_adapters(way.setup)
                start = time.perf_counter()
                way.scores([query])
                times[method].append(time.perf_counter() - start)
        for method, values in times.items():
            self.rows[method]["queries_per_s"] = 1 / statistics.median(values)
