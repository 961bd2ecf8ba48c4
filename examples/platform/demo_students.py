"""Students to serve: trains adapters for a few tenants and distils them into students of others.

Writes one folder for each tenant, the teachers' too, as `save_adapter` does, with the FAQs in `faqs.json`: what
`serve.py` serves.

    python examples/platform/demo_students.py --quick
    python examples/platform/demo_students.py --output outputs/students
"""

import logging
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from transformers import HfArgumentParser

import hf_adapter_distillation as had

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import demo_embeddings  # noqa: E402
import faq_retrieval  # noqa: E402
from faq_data import BUNDLED, Tenant, check_platform, hold_out, load_tenants  # noqa: E402
from faq_embeddings import EmbeddingPlatform, labelled_queries  # noqa: E402
from inputs import check_at_least, check_seed, open_folder  # noqa: E402
from tenant_students import write_faqs  # noqa: E402


@dataclass
class Arguments:
    """The arguments; `--quick` lowers the numbers that cost time."""

    data: str = field(default=str(BUNDLED), metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    teachers: int = field(default=3, metadata={"help": "Tenants with a plain adapter, which teach the others."})
    students: int = field(default=3, metadata={"help": "Tenants whose adapters are distilled."})
    shots: int = field(default=3, metadata={"help": "Training queries for each FAQ of a student."})
    output: str = field(default="outputs/students", metadata={"help": "The folder that is written."})
    quick: bool = field(default=False, metadata={"help": "Two teachers, two students and fewer steps."})
    seed: int = field(default=1, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        check_at_least(self, {"teachers": 1, "students": 1, "shots": 1})
        check_seed("seed", self.seed)
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} is there already; choose another folder or remove it.")
        if self.quick:
            self.teachers, self.students = min(self.teachers, 2), min(self.students, 2)


def prepare() -> tuple[Arguments, EmbeddingPlatform, list[Tenant], list[Tenant]]:
    """Read and check arguments, data and model, before any training.

    Returns:
        The arguments, the platform, the tenants that teach, and those that are taught.

    Raises:
        ValueError: If an argument, or what it names, is wrong.
        OSError: If the data cannot be downloaded.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tenants = load_tenants(args.data, args.seed)
    if len(tenants) < args.teachers + args.students:
        raise ValueError(
            f"--teachers {args.teachers} and --students {args.students} are more than the {len(tenants)} tenants of "
            f"the data; lower one of them."
        )
    teachers, students = tenants[: args.teachers], tenants[-args.students :]
    check_platform([*teachers, *students])
    for tenant in students:
        hold_out(tenant, args.shots)
    open_folder("The folder of --output,", Path(args.output).parent)
    folder = str(Path(tempfile.gettempdir()) / "demo_students")
    return args, EmbeddingPlatform(args.model, folder), teachers, students


def distil(
    platform: EmbeddingPlatform, tenant: Tenant, teachers: list[str], settings: faq_retrieval.Arguments
) -> None:
    """Train the student of a tenant."""
    queries = labelled_queries(tenant, "train", settings.shots)
    print(
        f"Student {tenant.name} of {', '.join(teachers)}: {len(queries)} queries, {settings.steps} steps", flush=True
    )
    platform.new_adapter(tenant.name, had.DistillationConfig(teachers), settings.seed)
    platform.train(tenant, queries, **demo_embeddings.training_arguments(settings, settings.steps))


def write(platform: EmbeddingPlatform, tenants: list[Tenant], output: Path) -> None:
    """Write the adapters with their FAQs; the folder gets its name only when it is complete."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for tenant in tenants:
        (partial / tenant.name).mkdir(parents=True)
        platform.model.save_adapter(str(partial / tenant.name), tenant.name)
        write_faqs(tenant, partial / tenant.name)
    partial.rename(output)


def main() -> None:
    """Train the adapters and write them."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        args, platform, teachers, students = prepare()
    except (ValueError, OSError) as error:
        raise SystemExit(f"demo_students.py: {str(error).splitlines()[0]}") from error
    settings = faq_retrieval.Arguments(quick=args.quick, shots=args.shots, seed=args.seed)
    names = demo_embeddings.train_teachers(platform, teachers, settings)
    for tenant in students:
        distil(platform, tenant, names, settings)
    write(platform, [*teachers, *students], Path(args.output))
    print(f"python examples/platform/serve.py --students {args.output}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
