"""Onboard a new tenant on embeddings: without a training, with a classifier, and with adapters."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import Fuse
from embedding_rows import Rows
from faq_data import Tenant
from faq_embeddings import EmbeddingPlatform, labelled_queries, search
from faq_table import draw
from sklearn.linear_model import LogisticRegression
from transformers import set_seed

import hf_adapter_distillation as had


def training_arguments(args: Any, steps: int) -> dict[str, Any]:
    """Return the training arguments that all methods share."""
    return {
        "max_steps": steps,
        "learning_rate": args.learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "seed": args.seed,
    }


def train_teachers(platform: EmbeddingPlatform, tenants: Sequence[Tenant], args: Any) -> list[str]:
    """Train an adapter for each existing tenant; return their names."""
    for number, tenant in enumerate(tenants, start=1):
        queries = labelled_queries(tenant, "train", args.teacher_queries)
        what = f"Teacher {number} of {len(tenants)}, {tenant.name}"
        print(f"{what}: {len(queries)} queries, {args.teacher_steps} steps", flush=True)
        platform.new_adapter(tenant.name, seed=args.seed)
        settings = training_arguments(args, args.teacher_steps) | {"learning_rate": args.teacher_learning_rate}
        platform.train(tenant, queries, **settings)
    return [tenant.name for tenant in tenants]


class Onboarding:
    """The ways to onboard a new tenant, all trained ones with the same number of steps.

    Args:
        platform: The platform with the adapters of the teachers.
        tenant: The new tenant, with queries for training and others for testing.
        teachers: The names of the teachers.
        args: The arguments of the example.
    """

    def __init__(self, platform: EmbeddingPlatform, tenant: Tenant, teachers: list[str], args: Any) -> None:
        self.platform, self.tenant, self.teachers, self.args = platform, tenant, teachers, args
        self.model = platform.model
        self.labelled = labelled_queries(tenant, "train", args.shots)
        test = labelled_queries(tenant, "test", args.test_queries)
        self.table = Rows(platform, tenant, test, Path(args.output_dir) / "adapters")
        self.rows = self.table.rows
        self.weights: dict[str, float] = {}

    def run(self) -> None:
        """Onboard the tenant in all ways."""
        self.frozen_encoder()
        self.logistic_regression()
        self.plain_adapter()
        self.teachers_average()
        self.adapter_fusion()
        self.adapter_distillation()
        self.table.take_times()

    def fit(self, what: str, steps: int) -> float:
        """Train the active adapter on the labelled queries; return the seconds."""
        print(f"{what}: {len(self.labelled)} queries, {steps} steps", flush=True)
        return self.platform.train(self.tenant, self.labelled, **training_arguments(self.args, steps))

    def frozen_encoder(self) -> None:
        """Rank by the cosine with the question of an FAQ, and with the centroid of question and labelled queries."""
        self.model.set_active_adapters(None)
        self.table.add_cosine("frozen encoder", 0.0, labelled=None)
        self.table.add_cosine("frozen centroid", 0.0, self.labelled)

    def logistic_regression(self) -> None:
        """Fit a classifier of frozen embeddings to the questions and the labelled queries."""
        began = time.perf_counter()
        texts = [*(faq.question for faq in self.tenant.faqs), *self.labelled["query"]]
        labels = [*range(len(self.tenant.faqs)), *self.labelled["label"]]
        classifier = LogisticRegression(max_iter=1000).fit(self.platform.encode(texts).cpu().numpy(), labels)
        seconds = time.perf_counter() - began

        def scores(queries: Sequence[str]) -> torch.Tensor:
            return torch.from_numpy(classifier.predict_log_proba(self.platform.encode(queries).cpu().numpy()))

        stored = {
            "coefficients": torch.from_numpy(classifier.coef_),
            "offsets": torch.from_numpy(classifier.intercept_),
        }
        self.table.add("logistic regression", seconds, scores, stored)

    def plain_adapter(self) -> None:
        """Train an adapter from its own random start."""
        self.platform.new_adapter(f"{self.tenant.name}-plain", seed=self.args.seed)
        seconds = self.fit("Plain adapter", self.args.steps)
        self.table.add_cosine("plain adapter", seconds, self.labelled, f"{self.tenant.name}-plain")

    def teachers_average(self) -> None:
        """Train an adapter that starts at the average of the teachers' weights."""
        set_seed(self.args.seed)
        self.model.average_adapter(f"{self.tenant.name}-average", self.teachers)
        self.model.train_adapter(f"{self.tenant.name}-average")
        seconds = self.fit("Plain adapter from the teachers' average", self.args.steps)
        self.table.add_cosine("teachers' average", seconds, self.labelled, f"{self.tenant.name}-average")

    def adapter_fusion(self) -> None:
        """Train an adapter for half of the steps, then a fusion of it with the teachers."""
        first = (self.args.steps + 1) // 2
        self.platform.new_adapter(f"{self.tenant.name}-own", seed=self.args.seed)
        seconds = self.fit("AdapterFusion, own adapter", first)
        fusion = Fuse(*self.teachers, f"{self.tenant.name}-own", name="fusion")
        self.model.add_adapter_fusion(fusion)
        self.model.train_adapter_fusion(fusion)
        seconds += self.fit("AdapterFusion, fusion", max(1, self.args.steps - first))
        self.table.add_cosine("AdapterFusion", seconds, self.labelled, f"{self.tenant.name}-own", fusion)

    def adapter_distillation(self) -> None:
        """Distil the teachers into a student, which is evaluated before its first step, too."""
        name, steps = self.tenant.name, self.args.steps
        print("AdapterDistillation, start of the student", flush=True)
        began = time.perf_counter()
        self.platform.new_adapter(name, had.DistillationConfig(self.teachers, fusion_rank=32), self.args.seed)
        trainer = self.platform.trainer(self.tenant, self.labelled, **training_arguments(self.args, steps))
        trainer.fit_start()
        seconds = time.perf_counter() - began
        weights, with_heavy_teachers = had.distillation_of(self.model, name).weights, self.model.active_adapters
        assert weights is not None
        self.weights = weights.mean()
        self.model.set_active_adapters(name)
        self.table.add_cosine("AdapterDistillation, untrained", seconds, self.labelled, name)

        print(f"AdapterDistillation: {len(self.labelled)} queries, {steps} steps", flush=True)
        began = time.perf_counter()
        self.model.set_active_adapters(with_heavy_teachers)
        trainer.train()
        seconds += time.perf_counter() - began
        self.table.add_cosine("AdapterDistillation", seconds, self.labelled, name)

    def draw(self, folder: Path) -> None:
        """Write the picture of the rows and of the teachers' weights."""
        draw(self.rows, self.weights, self.tenant.name).savefig(folder / "onboarding.png")

    def best_faqs(self, queries: Sequence[str]) -> list[int]:
        """Return the number of the best FAQ of each query, found by the student."""
        self.model.set_active_adapters(self.tenant.name)
        faqs = self.platform.faq_embeddings(self.tenant, self.labelled)
        return [found.faq for (found,) in search(self.platform.encode(queries), faqs, top_k=1)]
