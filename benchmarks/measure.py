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
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler talks while it counts memory

import adapters
import torch
import transformers
from adapters import AutoAdapterModel
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, GPT2Config, PretrainedConfig

import hf_adapter_distillation as had

logging.getLogger("adapters").setLevel(logging.ERROR)

# Random weights: the time does not depend on their values.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "minilm": lambda: BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    ),
    "bert-base": BertConfig,
    "gpt2": lambda: GPT2Config(pad_token_id=0),
}


def make_model(shape: str, device: str) -> torch.nn.Module:
    """A model with random weights and no adapters."""
    transformers.set_seed(0)
    return AutoAdapterModel.from_config(SHAPES[shape]()).to(device)


def make_batch(model: torch.nn.Module, batch: int, seq_len: int) -> dict[str, torch.Tensor]:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch, seq_len), generator=generator)
    labels = torch.randint(0, 2, (batch,), generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """Mixed precision as in Trainer's `bf16=True`; nothing for float32."""
    return nullcontext() if dtype == "float32" else torch.autocast(device, getattr(torch, dtype))


def seconds(call: Callable[[], Any], device: str) -> float:
    """The time of one call; CUDA events on a GPU."""
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
    """The most memory that torch holds during a call, above what it held before, in bytes."""
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
    """Times the calls in turns, each turn in another order: whatever slows the machine down slows all of them.

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
    """The median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def environment(device: str) -> dict[str, Any]:
    """What ran, and where."""
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


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
