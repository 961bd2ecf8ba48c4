"""Short tables of the weights of the teachers, and of a finished training."""

from collections.abc import Collection, Sequence

from ..method.weights import MINIMAL_GAIN, TeacherWeights, weight_of_none
from .training_run import TrainingRun


def weights_table(weights: TeacherWeights, kept: Collection[str]) -> str:
    """Return lines with the weights of the teachers, of which some are kept, and their gain."""
    means = weights.mean()
    lines = [f"{'teacher':<32}{'weight':>10}"]
    lines += [f"{name:<32}{weight:>10.3f}{'  kept' if name in kept else ''}" for name, weight in means.items()]
    lines += [
        f"{'(none)':<32}{weight_of_none(means.values()):>10.3f}",
        f"{'gain on held-out labels':<32}{weights.gain:>10.1%}",
    ]
    return "\n".join(lines)


def summary_rows(student: str, run: TrainingRun) -> list[tuple[str, str]]:
    """Return the start of a student, its teachers, its distance to them and its metrics, as texts in two columns."""
    settings = run.settings
    rows = [("student", f"{student!r}, {settings.get('steps', 0)} steps, {settings.get('epochs', 0):g} epochs")]
    if (explained := settings.get("start_explained")) is not None:
        rows.append(("start", f"explained {explained:.0%} of its teachers' mean update before the first step"))
    weights = settings.get("teacher_weights") or {}
    kept = [teacher.name for teacher in run.teachers]
    for name in [*kept, *(name for name in weights if name not in kept)]:
        facts = [f"weight {weights[name]:.2f}"] if name in weights else []
        attention = run.mean_attention(name)
        facts += [] if attention is None else [f"attention {attention:.2f}"]
        facts += [] if name in kept else ["left out"]
        rows.append((f"teacher {name}", ", ".join(facts) or "not weighed"))
    if weights:
        rows.append(("no teacher", f"weight {weight_of_none(weights.values()):.2f}"))
        gain = settings.get("teacher_gain", 0.0)
        too_little = ", too little to start at them" if gain < MINIMAL_GAIN else ""
        of_loss = f"{gain:.1%} of the task loss, on held-out labels{too_little}"
        rows.append(("gain of the teachers", of_loss))
    distance = run.losses.get("2", {}).get("distillation_loss")
    reached = "-, since stage 2 has no logged step" if distance is None else f"{distance:.4g} (distillation loss)"
    rows.append(("distance at the end", reached))
    return rows + [(name, f"{value:.4g}") for name, value in run.evaluation.items()]


def as_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return lines with two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
