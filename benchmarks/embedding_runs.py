"""Teachers and runs of `streaming_tenants.py` on one embedding model, which a process loads once."""

import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from pools import (
    NEW,
    TEACHER_SEED,
    Arrival,
    arrival,
    keep_teacher,
    learned_weights,
    load_teachers,
    shots_of,
    teacher_tenant,
)
from tenant_jobs import Arguments, Job, Method, finished, started

import hf_adapter_distillation as had

from faq_cross_encoder import stored_megabytes  # isort: skip
from faq_data import Tenant  # isort: skip
from faq_embeddings import EmbeddingPlatform, labelled_queries  # isort: skip
from onboarding_embeddings import METHODS, Onboarding  # isort: skip
from onboarding_frozen import FrozenEncoder, Onboarded  # isort: skip
from retrieval_metric import RetrievalMetric  # isort: skip

FOLDER = str(Path(tempfile.gettempdir()) / "streaming_tenants")
TIMED_QUERIES = 24


@lru_cache(maxsize=1)
def _platform(model: str | None, device: str, teachers_dir: str, pool: str) -> tuple[EmbeddingPlatform, FrozenEncoder]:
    """Load the platform; a process keeps it, with the teachers that it has loaded, for all jobs of one setting."""
    transformers.utils.logging.set_verbosity_error()
    for name in ("adapters", "sentence_transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    platform = load_platform(model, device)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        platform.model.set_active_adapters(None)
        return platform.encode(texts)

    return platform, FrozenEncoder(encode)


def load_platform(model: str | None, device: str) -> EmbeddingPlatform:
    """Load an encoder without adapters."""
    platform = EmbeddingPlatform(model, FOLDER, device)
    platform.encoder.model_card_data.widget = [{}]  # else each trainer computes examples for a card
    return platform


def platform_of(args: Arguments) -> tuple[EmbeddingPlatform, FrozenEncoder]:
    """Return the platform of this process, and its encoder without adapters."""
    return _platform(args.model, args.device, args.teachers_dir, args.pool)


def train_teacher(args: Arguments, name: str) -> str:
    """Train and keep the adapter of a tenant; return a line about it."""
    platform, _ = platform_of(args)
    tenant = teacher_tenant(args, name)
    platform.new_adapter(name, seed=TEACHER_SEED)
    queries = labelled_queries(tenant, "train", args.teacher_queries)
    seconds = platform.train(
        tenant,
        queries,
        num_train_epochs=args.teacher_epochs,
        per_device_train_batch_size=args.teacher_batch_size,
        learning_rate=args.teacher_learning_rate,
        seed=TEACHER_SEED,
        **args.of_training(),
    )
    validation = labelled_queries(tenant, "validation", args.search_queries)
    metrics = measure(platform.scores(tenant, validation), validation["label"])
    keep_teacher(args, partial(platform.model.save_adapter, adapter_name=name), name, metrics)
    platform.model.delete_adapter(name)
    return f"teacher {name}: accuracy@1 {metrics['accuracy_at_1']:.3f} on its own tenant, {seconds:.0f} s"


def measure(scores: torch.Tensor, labels: list[int]) -> dict[str, float]:
    """Return the metrics of the scores of queries with FAQs, (n_queries, n_faqs)."""
    n_queries, n_faqs = scores.shape
    right = torch.nn.functional.one_hot(torch.tensor(labels), n_faqs)
    ids = torch.arange(n_queries).repeat_interleave(n_faqs)
    flat = {"references": right.flatten().tolist(), "query_ids": ids.tolist()}
    return RetrievalMetric().compute(predictions=scores.flatten().tolist(), **flat)


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboard a tenant with one method, and measure it."""
    came = arrival(args, job.tenant, job.seed)
    run = onboarding(args, job, came)
    onboarded, centroids, line = measured(args, job, came, run, METHODS[job.method])
    if job.queries == "test" and args.latency:
        line |= latency(run, onboarded, centroids, came.tenant)
    if job.method.startswith("AdapterDistillation"):
        line |= learned_weights(had.distillation_of(run.platform.model, NEW).weights)
    remove_new(run.platform)
    return finished(args, line)


def measured(
    args: Arguments, job: Job, came: Arrival, run: Any, method: Method
) -> tuple[Onboarded, torch.Tensor, dict[str, Any]]:
    """Onboard a tenant; return what the method hands over, the centroids of its FAQs, and its line."""
    began, cpu_began = time.perf_counter(), time.process_time()
    onboarded = method.onboard(run)
    faqs = faq_embeddings(run, onboarded)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    test = labelled_queries(came.tenant, job.queries, args.n_measured(job.queries))
    line = started(args, job, came.teachers) | evaluate(onboarded, faqs, test)
    line |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
    if job.queries == "test":
        with tempfile.TemporaryDirectory() as folder:
            if onboarded.save is not None:
                onboarded.save(folder)
            line["MB"] = stored_megabytes(Path(folder))
    return onboarded, faqs[1], line


def onboarding(args: Arguments, job: Job, came: Arrival) -> Onboarding:
    """Return a run of a method, with all teachers on the model of this process."""
    platform, frozen = platform_of(args)
    load_teachers(args, platform.model, came.teachers, job.seed)
    platform.model.to(args.device)
    shots = shots_of(args, came.tenant)
    return Onboarding(
        platform=platform,
        frozen=frozen,
        fresh_platform=partial(load_platform, args.model, args.device),
        tenant=came.tenant,
        labelled=labelled_queries(came.tenant, "train", shots),
        unlabelled=Dataset.from_dict({"query": came.unlabelled}),
        teachers=came.teachers,
        others=came.others,
        shots=shots,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=job.learning_rate,
        seed=job.seed,
        options=args.of_training(),
    )


def remove_new(platform: EmbeddingPlatform) -> None:
    """Remove the new tenant's adapter and fusion from the model."""
    model = platform.model
    model.set_active_adapters(None)
    for name in list(model.adapters_config.fusions):
        model.delete_adapter_fusion(name)
    if NEW in model.adapters_config:
        model.delete_adapter(NEW)


def faq_embeddings(run: Any, onboarded: Onboarded) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of questions, and the centroids with the labelled queries, both (n_faqs, d)."""
    questions = (onboarded.encode_questions or onboarded.encode)(run.questions)
    centroids = questions
    if len(run.labelled):
        labelled = run.labelled.with_format(None)  # the trainer has set a format of its own
        labels = torch.tensor(labelled["label"], device=questions.device)
        centroids = questions.index_add(0, labels, onboarded.encode(labelled["query"]))
    return questions, torch.nn.functional.normalize(centroids, dim=-1)


def evaluate(onboarded: Onboarded, faqs: tuple[torch.Tensor, torch.Tensor], test: Dataset) -> dict[str, float]:
    """Return the metrics of a method, and its accuracy by the questions alone."""
    questions, centroids = faqs
    queries = onboarded.encode(test["query"])  # (n_queries, d)
    scores = onboarded.rank(queries) if onboarded.rank else queries @ centroids.T
    by_title = measure(queries @ questions.T, test["label"])
    return {**measure(scores, test["label"]), "title_accuracy_at_1": by_title["accuracy_at_1"]}


def latency(run: Onboarding, onboarded: Onboarded, faqs: torch.Tensor, tenant: Tenant) -> dict[str, float]:
    """Measure the milliseconds of a query, also relative to a plain adapter's."""
    texts = labelled_queries(tenant, "test", 2)["query"][:TIMED_QUERIES]
    model = run.platform.model
    active = model.active_adapters
    model.add_adapter("reference", config=model.adapters_config.get(run.teachers[0]))
    times: dict[str, list[float]] = {"method": [], "plain": []}
    for text in texts:
        for name, encode, setup in (
            ("method", onboarded.encode, active),
            ("plain", run.platform.encode, "reference"),
        ):
            model.set_active_adapters(setup)
            run.frozen.known.pop(text, None)
            began = time.perf_counter()
            _ = encode([text]) @ faqs.T
            times[name].append(1000 * (time.perf_counter() - began))
    model.delete_adapter("reference")
    model.set_active_adapters(active)
    method, plain = (statistics.median(times[name]) for name in ("method", "plain"))
    return {"ms": method, "ms_ratio": method / plain}
