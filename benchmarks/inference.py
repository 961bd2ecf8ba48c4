"""What a request costs: the base model, a plain adapter, a distilled student, and adapters' `Fuse` of N teachers.

The student is distilled for a few steps, saved, and loaded into a model that has never seen a distillation; its logits
there must be bitwise those of the model that trained it, or the benchmark fails.

    python benchmarks/inference.py
    python benchmarks/inference.py --shapes minilm bert-base gpt2 --teachers 1 8 32 --rounds 40
    python benchmarks/inference.py --shapes bert-base --device cuda --dtype bfloat16
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from adapters import Fuse
from matplotlib.figure import Figure
from measure import autocast, compare, make_batch, make_model, peak_bytes, ratio

import hf_adapter_distillation as had  # noqa: F401


@dataclass
class Arguments(measure.Arguments):
    """The arguments of the benchmark."""

    batches: list[int] = field(default_factory=lambda: [1, 32], metadata={"help": "Numbers of sequences in a batch."})
    output: str = field(
        default="outputs/inference.json", metadata={"help": "The JSON file; the plot is written beside it."}
    )


class Platform:
    """One base model with the adapters of all tenants, and a new tenant's adapter of each kind.

    Args:
        args: The arguments.
        shape: The shape of the model.
        n_teachers: The number of teachers.
    """

    def __init__(self, args: Arguments, shape: str, n_teachers: int) -> None:
        self.args, self.shape = args, shape
        self.config = f"seq_bn[reduction_factor={args.reduction_factor}]"
        self.model = make_model(shape, args.device)
        teachers = [f"teacher{n}" for n in range(n_teachers)]
        for name in [*teachers, "plain"]:
            self.model.add_adapter(name, config=self.config)
        self.model.add_classification_head("plain")
        self.fuse = Fuse(*teachers, "plain", name="fuse")
        self.model.add_adapter_fusion(self.fuse)
        self.model.add_adapter("student", config=self.config, distill_from=teachers)
        self.model.add_classification_head("student")
        self.model.to(args.device)
        self.distil()
        self.fuse_name = f"Fuse of {n_teachers} + own"
        self.methods: dict[str, tuple[Any, str]] = {
            "base model": (None, "plain"),
            "plain adapter": ("plain", "plain"),
            "distilled student": ("student", "student"),
            self.fuse_name: (self.fuse, "plain"),
        }

    def distil(self) -> None:
        """Train a few steps of stage 2."""
        self.model.train_adapter("student")
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        batch = make_batch(self.model, 4, self.args.seq_len)
        for _ in range(3):
            self.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def activate(self, method: str) -> None:
        """Set the model up for the requests of a tenant."""
        setup, head = self.methods[method]
        self.model.set_active_adapters(setup)
        self.model.active_head = head
        self.model.eval()

    @torch.inference_mode()
    def logits(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Answers a batch."""
        with autocast(self.args.device, self.args.dtype):
            return self.model(**batch).logits

    def check_reloaded(self, batch: dict[str, torch.Tensor]) -> None:
        """Compare the student's logits with those of the saved adapter in a fresh model."""
        self.activate("distilled student")
        fresh = make_model(self.shape, self.args.device)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_adapter(folder, "student")
            fresh.load_adapter(folder, set_active=True)
        fresh.to(self.args.device).eval()
        with torch.inference_mode(), autocast(self.args.device, self.args.dtype):
            reloaded = fresh(**batch).logits
        if not torch.equal(self.logits(batch), reloaded):
            raise SystemExit(f"inference.py: the reloaded student of {self.shape} has other logits.")

    def stored(self) -> dict[str, dict[str, float]]:
        """Return what a tenant adds to the platform's disk: parameters, and files in 10^6 bytes."""
        savers: dict[str, Callable[[str], None]] = {
            "plain adapter": lambda folder: self.model.save_adapter(folder, "plain"),
            "distilled student": lambda folder: self.model.save_adapter(folder, "student"),
        }
        rows = {"base model": {"parameters": 0, "stored_mb": 0.0}}
        for method, save in savers.items():
            name = self.methods[method][0]
            rows[method] = {"parameters": self.parameters(f"adapters.{name}.", f"heads.{name}."), **size(save)}
        fusion = self.parameters("adapter_fusion_layer.fuse.")
        rows[self.fuse_name] = {
            "parameters": rows["plain adapter"]["parameters"] + fusion,
            "stored_mb": rows["plain adapter"]["stored_mb"]
            + size(lambda folder: self.model.save_adapter_fusion(folder, self.fuse))["stored_mb"],
        }
        return rows

    def parameters(self, *parts: str) -> int:
        """Count the parameters whose names contain one of the parts."""
        named = self.model.named_parameters()
        return sum(p.numel() for name, p in named if any(f".{part}" in f".{name}" for part in parts))


def size(save: Callable[[str], None]) -> dict[str, float]:
    """Measure the size of the saved files, in 10^6 bytes."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return {"stored_mb": sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 1e6}


def compare_requests(args: Arguments, shape: str, n_teachers: int) -> list[dict[str, Any]]:
    """Measures all methods side by side; returns a row for each method and batch size."""
    platform = Platform(args, shape, n_teachers)
    platform.check_reloaded(make_batch(platform.model, max(args.batches), args.seq_len))
    stored = platform.stored()
    rows = []
    for batch_size in args.batches:
        batch = make_batch(platform.model, batch_size, args.seq_len)
        answer = partial(platform.logits, batch)

        def prepare(method: str, answer: Callable[[], Any] = answer) -> None:
            platform.activate(method)
            answer()  # a service answers one request after the other

        calls = {method: (partial(prepare, method), answer) for method in platform.methods}
        times = compare(calls, args.rounds, args.device)
        for method in platform.methods:
            platform.activate(method)
            rows.append(
                {
                    "shape": shape,
                    "teachers": n_teachers,
                    "batch": batch_size,
                    "method": method,
                    "ms": round(1000 * median(times[method]), 3),
                    "time_ratio": round(ratio(times[method], times["plain adapter"]), 3),
                    "peak_mb": round(peak_bytes(answer, args.device) / 1e6, 2),
                    **stored[method],
                }
            )
    return rows


def draw(rows: list[dict[str, Any]], title: str) -> Figure:
    """Latency relative to a plain adapter's, a panel for each batch size."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    labels = list(dict.fromkeys((row["shape"], row["method"]) for row in rows))
    figure = Figure(figsize=(5 * len(batches) + 1.5, 1 + 0.3 * len(labels)), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for ax, batch in zip(panels, batches, strict=True):
        ratios = {(row["shape"], row["method"]): row["time_ratio"] for row in rows if row["batch"] == batch}
        bars = ax.barh(
            [f"{shape}: {method}" for shape, method in labels],
            [ratios[label] for label in labels],
            color=["tab:orange" if "student" in method else "tab:blue" for _, method in labels],
        )
        ax.bar_label(bars, fmt="%.2f", padding=2)
        ax.axvline(1, color="black", linewidth=0.8, linestyle=":")
        ax.margins(x=0.12)
        ax.set(title=f"batch {batch}", xlabel="latency / plain adapter")
    panels[0].invert_yaxis()
    figure.suptitle(f"A request, {title}", fontsize="medium")
    return figure


def header(args: Arguments) -> str:
    """Return the header of the printed rows."""
    columns = f"{'shape':<11}{'batch':>6}  {'method':<20}{'ms':>9}{'time':>7}{'peak MB':>9}"
    return f"ratios to `plain adapter`\n{columns}{'parameters':>13}{'stored MB':>11}"


def line(row: dict[str, Any]) -> str:
    """Return the printed line of a row."""
    return (
        f"{row['shape']:<11}{row['batch']:>6}  {row['method']:<20}{row['ms']:>9.2f}{row['time_ratio']:>7.2f}"
        f"{row['peak_mb']:>9.1f}{row['parameters']:>13,}{row['stored_mb']:>11.2f}"
    )


def main() -> None:
    """Run the benchmark."""
    measure.run(Arguments, compare_requests, header, line, draw)
    print("The saved students, loaded into fresh models, have bitwise the same logits.")


if __name__ == "__main__":
    main()
