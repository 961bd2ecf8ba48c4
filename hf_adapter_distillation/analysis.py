"""Where the knowledge came from: the attention over teachers by layer, as a table and as a heat map."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from adapters import ModelAdaptersMixin

from .composition import find_block
from .state import distillations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AttentionTable = dict[str, dict[str, float]]


def teacher_attention(model: ModelAdaptersMixin, batches: Iterable[dict[str, torch.Tensor]]) -> AttentionTable:
    """The mean attention that the fusion pays to each teacher, by layer.

    The model runs in evaluation mode, so that each layer sees the student's hidden states, as in production. The
    active setup must be a distillation block with its fusion: during or before training, or after a training with
    `keep_fusion=True` and another `model.train_adapter(student)`.

    Args:
        model: The model.
        batches: Batches of inputs on the model's device, for instance a `DataLoader`.

    Returns:
        `{layer: {teacher: weight}}`: means over the batches, each of which weighs the same, and over the non-padding
        tokens of a batch. The weights of a layer sum to 1.

    Raises:
        ValueError: If no distillation block is active, its fusion was dropped, or there are no batches.
    """
    block = find_block(model.active_adapters)
    distillation = distillations(model.adapters_config).get(block.student) if block is not None else None
    if block is None or distillation is None:
        raise ValueError(
            f"The active setup {model.active_adapters} distils nothing; call model.train_adapter(student)."
        )
    was_training, n_batches = model.training, 0
    sums: AttentionTable = {}
    distillation.observing = True
    model.eval()
    try:
        for batch in batches:
            with torch.no_grad():
                model(**batch)
            n_batches += 1
            record = distillation.take_record()
            for location, attention in record.attention.items():
                row = sums.setdefault(location, dict.fromkeys(block.teachers, 0.0))
                for name, weight in zip(attention.names, attention.weights.tolist(), strict=True):
                    row[name] += weight
    finally:
        distillation.observing = False
        model.train(was_training)
    if not sums:
        raise ValueError("There is no attention to show: no batches were given, or the fusion was dropped.")
    return {location: {name: total / n_batches for name, total in row.items()} for location, row in sums.items()}


def plot_teacher_attention(table: AttentionTable, title: str = "Attention over teachers") -> "Figure":
    """Draws the table of `teacher_attention` as a heat map, layers from bottom to top.

    Args:
        table: `{layer: {teacher: weight}}`.
        title: The title of the figure.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: If the table is empty.
        ImportError: If matplotlib is not installed (`pip install "hf-adapter-distillation[demo]"`).
    """
    from matplotlib.figure import Figure

    if not table:
        raise ValueError("The table is empty; make one with teacher_attention(model, batches).")
    layers, teachers = list(table), list(next(iter(table.values())))
    figure = Figure(figsize=(3.2 + 0.8 * len(teachers), 1.6 + 0.42 * len(layers)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    weights = [[table[layer][teacher] for teacher in teachers] for layer in layers]
    image = axes.imshow(weights, origin="lower", aspect="auto", cmap="viridis", vmin=0)
    middle = max(map(max, weights)) / 2
    for y, row in enumerate(weights):
        for x, weight in enumerate(row):
            axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color="white" if weight < middle else "black")
    axes.set_xticks(range(len(teachers)), teachers, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set(title=title, xlabel="teacher", ylabel="layer")
    figure.colorbar(image, ax=axes, label="mean attention")
    return figure
