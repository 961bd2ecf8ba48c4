"""Write the table of `docs/methods.md` from a run of the tests.

make test ARGS="tests/behaviour/test_families.py -k every_method -m 'slow or not slow' --junitxml report.xml"
.venv/bin/python scripts/methods_table.py report.xml
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "methods.md"
sys.path.insert(0, str(ROOT / "tests"))

from adapter_kinds import METHODS  # noqa: E402


def make_table(report: str) -> str:
    """Return the table of families and methods from the properties in a JUnit report."""
    cells: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        if "cell" in properties:
            cells.setdefault(properties["family"], {})[properties["method"]] = properties["cell"]
    rows = [["model", *METHODS], ["---"] * (len(METHODS) + 1)]
    rows += [[family, *(row[method] for method in METHODS)] for family, row in sorted(cells.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    page = re.sub(r"(\n\n)(?:\|.*\n)+", lambda match: match[1] + make_table(sys.argv[1]), PAGE.read_text(), count=1)
    PAGE.write_text(page)
