"""Links of README and docs, offline: each leads to a file, a heading, a name of the package, a target or an extra."""

import importlib
import re

import pytest
from paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for folder in (ROOT.glob("*.md"), DOCS.rglob("*.md"), (ROOT / "examples").rglob("*.md"))
    for path in folder
    if "_build" not in path.parts
)
FENCE = re.compile(r"^(`{3,})(\S*)[^\n]*\n(.*?)^\1 *$", flags=re.M | re.S)
GONE = "hf_adapter_distillation.TeacherFusion.gone"
SCRIPTS_OF_READERS = {"train.py"}


def prose(page):
    """Return the text without blocks of code, inline code and addresses of the web."""
    return re.sub(r"`[^`\n]*`", "``", re.sub(r"https?://[^\s)>]*", "https://", FENCE.sub("", page.read_text())))


def shell_commands(text):
    joined = "\n".join(match[3] for match in FENCE.finditer(text) if match[2] in ("bash", "sh", "shell", "console"))
    return [line.strip().removeprefix("$ ") for line in joined.replace("\\\n", " ").splitlines() if line.strip()]


def headings(page):
    """Return the anchors of a page, as GitHub and MyST make them, with their levels."""
    levels = {}
    for level, title in re.findall(r"^(#+) +(.+?) *$", FENCE.sub("", page.read_text()), flags=re.M):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = sum(1 for other in levels if other == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", other))
        levels[f"{slug}-{number}" if number else slug] = len(level)
    return levels


def broken_links(page):
    """Return the links of a page that lead nowhere."""
    broken = []
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", prose(page))
    targets += re.findall(r"^\[[^\]]+\]: +(\S+)", prose(page), flags=re.M)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or not file.is_relative_to(ROOT if page.is_relative_to(ROOT) else page.parent):
            broken.append(target)
        elif anchor and (file.suffix != ".md" or headings(file).get(anchor, 9) > 3):  # myst_heading_anchors
            broken.append(target)
    return broken


def broken_roles(page):
    """Return each `{doc}` without a page, `{ref}` without a label, `{py:...}` without a name in the package."""
    text = FENCE.sub("", page.read_text())
    labels = set(re.findall(r"^\((.+)\)=$", "\n".join(path.read_text() for path in PAGES), flags=re.M))
    broken = []
    for role, content in re.findall(r"\{([a-z:]+)\}`([^`]+)`", text):
        target = (match[1] if (match := re.search(r"<(.+)>$", content)) else content).lstrip("~")
        if role == "doc":
            name = f"{target}.md"
            file = DOCS / name.removeprefix("/") if name.startswith("/") else page.parent / name
            exists = file.is_file()
        elif role == "ref":
            exists = target in labels
        else:
            exists = not role.startswith("py:") or is_in_package(target)
        if not exists:
            broken.append(f"{{{role}}}`{content}`")
    return broken


def is_in_package(name):
    """Return whether an object of that name can be imported."""
    parts = name.split(".")
    for n_modules in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n_modules]))
        except ImportError:
            continue
        for part in parts[n_modules:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def missing_paths(page):
    """Return the paths of this repository that the text or the code of a page names and that do not exist."""
    text = re.sub(r"https?://[^\s)>]*", "", page.read_text())
    # {a,b} is the shell's; a path with < or * is not one file.
    roots = r"\.ci|benchmarks|docs|examples|hf_adapter_distillation|scripts|tests"
    paths = re.findall(rf"(?<![\w/.-])((?:{roots})/[\w./{{}},*<-]*[\w}}])", text)
    missing = []
    for path in paths:
        braces = re.search(r"\{(.+?)\}", path)
        names = braces[1].split(",") if braces else [""]
        for name in names:
            whole = path if not braces else path[: braces.start()] + name + path[braces.end() :]
            if "*" not in whole and "<" not in whole and "_build" not in whole and not (ROOT / whole).exists():
                missing.append(whole)
    return missing


def missing_of_commands(page):
    """Return the make targets, scripts and extras that shell blocks and inline code name and the project lacks."""
    text = page.read_text()
    commands = shell_commands(text) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))
    targets = set(re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), flags=re.M))
    targets = {name for line in targets for name in line.split()}
    extras = set(re.findall(r'^(?: +|extras\[)"(\w+)"', (ROOT / "setup.py").read_text(), flags=re.M))
    missing = []
    for command in commands:
        if match := re.match(r"make ([a-z][\w-]*)", command):
            missing += [f"make {match[1]}"] if match[1] not in targets else []
        for script in re.findall(r"(?:^|[\s;]|bin/)python3? ((?!-)\S+\.py)", command):
            missing += [script] if script not in SCRIPTS_OF_READERS and not (ROOT / script).is_file() else []
        if match := re.match(r"pip install .*?\bhf-adapter-distillation(?!.* @ git\+)", command):
            missing.append(match[0])  # it is not on PyPI
        for names in re.findall(r"hf-adapter-distillation\[([^\]]+)\]|pip install \"\.\[([^\]]+)\]", command):
            missing += [f"[{name}]" for name in "".join(names).split(",") if name not in extras]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []
    assert broken_roles(page) == []
    assert missing_paths(page) == []
    assert missing_of_commands(page) == []


def test_no_message_or_notebook_installs_the_package_from_pypi():
    """It is not there: `pip install` needs the address of the repository, or a clone."""
    folders = (ROOT / "hf_adapter_distillation", ROOT / "examples", ROOT / "scripts")
    files = [path for folder in folders for suffix in ("py", "ipynb") for path in folder.rglob(f"*.{suffix}")]
    command = re.compile(r"pip install [^\n]*\bhf-adapter-distillation(?![^\n]* @ git\+)")
    assert [str(path.relative_to(ROOT)) for path in files if command.search(path.read_text(encoding="utf-8"))] == []


def test_pages_are_found():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {
        "README.md",
        "CHANGELOG.md",
        "docs/index.md",
        "docs/how_to/push.md",
        "examples/by_feature/README.md",
    } <= names


def test_each_page_is_in_a_toctree():
    entries = [
        entry
        for match in FENCE.finditer((DOCS / "index.md").read_text())
        if match[2] == "{toctree}"
        for entry in match[3].split()
    ]
    listed = {path for entry in entries for path in DOCS.glob(f"{entry}.md")}
    assert [page for page in PAGES if page.is_relative_to(DOCS) and page not in listed] == [DOCS / "index.md"]


@pytest.mark.parametrize(
    ("text", "find", "faults"),
    [
        ("[a](there.md) [b](there.md#one-two) [c](#here) [d](https://x.y) ![e](there.md)", broken_links, []),
        ("[a](gone.md) ![b](gone.png)", broken_links, ["gone.md", "gone.png"]),
        ("[a](there.md#three) [b](#gone)", broken_links, ["there.md#three", "#gone"]),
        ("[a](there.md#four-deep)", broken_links, ["there.md#four-deep"]),
        ("[a](there.md#again) [b](there.md#again-1) [c](there.md#again-2)", broken_links, ["there.md#again-2"]),
        ("`[a](gone.md)`\n\n```python\n[b](gone.md)\n```\n", broken_links, []),
        ("[a]\n\n[a]: gone.md\n", broken_links, ["gone.md"]),
        ("{doc}`there` {doc}`words <there>` {doc}`gone`", broken_roles, ["{doc}`gone`"]),
        ("(label)=\n{ref}`gone`", broken_roles, ["{ref}`gone`"]),
        (
            "{py:func}`hf_adapter_distillation.student.warm_start.fit_start` "
            "{py:func}`hf_adapter_distillation.student.warm_start.gone`",
            broken_roles,
            ["{py:func}`hf_adapter_distillation.student.warm_start.gone`"],
        ),
        ("{py:meth}`hf_adapter_distillation.TeacherFusion.forward`", broken_roles, []),
        (f"{{py:meth}}`{GONE}`", broken_roles, [f"{{py:meth}}`{GONE}`"]),
        ("{py:mod}`gone`", broken_roles, ["{py:mod}`gone`"]),
        ("`examples/faq_data.py`, benchmarks/results/streaming_tenants_{3,10}.jsonl", missing_paths, []),
        ("`examples/gone.py`: docs/{index,gone}.md.", missing_paths, ["examples/gone.py", "docs/gone.md"]),
        ("https://x.y/examples/gone.py path/examples/gone.py", missing_paths, []),
        ("```bash\nmake test\nmake gone\n```\n`make lost`", missing_of_commands, ["make gone", "make lost"]),
        ("```bash\nA=1 python gone.py\npython train.py\n```\n", missing_of_commands, ["gone.py"]),
        ('```bash\npip install "hf-adapter-distillation[plots] @ git+https://x.y"\n```\n', missing_of_commands, []),
        ('```bash\npip install ".[plots,gone]"\n```\n', missing_of_commands, ["[gone]"]),
        ("`pip install hf-adapter-distillation`", missing_of_commands, ["pip install hf-adapter-distillation"]),
    ],
)  # fmt: skip
def test_broken_links_are_reported(text, find, faults, tmp_path):
    (tmp_path / "there.md").write_text("# One, two\n\n## Again\n\n## Again\n\n#### Four deep\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{text}\n")
    assert find(page) == faults
