"""The table of the example and its picture."""

from collections.abc import Mapping
from itertools import product

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

COLUMNS = {  # header and format of each value of a row
    "accuracy_at_1": ("accuracy@1", ".3f"),
    "mrr": ("MRR", ".3f"),
    "auc": ("AUC", ".3f"),
    "exact_match": ("exact match", ".3f"),
    "setting": ("rate/weight", "g"),
    "queries_per_s": ("queries/s", ".0f"),
    "tokens_per_s": ("tokens/s", ".0f"),
    "ms": ("ms/query", ".1f"),
    "MB": ("MB", ".2f"),
    "onboard_s": ("onboard s", ".1f"),
    "train_s": ("train s", ".1f"),
}
DISTILLED, OTHER, BELOW = "#0b6e99", "#555b66", "#c2c7d0"  # colours: the student, other ways, weights below the mean
Rows = Mapping[str, Mapping[str, float]]


def cells(rows: Rows) -> list[list[str]]:
    """Return the header and the rows of the table as text, the methods in the first column."""
    keys = [key for key in COLUMNS if all(key in row for row in rows.values())]
    header = ["", *(COLUMNS[key][0] for key in keys)]
    return [header, *([method, *(f"{row[key]:{COLUMNS[key][1]}}" for key in keys)] for method, row in rows.items())]


def as_text(rows: Rows) -> str:
    """Return the table in columns."""
    table = cells(rows)
    width = max(len(method) for method, *_ in table)
    return "\n".join(f"{method:<{width}}" + "".join(f"{cell:>12}" for cell in row) for method, *row in table)


def draw(rows: Rows, weights: Mapping[str, float], student: str) -> Figure:
    """Draw accuracy@1 against the seconds to onboard, and the weights of the teachers.

    Args:
        rows: The rows with `accuracy_at_1` and `onboard_s`.
        weights: The weight of each teacher.
        student: The name of the new tenant.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=120)
    quality, teachers = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_weights(teachers, weights)
    teachers.set_title(f"Weights of {student}'s teachers", fontsize="medium")
    draw_quality(quality, rows)
    quality.set_title(f"Ways to onboard {student}", fontsize="medium")
    label_points(quality, {name: (row["onboard_s"], row["accuracy_at_1"]) for name, row in rows.items()})
    return figure


def colour(method: str) -> str:
    """Return the colour of a method."""
    return DISTILLED if method.startswith("AdapterDistillation") else OTHER


def draw_quality(axes: Axes, rows: Rows) -> None:
    """Draw a point for each way to onboard."""
    for method, row in rows.items():
        axes.plot(row["onboard_s"], row["accuracy_at_1"], "o", color=colour(method))
    axes.set(xscale="log", xlabel="seconds to onboard", ylabel="accuracy@1")
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write the name of each point beside it, where it covers neither a point nor another name."""
    figure = axes.figure
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # from now on the points have places
    renderer, pixels = canvas.get_renderer(), figure.dpi / 72  # of a typographic point
    places = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 5 * pixels, y - 5 * pixels, 10 * pixels, 10 * pixels) for x, y in places.values()]
    room = axes.get_window_extent(renderer)
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        label = axes.annotate(name, points[name], (0, 0), textcoords="offset points", va="center", fontsize="small")
        label.set_color(colour(name))
        extent = label.get_window_extent(renderer)
        for up, side in product((0, 11, -11, 22, -22, 33, -33, 44, -44), (8 * pixels, -8 * pixels - extent.width)):
            box = Bbox.from_bounds(x + side, y + up * pixels - extent.height / 2, extent.width, extent.height)
            inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        label.xyann = (side / pixels, up)
        if up:
            end = (8 if side > 0 else -8, up)
            line = {"arrowstyle": "-", "color": BELOW, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", points[name], end, textcoords="offset points", arrowprops=line)


def draw_weights(axes: Axes, weights: Mapping[str, float]) -> None:
    """Draw a bar for each teacher, from the mean weight to its own."""
    mean = sum(weights.values()) / len(weights)
    names = sorted(weights, key=lambda name: weights[name])
    for name in names:
        axes.barh(name, weights[name] - mean, left=mean, color=DISTILLED if weights[name] >= mean else BELOW)
        end = (max(weights[name], mean), name)
        axes.annotate(f"{weights[name]:.2f}", end, (4, 0), textcoords="offset points", va="center", fontsize="small")
    axes.axvline(mean, color=OTHER, linewidth=1)
    axes.set_xlabel("weight (line: the mean)")
    axes.set_xlim(0, 1.15 * max(weights.values()))
    axes.spines[["top", "right"]].set_visible(False)
