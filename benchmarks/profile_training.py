"""Where the time of a stage-2 epoch of a cross-encoder goes, part by part, beside a plain adapter's epoch.

The data, the model, the batches and the trainer are those of `examples/faq_retrieval.py --architecture cross-encoder`;
the teachers are not trained, which changes nothing of the time.

    python benchmarks/profile_training.py
    python benchmarks/profile_training.py --tenant travel --data path/to/clinc150
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measure import check_output, environment, ratio, write

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import faq_retrieval as example  # noqa: E402
import transformers  # noqa: E402
from adapters import AdapterTrainer  # noqa: E402
from datasets import Dataset  # noqa: E402
from demo_cross_encoder import N_WRONG  # noqa: E402
from faq_cross_encoder import ADAPTER, CrossEncoderPlatform  # noqa: E402
from faq_data import BUNDLED, hold_out, load_tenants, make_pairs  # noqa: E402
from transformers import HfArgumentParser, Trainer, TrainingArguments  # noqa: E402

import hf_adapter_distillation as had  # noqa: E402

PARTS = ("data", "forward", "backward", "clipping", "optimizer", "rest")


@dataclass
class Arguments:
    """The arguments of the profile."""

    data: str = field(default="", metadata={"help": "As for the example. Default: the bundled data."})
    tenant: str = field(default="", metadata={"help": "The new tenant. Default: the last one."})
    batch_size: int = field(default=8, metadata={"help": "Pairs in a training batch."})
    rounds: int = field(default=5, metadata={"help": "Epochs of each method that are timed, in turns."})
    output: str = field(default="outputs/profile_training.json", metadata={"help": "The JSON file."})


def take_times(trainer: Trainer) -> dict[str, float]:
    """Trains, and returns the seconds of each part of the training loop."""
    times: dict[str, float] = defaultdict(float)

    def timed(owner: object, name: str, part: str) -> None:
        original: Callable = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(*args, **kwargs)
            times[part] += time.perf_counter() - began
            return result

        setattr(owner, name, wrapper)

    def create_optimizer(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        timed(trainer.optimizer, "step", "optimizer")

    create = trainer.create_optimizer_and_scheduler
    trainer.create_optimizer_and_scheduler = create_optimizer
    timed(trainer, "get_batch_samples", "data")
    timed(trainer, "compute_loss", "forward")
    timed(trainer.accelerator, "backward", "backward")
    timed(trainer.accelerator, "clip_grad_norm_", "clipping")
    began = time.perf_counter()
    trainer.train()
    times["rest"] = time.perf_counter() - began - sum(times.values())
    return {part: times[part] for part in PARTS}


def epoch(platform: CrossEncoderPlatform, pairs: Dataset, method: str, teachers: list[str]) -> dict[str, float]:
    """Measure the times of one epoch of a new adapter, plain or distilled from the first step."""
    model, distils = platform.model, method != "plain adapter"
    config = had.DistillationConfig(teachers, method, student_start="average") if distils else None
    model.add_adapter("new", config=ADAPTER, distill_from=config)
    platform.add_head("new")
    model.train_adapter("new")
    cls = had.DistillationTrainingArguments if distils else TrainingArguments
    trainer = (had.DistillationTrainer if distils else AdapterTrainer)(
        model=model,
        args=platform.training_arguments(1, cls=cls, **({"distillation_start": 0.0} if distils else {})),
        train_dataset=pairs,
        data_collator=platform.collator,
        processing_class=platform.tokenizer,
    )
    times = take_times(trainer)
    model.delete_adapter("new")
    model.delete_head("new")
    return times


def main() -> None:
    """Run the profile."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    check_output(args.output)
    transformers.utils.logging.set_verbosity_error()
    platform = CrossEncoderPlatform(
        example.Arguments(
            architecture="cross-encoder",
            batch_size=args.batch_size,
            output_dir=str(Path(args.output).parent / "profile"),
        )
    )
    tenants = load_tenants(args.data or str(BUNDLED), seed=1)
    new = next((tenant for tenant in tenants if tenant.name == args.tenant), tenants[-1])
    hold_out(new, platform.args.shots)
    pairs = make_pairs(new, "train", platform.tokenizer, platform.args.shots, N_WRONG, 1)
    teachers = [tenant.name for tenant in tenants if tenant is not new]
    for name in teachers:
        platform.model.add_adapter(name, config=ADAPTER)
        platform.add_head(name)

    methods = ("plain adapter", "student", "fused", "mixed")
    rows: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for number in range(args.rounds + 1):
        for method in methods:
            times = epoch(platform, pairs, method, teachers)
            if number > 0:
                rows[method].append(times)

    about = environment("cpu")
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(
        f"\nAn epoch of {len(pairs)} pairs in batches of {args.batch_size}, {len(teachers)} teachers; seconds, medians"
    )
    print(f"{'':<15}" + "".join(f"{part:>11}" for part in (*PARTS, "all", "/ plain")))
    summary = {}
    totals = {method: [sum(times.values()) for times in epochs] for method, epochs in rows.items()}
    for method, epochs in rows.items():
        parts = {part: median(times[part] for times in epochs) for part in PARTS}
        against = ratio(totals[method], totals["plain adapter"])
        summary[method] = parts | {"all": median(totals[method]), "/ plain": against}
        print(f"{method:<15}" + "".join(f"{value:>11.3f}" for value in summary[method].values()))
    write(
        Path(args.output),
        {"environment": about, "arguments": asdict(args), "pairs": len(pairs), "teachers": len(teachers)}
        | {"seconds": summary},
    )


if __name__ == "__main__":
    main()
