"""The examples by feature: each runs its demo offline, and says in one line what is wrong with its arguments."""

import importlib
import json
import re
import sys
from importlib.util import find_spec

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from marks import LONG
from paths import ROOT

EXAMPLES = ROOT / "examples" / "by_feature"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import demo_data  # noqa: E402

# What the demo measures, and what it is at least after the training (0: nothing is promised); perplexity falls.
RESULTS = {
    "text_classification": ("accuracy", 0.75),
    "token_classification": ("entity F1", 0.7),
    "question_answering": ("exact match / F1", 0.6),
    "causal_lm": ("perplexity", None),
    "sft_trl": ("perplexity", None),
    "summarization": ("ROUGE-1", 0.75),
    "image_classification": ("accuracy", 0.5),
    "madx_language_task": ("accuracy", 0.7),
    "sentence_embeddings": ("accuracy at 1", 0.4),
    "own_trainer": ("balanced accuracy", 0.75),
    "mixed_teachers": ("accuracy", 0.0),  # what it reaches depends on the seed
}
WITHOUT_TRL = pytest.mark.skipif(find_spec("trl") is None, reason="it needs the extra trl")
SCRIPTS = [pytest.param(script, marks=WITHOUT_TRL if script == "sft_trl" else ()) for script in RESULTS]
SHORT = {"text_classification", "sentence_embeddings"}
DEMOS = [script if script.values[0] in SHORT else pytest.param(*script.values, marks=LONG) for script in SCRIPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("by_feature")


def run_example(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    importlib.import_module(script).main()


def test_each_script_is_tested_and_described():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"demo", "demo_data"}
    assert scripts == set(RESULTS)
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"{script}.py --demo" in readme for script in scripts)


def test_only_pictures_need_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    importlib.reload(demo_data)
    with pytest.raises(ImportError):
        demo_data.pictures("image", "label")


@pytest.mark.parametrize("script", DEMOS)
def test_demo(script, folder, monkeypatch, capsys):
    run_example(monkeypatch, script, "--demo", "--output_dir", folder / script)
    metric, least = RESULTS[script]
    printed = capsys.readouterr().out.splitlines()[-1]
    number = r"([\d.]+)(?: / [\d.]+)?"
    found = re.fullmatch(
        f"{metric} before training {number}, after {number}, loaded without teachers {number}", printed
    )
    assert found, printed
    before, after, alone = map(float, found.groups())
    assert after == alone, "the saved student does not need its teachers"
    assert after < before if least is None else after > (least and max(before, least))
    saved = json.loads((folder / script / demo.STUDENT / "adapter_config.json").read_text())
    assert saved["distillation"]["teachers"]  # light ones are left out


def test_teachers_and_data_of_ones_own(folder, tmp_path, monkeypatch, capsys):
    """Runs without --demo, on what the demo of before has left."""
    import text_classification

    made = folder / "text_classification"
    if not (made / "films").exists():  # this test alone
        run_example(monkeypatch, "text_classification", "--demo", "--output_dir", made, "--max_steps", 1)
    data = demo_data.reviews(["sentence1", "sentence2"])["hotels"]
    monkeypatch.setattr(text_classification, "load_dataset", lambda *asked: {("nyu-mll/glue", "rte"): data}[asked])
    capsys.readouterr()
    run_example(
        monkeypatch, "text_classification", "--model_name_or_path", made / "base", "--max_steps", 1, "--use_cpu",
        "--teachers", made / "books", made / "films", "--output_dir", tmp_path,
    )  # fmt: skip
    assert "loaded without teachers" in capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_teachers(script, monkeypatch):
    with pytest.raises(SystemExit, match=rf"^{script}.py: --teachers is empty; give Hub ids .* or --demo") as caught:
        run_example(monkeypatch, script)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("text_classification", ["--demo", "--task_name", "stsb"], "--task_name stsb is unknown; choose one of cola"),
        ("causal_lm", ["--demo", "--rank", "0"], "--rank 0 is out of range; it must be at least 1"),
        ("causal_lm", ["--demo", "--distillation_start", "2"], "distillation_start=2.0 is out of range"),
        pytest.param("sft_trl", ["--demo", "--rank", "0"], "--rank 0 is out of range", marks=WITHOUT_TRL),
        pytest.param("sft_trl", ["--demo", "--use_liger_kernel"], "use_liger_kernel=True replaces", marks=WITHOUT_TRL),
        pytest.param(
            "sft_trl",
            ["--teachers", "a", "--use_cpu"],
            "no column 'messages' in 'train', only text",
            marks=WITHOUT_TRL,
        ),
        ("madx_language_task", ["--demo", "--text_columns", "a", "b", "c"], "--text_columns a b c are not one or two"),
        ("mixed_teachers", ["--teachers", "a", "--model_name_or_path", "no/such"], "couldn't connect"),
        (
            "mixed_teachers",
            ["--teachers", "a", "--text_column", "title"],
            "no column 'title' in 'train', only text",
        ),
        ("mixed_teachers", ["--teachers", "nowhere"], "Unknown teacher 'nowhere'"),
        ("token_classification", ["--teachers", "a"], "no column 'tokens' in 'train', only text, label"),
        ("question_answering", ["--teachers", "a"], "no column 'question' in 'train'"),
        ("summarization", ["--teachers", "a"], "no column 'dialogue' in 'train'"),
        ("text_classification", ["--teachers", "a"], "no column 'sentence1' in 'train', only text, label"),
        ("sentence_embeddings", ["--teachers", "a"], "no column 'anchor' in 'train', only text, label"),
        (
            "own_trainer",
            ["--demo", "--weight_of_rare", "0"],
            "--weight_of_rare 0.0 is out of range; it must be above 0",
        ),
        ("image_classification", ["--teachers", "a", "--eval_split", "dev"], "no split 'dev', only train, validation"),
    ],
)
def test_bad_arguments_cost_no_training(script, arguments, message, tiny_encoder, tmp_path, monkeypatch):
    rows = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).cast_column("label", ClassLabel(2))
    monkeypatch.setattr(demo, "train", None)
    monkeypatch.setattr("transformers.AutoImageProcessor.from_pretrained", lambda path: None)
    module = importlib.import_module(script)
    monkeypatch.setattr(module, "load_dataset", lambda *asked: DatasetDict(train=rows, validation=rows))
    if "--model_name_or_path" not in arguments:
        arguments = [*arguments, "--model_name_or_path", tiny_encoder]
    if "nowhere" in arguments:
        arguments = [*arguments, "--text_column", "text"]
    with pytest.raises(SystemExit, match=re.escape(message)) as caught:
        run_example(monkeypatch, script, *arguments, "--output_dir", tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{script}.py: ")
