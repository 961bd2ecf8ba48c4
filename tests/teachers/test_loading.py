"""Teachers that are pulled over HTTP from a Hub on the loopback interface."""

import io
import re

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import reset_sessions
from messages import exactly
from model_state import everything
from saved_teachers import Evil
from tiny_models import TEACHERS, make_model, make_student, with_teachers

from hf_adapter_distillation._compat import ADAPTER_WEIGHTS, HEAD_WEIGHTS
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.student.provenance import read_provenance

CODE_AND_CHECKPOINTS = {
    "train.py": b"raise SystemExit",
    "config.json": b'{"auto_map": {"AutoModel": "train.Model"}}',
    "last-checkpoint/optimizer.pt": b"x",
    "README.md": b"# A teacher",
}


def files_of(tmp_path, name="bank", seed=0, **kwargs):
    model = make_student(make_model(seed=seed))
    for key, value in kwargs.items():
        setattr(model.config, key, value)
    model.save_adapter(str(tmp_path / f"{name}{seed}"), name, use_safetensors=True)
    return {path.name: path.read_bytes() for path in (tmp_path / f"{name}{seed}").iterdir()}


@pytest.fixture
def teacher(hub, tmp_path):
    """`me/faq-bank` with a first commit, which is tagged `v1`, and a second one."""
    repo = hub.create("me/faq-bank", {**CODE_AND_CHECKPOINTS, **files_of(tmp_path)})
    repo.refs["v1"] = repo.refs["main"]
    repo.commit("main", {**CODE_AND_CHECKPOINTS, **files_of(tmp_path, seed=1)}, "second")
    return repo


def pull(source, model=None, others=()):
    model = model or make_model()
    model.add_adapter("insurance", distill_from=[*others, source])
    return model, distillations(model.adapters_config)["insurance"].sources["faq-bank"]


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()


def test_a_teacher_is_pinned_to_its_commit(teacher, hub, tmp_path):
    first, second = teacher.commits
    assert first == teacher.refs["v1"]
    assert second == teacher.refs["main"]
    weights = {}
    for source, commit in (("", second), ("@main", second), ("@v1", first), (f"@{first}", first)):
        model, pinned = pull(f"me/faq-bank{source}")
        assert pinned == {"source": f"me/faq-bank{source}", "revision": commit}
        model.save_adapter(str(tmp_path / "saved"), "insurance")
        (saved,) = read_provenance(str(tmp_path / "saved")).teachers
        assert vars(saved).items() >= {"name": "faq-bank", **pinned}.items()
        weights.setdefault(commit, set()).add(saved.digest)
    assert len(weights[first]) == len(weights[second]) == 1
    assert weights[first] != weights[second]
    assert model.heads["faq-bank"] is not None


def test_a_dot_of_a_repository_is_an_underscore_in_the_name(hub, tmp_path):
    repo = hub.create("me/Llama-3.2-1B-bank", files_of(tmp_path))
    model = make_model()
    model.add_adapter("insurance", distill_from=["me/Llama-3.2-1B-bank@main"])
    sources = {"Llama-3_2-1B-bank": {"source": "me/Llama-3.2-1B-bank@main", "revision": repo.refs["main"]}}
    assert distillations(model.adapters_config)["insurance"].sources == sources
    model.save_adapter(str(tmp_path / "saved"), "insurance")
    (saved,) = read_provenance(str(tmp_path / "saved")).teachers
    assert (saved.name, saved.source) == ("Llama-3_2-1B-bank", "me/Llama-3.2-1B-bank@main")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("me/keys", "would be named 'keys', as is a part of torch's ModuleDict; {remedy}."),
        (
            "me/wo.rk@v1",
            "would be named 'wo_rk', and the model has an adapter or head of that name; distill from 'wo_rk' if it is "
            "the same, else {remedy}.",
        ),
    ],
)
def test_a_name_that_no_teacher_can_have_is_refused_before_the_download(source, message, hub):
    model = with_teachers(make_model(), teachers=["wo_rk"])
    hub.requests.clear()
    remedy = "give a folder of another name that holds it"
    with pytest.raises(ValueError, match=exactly(f"Teacher {source!r} " + message.format(remedy=remedy))):
        pull(source, model)
    assert not hub.requests


def test_nothing_but_the_adapter_is_downloaded(teacher, hub):
    pull("me/faq-bank")
    fetched = {match[1] for line in hub.requests if (match := re.match(r"GET .*/resolve/\w+/(.*)", line))}
    assert fetched == {"adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"}


@pytest.mark.parametrize("reason", ["HF_HUB_OFFLINE", "no network"])
def test_a_teacher_comes_from_the_cache_without_a_network(reason, teacher, hub, monkeypatch):
    _, pinned = pull("me/faq-bank")
    if reason == "no network":
        hub.stop()
    else:
        offline(monkeypatch)
    with hub.quiet():
        model, again = pull("me/faq-bank")
        assert again == pinned
        assert "faq-bank" in model.adapters_config
        not_cached = {
            "HF_HUB_OFFLINE": "it is not in the cache, and HF_HUB_OFFLINE is set.",
            "no network": f"it is not in the cache, and {hub.url} cannot be reached or broke off; try again.",
        }[reason]
        refused("me/faq-bank@v1", not_cached)


NOT_GIVEN = "Teacher {!r} is no adapter on the model, no local folder, and the Hub did not give it: "


def refused(source, message, prefix=NOT_GIVEN):
    """One line, and a model as it was: one teacher on it, and one that would be pulled before."""
    model = with_teachers(make_model(), teachers=["work"])
    before = everything(model)
    with pytest.raises(ValueError, match=exactly(prefix.format(source) + message)):
        pull(source, model, others=["work"])
    assert everything(model) == before


LOG_IN = "it does not exist or is private; check the name, or log in with `hf auth login`."
REFUSALS = [
    ("me/faq-bank@v9", "it has no such revision."),
    ("me/nothing", LOG_IN),
    ("other/private", LOG_IN),
    ("other/gated", "it is gated; accept its terms on the Hub and log in with `hf auth login`."),
]


@pytest.mark.parametrize("token", ["hf_me", None])
@pytest.mark.parametrize(("source", "message"), REFUSALS)
def test_what_the_hub_does_not_give(source, message, token, teacher, hub, tmp_path, monkeypatch):
    hub.create("other/private", files_of(tmp_path), private=True)
    hub.create("other/gated", files_of(tmp_path), gated=True)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    refused(source, message)


def test_a_private_teacher_comes_with_the_token_of_its_owner(hub, tmp_path, monkeypatch):
    hub.create("other/faq-bank", files_of(tmp_path), private=True, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert pull("other/faq-bank")[1]["revision"] == hub.repos["other/faq-bank"].refs["main"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [(500, "the Hub failed with 500; try again"), ("cut", "{} cannot be reached or broke off; try again")],
)
def test_a_hub_that_fails(status, reason, teacher, hub):
    hub.fail("GET /api/models", status)
    refused("me/faq-bank", f"it is not in the cache, and {reason.format(hub.url)}.")
    hub.faults.clear()
    hub.fail("GET /me/faq-bank/resolve", status)
    with pytest.raises(ValueError, match=re.escape(reason.format(hub.url))):
        pull("me/faq-bank")
    hub.faults.clear()
    pull("me/faq-bank")


def test_repositories_that_hold_no_such_adapter(hub, tmp_path):
    hub.create("me/model", {"config.json": b"{}", "train.py": b"raise SystemExit"})
    refused("me/model", "holds no adapter_config.json; give a folder made by save_adapter.", "Teacher {!r} ")
    hub.create("me/wide", files_of(tmp_path, hidden_size=64))
    message = "was made for hidden_size 64, the model has 32; use one trained on the same base model."
    refused("me/wide", message, "Teacher {!r} ")
    hub.create("me/cased", files_of(tmp_path, seed=1, model_type="roberta"))
    message = "was made for model_type 'roberta', the model has 'bert'; use one trained on the same base model."
    refused("me/cased", message, "Teacher {!r} ")


@pytest.mark.parametrize("changed", [None, "adapter", "head"])
def test_two_versions_of_a_teacher_in_one_folder_are_refused(changed, tmp_path):
    source, folder = with_teachers(teachers=["bank"]), tmp_path / "bank"
    source.save_adapter(str(folder), "bank", use_safetensors=True)
    for parameter in {"adapter": source.base_model, "head": source.heads}.get(changed, torch.nn.Module()).parameters():
        parameter.data += 1
    source.save_adapter(str(folder), "bank")
    model = make_model()
    before = everything(model)
    if changed is None:
        model.add_adapter("insurance", distill_from=[str(folder)])
        return
    safe, pickled = {"adapter": ADAPTER_WEIGHTS, "head": HEAD_WEIGHTS}[changed]
    why = f"{folder} holds two versions of the weights, {safe} and {pickled}; delete the older file."
    with pytest.raises(ValueError, match=exactly(f"Teacher {str(folder)!r} cannot be loaded: {why}")):
        model.add_adapter("insurance", distill_from=[str(folder)])
    assert everything(model) == before


@pytest.mark.parametrize("name", ["pytorch_adapter.bin", "pytorch_model_head.bin"])
def test_a_pickle_of_a_repository_is_not_executed(name, hub, tmp_path):
    files = files_of(tmp_path)
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    safe = {"pytorch_adapter.bin": "adapter.safetensors", "pytorch_model_head.bin": "model_head.safetensors"}[name]
    del files[safe]
    hub.create("me/faq-bank", {**files, name: evil.getvalue()})
    model = with_teachers(make_model(), teachers=TEACHERS[1:])
    before = everything(model)
    message = f"Teacher 'me/faq-bank' cannot be loaded: {name} is damaged, or holds other things than weights."
    with pytest.raises(ValueError, match=exactly(message)):
        pull("me/faq-bank", model, others=TEACHERS[1:])
    assert everything(model) == before
