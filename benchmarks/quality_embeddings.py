"""The table and the plots of the runs of `streaming_tenants.py` on embeddings."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox
from quality import (
    AVERAGE,
    DISTILLED,
    PLAIN,
    Lines,
    Runs,
    Table,
    by_tenant,
    differences,
    interval,
    median,
    points,
    rate_of,
    runs_of,
)

FROZEN, CENTROID, FUSION, MERGE = "frozen encoder", "frozen centroid", "AdapterFusion", "best merge, trained"
NO_ADAPTER = "no adapter"
METRICS = {"title_accuracy_at_1": "by the title alone", "mrr": "MRR", "auc": "AUC"}


def in_order(runs: Mapping[str, Runs]) -> list[str]:
    """Return the methods of runs in the order of the benchmark's methods, the ones that it no longer has last."""
    import embedding_runs
    import language_model_runs

    known = [NO_ADAPTER, *(embedding_runs.METHODS | language_model_runs.METHODS)]
    return [*(name for name in known if name in runs), *sorted(runs.keys() - set(known))]


def mean(runs: Runs) -> str:
    """Return the mean."""
    return f"{np.mean(list(runs.values())):.3f}" if runs else "–"


def lowest_tenant(runs: Runs, others: Runs) -> str:
    """Return the lowest paired difference of a tenant, the mean over its seeds, in points, and its name."""
    paired = by_tenant(differences(runs, others))
    if not paired:
        return "–"
    name = min(paired, key=paired.__getitem__)
    return f"{100 * paired[name]:+.1f} ({name})"


def embeddings(lines: Lines) -> Table:
    """Return a row per method: quality, paired differences from other methods, and the time to onboard a tenant.

    Metrics that the lines do not have, and rivals that did not run, get no column.
    """
    accuracy, rates = runs_of(lines, "accuracy_at_1"), runs_of(lines, "learning_rate")
    frozen = CENTROID if CENTROID in accuracy else FROZEN
    others = [other for other in (NO_ADAPTER, frozen, PLAIN, AVERAGE, FUSION, MERGE) if other in accuracy]
    metrics = {title: runs for key, title in METRICS.items() if (runs := runs_of(lines, key))}
    seconds = runs_of(lines, "cpu_seconds")
    rows: list[list[object]] = []
    for method in in_order(accuracy):
        runs = accuracy[method]
        at_1 = "{:.3f} [{:.3f}, {:.3f}]".format(*interval(runs)) if len(by_tenant(runs)) > 1 else mean(runs)
        row = [method, len(runs), rate_of(rates[method]), at_1, *(mean(of.get(method, {})) for of in metrics.values())]
        row += [points(runs, accuracy[other]) if other != method else "–" for other in others]
        if PLAIN in accuracy:
            row.append(lowest_tenant(runs, accuracy[PLAIN]) if method != PLAIN else "–")
        rows.append([*row, median(seconds.get(method, {}), 1)])
    header = ["method", "runs", "rate", "accuracy@1", *metrics]
    header += [f"points above {'plain' if other == PLAIN else other}" for other in others]
    header += ["lowest tenant above plain"] if PLAIN in accuracy else []
    return [*header, "CPU s to onboard"], rows


def comparison(lines: Lines) -> Table:
    """Return a row per method: quality, paired difference from the plain adapter, and time to onboard a tenant."""
    accuracy, seconds = runs_of(lines, "accuracy_at_1"), runs_of(lines, "cpu_seconds")
    plain = accuracy.get(PLAIN, {})
    rows: list[list[object]] = [
        [
            method,
            mean(accuracy[method]),
            points(accuracy[method], plain) if method != PLAIN else "–",
            median(seconds.get(method, {}), 1),
        ]
        for method in in_order(accuracy)
    ]
    return ["method", "accuracy@1", "points above plain", "CPU s to onboard"], rows


def color_of(method: str) -> str:
    """Return a color for the package's methods, one for trained rivals and one for the frozen encoder."""
    frozen = (FROZEN, CENTROID, "nearest neighbour", "logistic regression", "linear map")
    return "C3" if method.startswith(DISTILLED) else "C7" if method in frozen else "C0"


def draw_differences(files: Mapping[str, Lines]) -> Figure:
    """Draw the paired differences of each method from the plain adapter, a panel for each file, sorted by the first.

    Where no plain adapter ran, as without labels, the differences are from the frozen encoder. Methods with fewer runs
    than others are hollow.
    """
    accuracy = {title: runs_of(lines, "accuracy_at_1") for title, lines in files.items()}
    drawn: dict[str, dict[str, tuple[float, float, float]]] = {}
    for title, runs in accuracy.items():
        reference = runs.get(PLAIN) or runs.get(FROZEN, {})
        paired = {method: differences(of_method, reference) for method, of_method in runs.items()}
        drawn[title] = {method: interval(cells) for method, cells in paired.items() if cells}
    names: list[str] = []  # from the bottom
    for of_file in drawn.values():
        names = sorted(of_file.keys() - set(names), key=lambda method: of_file[method][0]) + names
    figure = Figure(figsize=(4 + 4 * len(files), 1.2 + 0.28 * len(names)), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(files), sharey=True, squeeze=False)[0]
    for axes, (title, of_file) in zip(panels, drawn.items(), strict=True):
        axes.axvline(0, color="black", linewidth=0.8)
        for row, method in enumerate(names):
            if method in of_file:
                middle, low, high = (100 * value for value in of_file[method])
                lengths = None if np.isnan(low) else [[middle - low], [high - middle]]
                is_whole = len(accuracy[title][method]) == max(map(len, accuracy[title].values()))
                style = {"color": color_of(method), "markerfacecolor": color_of(method) if is_whole else "white"}
                axes.errorbar(middle, row, xerr=lengths, fmt="o", markersize=4, capsize=2, **style)
        axes.grid(axis="x", alpha=0.3)
        than = PLAIN if PLAIN in accuracy[title] else FROZEN
        axes.set(title=title, xlabel=f"points of accuracy@1 above the {than}")
    panels[0].set_yticks(range(len(names)), names)
    figure.suptitle("Paired differences, mean over tenants and seeds with the 95% interval over tenants")
    return figure


def draw_cost(files: Mapping[str, Lines]) -> Figure:
    """Draw the accuracy@1 of each method against the CPU seconds to onboard a tenant, a panel for each file."""
    figure = Figure(figsize=(9 * len(files), 7), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    places = []
    for axes, (title, lines) in zip(panels, files.items(), strict=True):
        accuracy, seconds = runs_of(lines, "accuracy_at_1"), runs_of(lines, "cpu_seconds")
        at = {
            method: (float(np.median(list(seconds[method].values()))), float(np.mean(list(runs.values()))))
            for method, runs in accuracy.items()
            if method in seconds
        }
        for method, place in at.items():
            axes.plot(*place, "o", color=color_of(method))
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.margins(0.15, 0.08)
        axes.grid(alpha=0.3)
        axes.set(title=title, xlabel="CPU seconds to onboard a tenant", ylabel="accuracy@1")
        places.append(at)
    figure.draw_without_rendering()  # now the axes have their final size
    for axes, at in zip(panels, places, strict=True):
        label(axes, at)
    return figure


def label(axes: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Label points, each at the nearest place inside the axes where its label covers no point and no other label."""
    size = axes.figure.dpi / 72  # pixels of a typographic point
    dots = {name: axes.transData.transform(place) for name, place in places.items()}
    taken = [Bbox.from_bounds(x - 4 * size, y - 4 * size, 8 * size, 8 * size) for x, y in dots.values()]
    inside = axes.get_window_extent()
    angles = np.radians([0, 180, 30, -30, 150, -150, 60, -60, 120, -120, 90, -90])
    offsets = [(r * np.cos(a), r * np.sin(a)) for r in (7, 14, 22, 32, 44, 58, 74, 92, 112, 134) for a in angles]
    for name in sorted(places, key=lambda name: places[name][::-1]):
        for right, up in offsets:
            text = axes.annotate(
                name,
                places[name],
                (right, up),
                textcoords="offset points",
                fontsize=7,
                color=color_of(name),
                ha="left" if right > 1 else "right" if right < -1 else "center",
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color_of(name), "shrinkB": 3},
            )
            text.set_in_layout(False)
            text.update_positions(axes.figure.canvas.get_renderer())
            box = Text.get_window_extent(text).padded(size)  # without the line to the point
            is_inside = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            if (is_inside and not box.count_overlaps(taken)) or (right, up) == offsets[-1]:
                break
            text.remove()
        taken.append(box)
