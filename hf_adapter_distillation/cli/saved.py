"""The commands `inspect`, `plot` and `push`: use a saved student without its base model."""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence, Sized
from io import BytesIO
from pathlib import Path
from typing import Any

from ..analysis.plots import plot_teacher_attention
from ..downloads import ADAPTER_CONFIG_NAME, locate_saved
from ..student.provenance import PROVENANCE_NAME, provenance_of, read_student


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Return lines with aligned columns, without control characters: a text from the Hub must not steer a terminal."""
    rows = [header, *rows] if header else rows
    cells = [["".join(c if c.isprintable() else "?" for c in str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def check_writable(path: str) -> None:
    """Check before a long run that a file can be written."""
    if not Path(path).parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {Path(path).parent}; make it first.")
    if Path(path).is_dir():
        raise ValueError(f"--output {path} is a folder; name a file.")


def located_student(source: str) -> dict[str, Any]:
    """Return the config of a saved student in a folder or on the Hub, with its provenance."""
    return read_student(locate_saved(source, [ADAPTER_CONFIG_NAME, PROVENANCE_NAME]), source)


def _count(teachers: Sized) -> str:
    return f"{len(teachers)} teacher{'' if len(teachers) == 1 else 's'}"


def inspect(args: Namespace) -> str:
    """Return the provenance of a saved student, as tables or as JSON."""
    saved = located_student(args.source)
    if "distillation" not in saved:
        # A RuntimeError has the exit code 1: this is an answer, not wrong input.
        raise RuntimeError(f"{args.source} holds an adapter that was not distilled; it names no teachers.")
    provenance = provenance_of(saved, args.source)
    if args.json:
        base = {"name": saved["name"], "model_name": saved.get("model_name")}
        return json.dumps(base | provenance.to_dict(), indent=2)
    run, rows = provenance.run, []
    for teacher in provenance.teachers:
        mean = run.mean_attention(teacher.name)
        attention = "-" if mean is None else f"{mean:.2f}"
        ids = ((teacher.revision or "-")[:8], (teacher.digest or "-")[:8])
        rows.append((teacher.name, teacher.source, *ids, attention))
    facts = {
        "base model": saved.get("model_name") or saved.get("model_type"),
        "data set": run.dataset,
        **provenance.known_settings,
        **{f"{term}, stage {stage}": loss for stage, terms in run.losses.items() for term, loss in terms.items()},
        **run.evaluation,
        "versions": ", ".join(f"{package} {version}" for package, version in provenance.versions.items()),
    }
    parts = [
        table([(f"{saved['name']!r}, distilled from {_count(rows)}",)]),
        table(rows, ["teacher", "source", "revision", "digest", "attention"]) if rows else "",
        table((name, _as_text(value)) for name, value in facts.items() if value is not None),
    ]
    return "\n\n".join(filter(None, parts))


def _as_text(value: object) -> object:
    """Return a mapping as a list of its items, and anything else as it is."""
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else value


def plot(args: Namespace) -> str:
    """Draw the attention of a saved student over its teachers to a file."""
    check_writable(args.output)
    provenance = provenance_of(located_student(args.source), args.source)
    if not provenance.run.attention:
        raise ValueError(
            f"{args.source} has no record of the attention over its teachers; train it with --analysis, or call "
            "plot_teacher_attention while the fusion is on the model."
        )
    figure = plot_teacher_attention(provenance.run.attention)
    extension, supported = Path(args.output).suffix.lower()[1:], figure.canvas.get_supported_filetypes()
    if extension not in supported:
        choices = ", ".join(f".{each}" for each in sorted(supported))
        raise ValueError(f"--output {args.output} has no supported extension; choose one of {choices}.")
    image = BytesIO()  # keeps an old file if drawing fails
    figure.savefig(image, format=extension)
    Path(args.output).write_bytes(image.getvalue())
    return f"attention over {_count(provenance.teachers)} drawn to {args.output}"


def push(args: Namespace) -> str:
    """Push a saved student, and return the address of the commit or pull request."""
    from ..hub.push import push_saved  # imports torch

    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder!r} is not a folder; give the folder of a saved student.")
    options = ("private", "revision", "create_pr", "token", "commit_message")
    commit = push_saved(args.folder, args.repo, **{name: vars(args)[name] for name in options})
    return f"pushed to {commit.pr_url or commit.commit_url}"
