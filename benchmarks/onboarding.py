"""The ways to onboard a new tenant that `streaming_tenants.py` compares, all with the same number of steps."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adapters import AdapterTrainer, Fuse
from datasets import Dataset, concatenate_datasets
from transformers import Trainer, set_seed

import hf_adapter_distillation as had

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import faq_retrieval as example  # noqa: E402

NEW = "new"  # the name of the new tenant's adapter and head
Save = Callable[[str], None]


@dataclass
class Onboarding:
    """A new tenant, and a platform whose model holds the adapters of the others and nothing of the new one.

    Args:
        platform: The platform; its arguments have the learning rate, the batch size and the seed.
        teachers: The names of the other tenants' adapters.
        train: The training pairs of the new tenant.
        others: Training pairs of the other tenants, as many of each as the new one has.
        steps: The optimizer steps of the training, all stages together.
        options: Further training arguments of all methods.
        seconds: What the training took, so far.
    """

    platform: example.Platform
    teachers: list[str]
    train: Dataset
    others: list[Dataset]
    steps: int
    options: dict[str, Any]
    seconds: float = 0.0

    def fit(
        self, share: float = 1.0, dataset: Dataset | None = None, trainer_cls: type = AdapterTrainer, **options: Any
    ) -> None:
        """Trains the active setup for a share of the steps."""
        options = {"max_steps": round(share * self.steps), "disable_tqdm": True, **self.options, **options}
        self.seconds += self.platform.train(dataset or self.train, 1, trainer_cls, **options)

    def add(self, distill_from: had.DistillationConfig | None = None, config: str = example.ADAPTER) -> None:
        """Adds the new tenant's adapter and activates it for training."""
        set_seed(self.platform.args.seed)
        self.platform.model.add_adapter(NEW, config=config, distill_from=distill_from)
        if distill_from is None or distill_from.student_start == "random":
            self.platform.add_head(NEW)
        self.platform.model.train_adapter(NEW)

    def save(self, folder: str) -> None:
        """Saves the new tenant's adapter and head."""
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
    """An adapter from its own random start."""
    run.add()
    run.fit()
    return run.save


def teachers_average(run: Onboarding, trained: bool) -> Save:
    """An adapter and a head that start as the average of the others', with adapters' own functions."""
    set_seed(run.platform.args.seed)
    model = run.platform.model
    model.average_adapter(NEW, run.teachers)
    model.average_head(NEW, run.teachers)
    model.train_adapter(NEW)
    model.active_head = NEW
    if trained:
        run.fit()
    return run.save


def adapter_fusion(run: Onboarding) -> Save:
    """An adapter of its own for half of the steps, then adapters' fusion of all adapters for the other half."""
    model = run.platform.model
    run.add()
    run.fit(0.5)
    fusion = Fuse(*run.teachers, NEW, name="fusion")
    model.add_adapter_fusion(fusion)
    model.train_adapter_fusion(fusion)
    model.active_head = NEW
    run.fit(0.5)

    def save(folder: str) -> None:
        model.save_adapter_fusion(f"{folder}/fusion", fusion)
        run.save(folder)

    return save


def multi_task_adapter(run: Onboarding) -> Save:
    """One adapter and head for all tenants, trained on the pairs of all of them."""
    run.add()
    run.fit(dataset=concatenate_datasets([run.train, *run.others]))
    return run.save


def adapter_distillation(
    run: Onboarding, config: dict[str, Any] | None = None, arguments: dict[str, Any] | None = None
) -> Save:
    """The student of `DistillationTrainer`; settings that are not given are the package's defaults."""
    run.add(had.DistillationConfig(run.teachers, **(config or {})))
    run.fit(trainer_cls=had.DistillationTrainer, keep_fusion=True, **(arguments or {}))
    return run.save


def untrained_student(run: Onboarding) -> Save:
    """The student where `DistillationTrainer` starts it: without a step, and without a label of the new tenant."""
    run.add(had.DistillationConfig(run.teachers))
    platform = run.platform
    trainer = had.DistillationTrainer(
        model=platform.model,
        args=platform.training_arguments(1, cls=had.DistillationTrainingArguments, **run.options),
        train_dataset=run.train.remove_columns("labels"),
        data_collator=platform.collator,
    )
    began = time.perf_counter()
    trainer.fit_start()
    run.seconds = time.perf_counter() - began
    return run.save


class Method(NamedTuple):
    """A method, the learning rates that it chooses from, and the method whose choice it takes instead of its own."""

    onboard: Callable[[Onboarding], Save]
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    rate_of: str = ""


def _variant(rate_of: str = "AdapterDistillation", **settings: Any) -> Method:
    """AdapterDistillation with other settings than the defaults, those of the config or those of the training."""
    of_config = {name: settings.pop(name) for name in ("carrier", "student_start") if name in settings}
    return Method(partial(adapter_distillation, config=of_config, arguments=settings), rate_of=rate_of)


METHODS = {
    "full fine-tuning": Method(full_fine_tuning, rates=(5e-5, 1e-4, 2e-4)),
    "plain adapter": Method(plain_adapter),
    "teachers' average, untrained": Method(partial(teachers_average, trained=False), rates=(0.0,)),
    "teachers' average": Method(partial(teachers_average, trained=True)),
    "AdapterFusion": Method(adapter_fusion, rates=(5e-4, 1e-3, 2e-3)),
    "multi-task adapter": Method(multi_task_adapter, rate_of="plain adapter"),
    "AdapterDistillation, untrained": Method(untrained_student, rates=(0.0,)),
    "AdapterDistillation": Method(adapter_distillation),
    "AdapterDistillation: paper": _variant("plain adapter", carrier="student", student_start="random"),
    "AdapterDistillation: fused": _variant(carrier="fused"),
    "AdapterDistillation: mixed": _variant(carrier="mixed"),
    "AdapterDistillation: dual": _variant(carrier="dual"),
    "AdapterDistillation: fused, random start": _variant("plain adapter", carrier="fused", student_start="random"),
    "AdapterDistillation: mixed, random start": _variant("plain adapter", carrier="mixed", student_start="random"),
    "AdapterDistillation: dual, random start": _variant("plain adapter", carrier="dual", student_start="random"),
    "AdapterDistillation: average start": _variant(student_start="average"),
    "AdapterDistillation: stage 2 from 0.25": _variant(distillation_start=0.25),
    "AdapterDistillation: stage 2 from 0.5": _variant(distillation_start=0.5),
    "AdapterDistillation: never stage 2": _variant(distillation_start=1.0),
    "AdapterDistillation: weight 0.1": _variant(distillation_weight=0.1),
    "AdapterDistillation: weight 3": _variant(distillation_weight=3.0),
}
