"""Run the tests that `docs/reliability.md` counts, and write its tables.

make reliability
"""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "reliability.md"
COMPAT = ROOT / "docs" / "compat.json"
REPORT = ROOT / "outputs" / "reliability.xml"

# The sections of the page, and the tests that each counts, as shell patterns of "module::test". A test counts once, in
# the first section that names it.
SECTIONS = {
    "Killed": ["test_checkpoint::*kill*"],
    "Stopped by SIGTERM": ["*::*sigterm*"],
    "Resumed": ["*::*resumed_run_is_bitwise*"],
    "A full disk": ["*::*full_disk*"],
    "Damaged checkpoints": [
        "test_checkpoint::*damage*", "test_checkpoint::*whole_again*", "test_mixin::test_resuming_*"
    ],
    "Two processes": ["test_distributed::*"],
    "What must change nothing": [
        "test_invariance::*", "test_padding::*", "*::*gradient_checkpointing_changes_nothing", "*::*in_another_order*",
        "*::*micro_batches*",
    ],
    "The same seed": ["*::*same_seed*"],
    "Fuzzed input": ["*::test_any_*"],
    "Damaged folders": [
        "*::test_folders", "*::*bad_folders*", "*::*head_file*", "*::*folder_that_is_a_link*", "*::*name_in_a_config*"
    ],
    "A Hub that refuses or fails": ["test_push::*", "test_trainer_mixin::*", "test_loading::*"],
    "Wrong input": ["test_bad_inputs::*", "*::test_bad_*", "*::*refused*", "*::*cannot_be_converted*"],
    "Leaks and threads": [
        "*::*live_tensors*", "*::*leave_nothing_behind", "*::*leaves_nothing", "*::*two_models*", "*::*two_students*",
        "*::*two_threads*",
    ],
    "NaN and infinite losses": ["test_nonfinite::*"],
    "Teachers that stay as they are": [
        "*::test_both_stages", "*::test_training_moves_*", "test_families::test_every_method"
    ],
}  # fmt: skip
PACKAGES = ("torch", "transformers", "adapters", "accelerate", "datasets", "evaluate")


def section_of(test: str) -> str | None:
    """Return the section that counts a test, given as `module::test`, or `None`."""
    return next((name for name, patterns in SECTIONS.items() if any(fnmatch(test, p) for p in patterns)), None)


def collected_tests() -> list[str]:
    """Collect the ids of all tests, slow ones too."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "slow or not slow", "tests"]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def by_section(ids: Iterable[str]) -> dict[str, list[str]]:
    """Return the ids of the tests of each section."""
    tests: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for test in ids:
        match = re.match(r"tests/(?:\w+/)*(\w+)\.py::(\w+)", test)
        section = match and section_of(f"{match[1]}::{match[2]}")
        if section:
            tests[section].append(test)
    return tests


def make_table(report: Path) -> str:
    """Return the table of sections from a JUnit report.

    A test counts for one case, or for the sum of the numbers that it recorded as "cases".
    """
    rows = {name: {"tests": 0, "cases": 0, "survived": 0, "skipped": 0} for name in SECTIONS}
    for test in ElementTree.parse(report).iter("testcase"):
        module = test.attrib["classname"].split(".")[-1]
        section = section_of(f"{module}::{test.attrib['name'].split('[')[0]}")
        if section is None:
            continue
        row, outcomes = rows[section], {child.tag for child in test}
        row["tests"] += 1
        if "skipped" in outcomes:
            row["skipped"] += 1
            continue
        counts = [int(p.attrib["value"]) for p in test.iter("property") if p.attrib["name"] == "cases"]
        cases = sum(counts) if counts else 1
        row["cases"] += cases
        row["survived"] += 0 if outcomes & {"failure", "error"} else cases
    lines = ["| | tests | not run here | cases | survived |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        link = f"[{name}](#{name.lower().replace(' ', '-')})"
        lines.append(f"| {link} | {row['tests']} | {row['skipped']} | {row['cases']} | {row['survived']} |")
    return "\n".join(lines) + "\n"


def make_compat_table() -> str:
    """Return the table of versions from the results of `make compat`."""
    results = json.loads(COMPAT.read_text())
    by_python = {
        f"{which} on {python}": results[which][python]
        for which in ("lowest", "highest")
        for python in sorted(results.get(which, {}), key=lambda version: [*map(int, version.split("."))])
    }
    rows, runs = [["", *by_python]], list(by_python.values())
    rows.append(["---"] * len(rows[0]))
    rows.append(["Python", *(run["python"] for run in runs)])
    rows += [[package, *(run["versions"][package] for run in runs)] for package in PACKAGES]
    rows += [[key, *(str(run[key]) for run in runs)] for key in ("passed", "failed", "skipped", "platform", "date")]
    rows.append(["command", *(f"`{run['command']}`" for run in runs)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write(marker: str, table: str) -> None:
    """Write a table below its marker in the page, such as `<!-- table: cases -->`."""
    pattern = rf"(<!-- table: {marker} -->\n\n)(?:\|.*\n)*\n*"
    PAGE.write_text(re.sub(pattern, lambda match: f"{match[1]}{table}\n", PAGE.read_text()))


def main() -> int:
    """Run the tests of all sections, write both tables, and return the exit status of the tests."""
    REPORT.parent.mkdir(exist_ok=True)
    functions = sorted({test.split("[")[0] for tests in by_section(collected_tests()).values() for test in tests})
    command = [sys.executable, "-m", "pytest", "-n", "auto", "-m", "slow or not slow", "--junitxml", str(REPORT)]
    status = subprocess.run([*command, *functions], cwd=ROOT).returncode
    write("cases", make_table(REPORT))
    write("versions", make_compat_table())
    return status


if __name__ == "__main__":
    sys.exit(main())
