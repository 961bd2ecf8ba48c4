"""The ways to onboard a tenant of an embedding model that are compared, with as many steps each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from adapters import Fuse
from datasets import Dataset
from faq_data import Tenant
from faq_embeddings import EmbeddingPlatform, TenantSoftmaxLoss, labelled_queries
from onboarding_frozen import FROZEN_METHODS, FrozenEncoder, Onboarded
from peft.utils.merge_utils import dare_linear, ties
from pools import NEW, TEACHER_SEED
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from tenant_jobs import Method, halves
from transformers import PrinterCallback, set_seed

import hf_adapter_distillation as had

Start = Literal["teachers", "weighted"]

TIES_DENSITY, DARE_DENSITY = 0.2, 0.5


@dataclass
class Onboarding:
    """A new tenant, and a platform whose model holds the adapters of the others and nothing of the new one.

    Args:
        platform: The embedding model with the adapters of all tenants.
        frozen: The same encoder without adapters.
        fresh_platform: Loads another copy of the encoder.
        tenant: The new tenant.
        labelled: Its labelled queries, perhaps none.
        unlabelled: Other queries of it.
        teachers: The names of the other tenants' adapters.
        others: The other tenants, with as many training queries as the new one.
        shots: The training queries of each FAQ.
        steps: The optimizer steps of a training, all stages together.
        batch_size: The queries of a batch.
        learning_rate: The peak learning rate.
        seed: Of weights and of the order of the data.
        options: Further training arguments of all methods.
    """

    platform: EmbeddingPlatform
    frozen: FrozenEncoder
    fresh_platform: Callable[[], EmbeddingPlatform]
    tenant: Tenant
    labelled: Dataset
    unlabelled: Dataset
    teachers: list[str]
    others: list[Tenant]
    shots: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    options: dict[str, Any]
    questions: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.questions = [faq.question for faq in self.tenant.faqs]

    @property
    def queries(self) -> Dataset:
        """Return the labelled queries, or with none the questions in their place."""
        if len(self.labelled):
            return self.labelled
        return Dataset.from_dict({"query": self.questions, "label": list(range(len(self.questions)))})

    def arguments(self, steps: int | None = None) -> dict[str, Any]:
        """Return the training arguments for all steps, or for fewer."""
        settings = {
            "max_steps": steps or self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
        }
        return settings | self.options

    def fit(self, steps: int | None = None, **arguments: Any) -> None:
        """Train the active setup for all steps, or for fewer."""
        self.platform.train(self.tenant, self.queries, **(self.arguments(steps) | arguments))

    def adapter(self) -> Onboarded:
        """Return the new tenant's adapter, by which the platform encodes while it is active."""
        save = partial(self.platform.model.save_adapter, adapter_name=NEW)
        return Onboarded(self.platform.encode, save=lambda folder: save(f"{folder}/{NEW}"))


def full_fine_tuning(run: Onboarding) -> Onboarded:
    """Train all weights of a copy of the encoder."""
    own = run.fresh_platform()
    own.train(run.tenant, run.labelled, **run.arguments())
    return Onboarded(own.encode, save=own.encoder.save_pretrained)


def plain_adapter(run: Onboarding) -> Onboarded:
    """Train an adapter from its own random start."""
    run.platform.new_adapter(NEW, seed=run.seed)
    run.fit()
    return run.adapter()


def teachers_average(run: Onboarding, trained: bool) -> Onboarded:
    """Train an adapter that starts as the average of the others, with the function of adapters."""
    run.platform.model.average_adapter(NEW, run.teachers)
    run.platform.model.train_adapter(NEW)
    if trained:
        run.fit()
    return run.adapter()


def merge(run: Onboarding, merged: Callable[[list[torch.Tensor]], torch.Tensor], trained: bool) -> Onboarded:
    """Train an adapter that starts at a merge of the teachers' differences from the start that they share."""
    run.platform.new_adapter(NEW, seed=TEACHER_SEED)
    model = run.platform.model
    teachers = [model.get_adapter(name) for name in run.teachers]
    set_seed(run.seed)
    with torch.no_grad():
        for place, modules in model.get_adapter(NEW).items():
            for location, module in modules.items():
                others = [dict(teacher[place][location].named_parameters()) for teacher in teachers]
                for name, parameter in module.named_parameters():
                    parameter += merged([other[name] - parameter for other in others])
    if trained:
        run.fit()
    return run.adapter()


def merged_by_ties(differences: list[torch.Tensor]) -> torch.Tensor:
    """Merge by TIES (https://arxiv.org/abs/2306.01708): the mean of the largest entries that agree in their sign."""
    return ties(differences, torch.ones(len(differences)).to(differences[0]), TIES_DENSITY)


def merged_by_dare(differences: list[torch.Tensor]) -> torch.Tensor:
    """Merge by DARE (https://arxiv.org/abs/2311.03099): the mean, with entries dropped at random."""
    weights = torch.full((len(differences),), 1 / len(differences)).to(differences[0])
    return dare_linear(differences, weights, DARE_DENSITY)


def adapter_fusion(run: Onboarding) -> Onboarded:
    """Train an adapter for half of the steps, then adapters' fusion of all adapters for the other half."""
    model = run.platform.model
    run.platform.new_adapter(NEW, seed=run.seed)
    first, second = halves(run.steps)
    run.fit(first)
    fusion = Fuse(*run.teachers, NEW, name="fusion")
    model.add_adapter_fusion(fusion)
    model.train_adapter_fusion(fusion)
    run.fit(second)

    def save(folder: str) -> None:
        model.save_adapter_fusion(f"{folder}/fusion", fusion)
        model.save_adapter(f"{folder}/{NEW}", NEW)

    return Onboarded(run.platform.encode, save=save)


def multi_task_adapter(run: Onboarding) -> Onboarded:
    """Train one adapter for all tenants, each batch of one tenant, as many queries of each FAQ as the new one has."""
    platform = run.platform
    platform.new_adapter(NEW, seed=run.seed)
    queries = {NEW: run.labelled} | {other.name: labelled_queries(other, "train", run.shots) for other in run.others}
    losses = {
        tenant.name if tenant is not run.tenant else NEW: TenantSoftmaxLoss(
            platform.encoder, [faq.question for faq in tenant.faqs]
        )
        for tenant in (run.tenant, *run.others)
    }
    args = SentenceTransformerTrainingArguments(
        f"{platform.output_dir}/training",
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        multi_dataset_batch_sampler="proportional",
        **run.arguments(),
    )
    trainer = SentenceTransformerTrainer(platform.encoder, args, train_dataset=queries, loss=losses)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return run.adapter()


def adapter_distillation(
    run: Onboarding, config: Callable[..., had.DistillationConfig] = had.DistillationConfig, **arguments: Any
) -> Onboarded:
    """Train the student with the trainer of the package; all other settings are the package's defaults."""
    run.platform.new_adapter(NEW, config(run.teachers), seed=run.seed)
    run.fit(**arguments)
    return run.adapter()


def similarity(run: Onboarding) -> Onboarded:
    """Train the student to match its teachers' similarities between queries, also on unlabelled ones."""
    start: Start = "weighted" if len(run.labelled) else "teachers"  # weights need labels
    config = had.DistillationConfig(run.teachers, student_start=start, objective="similarity")
    run.platform.new_adapter(NEW, config, seed=run.seed)
    run.fit(unlabelled=run.unlabelled)
    return run.adapter()


def untrained_student(run: Onboarding, start: Start) -> Onboarded:
    """Return the student before the first step."""
    run.platform.new_adapter(NEW, had.DistillationConfig(run.teachers, student_start=start), seed=run.seed)
    run.platform.trainer(run.tenant, run.queries, **run.arguments()).fit_start()
    return run.adapter()


RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def _configured(**settings: Any) -> Method:
    """AdapterDistillation with another config than the default."""
    config = partial(had.DistillationConfig, **settings)
    return Method(partial(adapter_distillation, config=config), RATES, rate_of="AdapterDistillation")


METHODS = {
    **FROZEN_METHODS,
    "full fine-tuning": Method(full_fine_tuning, (1e-5, 2e-5, 5e-5, 1e-4)),
    "plain adapter": Method(plain_adapter, RATES),
    "teachers' average, untrained": Method(partial(teachers_average, trained=False), (0.0,), needs_labels=False),
    "teachers' average": Method(partial(teachers_average, trained=True), RATES),
    "TIES, untrained": Method(partial(merge, merged=merged_by_ties, trained=False), (0.0,), needs_labels=False),
    "TIES": Method(partial(merge, merged=merged_by_ties, trained=True), RATES),
    "DARE, untrained": Method(partial(merge, merged=merged_by_dare, trained=False), (0.0,), needs_labels=False),
    "DARE": Method(partial(merge, merged=merged_by_dare, trained=True), RATES),
    "multi-task adapter": Method(multi_task_adapter, RATES, rate_of="plain adapter"),
    "AdapterFusion": Method(adapter_fusion, RATES),
    "AdapterDistillation, untrained": Method(partial(untrained_student, start="teachers"), (0.0,), needs_labels=False),
    "AdapterDistillation": Method(adapter_distillation, RATES),
    "AdapterDistillation: uniform": _configured(student_start="teachers"),
    "AdapterDistillation: weights alone": Method(partial(untrained_student, start="weighted"), (0.0,)),
    "AdapterDistillation: weighted start": Method(partial(adapter_distillation, distillation_start=1.0), RATES),
    "AdapterDistillation: exact": Method(partial(adapter_distillation, distillation_share=1.0), RATES),
    "AdapterDistillation: lean": _configured(fusion_rank=32),
    "AdapterDistillation: weight 1": Method(
        partial(adapter_distillation, distillation_weight=1.0), RATES, rate_of="AdapterDistillation"
    ),
    "AdapterDistillation: similarity": Method(similarity, RATES, needs_labels=False),
    "AdapterDistillation: best 3 teachers": _configured(teacher_selection=3),
    "AdapterDistillation: weights per layer": _configured(weights_per_layer=True),
    "AdapterDistillation: paper": Method(
        partial(adapter_distillation, config=had.DistillationConfig.paper), RATES, rate_of="plain adapter"
    ),
}
