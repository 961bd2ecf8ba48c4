"""Build the wheel and the sdist, check both, and install the wheel in a fresh environment.

make release-check

Files that git does not track are ignored. All work is done in a temporary folder.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
PACKAGE = "hf_adapter_distillation"
OF_THE_SDIST = {
    "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", "pyproject.toml", "setup.py"
}  # fmt: skip
USE = """
import hf_adapter_distillation as had, importlib.metadata, sys
assert had.__file__.startswith(sys.prefix), had.__file__
assert had.__version__ == importlib.metadata.version("hf-adapter-distillation"), had.__version__
names = [getattr(had, name) for name in had.__all__]
print(len(names), "names of", had.__version__, "imported from", had.__file__)
"""


def files_of_the_package(files: list[str]) -> set[str]:
    """Return the files that users import."""
    return {name for name in files if name.startswith(f"{PACKAGE}/")}


def faults_of_wheel(names: list[str], files: list[str]) -> list[str]:
    """Return a line for each file that a wheel lacks, and for each that does not belong in it.

    Args:
        names: The names in the wheel.
        files: The files that git tracks.
    """
    modules = {name for name in names if not re.match(rf"{PACKAGE}-[^/]+\.dist-info/", name)}
    expected = files_of_the_package(files)
    no_license = [] if any(name.endswith("/LICENSE") for name in names) else ["the wheel lacks LICENSE"]
    return [
        *(f"the wheel lacks {name}" for name in sorted(expected - modules)),
        *(f"the wheel has {name}" for name in sorted(modules - expected)),
        *no_license,
    ]


def faults_of_sdist(names: list[str], files: list[str]) -> list[str]:
    """Return a line for each file that an sdist lacks; it may contain more."""
    contents = {name.partition("/")[2] for name in names}
    return [f"the sdist lacks {name}" for name in sorted((files_of_the_package(files) | OF_THE_SDIST) - contents)]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command and show its output."""
    subprocess.run(list(map(str, command)), check=True, cwd=cwd)


def main() -> None:
    """Build, check and install."""
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in files:
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
        run(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
        wheel, sdist = next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))
        run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
        with zipfile.ZipFile(wheel) as opened_wheel, tarfile.open(sdist) as opened_sdist:
            faults = faults_of_wheel(opened_wheel.namelist(), files) + faults_of_sdist(opened_sdist.getnames(), files)
        if faults:
            sys.exit("\n".join(faults))
        # -I: import what is installed, nothing from PYTHONPATH or the folder.
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        install = (python, "-I", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
        run(*install, "torch")
        run(*install, wheel)
        run(python, "-I", "-m", "pip", "check")
        run(python, "-I", "-W", "error::DeprecationWarning", "-c", USE, cwd=folder)


if __name__ == "__main__":
    main()
