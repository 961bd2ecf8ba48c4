"""What the package requires, how long it takes to import, how it is typed, and the files around it."""

import ast
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import setuptools
import yaml
from paths import ROOT
from release import OF_THE_SDIST, faults_of_sdist, faults_of_wheel

import hf_adapter_distillation as had
from hf_adapter_distillation.hub.card import TEMPLATE

MODULES = sorted((ROOT / "hf_adapter_distillation").rglob("*.py"))


@pytest.fixture
def setup_arguments(monkeypatch):
    """What setup.py hands to setuptools."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: found.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def read(name):
    return (ROOT / name).read_text()


def names_of(requirements):
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported(nodes):
    """The roots of the modules that some nodes import, without those of Python and of the package."""
    roots = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add(node.module.partition(".")[0])
    return roots - set(sys.stdlib_module_names)


def distributions_of(roots):
    """The distributions that some modules belong to; by their files, since not every wheel has a top_level.txt."""
    owners = {}
    for distribution in importlib.metadata.distributions():
        owned = {file.parts[0].removesuffix(".py") for file in distribution.files or ()} & roots
        owners |= dict.fromkeys(owned, distribution.name.lower().replace("_", "-"))
    assert owners.keys() == roots
    return set(owners.values())


def test_requirements_are_what_is_imported(setup_arguments):
    required = names_of(setup_arguments["install_requires"])
    trees = [ast.parse(path.read_text()) for path in MODULES]
    everywhere = set().union(*(imported(ast.walk(tree)) for tree in trees))
    assert distributions_of(everywhere - {"trl", "peft"}) == required | {"matplotlib", "sentence-transformers"}
    when_imported = set().union(*(imported(tree.body) for tree in trees))
    assert distributions_of(when_imported) == required
    assert names_of(setup_arguments["extras_require"]["plots"]) == {"matplotlib"}
    for name in ("trl", "peft"):
        assert names_of(setup_arguments["extras_require"][name]) == {name}


def test_one_version(setup_arguments):
    """In the package alone; the newest release of the changelog has it."""
    assert had.__version__ == setup_arguments["version"]
    written = [name for name in ("setup.py", "pyproject.toml", "CITATION.cff") if had.__version__ in read(name)]
    assert written == []
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), flags=re.M)
    assert headings[:2] == ["Unreleased", had.__version__]
    assert len(set(headings)) == len(headings)
    assert setup_arguments["license"] == yaml.safe_load(read("CITATION.cff"))["license"]


def test_the_workflow_and_make_compat_run_each_python_of_the_classifiers(setup_arguments):
    prefix = "Programming Language :: Python :: "
    classifiers = [each.removeprefix(prefix) for each in setup_arguments["classifiers"] if each.startswith(prefix)]
    assert setup_arguments["python_requires"] == f">={classifiers[0]}"
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrix = [(row["versions"], row["python"]) for row in jobs["compat"]["strategy"]["matrix"]["include"]]
    assert matrix == [("lowest", classifiers[0]), *(("highest", python) for python in classifiers[1:])]
    makefile = (ROOT / "Makefile").read_text()
    found = re.findall(r"^compat-(\w+): PYTHONS \?= (.*)", makefile, flags=re.M)
    assert [(which, each.removeprefix("python")) for which, pythons in found for each in pythons.split()] == matrix
    assert jobs["windows"]["runs-on"] == "windows-latest"
    tests = next(step["run"] for step in jobs["windows"]["steps"] if "pytest" in step.get("run", "")).split()
    assert all((ROOT / path).exists() for path in tests if path.startswith("tests/"))


# The time of an import

IMPORT = """
import json, sys, time
from adapters import AutoAdapterModel
before, start = set(sys.modules), time.process_time()
import hf_adapter_distillation
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""
OF_TRAININGS = {"datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "transformers.trainer"}


def test_an_import_takes_little_more_than_the_models_of_adapters():
    """CPU time, the best of three processes: the first may have to compile."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    best = float("inf")
    for _ in range(3):
        output = subprocess.check_output([sys.executable, "-c", IMPORT], env=environment, text=True)
        seconds, modules = json.loads(output.splitlines()[-1])
        assert not OF_TRAININGS & set(modules)
        best = min(best, seconds)
        if best < 0.3:
            break
    assert best < 0.3


def test_names_that_are_imported_late():
    for name in had._LAZY:
        had.__dict__.pop(name, None)
        assert name in dir(had)
        assert getattr(had, name) is getattr(sys.modules[f"hf_adapter_distillation.{had._LAZY[name]}"], name)
        assert name in vars(had)  # the second time it is there
    assert set(had._LAZY) < set(had.__all__) <= set(dir(had))
    with pytest.raises(AttributeError, match="module 'hf_adapter_distillation' has no attribute 'DistillationTrainr'"):
        had.DistillationTrainr  # noqa: B018


# Types

TYPED = """
from typing import Any, Literal, assert_type

import hf_adapter_distillation as had
from hf_adapter_distillation.analysis.plots import Estimate
from hf_adapter_distillation.method.distillation import Distillation

model: Any = None
Carrier = Literal["student", "fused", "mixed", "dual"]
config = had.DistillationConfig(teachers=["bank", "travel"], carrier="mixed", objective={"features": 1.0})
assert_type(config.carrier, Carrier)
assert_type(had.DistillationConfig.paper(["bank"]), had.DistillationConfig)
args = had.DistillationTrainingArguments("out", distillation_start=0.5)
assert_type(args.distillation_start, float | None)
trainer = had.DistillationTrainer(model=model, args=args)
assert_type(trainer, had.AdapterDistillationTrainer)
assert_type(trainer.distillation_weight, float)
assert_type(trainer.parameter_table(), str)
assert_type(trainer.first_distillation_step, int)
attention = had.teacher_attention(model, trainer.train_dataset)
assert_type(attention, dict[str, dict[str, Estimate]])
distances = had.student_distance(model, trainer.train_dataset)
assert_type(distances, dict[str, Estimate])
differences = had.leave_one_teacher_out(model, trainer.train_dataset)
assert_type(differences["bank"].mean, float)
had.plot_teacher_attention(attention)
had.plot_student_distance(distances)
had.plot_leave_one_teacher_out(differences)
assert_type(had.choose_teachers(model, []), dict[str, float])
weights = had.weigh_teachers(model, [], steps=10)
assert_type(weights, had.TeacherWeights)
had.plot_teacher_weights(weights)
had.write_analysis(model, trainer.train_dataset, "analysis")
assert_type(had.save_adapter_as_peft(model, "insurance", "outputs", with_head=False), None)
assert_type(had.from_peft(model).model_name, Any)
block = had.AdapterDistillation("insurance", ["bank"])
assert_type(block, had.AdapterDistillation)
assert_type(block.student, str)
assert_type(had.TeacherFusion, type[had.TeacherFusion])
assert_type(had.distillation_of(model), Distillation)
assert_type(had.distillation_of(model, "insurance").settings, had.StageSettings)
assert_type(had.DistillationMixin, type[had.DistillationMixin])
assert_type(had.DistillationArgumentsMixin.distillation_weight, float | None)
generator = had.Seq2SeqDistillationTrainer(model, had.Seq2SeqDistillationTrainingArguments("outputs"))
assert_type(generator, had.Seq2SeqDistillationTrainer)
assert_type(generator.distillation_weight, float)
assert_type(had.register(), None)
assert_type(had.unregister(), None)
had.DistillationTrainr  # wrong
had.DistillationConfig(teachers=["bank"], temperature="hot")  # wrong
had.DistillationConfig(teachers=["bank"], carrier="teacher")  # wrong
had.plot_student_distance(1.0)  # wrong
had.AdapterDistillation(["bank"])  # wrong
"""


def test_a_users_script_is_typed(tmp_path):
    """Each public name has types of its own, and what is wrong is found; the types of other packages have no part."""
    pytest.importorskip("mypy")
    assert [name for name in had.__all__ if not re.search(rf"\bhad\.{name}\b", TYPED)] == []
    script = tmp_path / "script.py"
    script.write_text(TYPED)
    command = [
        sys.executable, "-m", "mypy", "--config-file=", "--strict", "--no-site-packages", "--ignore-missing-imports",
        "--follow-imports=silent", "--python-version=3.11", f"--cache-dir={tmp_path / 'cache'}", str(script),
    ]  # fmt: skip
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    output = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True).stdout
    found = {int(line) for line in re.findall(r"script\.py:(\d+): error", output)}
    wrong = {number for number, line in enumerate(TYPED.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, output


# The files around the package


def test_wheels_and_sdists_are_looked_into():
    code = [f"hf_adapter_distillation/{name}" for name in ("__init__.py", "py.typed")]
    info = [f"hf_adapter_distillation-0.1.0.dist-info/{name}" for name in ("METADATA", "licenses/LICENSE")]
    files = [*code, "tests/conftest.py", "README.md"]
    assert faults_of_wheel([*code, *info], files) == []
    assert faults_of_wheel([code[0], "tests/conftest.py", info[0]], files) == [
        "the wheel lacks hf_adapter_distillation/py.typed",
        "the wheel has tests/conftest.py",
        "the wheel lacks LICENSE",
    ]
    root = "hf_adapter_distillation-0.1.0"
    names = [root, *(f"{root}/{name}" for name in (*code, *OF_THE_SDIST, "setup.cfg"))]
    assert faults_of_sdist(names, files) == []
    names.remove(f"{root}/LICENSE")
    assert faults_of_sdist(names, files) == ["the sdist lacks LICENSE"]
    assert all((ROOT / name).is_file() for name in OF_THE_SDIST)


def test_the_paper_has_the_same_authors_everywhere():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    citation = TEMPLATE.read_text()
    assert len(paper["authors"]) == 6
    assert f'author = "{authors}"' in citation
    assert paper["title"] in citation
    assert paper["url"] in citation


def test_the_workflow_runs_the_gate():
    (path,) = (ROOT / ".github" / "workflows").iterdir()
    workflow = yaml.safe_load(path.read_text())
    assert workflow[True].keys() == {"push", "pull_request"}  # YAML 1.1 reads "on" as true
    job = workflow["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (python,) = (step["with"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert (ROOT / python["cache-dependency-path"]).is_file()
    for page in ("README.md", "CONTRIBUTING.md"):  # the versions of constraints.txt need it
        assert f"Python {python['python-version']} or newer" in (ROOT / page).read_text()


def test_issues_have_forms():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").iterdir())
    assert [form.name for form in forms] == ["bug_report.yml", "feature_request.yml"]
    for form in forms:
        read = yaml.safe_load(form.read_text())
        assert read["name"]
        assert read["description"]
        ids = [field["id"] for field in read["body"]]
        assert len(set(ids)) == len(ids)
        assert all(field["attributes"]["label"] for field in read["body"])
        assert any(field.get("validations", {}).get("required") for field in read["body"])


def test_contributing_names_targets_and_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    assert set(re.findall(r"`make ([\w-]+)", text)) >= targets - {"compat-lowest", "compat-highest", "clean"}
    assert set(re.findall(r"`make ([\w-]+)", text)) <= targets
    for name in re.findall(r"`([\w/.]+\.(?:py|md|txt))`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "hf_adapter_distillation")), name
