"""What a training step of stage 2 costs: forward, backward and optimizer step, against a plain adapter's.

In one run, in turns: a plain adapter, the carriers `student`, `fused` and `mixed`, the same with each teacher on its
own (`per teacher`, the plain path), and adapters' `Fuse`. On demand: `whole layers`, which runs each layer again;
`every 4` or another number, the carrier `student` with a `distillation_share` of a quarter, the mean over four steps;
`rank 32` or another number, the carrier `student` with a `fusion_rank`; `rank 32 every 4` is both.

    python benchmarks/stage2_step.py
    python benchmarks/stage2_step.py --methods student "whole layers" --teachers 1 2 4 8
    python benchmarks/stage2_step.py --methods student "every 4" "every 8" --teachers 8 32 128
    python benchmarks/stage2_step.py --shapes minilm bert-base gpt2 --teachers 1 2 4 8 16 32 64 128
    python benchmarks/stage2_step.py --shapes bert-base --device cuda --dtype bfloat16 --compile
    python benchmarks/stage2_step.py --shapes smollm2 --config lora --methods student "rank 32" --teachers 8
    python benchmarks/stage2_step.py --shapes llama-1b --config lora --methods student --device cuda --dtype bfloat16
"""

import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import measure
import torch
from adapters import Fuse
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from measure import SHAPES, autocast, compare, make_batch, make_model, peak_bytes, ratio

import hf_adapter_distillation as had
from hf_adapter_distillation.method.parameters import owner

CARRIERS = ("student", "fused", "mixed")
WHOLE_LAYERS = "whole layers"


def steps_of(method: str) -> int:
    """Return the number of steps of which one runs the teachers."""
    found = re.search(r"every (\d+)", method)
    return int(found[1]) if found else 1


def rank_of(method: str) -> int | None:
    """Return the `fusion_rank` of a method."""
    found = re.search(r"rank (\d+)", method)
    return int(found[1]) if found else None


@dataclass
class Arguments(measure.Arguments):
    """The arguments of the benchmark."""

    teachers: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Numbers of teachers."})
    methods: list[str] = field(
        default_factory=lambda: [*CARRIERS, "per teacher", "Fuse"], metadata={"help": "What is compared."}
    )
    config: str = field(
        default="",
        metadata={"help": "Config of all adapters, such as lora[r=8]. Default: seq_bn of reduction_factor."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile the model with inductor, before the timed steps."})
    batch: int = field(default=16, metadata={"help": "Sequences in a batch."})
    rounds: int = field(default=7, metadata={"help": "Steps of each method that are timed."})
    max_gb: float = field(
        default=8.0, metadata={"help": "Fuse and per teacher are left out where they would hold more, in 10^9 bytes."}
    )
    output: str = field(
        default="outputs/stage2_step.json", metadata={"help": "The JSON file; the plot is written beside it."}
    )


class Steps:
    """The training steps of all methods on one model, which takes one setup after the other.

    Args:
        args: The arguments.
        shape: The shape of the model.
        n_teachers: The number of teachers.
    """

    def __init__(self, args: Arguments, shape: str, n_teachers: int) -> None:
        self.args = args
        self.model = make_model(shape, args.device)
        self.batch = make_batch(self.model, args.batch, args.seq_len)
        config = args.config or f"seq_bn[reduction_factor={args.reduction_factor}]"
        self.teachers = [f"teacher{n}" for n in range(n_teachers)]
        for name in [*self.teachers, "plain"]:
            self.model.add_adapter(name, config=config)
        self.model.add_classification_head("plain")
        for method in args.methods:
            if method != "Fuse":
                carrier = method if method in CARRIERS else "student"
                level = "layer" if method == WHOLE_LAYERS else "adapter"
                distill_from = had.DistillationConfig(
                    self.teachers, carrier, student_start="random", level=level, fusion_rank=rank_of(method)
                )
                self.model.add_adapter(method, config=config, distill_from=distill_from)
                self.model.add_classification_head(method)
        self.fuse = Fuse(*self.teachers, "plain", name="fuse")
        if "Fuse" in args.methods:
            self.model.add_adapter_fusion(self.fuse)
        self.model.to(args.device)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.call = torch.compile(self.model) if args.compile else self.model

    def prepare(self, method: str) -> None:
        """Activates a method, as a user would before training; the step after it copies the teachers anew."""
        if method == "Fuse":
            self.model.train_adapter_fusion(self.fuse)
            self.model.active_head = "plain"
        else:
            self.model.train_adapter(method)
            self.model.active_head = method
        self.model.train()
        if method not in self.optimizers:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizers[method] = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        if method in CARRIERS or steps_of(method) > 1 or rank_of(method):
            settings = had.StageSettings(fused_probability=0.5)  # its mean over stage 2, for `mixed`
            had.distillation_of(self.model, method).settings = settings

    def forward_backward(self, method: str) -> None:
        """Compute the loss and its gradients."""
        alone = mock.patch("hf_adapter_distillation.method.stacking.can_be_stacked", return_value=False)
        with autocast(self.args.device, self.args.dtype), alone if method == "per teacher" else nullcontext():
            loss = self.call(**self.batch).loss
        loss.backward()

    def step(self, method: str) -> None:
        """Run a training step, or as many as one of which runs the teachers."""
        for number in range(steps_of(method)):
            if steps_of(method) > 1:
                had.distillation_of(self.model, method).settings = had.StageSettings(enabled=number == 0)
            self.forward_backward(method)
            self.optimizers[method].step()
            self.optimizers[method].zero_grad()

    def held_bytes(self, method: str) -> int:
        """Measure the peak memory of forward and backward above model, optimizer and gradients, in bytes."""
        self.prepare(method)
        self.forward_backward(method)  # so that the gradients exist
        peak = peak_bytes(partial(self.forward_backward, method), self.args.device)
        self.optimizers[method].zero_grad()
        return peak

    def state_bytes(self, method: str) -> int:
        """Count the bytes of all weights that a training with the method has, of their gradients and of AdamW."""
        self.prepare(method)
        own = "plain" if method == "Fuse" else method
        adapters = {*self.teachers, "plain", *self.args.methods}
        takes_part = {own} if method == "plain" else {own, *self.teachers}

        def is_held(name: str) -> bool:
            if found := re.search(r"(?:^heads|\.distillation_fusion)\.([^.]+)\.", name):
                return found[1] == own
            if ".adapter_fusion_layer." in name:
                return method == "Fuse"
            return owner(name, adapters) in {None, *takes_part}

        held = [parameter for name, parameter in self.model.named_parameters() if is_held(name)]
        return sum(parameter.nbytes * (4 if parameter.requires_grad else 1) for parameter in held)


def fits(args: Arguments, shape: str, n_teachers: int) -> bool:
    """Whether the updates, keys and values of all teachers, three copies each way, stay below `max_gb`."""
    config = SHAPES[shape]()
    elements = args.batch * args.seq_len * n_teachers * config.hidden_size * config.num_hidden_layers
    return 6 * 4 * elements < args.max_gb * 1e9


def compare_steps(args: Arguments, shape: str, n_teachers: int) -> list[dict[str, Any]]:
    """Measures all methods side by side; returns a row for each."""
    every = fits(args, shape, n_teachers)
    cheap = (*CARRIERS, *(m for m in args.methods if steps_of(m) > 1 or rank_of(m)))
    methods = ["plain", *(method for method in args.methods if every or method in cheap)]
    steps = Steps(args, shape, n_teachers)
    times = compare(
        {m: (partial(steps.prepare, m), partial(steps.step, m)) for m in methods}, args.rounds, args.device
    )
    times = {m: [seconds / steps_of(m) for seconds in of_method] for m, of_method in times.items()}
    held = {method: steps.held_bytes(method) for method in methods}
    total = {method: steps.state_bytes(method) + held[method] for method in methods}
    return [
        {
            "shape": shape,
            "batch": args.batch,
            "seq_len": args.seq_len,
            "teachers": n_teachers,
            "method": method,
            "ms": round(1000 * median(times[method]), 3),
            "time_ratio": round(ratio(times[method], times["plain"]), 3),
            "peak_mb": round(held[method] / 1e6, 1),
            "peak_ratio": round(held[method] / held["plain"], 3),
            "total_mb": round(total[method] / 1e6, 1),
            "total_ratio": round(total[method] / total["plain"], 3),
        }
        for method in methods
    ]


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Time and memory relative to a plain adapter's step, over the number of teachers."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(1.5 + 4 * len(shapes), 7), layout="constrained", dpi=120)
    axes = figure.subplots(2, len(shapes), squeeze=False, sharex=True)
    for column, shape in enumerate(shapes):
        for row_axes, value in zip(axes, ("time_ratio", "peak_ratio"), strict=True):
            ax = row_axes[column]
            for method in dict.fromkeys(row["method"] for row in rows):
                points = [(r["teachers"], r[value]) for r in rows if r["shape"] == shape and r["method"] == method]
                style = {"color": "black", "linestyle": ":"} if method == "plain" else {"marker": "o", "markersize": 4}
                ax.plot(*zip(*points, strict=True), label=method, **style)
            ax.set(xscale="log", yscale="log")
            ax.set_xticks(sorted({row["teachers"] for row in rows}))
            ax.set_yticks([1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32])
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_major_formatter(ScalarFormatter())
                axis.set_minor_locator(NullLocator())
            ax.set_ylim(0.9, 1.2 * max(row[value] for row in rows))
            ax.grid(alpha=0.3)
        axes[0][column].set_title(shape)
        axes[1][column].set_xlabel("teachers")
    axes[0][0].set_ylabel("time of a step / plain adapter")
    axes[1][0].set_ylabel("peak memory / plain adapter")
    axes[0][0].legend()
    figure.suptitle(f"A step of stage 2, {rows[0]['batch']} sequences, {title}", fontsize="medium")
    return figure


def header(args: Arguments) -> str:
    """Return the header of the printed rows."""
    columns = f"{'shape':<12}{'teachers':>9}  {'method':<12}{'ms':>10}{'time':>8}{'peak MB':>10}{'memory':>8}"
    return f"{args.batch} sequences, ratios to `plain`\n{columns}{'total MB':>10}"


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""
    return (
        f"{row['shape']:<12}{row['teachers']:>9}  {row['method']:<12}{row['ms']:>10.1f}{row['time_ratio']:>8.2f}"
        f"{row['peak_mb']:>10.1f}{row['peak_ratio']:>8.2f}{row['total_mb']:>10.1f}"
    )


def main() -> None:
    """Run the benchmark."""
    measure.run(Arguments, compare_steps, header, line, draw)


if __name__ == "__main__":
    main()
