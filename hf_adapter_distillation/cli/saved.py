"""What the command line does with saved students; none of it loads a model."""

import json
from argparse import Namespace
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from .._compat import ADAPTER_CONFIG_NAME
from ..analysis.plots import MISSING, plot_teacher_attention
from ..downloads import locate_saved
from ..hub.push import push_saved
from ..student.provenance import provenance_of, read_saved


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Rows in columns of equal widths.

    Args:
        rows: The rows.
        header: The names of the columns.

    Returns:
        Lines of printable characters.
    """
    # What comes from somebody's repository shall not speak to the terminal.
    cells = [["".join(c if c.isprintable() else "?" for c in str(cell)) for cell in row] for row in rows]
    cells = [list(header), *cells] if header else cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in padded)


def check_writable(path: str) -> None:
    """Refuses a file that could not be written in the end.

    Args:
        path: The file.

    Raises:
        ValueError: If its folder does not exist, or it is a folder.
    """
    if not Path(path).parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {Path(path).parent}; make it first.")
    if Path(path).is_dir():
        raise ValueError(f"--output {path} is a folder; name a file.")


def inspect(args: Namespace) -> str:
    """Tells what a saved student was distilled from.

    Args:
        args: `source`, and whether it shall be `json`.

    Returns:
        Tables, or the provenance as JSON.

    Raises:
        ValueError: If there is no adapter, or its config is damaged.
        RuntimeError: If it was not distilled.
        OSError: If the Hub does not give it.
    """
    saved = read_saved(locate_saved(args.source, [ADAPTER_CONFIG_NAME]))
    if "distillation" not in saved:
        raise RuntimeError(f"{args.source} holds an adapter that was not distilled; it names no teachers.")
    provenance = provenance_of(saved, args.source)
    if args.json:
        base = {"name": saved["name"], "model_name": saved.get("model_name")}
        return json.dumps(base | provenance.to_dict(), indent=2)
    run, rows = provenance.run, []
    for teacher in provenance.teachers:
        mean = run.mean_attention(teacher.name)
        shown = (teacher.name, teacher.source, (teacher.revision or "-")[:8], (teacher.digest or "-")[:8])
        rows.append([*shown, "-" if mean is None else f"{mean:.2f}"])
    losses = [
        (f"{term}, stage {stage}", value) for stage, terms in run.losses.items() for term, value in terms.items()
    ]
    versions = ", ".join(f"{package} {version}" for package, version in provenance.versions.items())
    about = [
        ("base model", saved.get("model_name") or saved.get("model_type")),
        ("data set", run.dataset),
        *provenance.known_settings.items(),
        *losses,
        *run.evaluation.items(),
        ("versions", versions),
    ]
    parts = [
        table([(f"{saved['name']!r}, distilled from {len(rows)} teachers",)]),
        table(rows, ["teacher", "source", "revision", "digest", "attention"]) if rows else "",
        table((key, value) for key, value in about if value is not None),
    ]
    return "\n\n".join(filter(None, parts))


def plot(args: Namespace) -> str:
    """Draws the attention of a saved student over its teachers.

    Args:
        args: `source`, and `output`, the file of the image.

    Returns:
        Where the image is.

    Raises:
        ValueError: If there is no distilled student or no attention, or the file cannot be written.
        ImportError: If matplotlib is not installed.
        OSError: If the Hub does not give it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(MISSING) from error
    check_writable(args.output)
    kind, kinds = Path(args.output).suffix.lower().removeprefix("."), Figure().canvas.get_supported_filetypes()
    if kind not in kinds:
        known = ", ".join(f".{each}" for each in sorted(kinds))
        raise ValueError(f"--output {args.output} has no known ending; choose one of {known}.")
    provenance = provenance_of(read_saved(locate_saved(args.source, [ADAPTER_CONFIG_NAME])), args.source)
    if not provenance.run.attention:
        raise ValueError(
            f"{args.source} says nothing about the attention over its teachers; train it with --analysis, or draw it "
            "with plot_teacher_attention while the fusion is on the model."
        )
    image = BytesIO()  # nothing of the old file is lost where drawing fails
    plot_teacher_attention(provenance.run.attention).savefig(image, format=kind)
    Path(args.output).write_bytes(image.getvalue())
    return f"attention over {len(provenance.teachers)} teachers drawn to {args.output}"


def push(args: Namespace) -> str:
    """Pushes a saved student.

    Args:
        args: `folder`, `repo`, and what else `push_saved` takes.

    Returns:
        The address of the commit or of the pull request.

    Raises:
        ValueError: If there is no distilled student, or the repository has no valid name.
        OSError: If there is no token, or the Hub refuses.
    """
    if not Path(args.folder).is_dir():
        raise ValueError(f"{args.folder!r} is no folder; give that of a saved student.")
    options: dict[str, Any] = {
        name: vars(args)[name] for name in ("private", "revision", "create_pr", "token", "commit_message")
    }
    made = push_saved(args.folder, args.repo, **options)
    return f"pushed to {made.pr_url or made.commit_url}"
