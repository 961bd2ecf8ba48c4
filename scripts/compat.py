"""Run the tests with the lowest or the highest versions that setup.py allows, and write the result.

make compat                                  # lowest on the oldest Python, highest on all others
make compat-highest PYTHONS=python3.13       # one of them

Each has its own virtual environment and its own result. "lowest" installs each requirement of the package and its
tests at its lowest version, and lets pip choose the rest; "highest" lets pip choose everything, as for a new user.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "compat.json"
PACKAGE = "hf-adapter-distillation"
PYTHON = "{}.{}".format(*sys.version_info)
PACKAGES = ("torch", "transformers", "adapters", "accelerate", "datasets", "evaluate", "peft", "numpy")


def ask(python: str, function: str, names: tuple[str, ...]) -> dict:
    """Call a function of `importlib.metadata` for each package in another environment."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.{function}(n) for n in {names!r}}}))"
    return json.loads(subprocess.check_output([python, "-c", code], text=True))


def floors(requirements: list[str]) -> str:
    """Return the lines of a constraints file with each requirement at its lowest version.

    `adapters<2,>=1.3` becomes `adapters==1.3`. Requirements that are pinned already are left out.
    """
    matches = (re.match(r"([\w-]+)[^;]*[>~]=([\w.]+)", requirement) for requirement in requirements)
    return "".join(f"{match[1]}=={match[2]}\n" for match in matches if match)


def install(folder: Path, which: str) -> str:
    """Create the environment from scratch and return the path of its Python."""
    venv.create(folder, clear=True, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--editable"]
    subprocess.run([*pip, ".", "--no-deps"], check=True, cwd=ROOT)
    constraints = folder / "constraints.txt"
    requirements = ask(python, "requires", (PACKAGE,))[PACKAGE]
    constraints.write_text(floors(requirements) if which == "lowest" else "")
    subprocess.run([*pip, ".[demo,test]", "--constraint", str(constraints)], check=True, cwd=ROOT)
    return python


def main(which: str) -> int:
    """Install, run the tests, write the result, and return the exit status of the tests."""
    folder = ROOT / f".venv-compat-{which}-{PYTHON}"
    python, report = install(folder, which), folder / "report.xml"
    skip = ("--ignore", "tests/project/test_reliability.py")  # it reads the results of the last run
    command = [python, "-m", "pytest", "-n", "auto", *skip, "--junitxml", str(report)]
    tests = subprocess.run(command, cwd=ROOT)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failed, errors, skipped = (int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped"))
    results = json.loads(RESULTS.read_text())
    results.setdefault(which, {})[PYTHON] = {
        "command": f"make compat-{which} PYTHONS=python{PYTHON}",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": ask(python, "version", PACKAGES),
        "passed": total - failed - errors - skipped,
        "failed": failed + errors,
        "skipped": skipped,
    }
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return tests.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["lowest", "highest"])
    sys.exit(main(parser.parse_args().which))
