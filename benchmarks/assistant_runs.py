"""Teachers and runs of `streaming_tenants.py` on the assistant of `examples/llm_skills.py`."""

import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from language_model_runs import LORA_METHODS, RATES, Onboarding, lora_of, onboarding, trained_lora
from pools import arrival, keep_teacher, learned_weights
from tenant_jobs import Arguments, Job, Method, finished, started

from llm_methods import Outcome  # isort: skip
from llm_model import stored_megabytes  # isort: skip
from llm_tasks import messages_of  # isort: skip


def distilled_by_logits(run: Onboarding) -> Path | None:
    """Distil the teachers' distributions over the tokens of the answers, and not their updates in the layers."""
    run.llm.objective = "logits"
    return lora_of(run, "AdapterDistillation")


METHODS = {
    "no adapter": Method(partial(lora_of, way="no adapter"), (0.0,), needs_labels=False),
    **LORA_METHODS,
    "AdapterDistillation: logits": Method(distilled_by_logits, RATES, rate_of="AdapterDistillation"),
}


def train_teacher(args: Arguments, name: str) -> str:
    """Train and keep the LoRA of a tenant; return a line about it."""
    with trained_lora(args, name, "answers") as (llm, made):
        exact = llm.score(Outcome(made, 0.0), messages_of(llm.new, "validation", args.search_queries)).quality
        keep_teacher(args, partial(shutil.copytree, made), name, {"accuracy_at_1": exact})
    return f"teacher {name}: {exact:.3f} of the answers are right on its own tenant"


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboard a tenant with one method, and count the messages that it answers with exactly the right label."""
    came = arrival(args, job.tenant, job.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = onboarding(args, job, came, Path(folder), "answers")
        began, cpu_began = time.perf_counter(), time.process_time()
        lora = METHODS[job.method].onboard(run)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        messages = messages_of(came.tenant, job.queries, args.n_measured(job.queries))
        score = run.llm.score(Outcome(lora, seconds), messages)
        megabytes = stored_megabytes(lora)
    line = started(args, job, came.teachers)
    line |= {"accuracy_at_1": score.quality, "tokens_per_s": score.per_second, "MB": megabytes}
    line |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return finished(args, line | learned_weights(run.llm.weights))
