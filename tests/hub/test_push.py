"""Pushing over HTTP to a Hub on the loopback interface, and what stock adapters makes of it."""

from pathlib import Path

import pytest
import torch
from adapters import LoRAConfig
from hub_server import check_card
from huggingface_hub import get_token, snapshot_download
from huggingface_hub.utils import reset_sessions
from pushes import NO_TOKEN, NOT_PUSHED, OF_A_PUSH, full_disk, pushed, refused, trained
from safetensors.torch import load
from tiny_models import distillation_of, make_batch, make_dataset, make_model, make_student, noisy
from without_package import run_without_package

import hf_adapter_distillation as had
from hf_adapter_distillation._compat import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from hf_adapter_distillation.hub.push import push_saved
from hf_adapter_distillation.student.provenance import read_provenance

# In a process of its own, with nothing but what the card says:
LOAD = """
    import re, torch
    from huggingface_hub import ModelCard
    batch, logits = torch.load(sys.argv[1], weights_only=True), {}
    for repo in sys.argv[3:]:
        usage = re.search(r"```python\\n(.*?)```", ModelCard.load(repo).text, flags=re.S)[1]
        for usage in (usage, usage.replace(", use_safetensors=True", "")):
            names = {}
            exec(usage, names)
            with torch.no_grad():
                logits.setdefault(repo, []).append(names["model"].eval()(**batch).logits)
    torch.save(logits, sys.argv[2])
"""


def test_a_pushed_student_loads_in_stock_adapters_by_the_code_of_its_card(hub, trainer_args, tmp_path):
    kinds = [("flex", "seq_bn"), ("flex", "lora"), ("flex", "prefix_tuning"), ("classification", "seq_bn")]
    batch, logits = make_batch(), {}
    del batch["labels"]
    for kind, config in kinds:
        model = trained(trainer_args, kind, config).model
        repo = f"me/{kind}-{config}"
        model.push_adapter_to_hub(repo, "insurance")
        safe = () if config == "prefix_tuning" else ("adapter.safetensors", "model_head.safetensors")
        files = OF_A_PUSH - {"adapter.safetensors", "model_head.safetensors"} | {*safe}
        assert pushed(hub.repos[repo]) == files
        with torch.no_grad():
            logits[repo] = model.eval()(**batch).logits
    for kind in ("flex", "classification"):
        make_model(kind=kind).base_model.save_pretrained(str(tmp_path / kind))
        hub.create(f"me/tiny-{kind}", {path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()})

    torch.save(batch, tmp_path / "batch.pt")
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    arguments = [str(tmp_path / "batch.pt"), str(tmp_path / "logits.pt"), *logits]
    run_without_package(LOAD, *arguments, **environment)
    loaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert set(loaded) == set(logits)
    for repo, both in loaded.items():
        assert len(both) == 2, repo
        assert all(torch.equal(each, logits[repo]) for each in both), repo


def test_the_weights_of_a_push_are_the_students_and_no_others(hub, trainer_args):
    model = make_student(make_model(), teachers=["bank", "insurance2"])
    had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset()).train()
    commit = model.push_adapter_to_hub("me/faq", "insurance")
    files = hub.repos["me/faq"].files
    assert commit.oid == hub.repos["me/faq"].refs["main"]
    assert hub.repos["me/faq"].messages[-1] == "Upload insurance"
    own = model.state_dict()
    for safe, pickled in (ADAPTER_WEIGHTS, HEAD_WEIGHTS):
        weights = load(files[safe])
        assert weights
        assert all("insurance." in key and torch.equal(value, own[key]) for key, value in weights.items())
        hub_file = Path(snapshot_download("me/faq")) / pickled
        again = torch.load(hub_file, weights_only=True)
        assert again.keys() == weights.keys()
        assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_folders_of_teachers_are_not_pushed(hub, tmp_path):
    make_student(make_model(), teachers=["bank"]).save_adapter(str(tmp_path / "bank"), "bank")
    model = make_model()
    model.add_adapter("insurance", distill_from=[str(tmp_path / "bank")])
    model.save_adapter(str(tmp_path / "saved"), "insurance")
    assert read_provenance(str(tmp_path / "saved")).teachers[0].source == str(tmp_path / "bank")
    model.push_adapter_to_hub("me/faq", "insurance")
    assert not any(str(tmp_path).encode() in content for content in hub.repos["me/faq"].files.values())
    (teacher,) = read_provenance(snapshot_download("me/faq")).teachers
    assert teacher.name == teacher.source == "bank"


def test_two_versions_of_a_saved_student_are_not_pushed(hub, tmp_path):
    model, folder = make_student(make_model()), tmp_path / "insurance"
    model.save_adapter(str(folder), "insurance", use_safetensors=True)
    noisy(model, "insurance")
    model.save_adapter(str(folder), "insurance")
    message = f"{folder} holds two versions of the weights, {' and '.join(ADAPTER_WEIGHTS)}; delete the older file."
    with hub.quiet():
        refused(ValueError, message, push_saved, folder, "me/faq")


PEFT_USAGE = """
    import re, torch
    from huggingface_hub import ModelCard
    for repo in sys.argv[3:]:
        names = {}
        exec(re.search(r"```python\\n(.*?)```", ModelCard.load(repo).text, flags=re.S)[1], names)
        with torch.no_grad():
            torch.save(names["model"].eval()(**torch.load(sys.argv[1], weights_only=True)).logits, sys.argv[2])
"""


def test_a_student_pushed_for_peft_loads_by_the_code_of_its_card(hub, trainer_args, tmp_path):
    make_student(make_model(), teachers=["bank"], config="lora").save_adapter(str(tmp_path / "bank"), "bank")
    model = make_model(kind="classification")
    model.config.num_labels = 2
    model.config.name_or_path = "me/tiny"
    model.add_adapter("insurance", config="lora", distill_from=[str(tmp_path / "bank")])
    model.train_adapter("insurance")
    had.DistillationTrainer(model, trainer_args(max_steps=2), train_dataset=make_dataset()).train()
    model.push_adapter_to_hub("me/faq", "insurance")
    model.push_adapter_to_hub("me/faq", "insurance", format="peft")
    repo = hub.repos["me/faq"]
    files = {"adapter_config.json", "adapter_model.safetensors", "distillation.json", "README.md"}
    assert pushed(repo) == files, "files of the other format are gone"
    card = repo.files["README.md"].decode()
    assert "library_name: peft\n" in card
    assert not check_card(card)
    assert not any(str(tmp_path).encode() in content for content in repo.files.values())
    make_model(kind="classification").base_model.save_pretrained(str(tmp_path / "base"))
    hub.create("me/tiny", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    batch = make_batch()
    del batch["labels"]
    torch.save(batch, tmp_path / "batch.pt")
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    run_without_package(PEFT_USAGE, str(tmp_path / "batch.pt"), str(tmp_path / "logits.pt"), "me/faq", **environment)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=1e-6, atol=1e-6)


def test_a_student_that_adapters_would_load_in_part_is_pushed_for_peft_alone(hub, trainer_args, tmp_path):
    config = LoRAConfig(r=2, attn_matrices=["q", "attention.output.dense"])
    model = make_student(make_model(kind="classification"), teachers=["bank"], config=config)
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    message = (
        "'insurance' has LoRA in attention.output.dense, which adapters leaves out where it is loaded without "
        "hf_adapter_distillation; push it for PEFT, by push_adapter_to_hub(..., format='peft'), or by "
        "adapter-distill export and hf upload."
    )
    refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "insurance")
    refused(ValueError, message, push_saved, tmp_path / "insurance", "me/faq")
    args = trainer_args(push_to_hub=True, hub_model_id="me/faq")
    refused(ValueError, message, had.DistillationTrainer, model, args, train_dataset=make_dataset())
    assert not hub.repos
    model.push_adapter_to_hub("me/faq", "insurance", format="peft")
    assert "attention.output.dense" in hub.repos["me/faq"].files["adapter_config.json"].decode()


def test_a_format_that_a_push_does_not_have_is_named(hub):
    model = make_student(make_model(), config="seq_bn")
    message = "format='onnx' is unknown; choose one of 'adapters', 'peft'."
    refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "insurance", format="onnx")
    message = (
        "Adapter 'insurance' is a SeqBnConfig, which has no form in PEFT; only a plain LoRA is exported "
        "(save_adapter saves it)."
    )
    refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "insurance", format="peft")
    message = (
        "format takes a student of this model, and 'bank' was loaded or is not distilled; save it by "
        "save_adapter_as_peft and upload the folder."
    )
    refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "bank", format="peft")
    assert not hub.repos


def test_private_revision_pull_request_and_token(hub, monkeypatch):
    model = make_student(make_model())
    monkeypatch.delenv("HF_TOKEN")
    model.push_adapter_to_hub("faq", "insurance", private=True, token="hf_me")  # the owner is that of the token
    repo = hub.repos["me/faq"]
    assert repo.private
    assert pushed(repo) == OF_A_PUSH
    assert b'load_adapter("me/faq"' in repo.files["README.md"]
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    first = repo.refs["main"]

    model.heads["insurance"][1].weight.data += 1
    model.push_adapter_to_hub("me/faq", "insurance", revision="v2", commit_message="Second", commit_description="x")
    assert repo.refs["main"] == first
    assert repo.messages[-1] == "Second"
    assert repo.commits[repo.refs["v2"]]["model_head.safetensors"] != repo.files["model_head.safetensors"]

    theirs = hub.create("other/faq", {"notes.txt": b"mine"})
    commit = model.push_adapter_to_hub("other/faq", "insurance", create_pr=True)
    assert commit.pr_url.endswith("/other/faq/discussions/1")
    assert pushed(theirs) == {"notes.txt"}
    assert set(theirs.commits[theirs.refs["refs/pr/1"]]) == OF_A_PUSH | {"notes.txt", ".gitattributes"}


def test_a_push_replaces_an_adapter_and_leaves_its_history_and_all_other_files(hub):
    before = {
        "notes.txt": b"mine",
        "pytorch_adapter.bin": b"old",
        "head_config.json": b"{}",
        "model_head.safetensors": b"old",
        "other/model_head.safetensors": b"mine",
    }
    repo = hub.create("me/faq", before)
    model = make_student(make_model(kind="base"))
    model.push_adapter_to_hub("me/faq", "insurance")
    assert pushed(repo) == {
        "notes.txt", "adapter.safetensors", "pytorch_adapter.bin", "adapter_config.json", "README.md",
        "other/model_head.safetensors",
    }  # fmt: skip
    assert repo.files["notes.txt"] == b"mine"
    assert repo.files["pytorch_adapter.bin"] != b"old"
    assert len(repo.commits) == 2
    assert before.items() <= next(iter(repo.commits.values())).items()


def test_a_local_path_gets_the_files_and_keeps_its_card(hub, tmp_path):
    model = make_student(make_model())
    model.push_adapter_to_hub("me/faq", "insurance", local_path=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} >= OF_A_PUSH
    (tmp_path / "README.md").write_text("mine")
    generated = hub.repos["me/faq"].files["README.md"]
    model.push_adapter_to_hub("me/faq", "insurance", local_path=str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "mine"
    assert hub.repos["me/faq"].files["README.md"] == generated
    model.push_adapter_to_hub("me/faq", "insurance", local_path=str(tmp_path), overwrite_adapter_card=True)
    assert (tmp_path / "README.md").read_bytes() == generated


def test_a_local_path_with_an_adapter_in_the_other_format_is_not_spoiled(hub, tmp_path):
    model = make_student(make_model(kind="base"), config="lora")
    model.save_adapter(str(tmp_path / "stock"), "insurance")
    had.save_adapter_as_peft(model, "insurance", tmp_path / "peft")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for format_, folder, held in (
        ("peft", tmp_path / "stock", "an adapter that save_adapter wrote"),
        ("adapters", tmp_path / "peft", "an adapter of PEFT"),
    ):
        message = f"{folder} holds {held}; give another folder."
        refused(ValueError, message, push, model, local_path=str(folder), format=format_)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before
    assert not hub.repos
    push(model, local_path=str(tmp_path / "peft"), format="peft")
    assert (tmp_path / "peft" / "README.md").is_file()


def test_plain_adapters_are_pushed_by_adapters(hub):
    model = make_student(make_model())
    model.push_adapter_to_hub("me/bank", "bank")
    assert b"None dataset" in hub.repos["me/bank"].files["README.md"]
    assert "adapter.safetensors" not in hub.repos["me/bank"].files


@pytest.mark.parametrize("format_", ["adapters", "peft"])
def test_a_student_over_which_a_plain_adapter_was_loaded_is_pushed_as_plain(format_, hub, tmp_path):
    model = make_student(make_model(), config="lora")
    model.save_adapter(str(tmp_path / "plain"), "bank")
    model.load_adapter(str(tmp_path / "plain"), load_as="insurance")
    if format_ == "peft":
        message = (
            "format takes a student of this model, and 'insurance' was loaded or is not distilled; save it by "
            "save_adapter_as_peft and upload the folder."
        )
        refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "insurance", format="peft")
        return
    model.push_adapter_to_hub("me/faq", "insurance")
    assert b"distilled" not in hub.repos["me/faq"].files["README.md"]


@pytest.mark.parametrize("version", [None, "v1"])
def test_a_student_that_is_loaded_by_its_id_keeps_its_provenance(version, hub, trainer_args):
    model = trained(trainer_args, max_steps=2).model
    run = distillation_of(model).run
    push(model)
    hub.repos["me/faq"].refs["v1"] = hub.repos["me/faq"].refs["main"]
    model.load_adapter("me/faq", version=version)
    assert distillation_of(model).run.settings == run.settings
    assert not distillation_of(model).is_loaded
    model.push_adapter_to_hub("me/bank", "bank")
    model.load_adapter("me/bank", load_as="insurance")
    assert distillation_of(model).is_loaded


# What goes wrong


def push(model=None, repo="me/faq", **kwargs):
    model = model or make_student(make_model())
    return model.push_adapter_to_hub(repo, "insurance", **kwargs)


NOT_ALLOWED = "the token does not allow it; use one that may write there, or pass create_pr=True."
WRONG_TOKEN = "the token is missing or wrong; log in with `hf auth login`, or pass another token."


def test_nothing_is_asked_of_the_hub_for_what_cannot_be_pushed(hub, monkeypatch):
    model = make_student(make_model())
    with hub.quiet():
        message = "There is no adapter 'nope' to push; adapters on the model: 'bank', 'travel', 'work', 'insurance'."
        refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "nope")
        refused(ValueError, message, model.push_adapter_to_hub, "me/faq", "nope", format="peft")
        with pytest.raises(ValueError, match="Repo id must use alphanumeric chars"):
            push(model, "a b")
        with pytest.raises(TypeError, match="unexpected keyword argument 'licence'"):
            push(model, adapter_card_kwargs={"licence": "mit"})
        refused(OSError, NOT_PUSHED + NO_TOKEN, push, model, token=False)
        monkeypatch.delenv("HF_TOKEN")
        assert get_token() is None
        refused(OSError, NOT_PUSHED + NO_TOKEN, push, model)
        monkeypatch.setattr(had.hub.push, "save_weights", full_disk)
        refused(OSError, "no space left", push, model, token="hf_me")


FAILURES = [
    ("POST /api/repos/create", 401, WRONG_TOKEN),
    ("POST /api/repos/create", 500, "the Hub failed with 500; try again."),
    ("GET /api/models/me/faq/tree", "cut", "{} cannot be reached or broke off; try again."),
    ("POST /api/models/me/faq/preupload", 403, NOT_ALLOWED),
    ("POST /me/faq.git/info/lfs/objects/batch", 502, "the Hub failed with 502; try again."),
    ("PUT /lfs/", "cut", "{} cannot be reached or broke off; try again."),
    ("PUT /lfs/", 500, "the Hub failed with 500; try again."),
    ("POST /lfs/verify", 500, "the Hub failed with 500; try again."),
    ("POST /api/models/me/faq/commit", 409, "another push came between; push again."),
    ("POST /api/models/me/faq/commit", "cut", "{} cannot be reached or broke off; try again."),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "status", "message"), FAILURES)
def test_a_failure_is_one_line_and_commits_nothing(request_, status, message, hub):
    repo = hub.create("me/faq")
    hub.fail(request_, status)
    refused(OSError, NOT_PUSHED + message.format(hub.url), push)
    assert len(repo.commits) == 1
    assert not pushed(repo)
    hub.faults.clear()
    push()
    assert pushed(repo) == OF_A_PUSH


@pytest.mark.parametrize("status", [500, "cut"])
def test_the_upload_of_a_file_is_tried_again(status, hub):
    hub.fail("PUT /lfs/", status, times=2)
    push()
    assert pushed(hub.repos["me/faq"]) == OF_A_PUSH
    assert hub.faults[0][2] == 0


def test_a_commit_whose_answer_is_lost_is_whole_and_not_made_twice(hub):
    model, repo = make_student(make_model()), hub.create("me/faq")
    hub.fail("POST /api/models/me/faq/commit", "lost", times=1)
    refused(OSError, f"{NOT_PUSHED}{hub.url} cannot be reached or broke off; try again.", push, model)
    assert pushed(repo) == OF_A_PUSH
    assert push(model).oid == repo.refs["main"]
    assert len(repo.commits) == 2


def test_other_refusals_of_the_hub(hub, monkeypatch):
    model = make_student(make_model())
    refused(OSError, "'insurance' was not pushed to 'other/faq': " + NOT_ALLOWED, push, model, "other/faq")
    refused(OSError, "'insurance' was not pushed to 'faq': " + WRONG_TOKEN, push, model, "faq", token="hf_nobody")
    message = NOT_PUSHED + 'Invalid metadata in README.md. - "license" is not valid: My Own.'
    refused(OSError, message, push, model, adapter_card_kwargs={"license": "My Own"})
    monkeypatch.setattr(had.downloads.constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    refused(OSError, NOT_PUSHED + "HF_HUB_OFFLINE is set.", push, model)


def test_a_hub_that_is_not_there(hub):
    hub.stop()
    refused(OSError, f"{NOT_PUSHED}{hub.url} cannot be reached or broke off; try again.", push)
