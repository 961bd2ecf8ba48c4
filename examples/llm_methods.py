"""The ways to give a new tenant a LoRA, each of which ends in a folder that plain PEFT loads."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import adapters
from faq_data import Tenant
from inputs import load_model
from llm_model import (
    check_projections,
    new_lora,
    remove,
    stored_megabytes,
    student_config,
    with_adapter,
)
from llm_tasks import TASKS, Message, TaskDistillationTrainer, TaskTrainer, messages_of
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block
from hf_adapter_distillation.student.preparing import start_at_weights

MERGES: dict[str, dict[str, Any]] = {  # of PEFT, with their options
    "svd": {"svd_full_matrices": False},
    "ties": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "cat": {},
}
FUSION_RANK = 32  # whole matrices in each projection would hold more weights than SmolLM2
EXPORT_TOLERANCE = 1e-6  # relative, in float32


class Outcome(NamedTuple):
    """An adapter of the new tenant in a folder, or none, and the seconds that it took."""

    folder: Path | None
    seconds: float


class Choice(NamedTuple):
    """The best setting of a way, its outcome, and the validation quality of each setting, if there are several."""

    setting: float
    outcome: Outcome
    searched: dict[float, float]


class Onboarding:
    """The rows of a task for a new tenant.

    Every adapter is evaluated in plain PEFT. Where a way has several settings (learning rates, or weights of a merge),
    the validation messages choose one, and only that one meets the test messages.

    Args:
        args: The arguments of the example.
        task: The name of the task.
        model: The folder or id of the language model.
        tokenizer: Its tokenizer.
        new: The new tenant.
        existing: The tenants that have a LoRA, or get one first.
    """

    def __init__(
        self,
        args: Any,
        task: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        new: Tenant,
        existing: Sequence[Tenant],
    ) -> None:
        self.args, self.name, self.path, self.tokenizer = args, task, model, tokenizer
        self.kind: Any = TASKS[task]
        self.task = self.kind(tokenizer, new, args.shots)
        self.new, self.existing = new, existing
        self.batch_size = args.answers_batch_size if task == "answers" else args.batch_size
        self.folder = Path(args.output_dir) / task
        self.teachers = [self.folder / "teachers" / tenant.name for tenant in existing]
        self.base = self.load()
        check_projections(self.base)
        self.rows: dict[str, dict[str, Any]] = {}
        self.weights: had.TeacherWeights | None = None
        self.start_seconds = 0.0
        self.export_difference: float | None = None
        self.started: TaskDistillationTrainer | None = None
        self.objective = "features"

    def load(self) -> Any:
        """Load the language model, with its head or without it, as the task needs it."""
        model = load_model(self.kind.model_class.from_pretrained, self.path, dtype="float32")
        return model.requires_grad_(False).eval()

    def settings(self, cls: type[TrainingArguments], steps: int, rate: float, **more: Any) -> Any:
        """Return training arguments."""
        return cls(
            str(self.folder / "training"),
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=self.batch_size,
            seed=self.args.seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            **more,
        )

    def train_teachers(self) -> None:
        """Train a LoRA of PEFT for each existing tenant that has none in the output folder."""
        for number, (tenant, folder) in enumerate(zip(self.existing, self.teachers, strict=True), start=1):
            if not (folder / "adapter_config.json").is_file():
                print(f"{self.name}, LoRA {number} of {len(self.teachers)}, {tenant.name}", flush=True)
                self.train_teacher(tenant, folder)

    def train_teacher(self, tenant: Tenant, folder: Path) -> None:
        """Train a LoRA of PEFT for an existing tenant."""
        task = self.kind(self.tokenizer, tenant, self.args.teacher_queries)
        model = new_lora(self.base, self.args.rank, self.args.seed)
        args = self.settings(TrainingArguments, self.args.teacher_steps, self.args.teacher_learning_rate)
        TaskTrainer(model, args, task).train()
        save(model, folder)
        remove(model)

    # The ways

    def no_adapter(self, setting: float) -> Outcome:
        """Take the language model as it is."""
        return Outcome(None, 0.0)

    def plain_lora(self, rate: float) -> Outcome:
        """Train a new LoRA with PEFT."""
        model = new_lora(self.base, self.args.rank, self.args.seed)
        folder, seconds = self.folder_of("plain LoRA", rate), self.fit(model, rate)
        save(model, folder)
        remove(model)
        return Outcome(folder, seconds)

    def merge(self, kind: str, weight: float) -> Outcome:
        """Merge the LoRA of the other tenants with PEFT, all with one weight."""
        folder = self.folder_of(f"merge: {kind}", weight)
        with with_adapter(self.base, self.teachers[0]) as model:
            for number, teacher in enumerate(self.teachers[1:]):
                model.load_adapter(str(teacher), f"other{number}")
            names = list(model.peft_config)
            set_seed(self.args.seed)
            began = time.perf_counter()
            model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **MERGES[kind])
            seconds = time.perf_counter() - began
            save(model, folder, "merged")
        return Outcome(folder, seconds)

    def start_student(self, config: had.DistillationConfig) -> nn.Module:
        """Return a new model with adapters that has a student, at the average of its teachers."""
        set_seed(self.args.seed)
        model = self.load()
        adapters.init(model)
        model.add_adapter(self.new.name, config=student_config(self.args.rank), distill_from=config)
        return model

    def average(self, rate: float) -> Outcome:
        """Train a LoRA that starts at the average of the teachers' updates with PEFT."""
        folder = self.folder_of("average, trained", rate)
        teachers = [str(folder) for folder in self.teachers]
        began = time.perf_counter()
        model = self.start_student(had.DistillationConfig(teachers, student_start="average"))
        had.save_adapter_as_peft(model, self.new.name, folder)
        return self.train_further(folder, folder, rate, time.perf_counter() - began)

    def best_merge(self, rate: float) -> Outcome:
        """Train the merge that is best on the validation messages with PEFT."""
        merges = {method: row for method, row in self.rows.items() if method.startswith("merge: ")}
        if not all(row["searched"] for row in merges.values()):
            raise ValueError(f"The merges in {self.folder} have no validation accuracy; choose another --output_dir.")
        best = max(merges, key=lambda method: max(merges[method]["searched"].values()))
        start = self.folder_of(best, merges[best]["setting"])
        seconds = merges[best]["train_s"]
        return self.train_further(start, self.folder_of("best merge, trained", rate), rate, seconds)

    def train_further(self, start: Path, folder: Path, rate: float, seconds: float) -> Outcome:
        """Train a saved LoRA with PEFT."""
        with with_adapter(self.base, start, trainable=True) as model:
            seconds += self.fit(model, rate)
            save(model, folder)
        return Outcome(folder, seconds)

    def fit(self, model: nn.Module, rate: float) -> float:
        """Train the LoRA of a model on the messages of the new tenant; return the seconds."""
        trainer = TaskTrainer(model, self.settings(TrainingArguments, self.args.steps, rate), self.task)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began

    def learn_weights(self) -> TaskDistillationTrainer:
        """Return the trainer of a student at the weighted mean of its teachers; the weights are learned once."""
        began = time.perf_counter()
        teachers = [str(folder) for folder in self.teachers]
        model = self.start_student(had.DistillationConfig(teachers, objective=self.objective, fusion_rank=FUSION_RANK))
        model.train_adapter(self.new.name)
        if self.weights is not None:
            start_at_weights(model, active_block(model), self.weights)
        more = {"weighing_steps": self.args.weighing_steps}
        args = self.settings(had.DistillationTrainingArguments, self.args.steps, self.args.learning_rates[0], **more)
        trainer = TaskDistillationTrainer(model, args, task=self.task)
        if self.weights is None:
            trainer.fit_start()
            self.weights = had.distillation_of(model, self.new.name).weights
            self.start_seconds = time.perf_counter() - began
        return trainer

    def learned_weights(self, setting: float) -> Outcome:
        """Take the student before its first step, as LoraHub combines LoRA by weights that few labels teach."""
        self.started = self.learn_weights()
        folder = self.folder_of("learned weights", setting)
        had.save_adapter_as_peft(self.started.model, self.new.name, folder)
        return Outcome(folder, self.start_seconds)

    def distilled(self, rate: float) -> Outcome:
        """Distil the teachers into a student, and check that plain PEFT computes the same with its export."""
        trainer, self.started = self.started or self.learn_weights(), None
        trainer.args.learning_rate = rate
        began = time.perf_counter()
        trainer.train()
        seconds = self.start_seconds + time.perf_counter() - began
        folder = self.folder_of("AdapterDistillation", rate)
        had.save_adapter_as_peft(trainer.model, self.new.name, folder)
        own = self.task.outputs(trainer.model.eval())
        with with_adapter(self.base, folder) as model:
            difference = ((own - self.task.outputs(model)).norm() / own.norm()).item()
        print(f"{self.name}: the student differs in plain PEFT by {difference:.1e} of its outputs", flush=True)
        if not difference <= EXPORT_TOLERANCE:
            raise RuntimeError(f"The exported student in {folder} differs by {difference:.1e} in PEFT.")
        self.export_difference = max(difference, self.export_difference or 0.0)
        return Outcome(folder, seconds)

    # The rows

    def folder_of(self, method: str, setting: float) -> Path:
        """Return the folder of an adapter."""
        return self.folder / f"{method.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{setting:g}"

    def choose(self, method: str) -> Choice:
        """Run a way with each of its settings, and return the one that is best on validation messages."""
        validation = messages_of(self.new, "validation", self.args.validation_queries)
        choices, outcomes, searched = self.choices(method), {}, {}
        for setting in choices:
            print(f"{self.name}, {method}, {setting:g}", flush=True)
            outcomes[setting] = WAYS[method](self, setting)
            if len(choices) > 1 or (method.startswith("merge: ") and "best merge, trained" in self.args.methods):
                searched[setting] = self.score(outcomes[setting], validation).quality
        best = max(searched or choices, key=lambda setting: searched.get(setting, 0.0))
        return Choice(best, outcomes[best], searched)

    def row(self, method: str) -> dict[str, Any]:
        """Return the row of a way, with the best of its settings."""
        best, outcome, searched = self.choose(method)
        score = self.score(outcome, messages_of(self.new, "test", self.args.test_queries))
        return {
            self.task.quality: score.quality,
            "setting": best,
            self.task.speed: score.per_second,
            "MB": stored_megabytes(outcome.folder),
            "train_s": outcome.seconds,
            "searched": {f"{setting:g}": quality for setting, quality in searched.items()},
        }

    def choices(self, method: str) -> Sequence[float]:
        """Return the settings of a way: learning rates, weights of each teacher in a merge, or 0 for none."""
        if method.startswith("merge: "):
            share = 1 / len(self.teachers)
            return (share,) if self.args.quick or share == 1 else (share, 1.0)
        return (0.0,) if method in ("no adapter", "learned weights") else self.args.learning_rates

    def score(self, outcome: Outcome, messages: list[Message]) -> Any:
        """Evaluate an adapter in plain PEFT."""
        with with_adapter(self.base, outcome.folder) as model:
            return self.task.score(model, messages)


def save(model: Any, folder: Path, adapter: str = "default") -> None:
    """Save an adapter of PEFT in a folder; PEFT itself writes all but the default one into a folder below."""
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=[adapter], save_embedding_layers=False)
        source = Path(saved) / adapter if adapter != "default" else Path(saved)
        shutil.copytree(source, folder, dirs_exist_ok=True)


WAYS: dict[str, Callable[[Onboarding, float], Outcome]] = {
    "no adapter": Onboarding.no_adapter,
    "plain LoRA": Onboarding.plain_lora,
    **{f"merge: {kind}": partial(lambda run, weight, kind: run.merge(kind, weight), kind=kind) for kind in MERGES},
    "learned weights": Onboarding.learned_weights,
    "average, trained": Onboarding.average,
    "best merge, trained": Onboarding.best_merge,
    "AdapterDistillation": Onboarding.distilled,
}
