"""Teachers and runs of `streaming_tenants.py` on the language model of `examples/llm_skills.py`, with LoRA."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from embedding_runs import measure, measured
from onboarding_frozen import FROZEN_METHODS, FrozenEncoder, Onboarded
from pools import (
    NEW,
    TEACHER_SEED,
    Arrival,
    arrival,
    keep_teacher,
    learned_weights,
    randomize,
    shots_of,
    teacher_tenant,
)
from safetensors.torch import load_file, save_file
from tenant_jobs import Arguments, Job, Method, finished
from transformers import PreTrainedTokenizerBase

import llm_methods  # isort: skip
from faq_embeddings import labelled_queries  # isort: skip
from llm_model import CACHE, load_tokenizer, packaged_model, with_adapter  # isort: skip
from llm_tasks import embed_texts  # isort: skip

RANK = 8


@dataclass
class Settings:
    """What `llm_methods.Onboarding` reads."""

    output_dir: str
    shots: int
    learning_rates: list[float]
    batch_size: int
    seed: int
    steps: int
    validation_queries: int
    weighing_steps: int = 16
    teacher_queries: int = 0
    teacher_steps: int = 0
    teacher_learning_rate: float = 0.0
    rank: int = RANK
    quick: bool = False
    methods: list[str] = field(default_factory=lambda: list(llm_methods.WAYS))

    @property
    def answers_batch_size(self) -> int:
        """Return the messages in a training batch of the answers."""
        return self.batch_size


@dataclass
class Onboarding:
    """A new tenant, the language model, and the LoRA of the others in folders.

    Args:
        llm: The ways to give the tenant a LoRA.
        labelled: The labelled queries of the tenant.
        questions: Its questions.
        learning_rate: The peak learning rate, or the setting of a method without one.
        steps: The optimizer steps of a training.
        batch_size: The queries of a batch.
        seed: Of weights and of the order of the data.
    """

    llm: llm_methods.Onboarding
    labelled: Dataset
    questions: list[str]
    learning_rate: float
    steps: int
    batch_size: int
    seed: int

    @property
    def frozen(self) -> FrozenEncoder:
        """Return the language model without LoRA as an encoder."""
        return frozen_encoder(self.llm.path)


def lora_of(run: Onboarding, way: str) -> Path | None:
    """Return the folder of a LoRA that the example makes, with the rate of the run."""
    return llm_methods.WAYS[way](run.llm, run.learning_rate).folder


def best_merge(run: Onboarding, trained: bool) -> Path | None:
    """Merge the teachers with PEFT; the tenant's validation queries choose the kind and the weight."""
    choices = {way: run.llm.choose(way) for way in llm_methods.WAYS if way.startswith("merge: ")}
    if not trained:
        return max(choices.values(), key=lambda choice: max(choice.searched.values())).outcome.folder
    run.llm.rows = {
        way: {"searched": choice.searched, "setting": choice.setting, "train_s": choice.outcome.seconds}
        for way, choice in choices.items()
    }
    return lora_of(run, "best merge, trained")


def encoder(run: Onboarding, lora: Callable[[Onboarding], Path]) -> Onboarded:
    """Make a LoRA, by which plain PEFT encodes."""
    folder = lora(run)

    def encode(texts: Any) -> Any:
        with with_adapter(run.llm.base, folder) as model:
            return embed_texts(model, run.llm.tokenizer, texts)

    return Onboarded(encode, save=lambda saved: shutil.copytree(folder, Path(saved) / NEW))


RATES = (1e-3, 3e-3)

LORA_METHODS = {  # each returns the folder of a LoRA for PEFT
    "plain adapter": Method(partial(lora_of, way="plain LoRA"), RATES),
    "best merge": Method(partial(best_merge, trained=False), (0.0,)),
    "best merge, trained": Method(partial(best_merge, trained=True), RATES),
    "teachers' average": Method(partial(lora_of, way="average, trained"), RATES),
    "AdapterDistillation: weights alone": Method(partial(lora_of, way="learned weights"), (0.0,)),
    "AdapterDistillation": Method(partial(lora_of, way="AdapterDistillation"), RATES),
}

METHODS = {name: method for name, method in FROZEN_METHODS.items() if name != "SetFit"} | {
    name: method._replace(onboard=partial(encoder, lora=method.onboard)) for name, method in LORA_METHODS.items()
}


@lru_cache(maxsize=1)
def language_model(model: str | None) -> tuple[str, PreTrainedTokenizerBase]:
    """Find the language model; return its folder or id, and its tokenizer."""
    transformers.utils.logging.set_verbosity_error()
    path = model or str(packaged_model(CACHE))
    return path, load_tokenizer(path)


@lru_cache(maxsize=1)
def frozen_encoder(path: str) -> FrozenEncoder:
    """Load the language model as an encoder; a process keeps it, with the embeddings that it has made."""
    base = transformers.AutoModel.from_pretrained(path, dtype="float32").requires_grad_(False).eval()
    return FrozenEncoder(partial(embed_texts, base, load_tokenizer(path)))


@contextmanager
def trained_lora(args: Arguments, name: str, task: str) -> Iterator[tuple[llm_methods.Onboarding, Path]]:
    """Train the LoRA of a tenant; give the onboarding that made it, and its folder for the time of the block."""
    path, tokenizer = language_model(args.model)
    tenant = teacher_tenant(args, name)
    queries = labelled_queries(tenant, "train", args.teacher_queries)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            folder,
            shots=args.teacher_queries,
            learning_rates=[args.teacher_learning_rate],
            batch_size=args.teacher_batch_size,
            seed=TEACHER_SEED,
            steps=0,
            validation_queries=args.search_queries,
            teacher_queries=args.teacher_queries,
            teacher_steps=args.teacher_epochs * -(-len(queries) // args.teacher_batch_size),
            teacher_learning_rate=args.teacher_learning_rate,
        )
        llm = llm_methods.Onboarding(settings, task, path, tokenizer, tenant, [])
        made = Path(folder) / name
        llm.train_teacher(tenant, made)
        yield llm, made


def train_teacher(args: Arguments, name: str) -> str:
    """Train and keep the LoRA of a tenant; return a line about it."""
    with trained_lora(args, name, "routing") as (llm, made):
        validation = labelled_queries(llm.new, "validation", args.search_queries)
        with with_adapter(llm.base, made) as model:
            encode = partial(embed_texts, model, llm.tokenizer)
            scores = encode(validation["query"]) @ encode([faq.question for faq in llm.new.faqs]).T
        metrics = measure(scores, validation["label"])
        keep_teacher(args, partial(shutil.copytree, made), name, metrics)
    return f"teacher {name}: accuracy@1 {metrics['accuracy_at_1']:.3f} on its own tenant, by the title alone"


def random_lora(teacher: Path, folder: Path, key: str) -> Path:
    """Copy the LoRA of a teacher into a folder, with random weights of the same norms."""
    made = shutil.copytree(teacher, folder / teacher.name)
    tensors = load_file(made / "adapter_model.safetensors")
    randomize(list(tensors.values()), key)
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt"})
    return made


def onboarding(args: Arguments, job: Job, came: Arrival, folder: Path, task: str) -> Onboarding:
    """Return a run of a method in a task, which writes its LoRA into a folder."""
    path, tokenizer = language_model(args.model)
    tenant = came.tenant
    shots = shots_of(args, tenant)
    settings = Settings(
        str(folder),
        shots=shots,
        learning_rates=[job.learning_rate],
        batch_size=args.batch_size,
        seed=job.seed,
        steps=args.steps,
        validation_queries=args.search_queries,
    )
    llm = llm_methods.Onboarding(settings, task, path, tokenizer, tenant, [])
    llm.teachers = [Path(args.teachers_dir).resolve() / name for name in came.teachers]
    if args.pool == "random":
        llm.teachers = [
            random_lora(teacher, folder / "random", f"{teacher.name} {job.seed}") for teacher in llm.teachers
        ]
    return Onboarding(
        llm=llm,
        labelled=labelled_queries(tenant, "train", shots),
        questions=[faq.question for faq in tenant.faqs],
        learning_rate=job.learning_rate,
        steps=args.steps,
        batch_size=args.batch_size,
        seed=job.seed,
    )


def run_job(args: Arguments, job: Job) -> dict[str, Any]:
    """Onboard a tenant with one method, and measure it."""
    came = arrival(args, job.tenant, job.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = onboarding(args, job, came, Path(folder), "routing")
        *_, line = measured(args, job, came, run, METHODS[job.method])
    return finished(args, line | learned_weights(run.llm.weights))
