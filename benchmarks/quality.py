"""Means with intervals, paired differences, tables and plots of the lines of `streaming_tenants.py`."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t

PLAIN, AVERAGE, DISTILLED = "plain adapter", "teachers' average", "AdapterDistillation"
OBJECTIVES = tuple(
    f"{DISTILLED}: {what}"
    for what in (
        "cosine",
        "task-specific",
        "features and logits",
        "features and cross-task",
        "best 3 teachers",
        "query log",
    )
)
Lines = list[dict[str, Any]]
Runs = dict[tuple[str, int], float]
Table = tuple[list[str], list[list[object]]]


def runs_of(lines: Lines, key: str) -> dict[str, Runs]:
    """Return a value of the test runs that have it, by method, and by tenant and seed."""
    found: dict[str, Runs] = {}
    for line in lines:
        if line["queries"] == "test" and key in line:
            found.setdefault(line["method"], {})[line["tenant"], line["seed"]] = line[key]
    return found


def by_tenant(runs: Runs) -> dict[str, float]:
    """Average over the seeds."""
    names = dict.fromkeys(tenant for tenant, _ in runs)
    return {name: float(np.mean([value for (tenant, _), value in runs.items() if tenant == name])) for name in names}


def interval(runs: Runs) -> tuple[float, float, float]:
    """Return the mean over the tenants and its 95% interval by Student's t; seeds of a tenant are no new tenants."""
    values = np.array(list(by_tenant(runs).values()))
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def differences(runs: Runs, others: Runs) -> Runs:
    """Return the paired differences of the runs that both have."""
    return {cell: value - others[cell] for cell, value in runs.items() if cell in others}


def points(runs: Runs, others: Runs) -> str:
    """Return the mean paired difference with its interval, in points of 1/100."""
    paired = differences(runs, others)
    if not paired:
        return "–"
    mean, low, high = (100 * value for value in interval(paired))
    return f"{mean:+.1f}" if np.isnan(low) else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def median(runs: Runs, places: int) -> str:
    """Return the median with so many decimal places."""
    return f"{np.median(list(runs.values())):.{places}f}" if runs else "–"


def rate_of(runs: Runs) -> str:
    """Return the learning rate of the runs of a method."""
    return f"{next(iter(runs.values())):g}"


def methods(lines: Lines) -> Table:
    """Return a row per method: quality with its interval over tenants and seeds, paired differences, and costs."""
    metrics = {key: runs_of(lines, key) for key in ("auc", "accuracy_at_1", "mrr")}
    costs = {key: runs_of(lines, key) for key in ("ms", "ms_ratio", "MB", "seconds")}
    rates, accuracy = runs_of(lines, "learning_rate"), metrics["accuracy_at_1"]
    plain = {key: runs.get(PLAIN, {}) for key, runs in metrics.items()}
    rows = []
    for method in (name for name in accuracy if ":" not in name):
        quality = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval(runs[method])) for runs in metrics.values()]
        against = [points(accuracy[method], accuracy.get(other, {})) for other in (PLAIN, AVERAGE)]
        against.append(points(metrics["auc"][method], plain["auc"]))
        paired = by_tenant(differences(accuracy[method], plain["accuracy_at_1"]))
        wins = [sum(value > 1e-9 for value in paired.values()), sum(value < -1e-9 for value in paired.values())]
        ms, ratio, megabytes, seconds = (
            median(runs.get(method, {}), places) for runs, places in zip(costs.values(), (0, 2, 2, 0), strict=True)
        )
        row = [method, rate_of(rates[method]), len(accuracy[method]), *quality, *against, f"{wins[0]} / {wins[1]}"]
        rows.append([*row, f"{ms} ({ratio})" if ms != "–" else ms, megabytes, seconds])
    header = ["method", "rate", "runs", "AUC", "accuracy@1", "MRR", "points above plain", "above teachers' average"]
    header.append("points of AUC above plain")
    return [
        *header,
        "tenants better / worse than plain",
        "ms per query (/ plain)",
        "MB per tenant",
        "training s",
    ], rows


def variants(lines: Lines) -> Table:
    """Return a row per variant of AdapterDistillation, over the tenants and seeds that all of them ran for."""
    metrics = {key: runs_of(lines, key) for key in ("auc", "accuracy_at_1", "mrr", "seconds")}
    rates = runs_of(lines, "learning_rate")
    names = [name for name in metrics["mrr"] if name == DISTILLED or (":" in name and name not in OBJECTIVES)]
    common = _common(metrics["mrr"], names)
    rows = []
    for name in names:
        runs = {key: {cell: values[name][cell] for cell in common} for key, values in metrics.items()}
        means = [f"{np.mean(list(runs[key].values())):.3f}" for key in ("auc", "accuracy_at_1", "mrr")]
        against = [points(runs[key], metrics[key].get(DISTILLED, {})) for key in ("accuracy_at_1", "mrr")]
        against = against if name != DISTILLED else ["–", "–"]
        label = name.removeprefix(f"{DISTILLED}: ") if name != DISTILLED else "the defaults"
        rows.append([label, rate_of(rates[name]), len(common), *means, *against, median(runs["seconds"], 0)])
    header = ["AdapterDistillation with", "rate", "runs", "AUC", "accuracy@1", "MRR"]
    return [*header, "points of accuracy@1 above the defaults", "points of MRR", "training s"], rows


def _common(runs: dict[str, Runs], names: list[str]) -> list[tuple[str, int]]:
    """Return the tenants and seeds that all methods ran for."""
    return sorted(set.intersection(*(set(runs[name]) for name in names))) if names else []


def objectives(lines: Lines) -> Table:
    """Return a row per objective and choice of data beside the defaults, over tenants and seeds that all ran for."""
    metrics = {key: runs_of(lines, key) for key in ("auc", "accuracy_at_1", "mrr")}
    names = [name for name in (PLAIN, DISTILLED, *OBJECTIVES) if name in metrics["mrr"]]
    common = _common(metrics["mrr"], names)
    rows = []
    for name in names:
        runs = {key: {cell: values[name][cell] for cell in common} for key, values in metrics.items()}
        means = [f"{np.mean(list(of_metric.values())):.3f}" for of_metric in runs.values()]
        against = [points(runs[key], metrics[key].get(DISTILLED, {})) for key in ("accuracy_at_1", "mrr", "auc")]
        against = against if name != DISTILLED else ["–"] * 3
        label = {DISTILLED: "features (the defaults)"}.get(name, name.removeprefix(f"{DISTILLED}: "))
        rows.append([label, len(common), *means, *against])
    header = [
        "AdapterDistillation with",
        "runs",
        "AUC",
        "accuracy@1",
        "MRR",
        "points of accuracy@1 above the defaults",
    ]
    return [*header, "points of MRR", "points of AUC"], rows


def training_costs(lines: Lines) -> Table:
    """Return a row per method: the seconds of the training for a new tenant, also relative to a plain adapter's."""
    runs = runs_of(lines, "seconds")
    rows: list[list[object]] = []
    for name, seconds in runs.items():
        plain = runs.get(PLAIN, {})
        ratios = {cell: value / plain[cell] for cell, value in seconds.items() if cell in plain}
        rows.append([name, len(seconds), median(seconds, 1), median(ratios, 2)])
    return ["method", "runs", "training s", "/ plain adapter"], rows


def tenants(lines: Lines) -> Table:
    """Return a row per tenant: the accuracy@1 of each method, the mean over the seeds."""
    means = {method: by_tenant(runs) for method, runs in runs_of(lines, "accuracy_at_1").items() if ":" not in method}
    names = dict.fromkeys(name for of_method in means.values() for name in of_method)
    rows: list[list[object]] = [
        [name, *(f"{of_method[name]:.3f}" if name in of_method else "–" for of_method in means.values())]
        for name in names
    ]
    return ["new tenant", *means], rows


def by_budget(lines: Lines) -> dict[tuple[Any, int], Lines]:
    """Group the lines by queries per FAQ, a number or "all", and steps, the smallest budgets first."""
    found: dict[tuple[Any, int], Lines] = {}
    for line in lines:
        found.setdefault((line["shots"], line["arguments"]["steps"]), []).append(line)
    return dict(sorted(found.items(), key=lambda item: (float(str(item[0][0]).replace("all", "inf")), item[0][1])))


def training_data(lines: Lines) -> Table:
    """Return a row per amount of data and method: quality, and paired differences from the plain adapter."""
    rows: list[list[object]] = []
    for (shots, steps), of_budget in by_budget(lines).items():
        metrics = {key: runs_of(of_budget, key) for key in ("auc", "accuracy_at_1", "mrr")}
        rates = runs_of(of_budget, "learning_rate")
        for method in (name for name in (PLAIN, AVERAGE, DISTILLED) if name in rates):
            runs = {key: found[method] for key, found in metrics.items()}
            row = [shots, steps, method, rate_of(rates[method]), len(runs["auc"])]
            row += [f"{np.mean(list(values.values())):.3f}" for values in runs.values()]
            plain = {key: found.get(PLAIN, {}) for key, found in metrics.items()}
            row += [points(runs[key], plain[key]) for key in ("accuracy_at_1", "auc")]
            lowest = by_tenant(differences(runs["auc"], plain["auc"])).values()
            rows.append([*row, f"{100 * min(lowest):+.1f}" if lowest else "–"])
    header = ["queries per FAQ", "steps", "method", "rate", "runs", "AUC", "accuracy@1", "MRR", "points above plain"]
    return [*header, "points of AUC above plain", "the same, lowest tenant"], rows


def draw_training_data(lines: Lines) -> Figure:
    """Draw paired differences to the plain adapter by amount of data, for the tenants that have all amounts."""
    tenants_of = [{line["tenant"] for line in of if line["queries"] == "test"} for of in by_budget(lines).values()]
    common = set.intersection(*tenants_of)
    lines = [line for line in lines if line["tenant"] in common]
    budgets = by_budget(lines)
    compared = [method for method in (AVERAGE, DISTILLED) if method in runs_of(lines, "auc")]
    figure = Figure(figsize=(11, 4), layout="constrained", dpi=150)
    for axes, (key, label) in zip(
        figure.subplots(1, 2), (("accuracy_at_1", "accuracy@1"), ("auc", "AUC")), strict=True
    ):
        for number, method in enumerate(compared):
            places, drawn = [], []
            for place, of_budget in enumerate(budgets.values()):
                if method in (runs := runs_of(of_budget, key)):
                    places.append(place + 0.1 * (number - 0.5))
                    drawn.append(interval(differences(runs[method], runs[PLAIN])))
            means, lows, highs = 100 * np.array(drawn).T
            axes.errorbar(places, means, yerr=[means - lows, highs - means], fmt="o", capsize=3, label=method)
        ticks = [f"{shots} queries,\n{steps} steps" for shots, steps in budgets]
        axes.set_xticks(range(len(budgets)), ticks)
        axes.set(ylabel=f"points of {label} above the plain adapter", xlim=(-0.5, len(budgets) - 0.5))
        axes.axhline(0, color="gray", linewidth=1)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="lower right")
    figure.suptitle(f"Paired differences and 95% intervals by training queries of each FAQ, {len(common)} tenants")
    return figure


def draw_cost(lines: Lines) -> Figure:
    """Draw the paired differences in accuracy@1 to the plain adapter, with their intervals, and the time of a query.

    The methods are those that ran for all tenants. Without a plain adapter the first method is the reference.
    """
    accuracy, times = runs_of(lines, "accuracy_at_1"), runs_of(lines, "ms_ratio")
    tenants_of = {method: {tenant for tenant, _ in runs} for method, runs in accuracy.items()}
    everywhere = set().union(*tenants_of.values())
    names = [method for method in accuracy if ":" not in method and tenants_of[method] == everywhere]
    reference = PLAIN if PLAIN in names else names[0]
    figure = Figure(figsize=(8, 1.4 + 0.45 * len(names)), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    for row, method in enumerate(names):
        paired = differences(accuracy[method], accuracy[reference])
        if not paired:
            continue
        mean, low, high = (100 * value for value in interval(paired))
        error = None if method == reference else [[mean - low], [high - mean]]
        axes.errorbar(mean, row, xerr=error, fmt="o", capsize=3, color="gray" if method == reference else "#4c72b0")
    labels = [f"{method} ({median(times[method], 2)})" if method in times else method for method in names]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linestyle="--", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    label = f"points of accuracy@1 above the {reference}\n(mean and 95% interval of the paired differences)"
    axes.set(xlabel=label, title="Quality, and in brackets the time of a query / plain adapter")
    return figure


def draw_attention(lines: Lines) -> Figure:
    """Where the knowledge came from: the attention of each new tenant's fusion, by teacher and by layer."""
    tables = [
        (line["tenant"], line["attention"]) for line in lines if line["method"] == DISTILLED and "attention" in line
    ]
    new = list(dict.fromkeys(tenant for tenant, _ in tables))
    found = dict.fromkeys(name for _, table in tables for row in table.values() for name in row)
    teachers = [name for name in new if name in found] + [name for name in found if name not in new]
    layers = list(tables[0][1])
    by_teacher = np.full((len(new), len(teachers)), np.nan)
    highest = np.zeros((len(new), len(layers)))
    for row, name in enumerate(new):
        own = [table for tenant, table in tables if tenant == name]
        for column, teacher in enumerate(teachers):
            if teacher in own[0][layers[0]]:
                by_teacher[row, column] = np.mean([table[layer][teacher] for table in own for layer in layers])
        for column, layer in enumerate(layers):
            highest[row, column] = np.mean([max(table[layer].values()) for table in own])
    figure = Figure(figsize=(14, 5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for axes, values, labels, title in (
        (left, by_teacher, teachers, "Attention by teacher, mean over layers and seeds"),
        (right, highest, [str(number) for number in range(len(layers))], "Attention of a layer's strongest teacher"),
    ):
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(new)), new)
        axes.set(title=title, ylabel="new tenant")
        figure.colorbar(image, ax=axes)
    left.set_xlabel("teacher")
    right.set_xlabel("location, from bottom to top")
    return figure
