"""FAQ retrieval for tenants: distil the adapters of existing tenants into the adapter of a new one.

All tenants share one frozen embedding model, and each has an adapter of its own. A query is ranked by its cosine with
the embeddings of the tenant's FAQs, which are computed beforehand. A new tenant has only a few queries for each FAQ.
The table compares the ways to onboard it: the frozen encoder alone, a classifier on its embeddings, a plain adapter,
an adapter that starts from the teachers' average, AdapterFusion, and AdapterDistillation.

`--architecture cross-encoder` is the setting of the paper, where the model reads a query together with each FAQ.

    python examples/faq_retrieval.py
    python examples/faq_retrieval.py --quick --ask "my phone is gone"
    python examples/faq_retrieval.py --data path/to/clinc150 --new_tenant travel
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import adapters
import demo_cross_encoder
import demo_embeddings
import sentence_transformers
import torch
import transformers
from faq_cross_encoder import CrossEncoderPlatform
from faq_data import BUNDLED, Tenant, choose_new, hold_out, load_tenants
from faq_embeddings import EmbeddingPlatform
from faq_table import as_text
from inputs import check_at_least, check_rates, check_seed, is_unicode, open_folder
from transformers import HfArgumentParser

import hf_adapter_distillation as had

SETTINGS: dict[str, dict[str, Any]] = {
    "embeddings": {
        "teacher_queries": 10, "teacher_steps": 40, "teacher_learning_rate": 2e-3, "steps": 50, "batch_size": 16,
        "test_queries": 20, "learning_rate": 1e-3,
    },
    "cross-encoder": {
        "teacher_queries": 10, "teacher_steps": 360, "teacher_learning_rate": 2e-3, "steps": 216, "batch_size": 8,
        "test_queries": 8, "learning_rate": 2e-3,
    },
}  # fmt: skip
QUICK: dict[str, dict[str, Any]] = {
    "embeddings": {"teacher_steps": 16, "steps": 16, "test_queries": 8},
    "cross-encoder": {"teacher_queries": 6, "teacher_steps": 72, "steps": 54, "test_queries": 1},
}
QUICK_TEACHERS = 3
RESULTS = "results.json"


@dataclass
class Arguments:
    """The arguments of the example; `--quick` lowers the numbers that cost time."""

    data: str | None = field(
        default=None, metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id. Default: the bundled data."}
    )
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    architecture: str = field(default="embeddings", metadata={"help": "embeddings, or the paper's cross-encoder."})
    new_tenant: str = field(default="", metadata={"help": "The tenant to onboard. Default: the last one."})
    shots: int = field(default=3, metadata={"help": "Training queries for each FAQ of the new tenant."})
    teacher_queries: int | None = field(
        default=None, metadata={"help": "Training queries for each FAQ of the other tenants. Default: 10."}
    )
    test_queries: int | None = field(
        default=None, metadata={"help": "Test queries for each FAQ, at most. Default: 20 (cross-encoder 8)."}
    )
    teacher_steps: int | None = field(
        default=None, metadata={"help": "Steps of each existing tenant's adapter. Default: 40 (cross-encoder 360)."}
    )
    teacher_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the existing tenants' adapters. Default: 2e-3."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Steps of the new tenant, all stages. Default: 50 (cross-encoder 216)."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 1e-3 (cross-encoder 2e-3)."}
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Queries in a training batch, 16; pairs for the cross-encoder, 8."}
    )
    output_dir: str = field(default="outputs/faq_retrieval", metadata={"help": "The folder of all that is written."})
    ask: str = field(default="", metadata={"help": "A query of your own for the new tenant."})
    quick: bool = field(default=False, metadata={"help": "Three teachers and fewer steps, in a minute and a half."})
    seed: int = field(default=1, metadata={"help": "Random seed."})

    def __post_init__(self) -> None:
        if self.architecture not in SETTINGS:
            raise ValueError(f"--architecture {self.architecture} is unknown; choose one of {', '.join(SETTINGS)}.")
        settings = SETTINGS[self.architecture] | (QUICK[self.architecture] if self.quick else {})
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.shots < 1:
            raise ValueError(
                f"--shots {self.shots} leaves nothing to train on and is out of range; it must be at least 1."
            )
        rates = [name for name in settings if name.endswith("learning_rate")]
        check_rates(self, *rates)
        check_at_least(self, {name: 1 for name in settings if name not in rates})
        check_seed("seed", self.seed)
        if not is_unicode(self.ask):
            raise ValueError(f"--ask {ascii(self.ask)} is not valid Unicode; type it again.")


def prepare() -> tuple[Arguments, Any, Tenant, list[Tenant]]:
    """Read and check arguments, data and model, before any training.

    Returns:
        The arguments, the platform, the new tenant and the existing ones.

    Raises:
        ValueError: If an argument, or what it names, is wrong.
        OSError: If the data cannot be downloaded.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    new, others = choose_new(load_tenants(args.data or str(BUNDLED), args.seed), args.new_tenant)
    existing = others[: QUICK_TEACHERS if args.quick else None]
    hold_out(new, args.shots)
    if (open_folder("--output_dir", args.output_dir) / RESULTS).is_dir():
        raise ValueError(f"--output_dir {args.output_dir} has a folder {RESULTS}; choose another folder.")
    platform: Any
    if args.architecture == "embeddings":
        platform = EmbeddingPlatform(args.model, args.output_dir, "cuda" if torch.cuda.is_available() else "cpu")
    else:
        platform = CrossEncoderPlatform(args)
    return args, platform, new, existing


def write_results(args: Arguments, rows: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]) -> None:
    """Write the table and the teachers' weights, with the arguments and versions that gave them."""
    modules = (had, adapters, transformers, sentence_transformers, torch)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": asdict(args),
        "versions": {module.__name__: module.__version__ for module in modules},
        "threads": torch.get_num_threads(),
        "rows": rows,
        "weights": weights,
    }
    (Path(args.output_dir) / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the example."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    start = time.perf_counter()
    try:
        args, platform, new, existing = prepare()
    except (ValueError, OSError) as error:
        raise SystemExit(f"faq_retrieval.py: {str(error).splitlines()[0]}") from error
    module: Any = demo_embeddings if args.architecture == "embeddings" else demo_cross_encoder
    teachers = module.train_teachers(platform, existing, args)
    onboarding = module.Onboarding(platform, new, teachers, args)
    onboarding.run()

    print(f"New tenant {new.name}: {len(new.faqs)} FAQs, {args.shots} training queries each")
    print(f"Teachers: {', '.join(teachers)}")
    print(as_text(onboarding.rows))
    onboarding.draw(Path(args.output_dir))
    write_results(args, onboarding.rows, onboarding.weights)
    print(f"The adapters, the picture and results.json are in {args.output_dir}; the student answers:")
    queries = [args.ask] if args.ask.strip() else [faq.test[0] for faq in new.faqs[:3]]
    for query, best in zip(queries, onboarding.best_faqs(queries), strict=True):
        print(f"  Q: {query}\n  -> {new.faqs[best].question} {new.faqs[best].answer}".rstrip())
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
