"""The layout of the package and of its tests: test modules mirror modules, and no module or function grows long."""

import ast

import pytest
from paths import ROOT

PACKAGE, TESTS = ROOT / "hf_adapter_distillation", ROOT / "tests"

# Modules without a test module of their name, and the test module that covers them. A test module in a folder of the
# package covers the module of its name, or stands here.
COVERED_BY = {
    "_compat": "test_registration.py",
    "cli/data": "cli/test_main.py",
    "cli/evaluate": "cli/test_main.py",
    "cli/export": "cli/test_main.py",
    "cli/models": "cli/test_main.py",
    "cli/options": "cli/test_main.py",
    "cli/parser": "cli/test_main.py",
    "cli/predict": "cli/test_main.py",
    "cli/progress": "cli/test_main.py",
    "cli/saved": "cli/test_main.py",
    "cli/tasks": "cli/test_main.py",
    "cli/train": "cli/test_main.py",
    "method/layer_pass": "method/test_layers.py",
    "method/training_pass": "method/test_forward.py",
    "student/digests": "student/test_provenance.py",
    "student/peft_heads": "student/test_peft_export.py",
    "student/training_run": "hub/test_card.py",
    "training/arguments": "test_configuration.py",
}

# Files and functions that are still too long. No other may be, and one that is short enough is struck from the list.
MAX_LINES, MAX_LINES_OF_A_FUNCTION, MAX_NAMES_AT_THE_TOP = 330, 60, 12
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()


def modules_of(package):
    """Return the modules of a package as `folder/name`, without `__init__` and `__main__`."""
    return {
        str(path.relative_to(package).with_suffix(""))
        for path in package.rglob("*.py")
        if not path.name.startswith("__")
    }


def imports_of(path, package):
    """Return the modules of a package that a file imports, by absolute names or from its own folder."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level <= 1:
            folder = ".".join(path.relative_to(package.parent).parent.parts) if node.level else ""
            module = ".".join(filter(None, (folder, node.module)))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    paths = {name.replace(".", "/").removeprefix(f"{package.name}/") for name in names}
    return paths & modules_of(package)


def imports_module(test, module, package):
    """Tell whether a test imports a module, itself or through others of the module's folder."""
    folder = module.rpartition("/")[0]
    reached, new = set(), imports_of(test, package)
    while new:
        reached |= new
        beside = [name for name in new if name.rpartition("/")[0] == folder]
        new = set().union(*(imports_of(package / f"{name}.py", package) for name in beside)) - reached
    return module in reached


def faults_of_layout(package, tests, covered_by):
    """Return a line for each module without a test module, and for each wrong exception."""
    modules, faults = modules_of(package), []
    for module in sorted(modules | covered_by.keys()):
        folder, _, name = module.rpartition("/")
        of_its_name = tests / folder / f"test_{name}.py"
        other = covered_by.get(module)
        if module not in modules:
            faults.append(f"{module} does not exist")
        elif other is None and not of_its_name.is_file():
            faults.append(f"{module} has no {of_its_name.relative_to(tests)}")
        elif other is not None and of_its_name.is_file():
            faults.append(f"{module} has {of_its_name.relative_to(tests)} and needs no exception")
        elif other is not None and not (tests / other).is_file():
            faults.append(f"{module}: {other} does not exist")
        elif other is not None and not imports_module(tests / other, module, package):
            faults.append(f"{module}: {other} does not import it")
    return faults


def strays(package, tests, covered_by):
    """Return the test modules in mirrored folders that cover neither a module of their name nor another."""
    folders = {module.rpartition("/")[0] for module in modules_of(package)}
    paths = [path.relative_to(tests) for folder in folders for path in (tests / folder).glob("test_*.py")]
    return {
        str(path)
        for path in paths
        if not (package / path.with_name(path.name.removeprefix("test_"))).is_file()
        and str(path) not in covered_by.values()
    }


def long_files(package, limit):
    paths = sorted(package.rglob("*.py"))
    return {str(path.relative_to(package)) for path in paths if len(path.read_text().splitlines()) > limit}


def long_functions(package, limit):
    """Return the functions of more lines than a limit; the docstring counts, decorators do not."""
    return {
        f"{path.relative_to(package)}::{node.name}"
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > limit
    }


def test_each_module_has_a_test_module():
    assert faults_of_layout(PACKAGE, TESTS, COVERED_BY) == []


def test_each_test_module_has_a_module():
    assert strays(PACKAGE, TESTS, COVERED_BY) == set()


def test_no_file_and_no_function_is_long():
    assert long_files(PACKAGE, MAX_LINES) == LONG_FILES
    assert long_functions(PACKAGE, MAX_LINES_OF_A_FUNCTION) == LONG_FUNCTIONS


def test_few_names_stand_at_the_top():
    names = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "_compat.py", "py.typed", "__pycache__"}
    assert len(names) <= MAX_NAMES_AT_THE_TOP, sorted(names)


def test_no_test_module_imports_another():
    paths = sorted(TESTS.rglob("*.py"))
    modules = {path.stem for path in paths if path.name.startswith("test_")} | {"conftest"}
    assert len(modules) == sum(path.stem in modules for path in paths), "names of test modules are unique"
    for path in paths:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not names & modules, path


# The checks themselves


@pytest.fixture
def tree(tmp_path):
    """A package of three modules, and tests."""
    files = {
        "package/__init__.py": "",
        "package/room/__init__.py": "",
        "package/room/door.py": "from .wall import brick\n",
        "package/room/wall.py": "def brick():\n    pass\n",
        "package/roof.py": "from .room import door\n\n\nclass Roof:\n    def tile(self):\n        return 1\n",
        "tests/room/test_door.py": "from package.room.door import brick\n",
        "tests/test_house.py": "import package\nfrom package import roof\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


RIGHT = {"room/wall": "room/test_door.py", "roof": "test_house.py"}


@pytest.mark.parametrize(
    ("covered_by", "faults"),
    [
        (RIGHT, []),
        ({"roof": "test_house.py"}, ["room/wall has no room/test_wall.py"]),
        ({"room/wall": "room/test_door.py"}, ["roof has no test_roof.py"]),
        (RIGHT | {"roof": "room/test_door.py"}, ["roof: room/test_door.py does not import it"]),
        (RIGHT | {"room/wall": "test_house.py"}, ["room/wall: test_house.py does not import it"]),
        (RIGHT | {"room/wall": "test_gone.py"}, ["room/wall: test_gone.py does not exist"]),
        (RIGHT | {"room/door": "test_house.py"}, ["room/door has room/test_door.py and needs no exception"]),
        (RIGHT | {"cellar": "test_house.py"}, ["cellar does not exist"]),
    ],
)
def test_what_is_amiss_in_a_layout_is_found(covered_by, faults, tree):
    assert faults_of_layout(tree / "package", tree / "tests", covered_by) == faults


def test_test_modules_without_a_module_are_found(tree):
    for name in ("test_window.py", "room/test_window.py", "behaviour/test_window.py"):
        (tree / "tests" / name).parent.mkdir(exist_ok=True)
        (tree / "tests" / name).touch()
    assert strays(tree / "package", tree / "tests", RIGHT) == {"test_window.py", "room/test_window.py"}
    assert strays(tree / "package", tree / "tests", RIGHT | {"roof": "test_window.py"}) == {
        "test_house.py",
        "room/test_window.py",
    }


def test_what_is_long_is_found(tree):
    assert long_files(tree / "package", 5) == {"roof.py"}
    assert not long_files(tree / "package", 6)
    assert long_functions(tree / "package", 1) == {"roof.py::tile", "room/wall.py::brick"}
    assert not long_functions(tree / "package", 2)
