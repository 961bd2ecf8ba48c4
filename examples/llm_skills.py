"""LoRA of a language model: distil the LoRA of existing tenants into the LoRA of a new one, from PEFT to PEFT.

Each tenant has a LoRA of SmolLM2-135M-Instruct that PEFT trained. A new tenant has three messages for each of its
FAQs. Two tasks: the language model as an encoder that routes a message to an FAQ (`routing`), and an assistant that
generates the label of the FAQ (`answers`). The tables compare the language model alone, a plain LoRA, the merges of
PEFT, learned weights, trainings that start at the average or at the best merge, and AdapterDistillation. The student
is saved for PEFT, and every row is measured there.

    python examples/llm_skills.py --quick
    python examples/llm_skills.py --task routing
    python examples/llm_skills.py --data path/to/clinc150 --new_tenant banking --model path/to/llama
"""

import json
import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from transformers import HfArgumentParser, PreTrainedTokenizerBase

try:
    import peft
except ModuleNotFoundError as error:
    raise SystemExit("llm_skills.py: peft is missing; install it with pip install peft.") from error

from faq_data import BUNDLED, Tenant, choose_new, hold_out, load_tenants
from faq_table import as_text
from inputs import check_at_least, check_rates, check_seed, open_folder, read_json
from llm_methods import WAYS, Onboarding
from llm_model import CACHE, check_saved, load_tokenizer, packaged_model
from llm_tasks import TASKS

import hf_adapter_distillation as had

DEFAULTS = {
    "teachers": 4, "teacher_queries": 10, "validation_queries": 3, "test_queries": 8, "teacher_steps": 40, "steps": 30,
    "weighing_steps": 16, "answers_batch_size": 4, "learning_rates": [1e-3, 3e-3],
}  # fmt: skip
QUICK = {
    "teachers": 2, "teacher_queries": 4, "validation_queries": 1, "test_queries": 1, "teacher_steps": 4, "steps": 4,
    "weighing_steps": 2, "answers_batch_size": 2, "learning_rates": [3e-3],
}  # fmt: skip
LONG = ["average, trained", "best merge, trained"]  # not in --quick
FREE = ("task", "methods", "cache", "output_dir")  # arguments that runs with one result file need not share


@dataclass
class Arguments:
    """The arguments of the example; `--quick` lowers the numbers that cost time."""

    task: str = field(default="both", metadata={"help": f"{', '.join(TASKS)}, or both."})
    methods: list[str] = field(default_factory=list, metadata={"help": f"Rows, of: {'; '.join(WAYS)}. Default: all."})
    data: str | None = field(
        default=None, metadata={"help": "JSON file, CLINC150 folder, or Hub dataset id. Default: the bundled data."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a decoder like Llama. Default: the packaged SmolLM2."}
    )
    cache: str = field(default=str(CACHE), metadata={"help": "Where the packaged model is kept as safetensors."})
    new_tenant: str = field(default="", metadata={"help": "The tenant to onboard. Default: the last one."})
    teachers: int | None = field(
        default=None, metadata={"help": "Existing tenants with a LoRA; the first ones in the data. Default: 4."}
    )
    shots: int = field(default=3, metadata={"help": "Training messages for each FAQ of the new tenant."})
    teacher_queries: int | None = field(
        default=None, metadata={"help": "Training messages for each FAQ of the others. Default: 10."}
    )
    validation_queries: int | None = field(
        default=None, metadata={"help": "Validation messages for each FAQ. Default: 3."}
    )
    test_queries: int | None = field(
        default=None, metadata={"help": "Test messages for each FAQ, at most. Default: 8."}
    )
    teacher_steps: int | None = field(
        default=None, metadata={"help": "Steps of each existing tenant's LoRA. Default: 40."}
    )
    teacher_learning_rate: float = field(default=3e-3, metadata={"help": "Their peak learning rate."})
    steps: int | None = field(default=None, metadata={"help": "Steps of each LoRA of the new tenant. Default: 30."})
    weighing_steps: int | None = field(
        default=None, metadata={"help": "Steps in which the teachers' weights are learned. Default: 16."}
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Peak learning rates; each row takes the best one on the validation messages. Default: 1e-3 3e-3."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Messages in a training batch of the routing."})
    answers_batch_size: int | None = field(
        default=None, metadata={"help": "The same for the answers, whose texts are longer. Default: 4."}
    )
    rank: int = field(default=8, metadata={"help": "Rank of all LoRA."})
    seed: int = field(default=1, metadata={"help": "Random seed."})
    output_dir: str = field(default="outputs/llm_skills", metadata={"help": "The folder of all that is written."})
    quick: bool = field(default=False, metadata={"help": "A smoke test: two teachers, a few steps, no table."})

    def __post_init__(self) -> None:
        settings = DEFAULTS | (QUICK if self.quick else {})
        for name, value in settings.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.task not in (*TASKS, "both"):
            raise ValueError(f"--task {self.task} is unknown; choose one of {', '.join(TASKS)}, both.")
        if unknown := [method for method in self.methods if method not in WAYS]:
            raise ValueError(f"--methods {unknown[0]!r} is unknown; choose of {', '.join(map(repr, WAYS))}.")
        self.methods = self.methods or [method for method in WAYS if not (self.quick and method in LONG)]
        if "best merge, trained" in self.methods and not any(each.startswith("merge: ") for each in self.methods):
            raise ValueError("--methods 'best merge, trained' needs a merge; add 'merge: svd'.")
        counts = [name for name in settings if name != "learning_rates"]
        check_at_least(self, dict.fromkeys([*counts, "shots", "batch_size", "rank"], 1) | {"weighing_steps": 2})
        check_rates(self, "teacher_learning_rate", "learning_rates")
        check_seed("seed", self.seed)


def prepare() -> tuple[Arguments, str, PreTrainedTokenizerBase, Tenant, list[Tenant], dict[str, Any]]:
    """Read and check arguments, data and earlier results, and find the model, before any training.

    Returns:
        The arguments, the folder or id of the model, its tokenizer, the new tenant, the others, and earlier results.

    Raises:
        ValueError: If an argument, or what it names, is wrong.
        OSError: If the data cannot be downloaded.
        ImportError: If the packaged model is missing.
    """
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    new, others = choose_new(load_tenants(args.data or str(BUNDLED), args.seed), args.new_tenant)
    hold_out(new, args.shots, args.validation_queries)
    results = earlier_results(args)
    if args.model is not None:
        check_saved(args.model)
    model = args.model or str(packaged_model(Path(args.cache).expanduser()))
    return args, model, load_tokenizer(model), new, others[: args.teachers], results


def earlier_results(args: Arguments) -> dict[str, Any]:
    """Return the results of an earlier run with the same arguments, whose rows are kept.

    Raises:
        ValueError: If the folder holds results of other arguments.
    """
    path, mine = Path(args.output_dir) / "results.json", {k: v for k, v in asdict(args).items() if k not in FREE}
    open_folder("--output_dir", args.output_dir)
    if not path.exists():
        return {"rows": {}, "weights": {}, "export_difference": {}, "arguments": mine}
    results = read_json(path, dict, "choose another --output_dir")
    if not {"rows", "weights", "export_difference", "arguments"} <= results.keys():
        raise ValueError(f"{path} holds no results of this example; choose another --output_dir.")
    for name, value in mine.items():
        if results["arguments"].get(name) != value:
            raise ValueError(
                f"{path} holds results with --{name} {results['arguments'].get(name)}, not {value}; choose another "
                "--output_dir."
            )
    return results


def write_results(args: Arguments, results: dict[str, Any]) -> None:
    """Write the rows so far, with the command and the versions that gave them."""
    modules = (had, adapters, transformers, peft, torch)
    about = {"command": shlex.join(["python", *sys.argv]), "threads": torch.get_num_threads()}
    results["environment"] = about | {module.__name__: module.__version__ for module in modules}
    path = Path(args.output_dir) / "results.json"
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def run_task(onboarding: Onboarding, args: Arguments, results: dict[str, Any]) -> None:
    """Run the rows of a task that are not there yet; write the results after each."""
    name, rows = onboarding.name, results["rows"].setdefault(onboarding.name, {})
    onboarding.rows = rows
    if missing := [method for method in args.methods if method not in rows]:
        onboarding.train_teachers()
    for method in sorted(missing, key=list(WAYS).index):
        rows[method] = onboarding.row(method)
        results["rows"][name] = {each: rows[each] for each in WAYS if each in rows}
        if onboarding.weights is not None:
            results["weights"][name] = onboarding.weights.mean()
        if onboarding.export_difference is not None:
            results["export_difference"][name] = onboarding.export_difference
        write_results(args, results)
        if not args.quick:
            print(as_text({method: rows[method]}).splitlines()[-1], flush=True)


def show(args: Arguments, tasks: Sequence[str], new: Tenant, results: Mapping[str, Any]) -> None:
    """Print the table of each task; a smoke test has none."""
    if args.quick:
        print("A smoke test: every row has run, and its accuracy means nothing. Leave out --quick to get tables.")
    for task in () if args.quick else tasks:
        print(f"{task}, new tenant {new.name}: {len(new.faqs)} FAQs, {args.shots} training messages each")
        print(as_text(results["rows"][task]))
        if weights := results["weights"].get(task):
            print("Weights: " + ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()))
    print(f"The adapters, all for PEFT, and results.json are in {args.output_dir}.")


def main() -> None:
    """Run the example."""
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="peft")
    start = time.perf_counter()
    try:
        args, model, tokenizer, new, existing, results = prepare()
        tasks = list(TASKS) if args.task == "both" else [args.task]
        for task in tasks:  # fails before any training if the tokenizer does not fit
            TASKS[task](tokenizer, new, args.shots)
        for task in tasks:
            run_task(Onboarding(args, task, model, tokenizer, new, existing), args, results)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"llm_skills.py: {str(error).splitlines()[0]}") from error
    show(args, tasks, new, results)
    print(f"{time.perf_counter() - start:.0f} seconds in all")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
