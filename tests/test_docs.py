"""README and docs: code blocks run, commands exist, names are documented, figures come from result files."""

import json
import re
from pathlib import Path

import pytest
from adapters import AutoAdapterModel
from conftest import make_dataset, make_model, noisy

import hf_adapter_distillation as had

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/quickstart.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """In an empty folder with trained teachers, on a tiny model in place of the pretrained one."""
    monkeypatch.chdir(tmp_path)
    platform = make_model()
    for name in ("banking", "travel", "work"):
        platform.add_adapter(name)
        platform.add_classification_head(name)
        noisy(platform, name)
        (tmp_path / "adapters").mkdir(exist_ok=True)
        platform.save_adapter(f"adapters/{name}", name)
    pushed = []
    monkeypatch.setattr(AutoAdapterModel, "from_pretrained", lambda name, **kwargs: make_model())
    monkeypatch.setattr(
        had.registration.ModelAdaptersMixin, "push_adapter_to_hub", lambda self, repo, name: pushed.append(name)
    )
    monkeypatch.setenv("DISABLE_TQDM", "1")
    names = {"train_dataset": make_dataset(), "eval_dataset": make_dataset(seed=1)}
    sources = blocks(page, "python")
    assert sources
    for source in sources:
        exec(compile(source, page, "exec"), names)
    if page == "README.md":
        assert pushed == ["insurance"]
    else:
        assert (tmp_path / "outputs" / "attention.png").is_file()
        assert (tmp_path / "outputs" / "faq-insurance" / "adapter_config.json").is_file()


def test_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = [
        line for block in blocks("README.md", "bash") for line in block.splitlines() if line.startswith("make ")
    ]
    assert commands[:2] == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.M), command


def test_ci_runs_the_test_command_of_the_readme():
    readme = (ROOT / "README.md").read_text().splitlines()
    marker = readme.index("<!-- test-command -->")
    assert readme[marker + 1 : marker + 4] == ["```bash", "make test", "```"]


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert [name for name in had.__all__ if name not in reference] == []
    assert all(hasattr(had, name) for name in had.__all__)


def test_the_table_of_the_readme_is_that_of_the_result_file():
    results = json.loads((ROOT / "benchmarks" / "results" / "faq_retrieval.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert results["command"] in readme
    assert results["rows"]
    for method, row in results["rows"].items():
        cells = (
            f"{row['auc']:.3f}", f"{row['accuracy_at_1']:.3f}", f"{row['mrr']:.3f}", f"{row['ms']:.0f}",
            f"{row['MB']:.2f}", f"{row['train_s']:.0f}",
        )  # fmt: skip
        assert f"| {method} | {' | '.join(cells)} |" in readme
