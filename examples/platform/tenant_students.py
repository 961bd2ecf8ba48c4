"""The student of one tenant: train it from the platform's teachers, save it as a whole, find it again.

`StudentMaker` holds the base model with the teachers and makes students one after another. A student depends on its
tenant and the settings alone, not on the students before it or on the process.
"""

import gc
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_adapter_distillation as had

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from faq_data import Tenant, check_names, check_unicode  # noqa: E402
from faq_embeddings import EmbeddingPlatform, labelled_queries  # noqa: E402
from inputs import read_json  # noqa: E402
from student_folder import FAQS_NAME  # noqa: E402

from hf_adapter_distillation.student.digests import adapter_digest  # noqa: E402
from hf_adapter_distillation.teachers.loading import load_saved_adapter, name_from_folder  # noqa: E402

SETTINGS_NAME, PARTIAL = "onboarding.json", ".partial"


@dataclass(frozen=True)
class Settings:
    """What decides about the students of a run beside their tenants.

    Args:
        threads: Threads of torch for a student: sums of another number of threads are rounded in another way.
    """

    teachers: str
    model: str | None
    steps: int
    learning_rate: float
    batch_size: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """The end of a tenant's onboarding, with its seconds, or why there is no student."""

    tenant: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    error: str | None = None


def teacher_folders(teachers: str) -> list[Path]:
    """Return the folders of the saved adapters in a folder.

    Raises:
        ValueError: If there is no folder, or no adapter in it.
    """
    if not Path(teachers).is_dir():
        raise ValueError(f"--teachers {teachers} is no folder; give one with a folder for each saved adapter.")
    folders = sorted(path for path in Path(teachers).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"--teachers {teachers} holds no adapters; give each one a folder made by save_adapter.")
    return folders


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; the type stands before it, but for wrong values and files."""
    lines = str(error).splitlines() or [""]
    return lines[0] if isinstance(error, ValueError | OSError) and lines[0] else f"{type(error).__name__}: {lines[0]}"


class StudentMaker:
    """The base model with the teachers of the platform, which makes the students of tenants.

    Args:
        settings: The settings of all students.
        output: The folder of the students.

    Raises:
        ValueError: If a teacher is missing, damaged, or made for another base model.
        OSError: If the base model cannot be loaded.
    """

    def __init__(self, settings: Settings, output: str) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        logging.getLogger("adapters").setLevel(logging.ERROR)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        torch.set_num_threads(settings.threads)
        self.settings, self.output = settings, Path(output)
        self.teachers: list[str] = []
        self.platform: EmbeddingPlatform | None = None
        self.load()

    def load(self) -> EmbeddingPlatform:
        """Load the base model and the teachers, if that is not done yet."""
        if self.platform is None:
            gc.unfreeze()  # so that a model that was dropped is collected
            folder = str(Path(tempfile.gettempdir()) / "onboarding")  # nothing is written there
            platform, names = EmbeddingPlatform(self.settings.model, folder), []
            for path in teacher_folders(self.settings.teachers):
                label = f"Teacher {str(path)!r}"
                names.append(name_from_folder(path, label))
                load_saved_adapter(platform.model, path, names[-1], label)
            self.platform, self.teachers = platform, names
        return self.platform

    def describe(self) -> dict[str, Any]:
        """Return the settings, with the digest of each teacher's weights for the folder of the teachers."""
        settings = {name: value for name, value in asdict(self.settings).items() if name != "teachers"}
        model = self.load().model
        return settings | {f"teacher {name}": adapter_digest(model, name)[:12] for name in self.teachers}

    def ready(self) -> None:
        """Leave what is loaded out of the collections of garbage, one of which begins each training.

        A worker that answers has loaded its model.
        """
        gc.collect()
        gc.freeze()

    def make(self, tenant: Tenant) -> Outcome:
        """Train the student of a tenant on all its training queries, and save it.

        Returns:
            The outcome; what is wrong with the tenant is its error.

        Raises:
            OSError: If a file cannot be read or written, which may go well the next time.
        """
        began, cpu_began, settings = time.perf_counter(), time.process_time(), self.settings
        try:
            check_unicode(tenant)
            if self.platform is None:
                self.load()
                self.ready()
            platform = self.load()
            queries = labelled_queries(tenant, "train", max(len(faq.train) for faq in tenant.faqs))
            platform.new_adapter(tenant.name, had.DistillationConfig(self.teachers), settings.seed)
            platform.train(
                tenant,
                queries,
                max_steps=settings.steps,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                seed=settings.seed,
            )
            save_student(platform, tenant, self.output)
            platform.model.delete_adapter(tenant.name)
        except BaseException as error:
            self.platform = None  # a training that broke off may leave anything on the model
            if not isinstance(error, Exception) or isinstance(error, OSError):
                raise
            return Outcome(tenant.name, error=first_line(error))
        return Outcome(tenant.name, time.perf_counter() - began, time.process_time() - cpu_began)


# What is saved


def choose_queries(tenants: Sequence[Tenant], shots: int | None, seed: int) -> list[Tenant]:
    """Return the tenants with at most `shots` training queries of each FAQ, whatever other tenants there are.

    Raises:
        ValueError: If a tenant has fewer than two FAQs, or its name makes no folder or stands twice.
    """
    check_names(tenants)
    chosen = []
    for tenant in tenants:
        faqs = []
        for faq in tenant.faqs:
            order = random.Random(ascii([seed, tenant.name, faq.question]))
            queries = order.sample(sorted(faq.train), min(shots or len(faq.train), len(faq.train)))
            faqs.append(replace(faq, train=queries))
        chosen.append(replace(tenant, faqs=faqs))
    return chosen


def saved_faqs(tenant: Tenant) -> list[dict[str, Any]]:
    """Return the FAQs of a tenant as they are saved with its student."""
    return [{"question": faq.question, "queries": faq.train} for faq in tenant.faqs]


def write_faqs(tenant: Tenant, folder: Path) -> None:
    """Write the FAQs of a tenant into the folder of its student."""
    text = json.dumps(saved_faqs(tenant), indent=1, ensure_ascii=False)
    (folder / FAQS_NAME).write_text(f"{text}\n", encoding="utf-8")


def save_student(platform: EmbeddingPlatform, tenant: Tenant, output: Path) -> None:
    """Write a student with its FAQs; the folder gets its name only when it is complete.

    Raises:
        ValueError: If the training left weights that are not finite.
        OSError: If a file cannot be written.
    """
    modules = [module for place in platform.model.get_adapter(tenant.name).values() for module in place.values()]
    if not all(bool(parameter.isfinite().all()) for module in modules for parameter in module.parameters()):
        raise ValueError(f"The student of {tenant.name!r} has weights that are not finite; lower --learning_rate.")
    partial = output / f".{tenant.name}-{uuid.uuid4().hex}{PARTIAL}"
    partial.mkdir()
    platform.model.save_adapter(str(partial), tenant.name, use_safetensors=True)
    write_faqs(tenant, partial)
    for path in partial.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    try:
        partial.rename(output / tenant.name)
    except OSError:
        if not (output / tenant.name).is_dir():
            raise
        shutil.rmtree(partial)  # a worker that was believed lost has saved the same student


def remove_partial(output: Path) -> None:
    """Remove the students that workers have not finished."""
    for folder in output.glob(f".*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def open_output(output: Path, about: dict[str, Any], tenants: Sequence[Tenant]) -> list[Tenant]:
    """Create the folder of the students, or go on in it; return the tenants that have no student yet.

    Args:
        output: The folder.
        about: The settings and the digests of the teachers, the same for all students of a folder.
        tenants: All tenants.

    Raises:
        ValueError: If the folder holds students of other settings or FAQs, or anything else.
    """
    path, remedy = output / SETTINGS_NAME, "choose another folder"
    if path.is_file():
        before = read_json(path, dict, remedy)
        for key in before | about:
            old, new = before.get(key), about.get(key)
            if old != new:
                raise ValueError(f"--output {output} has students with {key} {old!r}, not {new!r}; {remedy}.")
    elif output.exists() and (not output.is_dir() or any(not path.name.startswith(".") for path in output.iterdir())):
        raise ValueError(f"--output {output} is there already, and not from an onboarding; {remedy}.")
    missing = [tenant for tenant in tenants if not (output / tenant.name).exists()]
    for tenant in tenants:
        faqs = output / tenant.name / FAQS_NAME
        if tenant not in missing and read_json(faqs, list, f"remove {faqs.parent}") != saved_faqs(tenant):
            raise ValueError(f"{output / tenant.name} has other FAQs than the tenant now; remove the folder.")
    output.mkdir(parents=True, exist_ok=True)
    remove_partial(output)
    unnamed = output / f".{SETTINGS_NAME}"
    unnamed.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    unnamed.replace(path)
    return missing
