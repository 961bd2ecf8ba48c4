"""Teachers and runs of `streaming_tenants.py` on one encoder with a classification head for each tenant.

The classes of a tenant are its FAQs, so a new tenant has to learn a head of its own: no teacher has its classes.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import embedding_runs
import torch
import transformers
from adapters import AdapterTrainer, AutoAdapterModel, Fuse
from datasets import Dataset
from onboarding_frozen import FROZEN_METHODS
from pools import (
    NEW,
    TEACHER_SEED,
    arrival,
    keep_teacher,
    learned_weights,
    load_teachers,
    shots_of,
    teacher_tenant,
)
from tenant_jobs import Arguments, Job, Method, finished, halves, started
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_adapter_distillation as had

from faq_cross_encoder import stored_megabytes  # isort: skip
from faq_data import Tenant  # isort: skip
from faq_embeddings import ADAPTER, labelled_queries, packaged_model  # isort: skip

TEST_BATCH_SIZE = 64


@dataclass
class Onboarding:
    """A tenant, and a model that holds the adapters of the others and nothing of the tenant.

    Args:
        model: The encoder with the teachers.
        tokenizer: Its tokenizer.
        tenant: The tenant.
        labelled: Its questions and labelled queries, with their classes.
        teachers: The names of the others' adapters.
        options: The training arguments of all methods, with the rate and the seed.
        steps: The optimizer steps of a training, all stages together.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tenant: Tenant
    labelled: Dataset
    teachers: list[str]
    options: dict[str, Any]
    steps: int

    def add_head(self, name: str) -> None:
        """Add a head with a class for each FAQ."""
        names = {number: faq.question for number, faq in enumerate(self.tenant.faqs)}
        self.model.add_classification_head(name, num_labels=len(names), id2label=names)

    def new_adapter(self, name: str, distill_from: had.DistillationConfig | None = None) -> None:
        """Add an adapter with a head, the same for all methods with a seed, and activate it for training."""
        set_seed(self.options["seed"])
        self.model.add_adapter(name, config=ADAPTER, distill_from=distill_from)
        self.add_head(name)
        self.model.train_adapter(name)

    def fit(self, steps: int | None = None, trainer_class: type[Trainer] = AdapterTrainer) -> None:
        """Train what is not frozen for all steps, or for fewer."""
        distilled = trainer_class is had.DistillationTrainer
        arguments: Any = had.DistillationTrainingArguments if distilled else TrainingArguments
        tokens = self.tokenizer(list(self.labelled["query"]), truncation=True)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_class(
                model=self.model,
                args=arguments(folder, **{"max_steps": steps or self.steps, **self.options}),
                train_dataset=Dataset.from_dict({**tokens, "labels": list(self.labelled["label"])}),
                data_collator=DataCollatorWithPadding(self.tokenizer),
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    @torch.no_grad()
    def logits(self, queries: list[str]) -> torch.Tensor:
        """Return the logits of the active setup, (n_queries, n_faqs)."""
        self.model.eval()
        logits = []
        for first in range(0, len(queries), TEST_BATCH_SIZE):
            texts = queries[first : first + TEST_BATCH_SIZE]
            batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            logits.append(self.model(**batch).logits.cpu())
        return torch.cat(logits)

    def save(self, folder: str) -> None:
        """Save the tenant's adapter with its head."""
        self.model.save_adapter(f"{folder}/{NEW}", NEW)


Save = Callable[[str], None]


def full_fine_tuning(run: Onboarding) -> Save:
    """Train all weights of the encoder, and a head."""
    for teacher in run.teachers:
        run.model.delete_adapter(teacher)
    set_seed(run.options["seed"])
    run.add_head(NEW)
    run.fit(trainer_class=Trainer)
    return run.model.save_pretrained


def plain_adapter(run: Onboarding) -> Save:
    """Train an adapter from its own random start."""
    run.new_adapter(NEW)
    run.fit()
    return run.save


def teachers_average(run: Onboarding) -> Save:
    """Train an adapter that starts as the average of the others, with the function of adapters."""
    run.model.average_adapter(NEW, run.teachers)
    set_seed(run.options["seed"])
    run.add_head(NEW)
    run.model.train_adapter(NEW)
    run.fit()
    return run.save


def adapter_fusion(run: Onboarding) -> Save:
    """Train an adapter for half of the steps, then adapters' fusion of all adapters for the other half."""
    run.new_adapter(NEW)
    first, second = halves(run.steps)
    run.fit(first)
    fusion = Fuse(*run.teachers, NEW, name="fusion")
    run.model.add_adapter_fusion(fusion)
    run.model.train_adapter_fusion(fusion)
    run.model.active_head = NEW
    run.fit(second)

    def save(folder: str) -> None:
        run.model.save_adapter_fusion(f"{folder}/fusion", fusion)
        run.save(folder)

    return save


def adapter_distillation(
    run: Onboarding, config: Callable[..., had.DistillationConfig] = had.DistillationConfig
) -> Save:
    """Train the student with `DistillationTrainer`; all other settings are the package's defaults."""
    run.new_adapter(NEW, config(run.teachers))
    run.fit(trainer_class=had.DistillationTrainer)
    return run.save


RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def _configured(**settings: Any) -> Method:
    """AdapterDistillation with another config than the default."""
    config = partial(had.DistillationConfig, **settings)
    return Method(partial(adapter_distillation, config=config), RATES, rate_of="AdapterDistillation")


METHODS = {
    **FROZEN_METHODS,
    "full fine-tuning": Method(full_fine_tuning, (2e-5, 5e-5, 1e-4, 2e-4)),
    "plain adapter": Method(plain_adapter, RATES),
    "teachers' average": Method(teachers_average, RATES),
    "AdapterFusion": Method(adapter_fusion, RATES),
    "AdapterDistillation": Method(adapter_distillation, RATES),
    "AdapterDistillation: uniform": _configured(student_start="teachers"),
    "AdapterDistillation: paper": Method(
        partial(adapter_distillation, config=had.DistillationConfig.paper), RATES, rate_of="plain adapter"
    ),
}


def examples_of(tenant: Tenant, n_queries: int) -> Dataset:
    """Return the question and up to `n_queries` training queries of each FAQ, with the number of the FAQ."""
    faqs = [replace(faq, train=[faq.question, *faq.train]) for faq in tenant.faqs]
    return labelled_queries(replace(tenant, faqs=faqs), "train", 1 + n_queries)


def load(args: Arguments, tenant: Tenant, teachers: list[str], n_queries: int, **options: Any) -> Onboarding:
    """Load an encoder with teachers, for a tenant with some queries of each FAQ."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    path = args.model or packaged_model()
    model = AutoAdapterModel.from_pretrained(path)
    load_teachers(args, model, teachers, options["seed"])
    settings = {"report_to": [], "save_strategy": "no", "dataloader_pin_memory": False, "label_names": ["labels"]}
    return Onboarding(
        model=model.to(args.device),
        tokenizer=AutoTokenizer.from_pretrained(path),
        tenant=tenant,
        labelled=examples_of(tenant, n_queries),
        teachers=teachers,
        options=settings | args.of_training() | options,
        steps=args.steps,
    )


def test(args: Arguments, run: Onboarding, split: str) -> dict[str, float]:
    """Return the metrics of the active setup on queries of a split."""
    queries = labelled_queries(run.tenant, split, args.n_measured(split))
    return embedding_runs.measure(run.logits(queries["query"]), queries["label"])


def train_teacher(args: Arguments, name: str) -> str:
    """Train and keep the adapter of a tenant, with its head; return a line about it."""
    run = load(
        args,
        teacher_tenant(args, name),
        [],
        args.teacher_queries,
        seed=TEACHER_SEED,
        learning_rate=args.teacher_learning_rate,
        per_device_train_batch_size=args.teacher_batch_size,
    )
    run.steps = args.teacher_epochs * -(-len(run.labelled) // args.teacher_batch_size)
    run.new_adapter(name)
    run.fit()
    metrics = test(args, run, "validation")
    keep_teacher(args, partial(run.model.save_adapter, adapter_name=name), name, metrics)
    return f"teacher {name}: accuracy@1 {metrics['accuracy_at_1']:.3f} on its own tenant"


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboard a tenant with one method, and measure it."""
    if job.method in FROZEN_METHODS:
        return embedding_runs.run_job(args, job)
    came = arrival(args, job.tenant, job.seed)
    run = load(
        args,
        came.tenant,
        came.teachers,
        shots_of(args, came.tenant),
        seed=job.seed,
        learning_rate=job.learning_rate,
        per_device_train_batch_size=args.batch_size,
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    save = METHODS[job.method].onboard(run)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    line = started(args, job, came.teachers) | test(args, run, job.queries)
    line |= {"seconds": seconds, "cpu_seconds": cpu_seconds}
    if job.queries == "test":
        with tempfile.TemporaryDirectory() as folder:
            save(folder)
            line["MB"] = stored_megabytes(Path(folder))
    if job.method.startswith("AdapterDistillation"):
        line |= learned_weights(had.distillation_of(run.model, NEW).weights)
    return finished(args, line)
