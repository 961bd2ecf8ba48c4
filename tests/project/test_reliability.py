"""The page "Reliability": its counts are of the tests there are, its versions those of setup.py and the last runs."""

import json
import re

import compat
import pytest
import reliability
from packaging.version import Version
from paths import ROOT

PAGE = reliability.PAGE.read_text()


def table(marker):
    return re.search(rf"<!-- table: {marker} -->\n\n((?:\|.*\n)+)", PAGE)[1]


def test_the_page_counts_the_tests_that_there_are(request):
    ids, places = request.config.collected, {"tests", str(ROOT / "tests")}
    if not places & {*request.config.args}:  # a part of the tests was collected
        ids = reliability.collected_tests()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table("cases").splitlines()[2:]]
    counted = {re.match(r"\[(.+)\]", row[0])[1]: int(row[1]) for row in rows}
    collected = {name: len(tests) for name, tests in reliability.by_section(ids).items()}
    assert counted == collected, "make reliability rewrites the page"
    assert all(collected.values()), "a section without a test"
    assert [f"## {name}" for name in collected] == re.findall("^## .+", PAGE, flags=re.M)[:-1]


def test_all_that_was_tried_was_survived():
    for line in table("cases").splitlines()[2:]:
        *_, cases, survived = (cell.strip() for cell in line.split("|")[1:-1])
        assert cases == survived, line


def test_a_case_counts_once_or_as_often_as_it_says(tmp_path):
    report, killed = tmp_path / "report.xml", "tests.training.test_checkpoint"
    number = '<properties><property name="cases" value="{}"/></properties>'
    report.write_text(f"""<testsuites><testsuite>
        <testcase classname="{killed}" name="test_kills">{number.format(20)}</testcase>
        <testcase classname="{killed}" name="test_kills[2]">{number.format(3)}<failure/></testcase>
        <testcase classname="{killed}" name="test_kills[3]"><skipped/></testcase>
        <testcase classname="tests.behaviour.test_bad_inputs" name="test_names"/>
        <testcase classname="tests.project.test_docs" name="test_names"/>
    </testsuite></testsuites>""")
    rows = reliability.make_table(report).splitlines()
    assert "| [Killed](#killed) | 3 | 1 | 23 | 20 |" in rows
    assert "| [Wrong input](#wrong-input) | 1 | 0 | 1 | 1 |" in rows
    assert sum(" 0 | 0 | 0 | 0 |" in row for row in rows) == len(reliability.SECTIONS) - 2


def test_the_versions_are_those_that_ran():
    assert table("versions") == reliability.make_compat_table()
    results = json.loads(reliability.COMPAT.read_text())
    runs = [(python, run) for of_python in results.values() for python, run in of_python.items()]
    assert all(run["failed"] == 0 and run["python"].startswith(f"{python}.") for python, run in runs)


def test_each_python_has_a_column_of_its_own(tmp_path, monkeypatch):
    (run,) = json.loads(reliability.COMPAT.read_text())["lowest"].values()
    results = {
        "highest": {python: run | {"python": f"{python}.1"} for python in ("3.13", "3.9")},
        "lowest": {"3.10": run},
    }
    monkeypatch.setattr(reliability, "COMPAT", tmp_path / "compat.json")
    reliability.COMPAT.write_text(json.dumps(results))
    lines = reliability.make_compat_table().splitlines()
    assert lines[0] == "|  | lowest on 3.10 | highest on 3.9 | highest on 3.13 |"
    assert lines[2] == f"| Python | {run['python']} | 3.9.1 | 3.13.1 |"
    assert {line.count("|") for line in lines} == {5}


def test_the_lowest_versions_that_ran_are_the_floors_of_setup_py():
    ran = json.loads(reliability.COMPAT.read_text())["lowest"]["3.10"]["versions"]
    setup = (reliability.ROOT / "setup.py").read_text()
    requirements = re.findall(r'"([\w-]+[<>~]=.+?)"', setup)
    floors = dict(line.split("==") for line in compat.floors(requirements).splitlines())
    for name in reliability.PACKAGES:
        assert Version(Version(ran[name]).public) == Version(floors[name]), name


@pytest.mark.parametrize(
    ("requirement", "line"),
    [
        ("torch>=2.6", "torch==2.6\n"),
        ("adapters<2,>=1.3", "adapters==1.3\n"),
        ("transformers~=4.57.6", "transformers==4.57.6\n"),
        ('pytest-xdist>=3.6.1; extra == "test"', "pytest-xdist==3.6.1\n"),
        ('mypy==2.4.1; extra == "dev"', ""),
    ],
)
def test_floors(requirement, line):
    assert compat.floors([requirement]) == line
