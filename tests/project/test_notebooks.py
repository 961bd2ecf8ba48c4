"""The notebooks run offline, and are committed with the outputs of their cells."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from marks import LONG
from paths import ROOT

FIGURES = {"quick_start": 1, "analysis": 4}
PLACES = ("/work/", "/tmp/", "/home/", "/root/", "/Users/", "site-packages")  # of a machine
VARIES = r"[-+]?\d[\d.,]*|helps|harms|within two errors of 0"  # from machine to machine


def read(path):
    """The notebook, with the code cells, each with its outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook, [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def figures(cell):
    return [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def check_outputs(path):
    """All cells ran once from the top, without a warning; the figures are there, and no path of the machine is."""
    notebook, cells = read(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    pictures = [picture for cell in cells for picture in figures(cell)]
    assert len(pictures) == FIGURES[path.stem]
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    text = "".join(map(printed, cells))
    assert not re.search(r"warning|Traceback|nan\b", text, re.I)
    assert not re.search(r"\d+%\||it/s", text)
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    assert [place for place in (*PLACES, sys.prefix, str(ROOT)) if place in json.dumps(notebook)] == []


@pytest.mark.parametrize("name", FIGURES)
def test_committed_outputs(name):
    path = ROOT / "examples" / "notebooks" / f"{name}.ipynb"
    check_outputs(path)
    notebook, cells = read(path)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell["metadata"] == {} for cell in cells), "no times of execution"
    assert path.stat().st_size < 600_000
    assert f"(examples/notebooks/{name}.ipynb)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [pytest.param(name, marks=LONG) for name in FIGURES])
def test_notebook_runs(name, tmp_path):
    """In a copy, without kernels or settings of the user's; the same is printed but for numbers."""
    pytest.importorskip("nbmake")
    path = Path(shutil.copy(ROOT / "examples" / "notebooks" / f"{name}.ipynb", tmp_path))
    _, committed = read(path)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "PYTEST", "IPYTHON"))}
    env |= {key: str(tmp_path / key) for key in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--timeout=0",
        "--nbmake",
        "--overwrite",
        str(path),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    check_outputs(path)
    _, cells = read(path)
    for cell, before in zip(cells, committed, strict=True):
        ours, theirs = (" ".join(re.sub(VARIES, "#", printed(each)).split()) for each in (cell, before))
        assert ours == theirs, "".join(cell["source"])
        assert len(figures(cell)) == len(figures(before)), "".join(cell["source"])
    if name == "quick_start":
        assert "hf_adapter_distillation cannot be imported\nidentical logits: True" in printed(cells[-1])
    folder = path.parent / "outputs" / name
    assert (folder / ("toys" if name == "quick_start" else "analysis")).is_dir()


def test_the_notebooks_repeat_the_address_of_the_repository():
    """In the button and in the cell that installs the package; `docs/conf.py` has it."""
    (address,) = re.findall(r'^repository = "(.+)"$', (ROOT / "docs" / "conf.py").read_text(), flags=re.M)
    assert address.startswith("https://github.com/")
    for name in FIGURES:
        path = ROOT / "examples" / "notebooks" / f"{name}.ipynb"
        notebook, cells = read(path)
        source = "".join("".join(cell["source"]) for cell in notebook["cells"])
        button = f"https://colab.research.google.com/github/{address.removeprefix('https://github.com/')}/blob/main/"
        assert f"]({button}{path.relative_to(ROOT)})" in source
        assert f'REPOSITORY = "{address}"' in "".join(cells[0]["source"])
        assert "git+{REPOSITORY}" in "".join(cells[0]["source"])


def test_what_the_quick_start_says_of_its_table():
    """The student leads, by less than two errors of a difference, and the teacher of other topics is at chance."""
    _, cells = read(ROOT / "examples" / "notebooks" / "quick_start.ipynb")
    text = "".join(map(printed, cells))
    rows = re.findall(r"^(teacher \w+|plain adapter|student) +([\d.]+) +([\d.]+)$", text, flags=re.M)
    *others, student = ((name, float(accuracy), float(error)) for name, accuracy, error in rows)
    assert [name for name, *_ in rows][-2:] == ["plain adapter", "student"]
    assert len(others) == 4
    assert all(accuracy < student[1] for _, accuracy, _ in others)
    best = max(others, key=lambda row: row[1])
    assert student[1] - best[1] < 2 * (student[2] ** 2 + best[2] ** 2) ** 0.5
    ((cinema, error),) = [row[1:] for row in others if row[0] == "teacher cinema"]
    assert abs(cinema - 1 / 3) < error


def test_what_the_analysis_says_of_its_tables():
    """Each sentence of its last section."""
    _, cells = read(ROOT / "examples" / "notebooks" / "analysis.ipynb")
    weights, attention, distances, differences = (
        next(printed(cell) for cell in cells if f"had.{name}(" in "".join(cell["source"]))
        for name in ("weigh_teachers", "teacher_attention", "student_distance", "leave_one_teacher_out")
    )
    of = {name: float(weight) for name, weight in re.findall(r"^(\w+) +([\d.]+)$", weights, flags=re.M)}
    assert min(of["shoes"], of["books"]) > 0.3
    assert max(of["cinema"], of["noise"]) < 0.05
    teachers = attention.splitlines()[0].split()[1:]
    layers = [re.findall(r"([\d.]+) ±", line) for line in attention.splitlines() if "±" in line]
    means = re.search("^mean over layers +(.*)", attention, re.M)[1].split()
    assert len(layers) == 6
    for row in (*layers, means):
        found = dict(zip(teachers, map(float, row), strict=True))
        assert min(found, key=found.get) == "noise"
    assert sorted(found, key=found.get)[1] == "cinema"
    found = [float(mean) for mean in re.findall(r"([\d.]+) ±", distances)]
    assert max(found) == found[-1] < 0.2
    verdicts = dict(re.findall(r"^(\w+) .*?±\s+[\d.]+ +(.*)$", differences, flags=re.M))
    assert list(verdicts) == teachers
    assert set(verdicts.values()) == {"within two errors of 0"}
