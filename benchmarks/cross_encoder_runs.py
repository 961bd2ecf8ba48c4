"""Teachers and runs of `streaming_tenants.py` on one cross-encoder, as in the paper."""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import embedding_runs
import transformers
from adapters import Stack
from onboarding_cross_encoder import METHODS, Onboarding
from onboarding_frozen import FROZEN_METHODS
from pools import (
    NEW,
    QUERY_LOG,
    TEACHER_SEED,
    adapter_parameters,
    arrival,
    keep_teacher,
    learned_weights,
    randomize,
    shots_of,
    teacher_tenant,
)
from tenant_jobs import Arguments, Job, finished, started
from transformers import BatchEncoding

import hf_adapter_distillation as had

from faq_cross_encoder import ADAPTER, CrossEncoderPlatform, stored_megabytes  # isort: skip
from faq_data import make_pairs  # isort: skip


@dataclass
class Settings:
    """What a `CrossEncoderPlatform` reads."""

    model: str | None
    output_dir: str
    learning_rate: float
    batch_size: int
    seed: int


def load(args: Arguments, seed: int, learning_rate: float, batch_size: int) -> CrossEncoderPlatform:
    """Load a platform without adapters."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    folder = str(Path(tempfile.gettempdir()) / "streaming_tenants")
    platform = CrossEncoderPlatform(Settings(args.model, folder, learning_rate, batch_size, seed))
    platform.model.to(args.device)
    return platform


def train_teacher(args: Arguments, name: str) -> str:
    """Train and keep the adapter of a tenant; return a line about it."""
    platform = load(args, TEACHER_SEED, args.teacher_learning_rate, args.teacher_batch_size)
    tenant = teacher_tenant(args, name)
    platform.new_adapter(name)
    pairs = make_pairs(tenant, "train", platform.tokenizer, args.teacher_queries, args.n_wrong, TEACHER_SEED)
    seconds = platform.train(pairs, args.teacher_epochs, **args.of_training())
    test = make_pairs(tenant, "validation", platform.tokenizer, args.search_queries, None, TEACHER_SEED)
    metrics = platform.evaluate(test, len(tenant.faqs))
    keep_teacher(args, partial(platform.model.save_adapter, adapter_name=name), name, metrics)
    return f"teacher {name}: accuracy@1 {metrics['accuracy_at_1']:.3f} on its own tenant, {seconds:.0f} s"


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboard a tenant with one method, and measure it."""
    if job.method in FROZEN_METHODS:
        return embedding_runs.run_job(args, job)
    platform = load(args, job.seed, job.learning_rate, args.batch_size)
    came = arrival(args, job.tenant, job.seed)
    model, new, shots = platform.model, came.tenant, shots_of(args, came.tenant)
    pairs = partial(make_pairs, tokenizer=platform.tokenizer, seed=job.seed)
    for name in came.teachers:
        model.load_adapter(str(Path(args.teachers_dir) / name), load_as=name, set_active=False)
        if args.pool == "random":
            randomize([*adapter_parameters(model, name), *model.heads[name].parameters()], f"{name} {job.seed}")
    model.to(args.device)
    unlabelled = partial(pairs, new, "validation", n_queries=QUERY_LOG, n_wrong=None)
    run = Onboarding(
        platform=platform,
        teachers=came.teachers,
        train=pairs(new, "train", n_queries=shots, n_wrong=args.n_wrong) if shots else unlabelled(),
        others=[pairs(other, "train", n_queries=shots, n_wrong=args.n_wrong) for other in came.others if shots],
        query_log=unlabelled,
        steps=args.steps,
        options=args.of_training(),
    )
    cpu_began = time.process_time()
    save = METHODS[job.method].onboard(run)
    cpu_seconds = time.process_time() - cpu_began
    test = pairs(new, job.queries, n_queries=args.n_measured(job.queries), n_wrong=None)
    line = started(args, job, came.teachers)
    line |= {**platform.evaluate(test, len(new.faqs)), "seconds": run.seconds, "cpu_seconds": cpu_seconds}
    if job.queries == "test":
        line |= costs(platform, save, platform.batches(test, len(new.faqs))[:12])
    is_distilled = job.method.startswith("AdapterDistillation")
    line |= learned_weights(had.distillation_of(model, NEW).weights) if is_distilled else {}
    if job.queries == "test" and is_distilled:
        model.train_adapter(NEW)
        first = test.select(range(min(96, len(test))))
        table = had.teacher_attention(model, first, platform.collator)
        line["attention"] = {layer: {name: cell.mean for name, cell in row.items()} for layer, row in table.items()}
    return finished(args, line)


def costs(
    platform: CrossEncoderPlatform, save: Callable[[str], None], batches: list[BatchEncoding]
) -> dict[str, float]:
    """Measure the milliseconds of a query, also relative to a plain adapter on the same model, and storage."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        megabytes = stored_megabytes(Path(folder))
    setup = platform.model.active_adapters
    platform.model.add_adapter("reference", config=ADAPTER)
    platform.model.to(platform.model.device)
    times = platform.milliseconds({"method": setup, "plain": Stack("reference")}, batches)
    platform.model.set_active_adapters(setup)
    return {"ms": times["method"], "ms_ratio": times["method"] / times["plain"], "MB": megabytes}
