"""Onboard a new tenant with a cross-encoder, as in the paper: each query is read together with each FAQ."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapters import AdapterCompositionBlock
from datasets import Dataset
from faq_cross_encoder import CrossEncoderPlatform, stored_megabytes
from faq_data import Tenant, make_pairs

import hf_adapter_distillation as had

N_WRONG = 3  # wrong FAQs that a training query is paired with
TIMED_QUERIES = 24
PLOTTED_PAIRS = 96


def train_teachers(platform: CrossEncoderPlatform, tenants: Sequence[Tenant], args: Any) -> list[str]:
    """Train an adapter for each existing tenant; return their names."""
    for number, tenant in enumerate(tenants, start=1):
        pairs = make_pairs(tenant, "train", platform.tokenizer, args.teacher_queries, N_WRONG, args.seed)
        print(f"Teacher {number} of {len(tenants)}, {tenant.name}: {len(pairs)} pairs, {args.teacher_steps} steps")
        platform.new_adapter(tenant.name)
        platform.train(pairs, 1, max_steps=args.teacher_steps, learning_rate=args.teacher_learning_rate)
    return [tenant.name for tenant in tenants]


class Onboarding:
    """Four ways to onboard a new tenant, all with the same number of steps.

    Args:
        platform: The platform with the adapters of the teachers.
        tenant: The new tenant, with queries for training and others for testing.
        teachers: The names of the teachers.
        args: The arguments of the example.
    """

    def __init__(self, platform: CrossEncoderPlatform, tenant: Tenant, teachers: list[str], args: Any) -> None:
        self.platform, self.tenant, self.teachers, self.args = platform, tenant, teachers, args
        self.model = platform.model
        self.train = make_pairs(tenant, "train", platform.tokenizer, args.shots, N_WRONG, args.seed)
        self.test = make_pairs(tenant, "test", platform.tokenizer, args.test_queries, None, args.seed)
        self.rows: dict[str, dict[str, float]] = {}
        self.setups: dict[str, AdapterCompositionBlock] = {}
        self.weights: dict[str, float] = {}

    def run(self) -> None:
        """Onboard the tenant in all ways."""
        self.plain_adapter()
        self.adapter_fusion()
        self.teachers_average()
        self.adapter_distillation()
        batches = self.platform.batches(self.test, len(self.tenant.faqs))[:TIMED_QUERIES]
        for method, milliseconds in self.platform.milliseconds(self.setups, batches).items():
            self.rows[method]["ms"] = milliseconds

    def fit(self, what: str, steps: int, *trainer_cls: type, **options: Any) -> float:
        """Train the active adapter on the pairs; return the seconds."""
        print(f"{what}: {len(self.train)} pairs, {steps} steps", flush=True)
        return self.platform.train(self.train, 1, *trainer_cls, max_steps=steps, **options)

    def finish(self, method: str, seconds: float, save: Callable[[Path], None]) -> None:
        """Add a row for the active adapters."""
        path = Path(self.args.output_dir) / "adapters" / method.replace(" ", "_")
        path.mkdir(parents=True, exist_ok=True)
        save(path)
        self.setups[method] = self.model.active_adapters
        quality = self.platform.evaluate(self.test, len(self.tenant.faqs))
        self.rows[method] = {**quality, "MB": stored_megabytes(path), "train_s": seconds}

    def plain_adapter(self) -> None:
        """Train an adapter from its own random start."""
        # adapters saves with a head all those whose names begin like its own
        self.platform.new_adapter(f"plain-{self.tenant.name}")
        seconds = self.fit("Plain adapter", self.args.steps)
        self.finish(
            "plain adapter",
            seconds,
            lambda path: self.model.save_adapter(str(path / f"plain-{self.tenant.name}"), f"plain-{self.tenant.name}"),
        )

    def adapter_fusion(self) -> None:
        """Train an adapter for half of the steps, then a fusion of it with the teachers."""
        first = (self.args.steps + 1) // 2
        self.platform.new_adapter(f"own-{self.tenant.name}")
        seconds = self.fit("AdapterFusion, own adapter", first)
        fusion = self.platform.fuse(f"own-{self.tenant.name}", self.teachers)
        seconds += self.fit("AdapterFusion, fusion", max(1, self.args.steps - first))

        def save(path: Path) -> None:
            self.model.save_adapter_fusion(str(path / "fusion"), fusion)
            self.model.save_adapter(str(path / f"own-{self.tenant.name}"), f"own-{self.tenant.name}")

        self.finish("AdapterFusion", seconds, save)

    def teachers_average(self) -> None:
        """Train an adapter that starts at the average of the teachers' weights."""
        self.platform.average(f"average-{self.tenant.name}", self.teachers)
        seconds = self.fit("Plain adapter from the teachers' average", self.args.steps)
        self.finish(
            "teachers' average",
            seconds,
            lambda path: self.model.save_adapter(
                str(path / f"average-{self.tenant.name}"), f"average-{self.tenant.name}"
            ),
        )

    def adapter_distillation(self) -> None:
        """Distil the teachers into a student."""
        name = self.tenant.name
        self.platform.new_adapter(name, had.DistillationConfig(self.teachers))
        seconds = self.fit("AdapterDistillation", self.args.steps, had.DistillationTrainer, keep_fusion=True)
        self.finish("AdapterDistillation", seconds, lambda path: self.model.save_adapter(str(path / name), name))

    def draw(self, folder: Path) -> None:
        """Write the picture of the attention over the teachers."""
        name = self.tenant.name
        self.model.train_adapter(name)
        examples = self.test.select(range(min(PLOTTED_PAIRS, len(self.test))))
        table = had.teacher_attention(self.model, examples, self.platform.collator)
        figure = had.plot_teacher_attention(table, title=f"Where {name}'s adapter looked")
        figure.savefig(folder / "teacher_attention.png")

    def best_faqs(self, queries: Sequence[str]) -> list[int]:
        """Return the number of the best FAQ of each query, found by the student."""
        self.model.set_active_adapters(self.tenant.name)
        questions = [faq.question for faq in self.tenant.faqs]
        best = []
        for query in queries:
            encoded = self.platform.tokenizer([query] * len(questions), questions, truncation=True)
            (batch,) = self.platform.batches(Dataset.from_dict(dict(encoded)), len(questions))
            scores = self.platform.score(batch)
            best.append(max(range(len(scores)), key=scores.__getitem__))
        return best
