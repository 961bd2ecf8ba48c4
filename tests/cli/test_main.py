"""The command line: what it does, what it refuses in one line, and that its documentation runs."""

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import adapters
import datasets
import peft
import pytest
import torch
from adapters import AutoAdapterModel
from command_line import QUICK, all_say_why, run, says_why, write_csv
from datasets import ClassLabel, Dataset, DatasetDict
from hub_server import check_card
from messages import exactly, one_line
from paths import ROOT
from safetensors.torch import load, load_file, save_file
from tiny_models import CONFIGS, STATIC, noisy
from transformers import AutoModel

import hf_adapter_distillation as had
from hf_adapter_distillation import downloads
from hf_adapter_distillation._compat import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS, HEAD_WEIGHTS
from hf_adapter_distillation.cli import export, predict
from hf_adapter_distillation.cli import train as cli_training
from hf_adapter_distillation.cli.data import check_columns, label_ids, labels_of
from hf_adapter_distillation.cli.data import load as load_dataset
from hf_adapter_distillation.cli.main import EXAMPLES, command_function, main, make_parser, parse
from hf_adapter_distillation.cli.options import USUAL, DataArguments, TrainArguments
from hf_adapter_distillation.hub import push as pushing
from hf_adapter_distillation.hub.card import CardOptions
from hf_adapter_distillation.hub.push import push_saved, student_folder
from hf_adapter_distillation.student.provenance import read_provenance

TEXTS = ["my card is gone", "when does the train leave", "what do i pay", "how is the weather"]
LABELS = ["card", "train", "card", "train"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_encoder):
    """A folder with a base model, teachers, data, and a student that the command line has trained."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_encoder, folder / "bert-base-uncased")
    model = AutoAdapterModel.from_pretrained(tiny_encoder)
    for name in ("banking", "travel", "headless"):
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        noisy(model, name)
        if name != "headless":
            model.add_classification_head(name, num_labels=2)
        (folder / "adapters").mkdir(exist_ok=True)
        model.save_adapter(str(folder / "adapters" / name), name)
    write_csv(folder / "data" / "train.csv", {"text": TEXTS, "label": LABELS}, n=20)
    write_csv(folder / "data" / "test.csv", {"text": TEXTS, "label": LABELS})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, "--eval_split=0.25", "--output_dir=outputs", "--analysis", "--logging_steps=1"]) == 0
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(world, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


TRAIN = [
    "train", "--model=bert-base-uncased", "--teachers", "adapters/banking", "adapters/travel", "--student=insurance",
    "--adapter_config=seq_bn[reduction_factor=4]", "--dataset=data/train.csv", "--learning_rate=1e-2", *QUICK,
]  # fmt: skip
EVAL = ["eval", "--model=bert-base-uncased", "--adapter=outputs/insurance", "--dataset=data/test.csv"]


# What the commands do


def test_a_trained_student_is_a_plain_adapter_with_its_head_and_names(world, tiny_encoder):
    saved = world / "outputs" / "insurance"
    model = AutoAdapterModel.from_pretrained(tiny_encoder)
    model.load_adapter(str(saved), set_active=True)
    assert model.heads["insurance"].config["label2id"] == {"card": 0, "train": 1}
    assert (world / "outputs" / "tokenizer.json").is_file()
    assert (world / "outputs" / "analysis").is_dir()
    provenance = read_provenance(str(saved))
    assert [teacher.source for teacher in provenance.teachers] == ["adapters/banking", "adapters/travel"]
    assert provenance.run.settings["steps"] == 2
    assert {"eval_accuracy", "eval_loss"} <= provenance.run.evaluation.keys()


def test_train_prints_results_alone_and_can_be_repeated(here, capsys):
    capsys.readouterr()
    assert main([*TRAIN, "--eval_split=0.25", "--output_dir=again", "--analysis", "--logging_steps=1"]) == 0
    out, err = capsys.readouterr()
    lines = dict(re.split("  +", line, maxsplit=1) for line in out.splitlines())
    run_ = read_provenance("again/insurance").run
    assert lines["student"] == "'insurance', 2 steps, 0.5 epochs"
    weights = run_.settings["teacher_weights"]
    for name in ("banking", "travel"):
        facts = f"weight {weights[name]:.2f}, attention {run_.mean_attention(name):.2f}"
        assert lines[f"teacher {name}"] == facts
    assert lines["gain of the teachers"].startswith(f"{run_.settings['teacher_gain']:.1%} of the task loss")
    assert lines["gain of the teachers"].endswith("too little to start at them") != ("start" in lines)
    assert lines["distance at the end"] == f"{run_.losses['2']['distillation_loss']:.4g} (distillation loss)"
    assert lines["eval_accuracy"] == f"{run_.evaluation['eval_accuracy']:.4g}"
    assert (lines["train examples"], lines["eval examples"]) == ("15", "5")
    assert lines["saved in"] == "again/insurance"
    assert lines["loaded by"] == "model = AutoAdapterModel.from_pretrained('bert-base-uncased')"
    assert lines[""] == "model.load_adapter('again/insurance', set_active=True)"
    assert not re.search(r"[{]|\d{7}|\n\n", out)
    assert re.search(r"step 1  stage 2  loss [\d.]+ .* distance [\d.e-]+$", err, re.M)
    assert not re.search(r"{'|\d\.\d{7}|none are activated|Generating|Map: ", err, re.M)
    first, second = (load_file(f"{folder}/insurance/adapter.safetensors") for folder in ("outputs", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_teachers_are_chosen_from_a_pool(here):
    options = [option for option in TRAIN if not option.startswith(("adapters/", "--adapter_config"))]
    options.insert(options.index("--teachers") + 1, "adapters")
    assert main([*options, "--teacher_selection=2", "--output_dir=chosen"]) == 0
    provenance = read_provenance("chosen/insurance")
    assert 1 <= len(provenance.teachers) <= 2, "those that lower the loss, of three"
    assert {Path(teacher.source).parent for teacher in provenance.teachers} == {Path("adapters")}
    saved = json.loads(Path("chosen/insurance/adapter_config.json").read_text())
    assert saved["config"]["reduction_factor"] == 4, "the config that all of them have"


def test_a_config_file_gives_options_and_the_command_line_wins(here, capsys):
    names = [f.name for f in fields(had.DistillationConfig)]
    assert set(names) <= {f.name for f in fields(TrainArguments)}
    defaults = had.DistillationConfig(["a"])
    made = TrainArguments(model="m", student="s", teachers=["a"], dataset="d")
    assert made.distillation() == defaults
    Path("train.yaml").write_text(
        "teachers: [a, 010]\nmodel: m\nstudent: s\ndataset: d\nobjective: {features: 1, logits: 0.5}\n"
        "layer_weights: [1, 0]\nteacher_selection: 2\nlearning-rate: 1e-3\nstop_on_nan: false\nseed: 3\n"
        "lr_scheduler_kwargs: {x: 1}\nfusion_learning_rate:\ndebug: underflow_overflow\nuse_cpu: true\n"
        "save_strategy: no\neval_strategy: 'no'\nlabel_column: 007\ntext_column: 1.50\nbf16: no\nweight_decay: 1e-2\n"
        "eval_split: ~\nadam_beta1: .9\nfp16: False\n"
    )
    assert parse(["train", "--config", "train.yaml"])[1][0].teachers == ["a", "010"]
    _, (args, training_args) = parse(["train", "--config", "train.yaml", "--seed", "4", "--teachers", "c"])
    config = args.distillation()
    assert config.teachers == ["c"]
    assert config.objective == {"features": 1, "logits": 0.5}
    assert config.teacher_selection == 2
    assert config.layer_weights == [1.0, 0.0]
    assert (training_args.learning_rate, training_args.stop_on_nan, training_args.seed) == (1e-3, False, 4)
    assert training_args.lr_scheduler_kwargs == {"x": 1}
    assert training_args.fusion_learning_rate is None
    assert (training_args.save_strategy, training_args.eval_strategy) == ("no", "no")
    assert (args.label_column, args.text_column, args.eval_split) == ("007", "1.50", None)
    assert (training_args.bf16, training_args.fp16, training_args.use_cpu) == (False, False, True)
    assert (training_args.weight_decay, training_args.adam_beta1) == (0.01, 0.9)
    assert len(training_args.debug) == 1


def test_eval_prints_and_writes_what_a_stock_adapter_reaches(here, capsys):
    code, out, _ = run(capsys, *EVAL, "--output", "result.json")
    assert code == 0
    result = json.loads(Path("result.json").read_text())
    assert result["examples"] == 4
    assert result.keys() == {"adapter", "dataset", "examples", "accuracy", "macro_f1", "loss", "classes"}
    assert f"\naccuracy  {result['accuracy']:.4f}\n" in out
    model, tokenizer = cli_training.load_base("bert-base-uncased", 8)
    model.load_adapter("outputs/insurance", set_active=True, use_safetensors=True)
    labels = torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        output = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt"), labels=labels)
    assert result["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    predicted = output.logits.argmax(-1)
    assert result["accuracy"] == (predicted == labels).float().mean().item()
    f1s = []
    for number, name in enumerate(("card", "train")):
        right = int(((predicted == number) & (labels == number)).sum())
        of_both = int((predicted == number).sum() + (labels == number).sum())
        f1s.append(2 * right / of_both)
        assert result["classes"][name]["f1"] == pytest.approx(f1s[-1], abs=1e-4)
        assert re.search(rf"^{name} +[\d.]+ +[\d.]+ +{f1s[-1]:.4f} +2$", out, re.M)
    assert result["macro_f1"] == pytest.approx(sum(f1s) / 2, abs=1e-5)


def test_predict_prints_what_a_stock_adapter_says(here, capsys, monkeypatch):
    model, tokenizer = cli_training.load_base("bert-base-uncased", 8)
    model.load_adapter("outputs/insurance", set_active=True)
    with torch.no_grad():
        shares = model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1)
    adapter = ["predict", "--adapter=outputs/insurance"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + "\n".join(TEXTS) + "\n\n"))
    found = [run(capsys, *adapter, *argv) for argv in (["--text", *TEXTS], ["--dataset=data/test.csv"], [])]
    assert len({out for _, out, _ in found}) == 1
    for line, text, (card, train) in zip(found[0][1].splitlines(), TEXTS, shares.tolist(), strict=True):
        row = json.loads(line)
        assert row["text"] == text
        assert row["label"] == ("card" if card > train else "train")
        assert row["scores"] == {"card": pytest.approx(card, abs=1e-4), "train": pytest.approx(train, abs=1e-4)}
        assert row["score"] == max(row["scores"].values())
    assert run(capsys, *adapter, "--text", "a,b", "--format=csv", "--output=p.csv")[1] == (
        "1 predictions are written to p.csv\n"
    )
    assert Path("p.csv").read_text().startswith('text,label,score,score_card,score_train\n"a,b",')
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    says_why(
        capsys, 2, "The standard input has no lines; write one text a line, or pass --text or --dataset.", *adapter
    )


def test_texts_that_are_not_utf_8_or_blank_are_told_in_one_line(here, capsys, monkeypatch):
    fix = "is not UTF-8 (*); pass a .csv file by --dataset, with its --encoding."
    cases = [(["--text", "clich\udce9"], f"--text {fix}"), (["--text", "a", " "], "text=' ' is blank; leave it out.")]
    for argv, message in cases:
        says_why(capsys, 2, message, "predict", "--adapter=outputs/insurance", *argv)
    for errors in ("strict", "surrogateescape"):
        read = io.TextIOWrapper(io.BytesIO(b"clich\xe9\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", read)
        says_why(capsys, 2, f"The standard input {fix}", "predict", "--adapter=outputs/insurance")


def test_other_tasks_from_the_files_of_other_programs(here, capsys):
    """Regression on pairs in a .tsv file of another encoding, and tags of words in JSON lines."""
    train = [*TRAIN, "--max_steps=1", "--eval_split=0.5"]
    rows = "".join(f"{text} \xe9\t{text}\t{score}\n" for text in TEXTS for score in (0.5, 1.5))
    Path("pairs.tsv").write_bytes(f"sentence1\tsentence2\tscore\n{rows}".encode("latin-1"))
    pairs = ["--dataset=pairs.tsv", "--encoding=latin-1"]
    code, out, _ = run(capsys, *train, *pairs, "--task=regression", "--output_dir=r")
    assert code == 0
    assert "mean_squared_error" in out
    assert "accuracy" not in out
    assert run(capsys, "eval", "--adapter=r/insurance", *pairs)[0] == 0
    numbers = "*'card'; r/insurance predicts numbers, so give it a column of them."
    says_why(capsys, 2, numbers, "eval", "--adapter=r/insurance", "--dataset=data/test.csv")
    for column, code in (("score", 2), ("label", 0)):
        found = run(capsys, "predict", "--adapter=r/insurance", "--text=a", f"--text_column={column}")
        assert found[0] == code, found
    (line, *_) = run(capsys, "predict", "--adapter=r/insurance", *pairs)[1].splitlines()
    assert json.loads(line).keys() == {"sentence1", "sentence2", "score"}
    assert "\xe9" in line
    words = [text.split() for text in TEXTS]
    Dataset.from_dict({"words": words, "tags": [["O"] * (len(w) - 1) + ["END"] for w in words]}).to_json("t.jsonl")
    code, out, _ = run(capsys, *train, "--dataset=t.jsonl", "--output_dir=t")
    assert code == 0
    Dataset.from_dict(
        {"words": words, "tags": [["O"] * len(w) for w in words[:-1]] + [["X"] * len(words[-1])]}
    ).to_json("x.jsonl")
    unknown = "Column 'tags' has 'X' in row 4, not a label of t/insurance: *"
    says_why(capsys, 2, unknown, "eval", "--adapter=t/insurance", "--dataset=x.jsonl")
    no_list = "label_column='label' holds one label a row; give a list of tags, one for each word."
    says_why(capsys, 2, no_list, "eval", "--adapter=t/insurance", "--dataset=data/test.csv")
    write_csv(Path("x.csv"), {"words": TEXTS, "tags": LABELS})
    no_list = no_list.replace("'label'", "'tags'")
    says_why(capsys, 2, no_list, *TRAIN, "--dataset=t.jsonl", "--eval_file=x.csv", "--output_dir=x")
    code, out, _ = run(capsys, "eval", "--adapter=t/insurance", "--dataset=t.jsonl")
    assert re.search(r"^END +[\d.]+ +[\d.]+ +[\d.]+ +4$", out, re.M)
    row = json.loads(run(capsys, "predict", "--adapter=t/insurance", "--text", TEXTS[0])[1])
    assert row["words"] == words[0]
    assert {*row["labels"]} <= {"O", "END"}
    assert len(row["labels"]) == len(words[0])
    Dataset.from_dict({"words": [[words[0][0], "", *words[0][1:]]]}).to_json("gap.jsonl")  # "" has no token
    assert json.loads(run(capsys, "predict", "--adapter=t/insurance", "--dataset=gap.jsonl")[1]) == row


def test_help_and_inspect_import_no_torch(world):
    """In processes of their own: this one has imported everything."""
    heavy = {"torch", "transformers", "adapters", "datasets", "matplotlib"}
    for argv in (["train", "--help"], ["inspect", "outputs/insurance"]):
        code = (
            f"import sys; sys.argv = ['adapter-distill', *{argv}]\n"
            "from hf_adapter_distillation.cli import main\n"
            f"try: main()\nfinally: print('imported', {heavy} & sys.modules.keys())"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        out = subprocess.check_output(command, cwd=world, env=environment, text=True)
        assert out.endswith("imported set()\n"), out
    assert USUAL.keys() <= {field.name for field in fields(had.DistillationTrainingArguments)}
    assert ADAPTER_CONFIG_NAME == downloads.ADAPTER_CONFIG_NAME


def test_a_number_of_a_table_is_the_label_of_its_value(tmp_path):
    """A table of decimals alone is read as numbers, which do not say how they were written."""
    args = TrainArguments(model="m", teachers=["a"], student="s", dataset="d")
    write_csv(tmp_path / "a.csv", {"text": TEXTS[:3], "label": ["2.50", "1.10", "2.50"]})
    dataset = load_dataset(str(tmp_path / "a.csv"), args)["train"]
    assert label_ids(dataset, "label", ["1.10", "2.50", "beta"], "s") == [1, 0, 1]
    message = "Column 'label' has 1.1 in row 2, which may be '1.1' or '1.10' of s; give the labels names that are no"
    with pytest.raises(ValueError, match=one_line(start=message)):
        label_ids(dataset, "label", ["1.1", "1.10", "2.50"], "s")


def test_datasets_of_all_kinds_and_labels(here, capsys):
    rows = Dataset.from_dict({"text": TEXTS, "label": LABELS, "number": [0, 1, 0, 1], "year": [1999, 2001] * 2})
    rows.to_json("rows.jsonl")
    rows.to_parquet("rows.parquet")
    rows.save_to_disk("one")
    classes = rows.cast_column("label", ClassLabel(names=["train", "card"]))  # in another order than the head's
    DatasetDict({"train": classes, "test": classes}).save_to_disk("several")
    found = [run(capsys, *EVAL, f"--dataset={name}") for name in ("rows.jsonl", "rows.parquet", "one", "several")]
    assert len({out.partition("examples")[2] for code, out, _ in found}) == 1
    assert not any(code for code, *_ in found)
    for column, label2id in (
        ("number", {"LABEL_0": 0, "LABEL_1": 1}),
        ("year", {"1999": 0, "2001": 1}),
        ("label", {"train": 0, "card": 1}),
    ):
        again = [*TRAIN, "--overwrite_output_dir", "--dataset=several", f"--label_column={column}", "--output_dir=x"]
        code, out, _ = run(capsys, *again, "--eval_split=test", "--max_steps=1")
        assert code == 0
        assert "eval_accuracy" in out
        head = json.loads(Path("x/insurance/head_config.json").read_text())
        assert head["config"]["label2id"] == label2id
        assert head["config"]["num_labels"] == 2
        assert run(capsys, *EVAL, "--adapter=x/insurance", "--dataset=several", f"--label_column={column}")[0] == 0


@pytest.mark.parametrize("extension", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["None", "card"], ["None", "card"]),
        (["NA", "DE"], ["DE", "NA"]),
        (["null", "nan"], ["nan", "null"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        (["010", "9"], ["010", "9"]),
        (["true", "false"], ["false", "true"]),
        (["7", "99999999999999999999"], ["7", "99999999999999999999"]),
        (["1", "0", " 1"], [0, 1]),
        (["10", "9"], ["9", "10"]),
        ([*map(str, range(20_000)), "boat"], sorted([*map(str, range(20_000)), "boat"])),
    ],
)
def test_labels_of_a_table_are_as_they_are_written(tmp_path, extension, cells, labels):
    path = write_csv(tmp_path / "rows.csv", {"id": range(1, len(cells) + 1), "label": cells, "text": cells}, n=4)
    path.rename(path := path.with_suffix(f".{extension}"))
    args = DataArguments(dataset=str(path), sep=",", text_column="text")
    rows = load_dataset(str(path), args)["train"]
    assert labels_of(rows, "label") == labels
    assert rows["id"][:] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("word", ["None", "null", "NA", "nan"])
def test_a_text_of_a_table_may_look_like_a_gap(tmp_path, word):
    path = write_csv(tmp_path / "rows.csv", {"text": [word, "a", "b"], "label": ["x", "y", ""]})
    args = DataArguments(dataset=str(path), text_column="text", label_column="label")
    rows = load_dataset(str(path), args)["train"]
    assert rows["text"][0] == word
    with pytest.raises(ValueError, match="Column 'label' is empty in row 3"):
        check_columns(rows, args)
    with pytest.raises(ValueError, match="Column 'text' is empty in row 2"):
        check_columns(Dataset.from_dict({"text": ["a", " \t"], "label": ["x", "y"]}), args)


@pytest.mark.parametrize("rows", ["a, b,x\nc, d,y\n", "a,x,\nb,y,\n", "a, b,x\nc,y\n", "a,1,2\nb,3,4\n"])
def test_surplus_cells_of_a_table_do_not_shift_the_others(tmp_path, rows):
    (path := tmp_path / "rows.csv").write_text(f"text,label\n{rows}")
    fix = "quote the texts that hold the separator, name all columns, or pass another --sep."
    with pytest.raises(ValueError, match=exactly(f"{path} has rows with more cells than its header names; {fix}")):
        load_dataset(str(path), DataArguments(dataset=str(path)))
    path.write_text(f"text,label\na,x\n{rows}")
    with pytest.raises(ValueError, match=one_line(part=f"saw 3); {fix}")):
        load_dataset(str(path), DataArguments(dataset=str(path)))
    path.write_text("text,label,__index_level_0__\na,x,7\n")  # as pandas names the index of a selection
    assert load_dataset(str(path), DataArguments(dataset=str(path)))["train"]["__index_level_0__"][:] == [7]


@pytest.mark.parametrize("row", ['"{}\t{}', '{}\t"{}'])
def test_a_lone_quote_of_a_table_does_not_swallow_rows(tmp_path, row):
    rows = [row.format("my card", "card"), "the train\ttrain", row.format("my pay", "pay"), "the train\ttrain"]
    (path := tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *rows]))
    start = "my card" if row.startswith('"') else "card"
    message = f"{path} has a quote without an end before {start!r}; close it, or leave it out."
    with pytest.raises(ValueError, match=exactly(message)):
        load_dataset(str(path), DataArguments(dataset=str(path)))
    path.write_text('text\tlabel\n"my\tcard"\tcard\n"the\ntrain"\ttrain\n')
    found = load_dataset(str(path), DataArguments(dataset=str(path)))["train"]
    assert found["text"][:] == ["my\tcard", "the\ntrain"]


@pytest.mark.parametrize(("name", "form"), [("row.jsonl", "{}"), ("row.json", "[{}]")])
def test_a_row_of_lists_is_a_row(tmp_path, name, form):
    (path := tmp_path / name).write_text(form.replace("{}", '{"words": ["my", "card"], "tags": ["O", "END"]}'))
    assert load_dataset(str(path), DataArguments(dataset=str(path)))["train"]["words"][:] == [["my", "card"]]


@pytest.mark.parametrize("seed", range(4))
def test_all_labels_of_the_file_are_known_after_a_fraction_is_split_off(tmp_path, seed):
    texts, labels = [[f"text {n}" for n in range(20)], [f"intent{n // 2}" for n in range(20)]]
    path = write_csv(tmp_path / "few.csv", {"text": texts, "label": labels})
    tags = [["O", f"tag{n}"] for n in range(10)]
    Dataset.from_dict({"words": [["a", "b"]] * 10, "tags": tags}).to_json(tmp_path / "tags.jsonl")
    options = {"model": "m", "teachers": ["a"], "student": "s", "eval_split": "0.4"}
    labelled = cli_training.load_labelled(TrainArguments(dataset=str(path), **options), seed)
    assert {name: len(part) for name, part in labelled.data.items()} == {"train": 12, "eval": 8}
    assert labelled.labels == sorted({*labels})
    for name, part in labelled.data.items():
        assert [labelled.labels[number] for number in labelled.targets[name]] == list(part["label"])
    tagged = cli_training.load_labelled(TrainArguments(dataset=str(tmp_path / "tags.jsonl"), **options), seed)
    assert tagged.labels == sorted({"O", *(tag for _, tag in tags)})


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([["A"], ["A", "B"], ["A", "B"]], "Row 2 has 1 words and 2 tags; give each word one tag."),
        ([["A"], ["B"], ["A"]], "Row 3 has 2 words and 1 tags; give each word one tag."),
    ],
)
def test_an_error_names_the_row_of_the_file_whatever_is_split_off(tmp_path, tags, message):
    words = [["a"], ["b"], ["c", "d"]]
    Dataset.from_dict({"words": [*words, *words[:1] * 9], "tags": [*tags, *tags[:1] * 9]}).to_json(
        tmp_path / "t.jsonl"
    )
    options = {"model": "m", "teachers": ["a"], "student": "s", "eval_split": "0.5"}
    for seed in range(3):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            cli_training.load_labelled(TrainArguments(dataset=str(tmp_path / "t.jsonl"), **options), seed)


def test_labels_with_the_default_names_of_transformers_are_evaluated(here, capsys):
    labels = ["LABEL_0", "LABEL_1"] * 2
    write_csv(Path("named.csv"), {"text": TEXTS, "label": labels}, n=20)
    assert run(capsys, *TRAIN, "--dataset=named.csv", "--output_dir=x")[0] == 0
    rows = Dataset.from_dict({"text": TEXTS, "label": labels})
    classes = rows.cast_column("label", ClassLabel(names=["LABEL_1", "LABEL_0"]))  # in another order than the head's
    DatasetDict({"test": classes}).save_to_disk("classes")
    write_csv(Path("test.csv"), {"text": TEXTS, "label": labels})
    found = [run(capsys, *EVAL, "--adapter=x/insurance", f"--dataset={name}") for name in ("test.csv", "classes")]
    assert [code for code, *_ in found] == [0, 0]
    assert len({out.partition("examples")[2] for _, out, _ in found}) == 1


def test_an_output_folder_is_kept_unless_it_is_to_be_replaced_or_gone_on_with(here, capsys):
    before = {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    hint = "pass --overwrite_output_dir, another --output_dir, or --resume_from_checkpoint true to go on from there."
    message = f"outputs/insurance already holds a student; {hint}"
    says_why(capsys, 2, message, *TRAIN, "--output_dir=outputs")
    assert before == {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}
    says_why(capsys, 2, "new has no whole checkpoint; leave out resume_from_checkpoint.", *TRAIN, "--output_dir=new",
             "--resume_from_checkpoint=true")  # fmt: skip
    save = ["--save_strategy=steps", "--save_steps=1", "--eval_file=data/test.csv", "--output_dir=new"]
    assert run(capsys, *TRAIN, *save)[0] == 0
    shutil.rmtree("new/insurance")
    says_why(capsys, 2, f"new holds checkpoints of an earlier training; {hint}", *TRAIN, *save)
    whole = load_file("new/checkpoint-2/insurance/adapter.safetensors")
    shutil.rmtree("new/checkpoint-2")
    code, out, _ = run(capsys, *TRAIN, *save, "--resume_from_checkpoint", "True")
    assert code == 0
    assert "train_loss" not in out, "no mean: the steps before the checkpoint are not in it"
    resumed = load_file("new/insurance/adapter.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    Path("new/insurance/pytorch_adapter.bin").write_bytes(b"of another student")
    assert run(capsys, *TRAIN, "--overwrite_output_dir", "--output_dir=new")[0] == 0
    assert Path("new/insurance/pytorch_adapter.bin").read_bytes() != b"of another student"


def test_a_student_that_is_replaced_leaves_no_checkpoint_and_no_card(here, capsys):
    new = [*TRAIN, "--save_strategy=steps", "--output_dir=new"]
    assert run(capsys, *new, "--save_steps=1")[0] == 0
    earlier = [Path("new/checkpoint-2"), Path("new/insurance/README.md"), Path("new/checkpoint-of-mine")]
    earlier[1].touch()
    earlier[2].mkdir()
    replace = [*new, "--save_steps=1", "--max_steps=1", "--overwrite_output_dir"]
    assert run(capsys, *replace, "--learning_rate=nan")[0] == 2
    assert all(path.exists() for path in earlier)
    assert run(capsys, *replace)[0] == 0
    assert [path.exists() for path in earlier] == [False, False, True]
    assert run(capsys, *replace, "--resume_from_checkpoint=true", "--max_steps=2")[0] == 0
    assert all(Path(f"new/checkpoint-{step}").exists() for step in (1, 2))


def test_inspect_reads_the_config_alone(here, capsys, hub, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    code, out, _ = run(capsys, "inspect", "outputs/insurance")
    provenance = read_provenance("outputs/insurance").to_dict()
    assert code == 0
    assert out.startswith("'insurance', distilled from 2 teachers\n\nteacher  source ")
    for teacher in provenance["teachers"]:
        mean = sum(row[teacher["name"]] for row in provenance["attention"].values()) / len(provenance["attention"])
        assert re.search(
            rf"^{teacher['name']} +{teacher['source']} +- +{teacher['digest'][:8]} +{mean:.2f}$", out, re.M
        )
    for key in ("objective", "distillation_start", "distillation_weight", "learning_rate", "steps", "seed"):
        assert re.search(rf"^{key} +{provenance[key]}$", out, re.M), key
    assert re.search(rf"^eval_accuracy +{provenance['evaluation']['eval_accuracy']}$", out, re.M)
    assert re.search(r"^versions +.*\bhf-adapter-distillation [\d.]+", out, re.M)
    assert "loss, stage 2" in out
    weights = provenance["teacher_weights"]
    assert re.search(rf"^teacher_weights +banking {weights['banking']}, travel {weights['travel']}$", out, re.M)
    config = Path("outputs/insurance/adapter_config.json").read_bytes()
    hub.create("me/faq", {"adapter_config.json": config, "adapter.safetensors": b"x" * 99})
    repo = hub.repos["me/faq"]
    repo.refs["v1"] = repo.refs["main"]
    code, out, _ = run(capsys, "inspect", "me/faq@v1", "--json")
    assert code == 0
    assert json.loads(out) | provenance == json.loads(out)
    assert json.loads(out)["name"] == "insurance"
    assert not any("safetensors" in line for line in hub.requests)
    escaped = config.replace(b"adapters/banking", b"\\u001b[31m\\nred")
    Path("outputs/insurance/adapter_config.json").write_bytes(escaped)
    assert "?[31m?red" in run(capsys, "inspect", "outputs/insurance")[1]


def test_plot_draws_the_attention_into_the_named_file_alone(here, capsys):
    before = sorted(Path().rglob("*"))
    for name, first in (("a.png", b"\x89PNG"), ("b.SVG", b"<?xml")):
        Path(name).write_text("old")
        code, out, _ = run(capsys, "plot", "outputs/insurance", "-o", name)
        assert (code, out) == (0, f"attention over 2 teachers drawn to {name}\n")
        assert Path(name).read_bytes().startswith(first)
    assert sorted({*Path().rglob("*")} - {*before}) == [Path("a.png"), Path("b.SVG")]


def test_push_uploads_what_the_student_on_its_model_would(here, capsys, hub):
    Path("outputs/insurance/training_args.bin").write_bytes(b"secret")
    for saved in Path("outputs/insurance").glob("*_config.json"):  # as of a base model on the Hub
        saved.write_text(saved.read_text().replace('"bert-base-uncased"', '"me/tiny"'))
    code, out, _ = run(capsys, "push", "outputs/insurance", "faq", "--private", "--commit_message", "Mine")
    repo = hub.repos["me/faq"]
    assert (code, out) == (0, f"pushed to {hub.url}/me/faq/commit/{repo.refs['main']}\n")
    assert repo.private
    assert repo.messages[-1] == "Mine"
    assert "training_args.bin" not in repo.files
    assert not check_card(repo.files["README.md"].decode())
    assert b"base_model: me/tiny\n" in repo.files["README.md"]
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    model.add_adapter("insurance", "seq_bn[reduction_factor=4]", distill_from=["adapters/banking", "adapters/travel"])
    model.load_adapter("outputs/insurance", load_as="insurance", use_safetensors=True)
    model.config.name_or_path = "me/tiny"
    state = had.method.distillation.distillations(model.adapters_config)["insurance"]
    state.run = read_provenance("outputs/insurance").run
    with student_folder(model, "insurance", "me/faq", CardOptions()) as folder:
        expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {*repo.files} - {".gitattributes"} == {*expected}
    for name in ("README.md", "head_config.json"):  # settings and versions stand in the order of the file
        words = [sorted(re.findall(rb"[\w.-]*\w", files[name])) for files in (repo.files, expected)]
        assert words[0] == words[1], name
    for safe, pickled in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        own, theirs = load(expected[safe]), load(repo.files[safe])
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in own)
        Path(pickled).write_bytes(repo.files[pickled])
        assert all(torch.equal(own[key], value) for key, value in torch.load(pickled, weights_only=True).items())
    Path("outputs/insurance/README.md").write_text("---\nlicense: mit\n---\nmine")
    code, out, _ = run(capsys, "push", "outputs/insurance", "me/faq", "--create_pr")
    assert out == f"pushed to {hub.url}/me/faq/discussions/1\n"
    assert len(repo.refs) == 2
    assert run(capsys, "push", "outputs/insurance", "me/faq", "--revision", "v2", "--token", "hf_me")[0] == 0
    assert repo.commits[repo.refs["v2"]]["README.md"].endswith(b"mine")
    assert not repo.files["README.md"].endswith(b"mine")


def test_by_default_the_student_has_the_method_of_its_teachers(here, capsys):
    train = [each for each in TRAIN if not each.startswith("--adapter_config")]
    assert run(capsys, *train, "--output_dir=like")[0] == 0
    configs = [
        json.loads(Path(f"{name}/adapter_config.json").read_text())["config"]
        for name in ("like/insurance", "adapters/banking")
    ]
    assert configs[0] == configs[1]
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    model.add_adapter("lora", config="lora")
    model.save_adapter("adapters/lora", "lora")
    mixed = [each.replace("adapters/travel", "adapters/lora") for each in train]
    assert run(capsys, *mixed, "--output_dir=mixed") == (
        2, "",
        "Teachers 'adapters/banking' and 'adapters/lora' have different methods; "
        "choose the student's with --adapter_config, such as seq_bn or lora.",
    )  # fmt: skip


def test_export_writes_what_peft_reads(here, capsys):
    lora = [*TRAIN, "--adapter_config=lora", "--output_dir=lora"]
    assert run(capsys, *(each for each in lora if each != "--adapter_config=seq_bn[reduction_factor=4]"))[0] == 0
    out = "'insurance' is saved for PEFT in peft\n"
    assert run(capsys, "export", "lora/insurance", "peft", "--no_head") == (0, out, "")
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained("bert-base-uncased"), "peft")
    own = AutoAdapterModel.from_pretrained("bert-base-uncased")
    own.load_adapter("lora/insurance", set_active=True, use_safetensors=True)
    ids = torch.arange(5, 10)[None]
    with torch.no_grad():
        expected = own.eval().base_model(ids).last_hidden_state
        torch.testing.assert_close(model.eval()(ids).last_hidden_state, expected, rtol=1e-6, atol=1e-6)
    saved = json.loads(Path("peft/distillation.json").read_text())
    assert saved == read_provenance("lora/insurance").to_dict() == read_provenance("peft").to_dict()
    all_say_why(
        capsys,
        [
            (
                2,
                ["export", "outputs/insurance", "b"],
                "Adapter 'outputs/insurance' is a BnConfig, which has no form in *",
            ),
            (
                2,
                ["export", "lora/insurance", "b"],
                "Adapter 'insurance' has a head for classification that no bert of *",
            ),
            (2, ["export", "peft", "b"], "peft is an adapter of PEFT already."),
            (
                2,
                ["export", "lora/insurance", "adapters/travel", "--no_head"],
                "adapters/travel holds an adapter that *",
            ),
            (
                2,
                ["export", "lora/insurance", "b", "--model", "no model"],
                "model='no model' is neither a folder nor *",
            ),
            (2, ["export", "lora/insurance", "", "--no_head"], "save_directory='' names no folder; give one."),
        ],
    )
    assert not Path("b").exists()


@pytest.mark.parametrize(
    ("family", "kind", "with_head"),
    [("llama", "causal_lm", True), ("llama", "causal_lm", False), ("modernbert", "classification", True)],
)
def test_export_loads_the_class_from_which_an_adapter_was_saved(family, kind, with_head, tmp_path, capsys):
    """A language model whose head was not saved, and a family without AutoAdapterModel."""
    base, student, out = (str(tmp_path / name) for name in ("base", "student", "peft"))
    labels = {"num_labels": 3} if kind == "classification" else {}
    STATIC["base" if labels else kind].from_config(CONFIGS[family]()).save_pretrained(base)
    model = STATIC[kind].from_pretrained(base, **labels)
    adapters.init(model)
    model.add_adapter("s", config="lora")
    noisy(model, "s")
    model.save_adapter(student, "s", with_head=with_head)
    assert run(capsys, "export", student, out) == (0, f"'s' is saved for PEFT in {out}\n", "")
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["auto_mapping"]["base_model_class"] == type(model).__name__
    assert (saved["modules_to_save"] is None) is (kind == "causal_lm")
    read = peft.PeftModel.from_pretrained(STATIC[kind].from_pretrained(base, **labels), out).eval()
    model.set_active_adapters("s")
    ids = torch.arange(5, 10)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    other = str(tmp_path / "gpt2")
    CONFIGS["gpt2"]().save_pretrained(other)
    why = f"model={other!r} cannot be loaded: it is a gpt2, and the adapter was saved from a {family}"
    says_why(capsys, 1, why, "export", student, str(tmp_path / "other"), "--model", other)
    if kind == "classification":
        (tmp_path / "student" / "head_config.json").write_text("{")
        code, _, err = run(capsys, "export", student, str(tmp_path / "other"))
        assert (code, err.startswith(f"{student}/head_config.json is damaged")) == (2, True)
        assert not (tmp_path / "other").exists()


def test_an_export_is_inspected_and_the_other_commands_say_what_to_give_instead(here, capsys, hub):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    model.add_adapter("s", config="lora", distill_from=["adapters/banking", "adapters/travel"])
    model.add_classification_head("s", num_labels=2, layers=1, use_pooler=True)
    model.save_adapter("s", "s")
    assert run(capsys, "export", "s", "peft")[0] == 0
    own, exported = (run(capsys, "inspect", folder) for folder in ("s", "peft"))
    assert exported == (0, own[1].replace("'s'", "'peft'"), "")
    hub.create("me/faq", {path.name: path.read_bytes() for path in Path("peft").iterdir()})
    code, out, _ = run(capsys, "inspect", "me/faq", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"name": "faq", "model_name": "bert-base-uncased"} | read_provenance("s").to_dict(),
    )
    assert not any("safetensors" in line for line in hub.requests)
    peft_of = "peft is an adapter of PEFT"
    head = f"{peft_of}, whose head adapters does not load; give the folder that save_adapter wrote, or *retrieval*."
    push = f"{peft_of}; push it with `hf upload`, or give the folder that save_adapter wrote."
    cases = [
        (2, ["predict", "--adapter=peft", "--text=a"], head),
        (2, [*EVAL, "--adapter=peft"], head),
        (2, ["plot", "peft", "-o", "a.png"], "peft has no record of the attention over its teachers; *"),
    ]
    all_say_why(capsys, cases)
    with hub.quiet():
        says_why(capsys, 2, push, "push", "peft", "me/faq")
    for content in ("{", "5"):
        Path("peft/distillation.json").write_text(content)
        says_why(capsys, 2, "distillation.json of peft is damaged; save the student again.", "inspect", "peft")
    Path("peft/distillation.json").unlink()
    says_why(capsys, 1, "peft holds an adapter that was not distilled; it names no teachers.", "inspect", "peft")


def test_tensors_that_share_a_storage_are_pickled_alone(tmp_path, monkeypatch):
    whole = torch.arange(12.0)
    own = {"heads.a.1.weight": whole[:4], "b": whole[4:]}
    safe, pickled = ADAPTER_WEIGHTS
    save_file(own, tmp_path / safe)
    place = "hf_adapter_distillation.student.saving.load_file"
    monkeypatch.setattr(place, lambda path: own)  # as older safetensors reads it
    pushing.write_all_formats(tmp_path, tmp_path, "a")
    weights = torch.load(tmp_path / pickled, weights_only=True)
    assert all(torch.equal(weights[key], own[key]) for key in own)
    assert all(value.untyped_storage().nbytes() == 4 * value.numel() for value in weights.values())


# What they refuse


def test_wrong_usage_is_told_in_one_line(here, capsys):
    dash = 'write a value that begins with a dash as in --text="-5 degrees"'
    see = "; see adapter-distill train --help."
    cases = [
        ([], "the following arguments are required: command; see adapter-distill --help."),
        (["tran"], "argument command: invalid choice: 'tran'*"),
        (["train"], f"the following arguments are required: --dataset, --model, --teachers, --student{see}"),
        ([*TRAIN, "--lerning_rate=1"], f"unknown option --lerning_rate, did you mean 'learning_rate'?{see}"),
        ([*TRAIN, "--learning", "1"], f"unknown option --learning, did you mean 'learning_rate'?{see}"),
        ([*TRAIN, "--seed", "1", "2"], f"unknown argument '2'{see}"),
        ([*TRAIN, "--carrier=x"], f"argument --carrier: invalid choice: 'x' (*'student'*){see}"),
        ([*TRAIN, "--learning_rate=x"], f"argument --learning_rate/--learning-rate: invalid float value: 'x'{see}"),
        ([*TRAIN, "--distillation_start=2"], "distillation_start=2.0 is out of range; it must be a fraction*"),
        ([*TRAIN, "--objective=x"], "objective='x' is not supported; choose one of *"),
        ([*TRAIN, "--objective={x"], "objective='{x' is neither a name nor a mapping such as {name: 1.0}."),
        ([*TRAIN, "--teacher_selection=0"], "teacher_selection=0 is out of range; *"),
        ([*TRAIN, "--max_length=0"], "max_length=0 is out of range; it must be at least 1."),
        ([*TRAIN, "--student=a/b"], "student='a/b' is not a folder name; leave out '/'."),
        (["predict", "--text", "-card"], f"argument --text: expected at least one argument ({dash}); see *"),
        (["predict", "--text", "-- is it gone"], f"unknown option -- is it gone ({dash}); see *"),
        ([*TRAIN, "--student="], "student='' is empty; give the new adapter a name."),
        (
            [*TRAIN, "--student=analysis"],
            "student='analysis' is the name of a folder of the training; choose another*",
        ),
        ([*TRAIN, "--student=checkpoint-3"], "student='checkpoint-3' is the name of a folder of the training; *"),
        ([*TRAIN, "--eval_file=a", "--eval_split=b"], "eval_split and eval_file exclude each other; leave one*"),
        (["inspect", "a", "b"], "unknown argument 'b'; see adapter-distill inspect --help."),
    ]
    all_say_why(capsys, [(2, argv, message) for argv, message in cases])


def test_wrong_config_files_are_told_in_one_line(here, capsys):
    see = "; see adapter-distill train --help."
    cases = [
        ("lerning_rate: 1", f"c.yaml: unknown option 'lerning_rate', did you mean 'learning_rate'?{see}"),
        ("config: a", "c.yaml: unknown option 'config', did you mean *"),
        ("learning_rate: x", "argument --learning_rate/--learning-rate: invalid float value: 'x'; see *"),
        ("learning_rate: {a: 1}", "argument --learning_rate/--learning-rate: invalid float value: *"),
        ("seed: [1, 2]", "c.yaml: seed takes one value, not the list [1, 2]."),
        ("learning_rate:", "c.yaml: learning_rate has no value; leave it out, or give one."),
        ("- a", "c.yaml holds no options; write them as `name: value`."),
        ("", "c.yaml holds no options; write them as `name: value`."),
        ("a: [", "c.yaml is not valid YAML: *"),
    ]
    for text, message in cases:
        Path("c.yaml").write_text(text)
        says_why(capsys, 2, message, *TRAIN, "--config=c.yaml")
    says_why(
        capsys, 2, "--config no.yaml is not a file; give a YAML file of options by name.", *EVAL, "--config", "no.yaml"
    )


def test_wrong_data_is_told_in_one_line_before_a_model_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(cli_training, "load_base", None)
    columns = {
        "text": TEXTS, "label": LABELS, "gaps": ["a", "", "b", "a"], "same": ["a"] * 4, "score": [0.5, 1.5, 2, 3],
        "number": [0, 1, "", 0], "unknown": [0.5, 1, "nan", 0],
    }  # fmt: skip
    write_csv(Path("data.csv"), columns)
    write_csv(Path("guess.csv"), {"frage": TEXTS, "antwort": TEXTS, "thema": LABELS})
    Path("semicolons.csv").write_text("text;label\nmy card is gone;card\n")
    Path("surplus.csv").write_text("text,label\nmy card,card\nmy card, and me,card\n")
    Path("broken.parquet").write_text("text,label")
    Path("empty.csv").write_text("text,label\n")
    Path("empty.jsonl").touch()
    Path("columns.json").write_text(json.dumps({"text": TEXTS, "label": LABELS}))
    Path("latin.jsonl").write_bytes('{"text": "\xe9", "label": "a"}\n'.encode("latin-1"))
    Path("folder").mkdir()
    rows = Dataset.from_dict({"text": TEXTS, "label": LABELS}).cast_column(
        "label", ClassLabel(names=["card", "train"])
    )
    unlabelled = rows.map(lambda row: {"label": -1})
    DatasetDict({"train": rows, "validation": unlabelled}).save_to_disk("glue")
    unlabelled.cast_column("label", ClassLabel(names=["card"])).save_to_disk("one_class")
    write_csv(Path("other.csv"), {"text": TEXTS, "label": ["card", "boat"] * 2})
    give = "give a .csv, .tsv, .json, .jsonl, .parquet file, a folder made with save_to_disk, or a Hub id."
    cases = [
        (["--dataset=no.csv"], f"The dataset no.csv does not exist; {give}"),
        (["--dataset=./no"], "The dataset './no' is not a file, a folder or a Hub id."),
        (["--dataset=folder"], f"The dataset folder cannot be read (*); {give}"),
        (["--dataset=broken.parquet"], f"The dataset broken.parquet cannot be read (*); {give}"),
        (["--dataset=empty.csv"], f"The dataset empty.csv cannot be read (*no data*); {give}"),
        (["--dataset_config=x"], "dataset_config='x' is for Hub datasets, not for data.csv; leave it out."),
        (["--train_split=x"], "data.csv has no split 'x'; choose one of 'train'."),
        (["--eval_split=x"], "data.csv has no split 'x'; choose one of 'train'."),
        (["--eval_split=1.5"], "eval_split=1.5 is out of range; a fraction lies between 0 and 1."),
        (["--eval_split=0.9"], "eval_split=0.9 leaves no row to train on; give more rows, or leave it out."),
        (["--text_column=texts"], "text_column='texts' is not one of the columns 'text', *; did you mean 'text'?"),
        (["--text_pair_column=x"], "text_pair_column='x' is not one of the columns 'text', *; choose one of them."),
        (["--label_column=x"], "label_column='x' is not one of the columns *"),
        (["--text_column=score"], "text_column='score' holds float64, not text; choose a text column."),
        (["--text_column=gaps"], "Column 'gaps' is empty in row 2; fill it, or leave the row out."),
        (["--label_column=gaps"], "Column 'gaps' is empty in row 2; fill it, or leave the row out."),
        (["--label_column=number"], "Column 'number' is empty in row 3; fill it, or leave the row out."),
        (["--label_column=same"], "label_column='same' holds only one label, 'a'; a head needs at least two."),
        (["--dataset=one_class"], "label_column='label' holds only one label, 'card'; a head needs at least two."),
        (["--label_column=score"], "label_column='score' holds float64, *; pass --task regression to *"),
        (["--dataset=semicolons.csv"], "The only column is 'text;label'; pass --sep ';' if that separates columns."),
        (["--dataset=surplus.csv"], "The dataset surplus.csv cannot be read (*saw 3); quote the texts that hold *"),
        (["--output_dir=guess.csv"], "output_dir='guess.csv' is a file; name a folder."),
        (["--output_dir=.", "--student=guess.csv"], "guess.csv is a file, the place of the student; move it, *"),
        (["--sep=;", "--dataset=glue"], "sep=';' is for .csv and .tsv files, not for glue; leave it out."),
        (["--encoding=x"], "encoding='x' is unknown; give one such as utf-8 or latin-1."),
        (["--encoding=utf-16"], "encoding='utf-16' does not fit data.csv (*); pass another --encoding, such as *"),
        (["--dataset=empty.jsonl"], "empty.jsonl is empty; give a file with rows."),
        (["--dataset=columns.json"], "columns.json holds a list for each column; give a list with an object *"),
        (["--dataset=latin.jsonl"], "encoding='utf-8' does not fit latin.jsonl (*); pass another --encoding*"),
        (["--task=tokens"], "task='tokens' does not fit label_column='label', which holds one label a row."),
        (["--dataset=guess.csv"], "The columns 'frage', 'antwort', 'thema' do not say which one is the text_*"),
        (["--dataset=guess.csv", "--text_column=frage"], "* do not say which one is the label_column; pass *"),
        (["--task=regression"], "Column 'label' holds no number: could not convert string to float: 'card'; leave *"),
        (["--task=regression", "--label_column=unknown"], "Column 'unknown' has nan in row 3; give a number, or *"),
        (["--dataset=glue"], "Column 'label' has no label in row 1; choose a split that has labels."),
        (["--eval_file=guess.csv"], "text_column='text' is not one of the columns *'thema' of guess.csv; rename *"),
        (["--eval_file=other.csv"], "Column 'label' has 'boat' in row 2, not a label of the training data: *"),
    ]  # fmt: skip
    given = [*TRAIN, "--dataset=data.csv", "--output_dir=new"]
    all_say_why(capsys, [(2, [*given, *argv], message) for argv, message in cases])
    assert not Path("new").exists()


def test_the_log_of_a_reader_is_not_shown_beside_its_error(here, capsys, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    Path("surplus.csv").write_text("text,label\nmy card,card\nmy card, and me,card\n")
    says_why(capsys, 2, "The dataset surplus.csv cannot be read *", *EVAL, "--dataset=surplus.csv")
    assert not caplog.messages


def test_wrong_models_teachers_and_adapters_are_told_in_one_line(here, capsys):
    numbered = write_csv(Path("numbers.csv"), {"text": TEXTS, "label": [0, 1, 0, 2]})
    Path("empty").mkdir()
    new = [*TRAIN, "--output_dir=new"]
    unknown = "Column 'label' has '0' in row 1, not a label"
    cases = [
        (2, [*new, "--model=./no"], "model='./no' is neither a folder nor a Hub id; give a saved model."),
        (1, [*new, "--model=someone/no"], "model='someone/no' cannot be loaded: We couldn't connect to *"),
        (2, [*new, "--model=empty"], "model='empty' holds no config.json; give the folder of a model."),
        (2, [*new, "--max_length=999"], "max_length=999 is out of range; bert-base-uncased takes 512 tokens at most."),
        (1, [*new, "--dataset=someone/no"], "The dataset 'someone/no' is not a local file, and the Hub did not*"),
        (2, [*new, "--teachers", "adapters/bankin"], "*'adapters/bankin'*"),
        (2, [*new, "--teachers", "nope"], "Unknown teacher 'nope': it is no local folder or Hub id either. *"),
        (2, [*new, "--teachers", "empty"], "Teacher 'empty' holds no adapter_config.json; give a folder made by*"),
        (2, [*new, "--adapter_config=nope"], "Student 'insurance' has no valid adapter config: *"),
        (2, [*new, "--eval_strategy=epoch"], "*eval*"),
        (2, [*EVAL, "--adapter=nope"], "'nope' is no local folder, and no Hub id either ('user/adapter')."),
        (1, [*EVAL, "--adapter=me/no"], "'me/no' is no local folder, and the Hub did not give it: *"),
        (2, [*EVAL, "--adapter=outputs"], "outputs holds no adapter_config.json; did you mean outputs/insurance?"),
        (2, [*EVAL, "--adapter=empty"], "empty holds no adapter_config.json; give a folder made by save_adapter."),
        (2, [*EVAL, "--adapter=adapters/headless"], "adapters/headless has no head, so it predicts nothing; *"),
        (2, [*EVAL, f"--dataset={numbered}"], f"{unknown} of outputs/insurance: 'card', 'train'."),
        (2, [*EVAL, f"--dataset={numbered}", "--adapter=adapters/banking"], "Column * has '2' in row 4, *: '0', '1'."),
        (2, [*EVAL, "--output=no/result.json"], "--output no/result.json: there is no folder no; make it first."),
        (2, [*EVAL, "--output=data"], "--output data is a folder; name a file."),
        (2, [*EVAL, "--batch_size=0"], "batch_size=0 is out of range; it must be at least 1."),
    ]  # fmt: skip
    all_say_why(capsys, cases)
    assert not Path("new", "insurance").exists()


@pytest.mark.parametrize(
    "argv",
    [["eval", "--adapter=s", "--dataset=test.csv"], ["predict", "--adapter=s", "--text=a"], ["export", "s", "p"]],
)
def test_an_error_of_a_base_model_says_who_named_it(here, capsys, monkeypatch, argv):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    model.add_adapter("s", config="lora")
    model.add_classification_head("s", num_labels=2)
    Path("elsewhere").mkdir()
    model.save_adapter("elsewhere/s", "s")
    monkeypatch.chdir("elsewhere")
    write_csv(Path("test.csv"), {"text": TEXTS, "label": LABELS})
    named = "model='bert-base-uncased' (named by s; --model replaces it) cannot be loaded: *"
    says_why(capsys, 1, named, *argv)
    says_why(capsys, 2, "model='./no' is neither a folder nor a Hub id; give a saved model.", *argv, "--model=./no")


@pytest.mark.parametrize("column", ["label", "score", "scores", "score_card"])
def test_a_text_column_with_the_name_of_a_result_is_refused_before_the_model_runs(here, capsys, monkeypatch, column):
    monkeypatch.setattr(predict, "run_model", None)
    write_csv(Path("texts.csv"), {column: TEXTS, "other": TEXTS})
    argv = ["predict", "--adapter=outputs/insurance", "--dataset=texts.csv", "--format=csv"]
    for option, others in (("text_column", []), ("text_pair_column", ["--text_column=other"])):
        message = f"{option}={column!r} is also the name of a result; rename the column."
        says_why(capsys, 2, message, *argv, *others, f"--{option}={column}")


def test_adapters_that_tell_nothing_say_why(here, capsys, hub, monkeypatch):
    shutil.copytree("outputs/insurance", "quiet")
    config = json.loads(Path("quiet/adapter_config.json").read_text())
    empty = {"teachers": [], "versions": {}}
    uneven = {"layer.0": {"banking": 1.0}, "layer.1": {"travel": 1.0}}
    broken = [
        {"versions": {}}, 5, {"teachers": [{"name": 1}], "versions": {}}, {**empty, "attention": uneven},
        {**empty, "evaluation": {"eval_loss": "x"}}, {**empty, "losses": [1]},
    ]  # fmt: skip
    not_distilled = "adapters/banking holds an adapter that was not distilled; it names no teachers."
    for command in (["inspect"], ["plot", "-o", "a.png"]):
        says_why(capsys, 2, "'nope' is no local folder, and no Hub id either ('user/adapter').", *command, "nope")
        says_why(
            capsys,
            1,
            "'me/no' is no local folder, and the Hub did not give it: it does not exist *",
            *command,
            "me/no",
        )
        says_why(
            capsys, 2, "outputs holds no adapter_config.json; did you mean outputs/insurance?", *command, "outputs"
        )
        says_why(capsys, 1 if command == ["inspect"] else 2, not_distilled, *command, "adapters/banking")
        for run_ in broken:
            Path("quiet/adapter_config.json").write_text(json.dumps({**config, "distillation": run_}))
            message = '"distillation" in the adapter_config.json of quiet is damaged; save the student again.'
            says_why(capsys, 2, message, *command, "quiet")
        Path("quiet/adapter_config.json").write_text("{")
        says_why(capsys, 2, "quiet/adapter_config.json is damaged (*); save the adapter again.", *command, "quiet")
    Path("quiet/adapter_config.json").write_text(json.dumps({**config, "distillation": empty}))
    says_why(capsys, 2, "quiet has no record of the attention over its teachers; *", "plot", "quiet", "-o", "a.png")
    message = "--output a.xyz has no supported extension; choose one of *"
    says_why(capsys, 2, message, "plot", "outputs/insurance", "-o", "a.xyz")
    says_why(capsys, 2, "--output no/a.png: there is no folder no; *", "plot", "outputs/insurance", "-o", "no/a.png")
    assert not Path("a.png").exists()
    Path("outputs/insurance/adapter.safetensors").write_bytes(b"x")
    with hub.quiet():
        says_why(capsys, 2, "'nope' is not a folder; give the folder of a saved student.", "push", "nope", "me/faq")
        says_why(capsys, 2, not_distilled, "push", "adapters/banking", "me/faq")
        says_why(capsys, 2, "Repo id must use alphanumeric chars*", "push", "outputs/insurance", "a b")
        damaged = "outputs/insurance/adapter.safetensors is damaged; save the student again."
        says_why(capsys, 2, damaged, "push", "outputs/insurance", "me/faq")
        for file in ADAPTER_WEIGHTS:
            Path("outputs/insurance", file).unlink()
        no_weights = "outputs/insurance holds no weights of an adapter; save the student again."
        says_why(capsys, 2, no_weights, "push", "outputs/insurance", "me/faq")
        monkeypatch.delenv("HF_TOKEN")
        message = (
            "'insurance' was not pushed to 'me/faq': there is no token; log in with `hf auth login`, or pass one."
        )
        says_why(capsys, 1, message, "push", "outputs/insurance", "me/faq")


def test_a_push_that_the_hub_does_not_take_says_why_and_commits_nothing(here, capsys, hub):
    hub.fail("POST /api/models/me/faq/commit", 409)
    message = "'insurance' was not pushed to 'me/faq': another push came between; push again."
    says_why(capsys, 1, message, "push", "outputs/insurance", "me/faq")
    assert {*hub.repos["me/faq"].files} == {".gitattributes"}
    with pytest.raises(TypeError, match="licence"):
        push_saved("outputs/insurance", "me/faq", adapter_card_kwargs={"licence": "mit"})


def test_a_run_that_fails_or_is_stopped_has_its_exit_code(here, capsys, monkeypatch):
    errors = [
        (RuntimeError("No space\nleft"), 1, "No space left"),
        (KeyError("x"), 1, "KeyError: 'x'"),
        (FloatingPointError("loss"), 1, "FloatingPointError: loss"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ]
    left = [error for error, _, _ in errors]

    def fails(self, **kwargs):
        raise left.pop(0)

    monkeypatch.setattr(had.DistillationTrainer, "train", fails)
    all_say_why(capsys, [(code, [*TRAIN, "--output_dir=new"], line) for _, code, line in errors])
    assert main(["inspect", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def process(*argv, stdout=subprocess.PIPE, **variables):
    own = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE)}
    environment = {**os.environ, **own, **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "hf_adapter_distillation.cli", *argv],
        env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background may ignore it
    )  # fmt: skip


def test_exit_codes_of_a_process_and_ctrl_c_in_a_training(here):
    with process("inspect", "adapters/banking") as failed:
        out, err = failed.communicate(timeout=120)
    assert (failed.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    endless = [*TRAIN, "--max_steps=1000000", "--logging_steps=1", "--disable_tqdm=true", "--output_dir=new"]
    with process(*endless) as training:
        for line in training.stderr:
            if "  loss " in line:
                break
        training.send_signal(signal.SIGINT)
        out, err = training.communicate(timeout=120)
    assert training.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("adapter-distill: error: stopped by Ctrl-C\n")


def test_a_result_is_written_in_the_encoding_of_the_output(here):
    model = AutoAdapterModel.from_pretrained("bert-base-uncased")
    model.load_adapter("outputs/insurance", load_as="s")
    model.heads["s"].config["label2id"] = {"zurück €": 0, "\U0001f600": 1}
    model.save_adapter("s", "s")
    with process("predict", "--adapter=s", "--text", "é", PYTHONIOENCODING="ascii") as predicting:
        out, err = predicting.communicate(timeout=120)
    assert predicting.returncode == 0, err
    assert r"zur\u00fcck \u20ac" in out
    assert {"é", "zurück €", "\U0001f600"} <= {json.loads(out)["text"], *json.loads(out)["scores"]}


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_no_traceback(here, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    with process("inspect", "outputs/insurance", stdout=writing, PYTHONUNBUFFERED=unbuffered) as cut:
        err = cut.communicate(timeout=120)[1]
    os.close(writing)
    assert (cut.returncode, err) == (0, "")
    with open("/dev/full", "w") as full:
        with process("inspect", "outputs/insurance", stdout=full, PYTHONUNBUFFERED=unbuffered) as failed:
            err = failed.communicate(timeout=120)[1]
    assert (failed.returncode, err) == (1, "adapter-distill: error: [Errno 28] No space left on device\n")


# What the documentation says


def commands(text):
    """The command lines in a text, continued lines in one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("adapter-distill ")]


def test_help_ends_with_examples_that_are_right(here, capsys, monkeypatch):
    Path("train.yaml").write_text("model: m\nteachers: [a]\nstudent: s\ndataset: d\n")
    _, parsers = make_parser()
    assert parsers.keys() == EXAMPLES.keys()
    assert [command_function(name) for name in ("export", "predict")] == [export.export, predict.predict]
    for name, examples in EXAMPLES.items():
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        out = capsys.readouterr().out
        assert stopped.value.code == 0
        assert out.rstrip().endswith(examples.rstrip())
        found = commands(examples)
        assert len(found) in (2, 3)
        assert all(argv[0] == name and parse(argv) for argv in found)
    assert (
        'console_scripts": ["adapter-distill = hf_adapter_distillation.cli:main"]' in (ROOT / "setup.py").read_text()
    )


def test_help_all_lists_the_options_of_the_training_arguments(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help_all"])
    assert stopped.value.code == 0
    assert {"--distillation_weight", "--lr_scheduler_type"} <= set(capsys.readouterr().out.split())


def test_the_page_about_the_command_line_runs(here, capsys, hub):
    page = (ROOT / "docs" / "how_to" / "command_line.md").read_text()
    config = re.search(r"```yaml\n# train.yaml\n(.*?)```", page, flags=re.S)[1]
    Path("train.yaml").write_text(config)
    files = {path.name: path.read_bytes() for path in Path("adapters/travel").iterdir()}
    repo = hub.create("someone/faq-work", files)
    repo.refs["v1"] = repo.refs["main"]
    shutil.rmtree("outputs")
    shutil.copytree("bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2")
    for name in ("faq", "faq_test"):
        write_csv(Path("data", f"{name}.csv"), {"query": TEXTS, "faq": LABELS}, n=20)
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, flags=re.M | re.S)
    found = [argv for block in blocks for argv in commands(block)]
    names = ["train", "train", "eval", "predict", "predict", "train", "eval", "predict"]
    names += ["inspect", "inspect", "plot", "push"]
    assert [argv[0] for argv in found] == names
    for argv in found:
        assert run(capsys, *argv, *(QUICK if argv[0] == "train" else ()))[0] == 0, argv
    assert Path("attention.png").is_file()
    assert Path("result.json").is_file()
    assert "me/faq-insurance" in hub.repos
    sources = [teacher.source for teacher in read_provenance("outputs/insurance/insurance").teachers]
    assert len(sources) == 2  # by teacher_selection
