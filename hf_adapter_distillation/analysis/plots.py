"""Draw the results of `observe` with matplotlib, for few teachers and layers or for many."""

from collections.abc import Mapping
from math import isnan, nan
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsFloat

from ..method.weights import TeacherWeights, weight_of_none

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 16  # with more teachers, the cells of a heat map are too narrow for their numbers
LONGEST = 30.0  # inches
MISSING = "Plots need matplotlib; install it with pip install matplotlib."


class Estimate(NamedTuple):
    """Mean over examples, which is also `float()` of the estimate, and its standard error."""

    mean: float
    standard_error: float  # NaN for a single example

    def __float__(self) -> float:
        return self.mean


def plot_teacher_attention(
    table: Mapping[str, Mapping[str, SupportsFloat]], title: str = "Attention over teachers"
) -> "Figure":
    """Draw a table of `teacher_attention`, estimates or numbers, as a heat map, layers from bottom to top.

    White is the equal share of the teachers, red more and blue less. Attention that is nearly even stays pale: the
    scale reaches from half the equal share, or less, to one and a half, or more. Up to 16 teachers the cells show
    their numbers.

    Returns:
        A matplotlib figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: If the table is empty.
        ImportError: If matplotlib is not installed.
    """
    if not table:
        raise ValueError("The table is empty; make one with teacher_attention(model, dataset).")
    layers, teachers = list(table), list(next(iter(table.values())))
    numbered = len(teachers) <= NUMBERED
    figure, axes = _axes(3.2 + len(teachers) * (0.8 if numbered else 0.24), 1.6 + 0.42 * len(layers))
    weights = [[float(table[layer][teacher]) for teacher in teachers] for layer in layers]
    from matplotlib.colors import TwoSlopeNorm

    share = 1 / len(teachers)
    spread = max(share / 2, *(abs(weight - share) for row in weights for weight in row))
    norm = TwoSlopeNorm(share, vmin=max(0, share - spread), vmax=share + spread)
    image = axes.imshow(weights, origin="lower", aspect="auto", cmap="RdBu_r", norm=norm)
    axes.set_xticks([x - 0.5 for x in range(1, len(teachers))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(layers))], minor=True)
    axes.grid(which="minor", color="lightgray", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if numbered:
        for y, row in enumerate(weights):
            for x, weight in enumerate(row):
                color = "black" if 0.15 < norm(weight) < 0.85 else "white"
                axes.text(x, y, f"{weight:.2f}", ha="center", va="center", color=color)
    rotation: dict[str, Any] = {"rotation": 30, "ha": "right"} if numbered else {"rotation": 90, "fontsize": 8}
    axes.set_xticks(range(len(teachers)), teachers, parse_math=False, **rotation)  # a name may hold dollar signs
    axes.set_yticks(range(len(layers)), layers)
    axes.set(title=title, xlabel="teacher", ylabel="layer")
    bar = figure.colorbar(image, ax=axes, label=f"mean attention (white: the equal share, {share:.3g})")
    bar.ax.axhline(share, color="gray", linewidth=2)
    return figure


def plot_teacher_weights(
    weights: Mapping[str, float] | TeacherWeights, title: str = "Weights of the teachers"
) -> "Figure":
    """Draw the weights of the teachers for a task, of `TeacherWeights` their mean, as bars, the heaviest on top.

    What they lack to 1 is the bar of the null teacher, "(none)". A line marks the equal share.

    Raises:
        ValueError: If there are no weights.
        ImportError: If matplotlib is not installed.
    """
    weights = weights.mean() if isinstance(weights, TeacherWeights) else weights
    if not weights:
        raise ValueError("There are no weights; learn them with weigh_teachers(model, batches).")
    ordered = dict(sorted(weights.items(), key=lambda item: item[1]))
    bars = {"(none)": weight_of_none(weights.values()), **ordered}
    figure, axes = _bars({name: Estimate(weight, nan) for name, weight in bars.items()}, title, "teacher", "weight")
    axes.axvline(sum(bars.values()) / len(bars), color="gray", linestyle="--", linewidth=1, label="the equal share")
    axes.legend(loc="lower right", fontsize=8)
    axes.set_xlim(0, max(1.0, *bars.values()))
    return figure


def plot_student_distance(
    distances: Mapping[str, Estimate], title: str = "Distance of the student to its fused teachers"
) -> "Figure":
    """Draw the result of `student_distance` as bars with one standard error, layers from bottom to top.

    A line marks 1, the distance of a student that adds nothing. Where all are below a third, the scale ends earlier.

    Raises:
        ValueError: If there are no distances.
        ImportError: If matplotlib is not installed.
    """
    if not distances:
        raise ValueError("There are no distances; find them with student_distance(model, dataset).")
    figure, axes = _bars(distances, title, "layer", "squared distance / variance of the fused update")
    longest = max(
        each.mean + (0 if isnan(each.standard_error) else each.standard_error) for each in distances.values()
    )
    if 0 < longest < 1 / 3:
        axes.set_xlim(0, 1.1 * longest)
        axes.set_xlabel(f"{axes.get_xlabel()}\n(a student that adds nothing is at 1, outside this scale)")
        return figure
    axes.axvline(1, color="gray", linestyle="--", linewidth=1, label="a student that adds nothing")
    axes.legend(loc="lower right", fontsize=8)
    axes.set_xlim(left=0)
    return figure


def plot_leave_one_teacher_out(
    differences: Mapping[str, Estimate], title: str = "Without one of the teachers"
) -> "Figure":
    """Draw the result of `leave_one_teacher_out` as bars with one standard error, the most useful teacher on top.

    Raises:
        ValueError: If there are no differences.
        ImportError: If matplotlib is not installed.
    """
    if not differences:
        raise ValueError("There are no differences; find them with leave_one_teacher_out(model, dataset).")
    ordered = dict(sorted(differences.items(), key=lambda item: item[1].mean))
    label = "task loss without it, minus with all: right of 0 it helps"
    figure, axes = _bars(ordered, title, "teacher left out", label)
    axes.axvline(0, color="gray", linewidth=1)
    return figure


def _axes(width: float, height: float) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    figure = Figure(figsize=(min(LONGEST, width), min(LONGEST, height)), layout="constrained", dpi=150)
    return figure, figure.add_subplot()


def _bars(estimates: Mapping[str, Estimate], title: str, name: str, label: str) -> tuple["Figure", Any]:
    """Draw one horizontal bar for each estimate, from bottom to top; an error that is NaN is not drawn."""
    figure, axes = _axes(6.4, 1.4 + 0.24 * len(estimates))
    means, errors = zip(*estimates.values(), strict=True)
    places = range(len(estimates))
    axes.barh(places, means, height=0.7, color="#4c72b0")
    axes.errorbar(means, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    axes.set_yticks(places, list(estimates), parse_math=False, fontsize=8 if len(estimates) > NUMBERED else 10)
    axes.set(title=title, xlabel=label, ylabel=name)
    axes.margins(y=0.01)
    return figure, axes
