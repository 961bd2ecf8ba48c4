"""What the benchmarks share: model shapes, batches, and measuring time and memory side by side."""

import json
import logging
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler talks while it counts memory

import adapters
import torch
import transformers
from adapters import AutoAdapterModel
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, GPT2Config, HfArgumentParser, LlamaConfig, PretrainedConfig

import hf_adapter_distillation as had

logging.getLogger("adapters").setLevel(logging.ERROR)

# Random weights: the time does not depend on their values.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "minilm": lambda: BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    ),
    "bert-base": BertConfig,
    "gpt2": lambda: GPT2Config(pad_token_id=0),
    "smollm2": lambda: LlamaConfig(  # of SmolLM2-135M
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        pad_token_id=0,
        tie_word_embeddings=True,
    ),
    "llama-1b": lambda: LlamaConfig(  # of Llama 3.2
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        pad_token_id=0,
        tie_word_embeddings=True,
    ),
}


@dataclass
class Arguments:
    """The arguments that the benchmarks of a model share; the defaults are the quick run."""

    shapes: list[str] = field(default_factory=lambda: ["minilm"], metadata={"help": f"Of {', '.join(SHAPES)}."})
    teachers: list[int] = field(default_factory=lambda: [8], metadata={"help": "Numbers of teachers."})
    seq_len: int = field(default=32, metadata={"help": "Tokens in a sequence."})
    reduction_factor: int = field(default=16, metadata={"help": "Hidden size / width of all bottlenecks."})
    rounds: int = field(default=20, metadata={"help": "Calls of each method that are timed."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 for mixed precision."})
    output: str = field(default="", metadata={"help": "The JSON file; the plot is written beside it."})


def run(
    cls: type[Arguments],
    measure: Callable[[Any, str, int], list[dict[str, Any]]],
    header: Callable[[Any], str],
    line: Callable[[dict[str, Any]], str],
    draw: Callable[[list[dict[str, Any]], str], Figure],
) -> None:
    """Measures each shape with each number of teachers; prints rows as they come, writes JSON and plot.

    Args:
        cls: The arguments of the benchmark.
        measure: Gives the rows of a shape and a number of teachers.
        header: What is printed above the rows.
        line: What is printed of a row.
        draw: Draws all rows, with a title.

    Raises:
        SystemExit: If a shape is unknown, or the output cannot be written.
    """
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses()
    if unknown := set(args.shapes) - set(SHAPES):
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script}: --shapes {min(unknown)} is unknown; choose of {', '.join(SHAPES)}.")
    check_output(args.output)
    about = environment(args.device)
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"\n{args.seq_len} tokens a sequence, {args.dtype}, medians of {args.rounds} rounds; {header(args)}")
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for n_teachers in args.teachers:
            for row in measure(args, shape, n_teachers):
                rows.append(row)
                print(line(row), flush=True)
            write(Path(args.output), {"environment": about, "arguments": asdict(args), "rows": rows})
    title = f"{args.seq_len} tokens a sequence, {args.dtype}\n{about['device']}"
    draw(rows, title).savefig(Path(args.output).with_suffix(".png"))


def make_model(shape: str, device: str) -> torch.nn.Module:
    """Return a model with random weights and no adapters."""
    transformers.set_seed(0)
    return AutoAdapterModel.from_config(SHAPES[shape]()).to(device)


def make_batch(model: torch.nn.Module, batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Return a batch without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch, seq_len), generator=generator)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Mixed precision as in Trainer's `bf16=True`; nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device, getattr(torch, dtype))


def seconds(call: Callable[[], Any], device: str) -> float:
    """Measure the time of one call, on a GPU with CUDA events."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Measure by how many bytes a call raises the memory of torch at its peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int, device: str
) -> dict[str, list]:
    """Time the calls in turns, each turn in another order, so that a slow moment of the machine slows all of them.

    Args:
        calls: For each name a preparation, which is not timed, and the call.
        rounds: The number of turns, after one that is not counted.
        device: "cpu" or "cuda".

    Returns:
        The seconds of each call by name, one for each round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for number in range(rounds + 1):
        shuffle(order := list(calls))
        for name in order:
            prepare, call = calls[name]
            prepare()
            taken = seconds(call, device)
            if number > 0:
                times[name].append(taken)
    return times


def ratio(times: list[float], others: list[float]) -> float:
    """Return the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def environment(device: str) -> dict[str, Any]:
    """Describe the software and the machine."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none at hand, nothing measured on one",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, adapters, had)},
    }


def check_output(output: str) -> None:
    """Create the folder of the output; raise `SystemExit` if it cannot be written, before anything is measured."""
    script, path = Path(sys.argv[0]).name, Path(output)
    if path.is_dir():
        raise SystemExit(f"{script}: --output {output} is a folder; give a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"{script}: --output {output} cannot be written ({error.strerror}); give another.") from error


def write(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
