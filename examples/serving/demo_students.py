"""Students to serve: trains adapters for a few tenants and distils them into students of others.

Writes one folder for each tenant, the teachers' too, as `save_adapter` does, with the FAQs in `faqs.json`: what
`serve_tenants.py` serves.

    python examples/serving/demo_students.py --quick
    python examples/serving/demo_students.py --output outputs/students
"""

import json
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import faq_retrieval  # noqa: E402
from faq_cross_encoder import CrossEncoderPlatform  # noqa: E402
from faq_data import BUNDLED, hold_out, load_tenants, make_pairs  # noqa: E402
from faq_retrieval import Tenant, train_teachers  # noqa: E402


@dataclass
class Arguments:
    """The arguments; `--quick` lowers the numbers that cost time."""

    data: str = field(default=str(BUNDLED), metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    teachers: int = field(default=3, metadata={"help": "Tenants with a plain adapter, which teach the others."})
    students: int = field(default=3, metadata={"help": "Tenants whose adapters are distilled."})
    shots: int = field(default=3, metadata={"help": "Training queries a FAQ of a student."})
    output: str = field(default="outputs/students", metadata={"help": "The folder that is written."})
    quick: bool = field(default=False, metadata={"help": "A run that shows that all works, not how well."})
    seed: int = field(default=1, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        for name in ("teachers", "students", "shots"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is out of range; it must be at least 1.")
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} is there already; choose another folder or remove it.")
        if self.quick:
            self.teachers, self.students = min(self.teachers, 2), min(self.students, 2)


def prepare() -> tuple[Arguments, CrossEncoderPlatform, list[Tenant], list[Tenant]]:
    """Read and check arguments, data and model, before any training.

    Returns:
        The arguments, the platform, the tenants that teach, and those that are taught.

    Raises:
        ValueError: If an argument, or what it names, is wrong.
        OSError: If the model cannot be loaded.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tenants = load_tenants(args.data, args.seed)
    if len(tenants) < args.teachers + args.students:
        raise ValueError(
            f"--teachers {args.teachers} and --students {args.students} are more than the {len(tenants)} tenants of "
            f"the data; lower one of them."
        )
    teachers, students = tenants[: args.teachers], tenants[args.teachers : args.teachers + args.students]
    for tenant in students:
        hold_out(tenant, args.shots)
    folder = str(Path(tempfile.gettempdir()) / "demo_students")
    settings = faq_retrieval.Arguments(model=args.model, quick=args.quick, seed=args.seed, output_dir=folder)
    return args, CrossEncoderPlatform(settings), teachers, students


def distil(platform: CrossEncoderPlatform, tenant: Tenant, teachers: list[str], shots: int) -> None:
    """Trains the student of a tenant."""
    args = platform.args
    pairs = make_pairs(tenant, "train", platform.tokenizer, shots, args.n_wrong, args.seed)
    platform.new_adapter(tenant.name, had.DistillationConfig(teachers=teachers))
    platform.train(pairs, args.epochs, had.DistillationTrainer, f"Student {tenant.name} of {', '.join(teachers)}")


def write(platform: CrossEncoderPlatform, tenants: list[Tenant], output: Path) -> None:
    """Write the adapters with their FAQs; the folder gets its name only when it is complete."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for tenant in tenants:
        (partial / tenant.name).mkdir(parents=True)
        platform.model.save_adapter(str(partial / tenant.name), tenant.name)
        texts = json.dumps([faq.question for faq in tenant.faqs], indent=1, ensure_ascii=False)
        (partial / tenant.name / "faqs.json").write_text(f"{texts}\n", encoding="utf-8")
    partial.rename(output)


def main() -> None:
    """Trains and writes."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    try:
        args, platform, teachers, students = prepare()
    except (ValueError, OSError) as error:
        raise SystemExit(f"demo_students.py: {str(error).splitlines()[0]}") from error
    names = train_teachers(platform, teachers)
    for tenant in students:
        distil(platform, tenant, names, args.shots)
    write(platform, [*teachers, *students], Path(args.output))
    if args.quick:
        print("\nA quick run trains too little to rank well; leave --quick out for that.")
    print(f"\npython examples/serving/serve_tenants.py --students {args.output}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
