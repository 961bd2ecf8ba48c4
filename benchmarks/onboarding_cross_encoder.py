"""The ways to onboard a new tenant of a cross-encoder that are compared, with as many steps each."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from adapters import AdapterTrainer
from datasets import Dataset, concatenate_datasets
from faq_cross_encoder import CrossEncoderPlatform
from onboarding_frozen import FROZEN_METHODS
from pools import NEW
from tenant_jobs import Method, halves
from transformers import Trainer, set_seed

import hf_adapter_distillation as had

Save = Callable[[str], None]


@dataclass
class Onboarding:
    """A new tenant, and a platform whose model holds the adapters of the others and nothing of the new one.

    Args:
        platform: The platform; its arguments have the learning rate, the batch size and the seed.
        teachers: The names of the other tenants' adapters.
        train: The training pairs of the new tenant.
        others: Training pairs of the other tenants, as many of each as the new one has.
        query_log: Makes pairs of other queries of the new tenant, each with all FAQs.
        steps: The optimizer steps of the training, all stages together.
        options: Further training arguments of all methods.
        seconds: What the training took, so far.
    """

    platform: CrossEncoderPlatform
    teachers: list[str]
    train: Dataset
    others: list[Dataset]
    query_log: Callable[[], Dataset]
    steps: int
    options: dict[str, Any]
    seconds: float = 0.0

    def fit(
        self,
        steps: int | None = None,
        dataset: Dataset | None = None,
        trainer_cls: type = AdapterTrainer,
        **options: Any,
    ) -> None:
        """Train the active setup for all steps, or for fewer."""
        options = {"max_steps": steps or self.steps, **self.options, **options}
        self.seconds += self.platform.train(dataset or self.train, 1, trainer_cls, **options)

    def save(self, folder: str) -> None:
        """Save the new tenant's adapter and head."""
        self.platform.model.save_adapter(f"{folder}/{NEW}", NEW)


def full_fine_tuning(run: Onboarding) -> Save:
    """All weights of a copy of the base model."""
    model = run.platform.model
    for teacher in run.teachers:
        model.delete_adapter(teacher)
        model.delete_head(teacher)
    set_seed(run.platform.args.seed)
    run.platform.add_head(NEW)
    run.fit(trainer_cls=Trainer, label_names=["labels"])
    return model.save_pretrained


def plain_adapter(run: Onboarding) -> Save:
    """Train an adapter from its own random start."""
    run.platform.new_adapter(NEW)
    run.fit()
    return run.save


def teachers_average(run: Onboarding, trained: bool) -> Save:
    """Train an adapter and a head that start as the average of the others', with adapters' own functions."""
    run.platform.average(NEW, run.teachers)
    if trained:
        run.fit()
    return run.save


def adapter_fusion(run: Onboarding) -> Save:
    """Train an adapter for half of the steps, then adapters' fusion of all adapters for the other half."""
    run.platform.new_adapter(NEW)
    first, second = halves(run.steps)
    run.fit(first)
    fusion = run.platform.fuse(NEW, run.teachers)
    run.fit(second)

    def save(folder: str) -> None:
        run.platform.model.save_adapter_fusion(f"{folder}/fusion", fusion)
        run.save(folder)

    return save


def multi_task_adapter(run: Onboarding) -> Save:
    """One adapter and head for all tenants, trained on the pairs of all of them."""
    run.platform.new_adapter(NEW)
    run.fit(dataset=concatenate_datasets([run.train, *run.others]))
    return run.save


def adapter_distillation(
    run: Onboarding, config: Callable[..., had.DistillationConfig] = had.DistillationConfig, **arguments: Any
) -> Save:
    """Train the student with `DistillationTrainer`; all other settings are the package's defaults."""
    run.platform.new_adapter(NEW, config(run.teachers))
    run.fit(trainer_cls=had.DistillationTrainer, keep_fusion=True, **arguments)
    return run.save


def with_query_log(run: Onboarding) -> Save:
    """Train the student with `DistillationTrainer`, also on unlabelled queries."""
    run.platform.new_adapter(NEW, had.DistillationConfig(run.teachers))
    platform = run.platform
    trainer = had.DistillationTrainer(
        model=platform.model,
        args=platform.training_arguments(
            1, cls=had.DistillationTrainingArguments, max_steps=run.steps, keep_fusion=True, **run.options
        ),
        train_dataset=run.train,
        distillation_dataset=run.query_log().remove_columns("labels"),
        data_collator=platform.collator,
    )
    began = time.perf_counter()
    trainer.train()
    run.seconds = time.perf_counter() - began
    return run.save


def untrained_student(run: Onboarding, start: Literal["teachers", "weighted"]) -> Save:
    """Return the student at the start of `DistillationTrainer`, before any step; only weights need labels."""
    run.platform.new_adapter(NEW, had.DistillationConfig(run.teachers, student_start=start))
    platform = run.platform
    trainer = had.DistillationTrainer(
        model=platform.model,
        args=platform.training_arguments(1, cls=had.DistillationTrainingArguments, **run.options),
        train_dataset=run.train if start == "weighted" else run.train.remove_columns("labels"),
        data_collator=platform.collator,
    )
    began = time.perf_counter()
    trainer.fit_start()
    run.seconds = time.perf_counter() - began
    return run.save


RATES = (1e-3, 2e-3, 4e-3)


def _configured(rate_of: str = "AdapterDistillation", **settings: Any) -> Method:
    """AdapterDistillation with another config than the default."""
    config = partial(had.DistillationConfig, **settings)
    return Method(partial(adapter_distillation, config=config), RATES, rate_of)


def _trained(**arguments: Any) -> Method:
    """AdapterDistillation with other training arguments than the defaults."""
    return Method(partial(adapter_distillation, **arguments), RATES, "AdapterDistillation")


METHODS = {
    "frozen encoder": FROZEN_METHODS["frozen encoder"],
    "frozen centroid": FROZEN_METHODS["frozen centroid"],
    "full fine-tuning": Method(full_fine_tuning, (5e-5, 1e-4, 2e-4)),
    "plain adapter": Method(plain_adapter, RATES),
    "teachers' average, untrained": Method(partial(teachers_average, trained=False), (0.0,), needs_labels=False),
    "teachers' average": Method(partial(teachers_average, trained=True), RATES),
    "AdapterFusion": Method(adapter_fusion, (5e-4, 1e-3, 2e-3)),
    "multi-task adapter": Method(multi_task_adapter, RATES, "plain adapter"),
    "AdapterDistillation, untrained": Method(partial(untrained_student, start="teachers"), (0.0,), needs_labels=False),
    "AdapterDistillation": Method(adapter_distillation, RATES),
    "AdapterDistillation: paper": Method(
        partial(adapter_distillation, config=had.DistillationConfig.paper), RATES, "plain adapter"
    ),
    "AdapterDistillation: uniform": _configured(student_start="teachers"),
    "AdapterDistillation: weights alone": Method(partial(untrained_student, start="weighted"), (0.0,)),
    "AdapterDistillation: fused": _configured("plain adapter", carrier="fused"),
    "AdapterDistillation: mixed": _configured("plain adapter", carrier="mixed"),
    "AdapterDistillation: fused, higher rate": _configured(carrier="fused"),
    "AdapterDistillation: mixed, higher rate": _configured(carrier="mixed"),
    "AdapterDistillation: dual": _configured(carrier="dual"),
    "AdapterDistillation: fused, random start": _configured("plain adapter", carrier="fused", student_start="random"),
    "AdapterDistillation: mixed, random start": _configured("plain adapter", carrier="mixed", student_start="random"),
    "AdapterDistillation: dual, random start": _configured("plain adapter", carrier="dual", student_start="random"),
    "AdapterDistillation: average start": _configured(student_start="average"),
    "AdapterDistillation: cosine": _configured(objective="cosine"),
    "AdapterDistillation: task-specific": _configured(objective="task_specific"),
    "AdapterDistillation: features and logits": _configured(objective={"features": 1.0, "logits": 1.0}),
    "AdapterDistillation: features and cross-task": _configured(objective={"features": 1.0, "cross_task": 1.0}),
    "AdapterDistillation: best 3 teachers": _configured(teacher_selection=3),
    "AdapterDistillation: query log": Method(with_query_log, RATES, "AdapterDistillation"),
    "AdapterDistillation: stage 2 from 0.25": _trained(distillation_start=0.25),
    "AdapterDistillation: stage 2 from 0.5": _trained(distillation_start=0.5),
    "AdapterDistillation: never stage 2": _trained(distillation_start=1.0),
    "AdapterDistillation: weight 0.1": _trained(distillation_weight=0.1),
    "AdapterDistillation: weight 1": _trained(distillation_weight=1.0),
    "AdapterDistillation: weight 3": _trained(distillation_weight=3.0),
}
