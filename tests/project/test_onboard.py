"""The example that onboards many tenants on Ray: its runs are made by `onboarding_runs.py`, in forks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from marks import LONG
from paths import ROOT
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "examples" / "platform"))

import onboard  # noqa: E402
import tenant_students  # noqa: E402
from faq_data import Faq, Tenant  # noqa: E402
from faq_embeddings import EmbeddingPlatform  # noqa: E402

from hf_adapter_distillation.teachers.loading import load_saved_adapter  # noqa: E402

NAMES = ["rail", "bank", "post"]
QUERIES = {"my card": ["my card is gone", "the card is gone", "is my card gone"], "the train": ["when does it leave"]}
FAQS = [{"question": f"what is {name}", "queries": queries} for name, queries in QUERIES.items()]
TOO_LONG = "x" * 250  # with what is added, too long for the name of a folder
UNREADABLE = {"question": "half \ud800", "queries": ["how is it"]}
NO_QUERIES = {"question": "why", "queries": []}


@pytest.fixture(scope="module")
def inputs(tiny_encoder, tmp_path_factory):
    """A folder with an encoder, two teachers and the data of five tenants, of which two fail."""
    folder = tmp_path_factory.mktemp("onboarding")
    shutil.copytree(tiny_encoder, folder / "encoder")
    platform = EmbeddingPlatform(tiny_encoder)
    (folder / "teachers").mkdir()
    for name in ("banking", "travel"):
        platform.new_adapter(name)
        for key, parameter in platform.model.named_parameters():
            if name in key:
                parameter.data += 0.1 * torch.randn_like(parameter)
        platform.model.save_adapter(str(folder / "teachers" / name), name, use_safetensors=True)
    faqs = {"surrogate": [UNREADABLE, *FAQS], TOO_LONG: FAQS} | dict.fromkeys(NAMES, FAQS)
    tenants = [{"name": name, "faqs": of_tenant} for name, of_tenant in faqs.items()]
    (folder / "data.json").write_text(json.dumps({"tenants": tenants}))
    return folder


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=LONG)], ids=["here", "ray"])
def runs(request, inputs, tmp_path_factory):
    """The folder after all runs, and how each ended; the one that is killed has a worker of Ray in the long form."""
    pytest.importorskip("ray")
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(inputs, folder, dirs_exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    command = [sys.executable, str(ROOT / "tests" / "onboarding_runs.py"), str(folder), str(request.param)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=840)
        except subprocess.TimeoutExpired:
            code = None
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
    printed = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.txt")))
    assert code == 0, printed
    ended = json.loads((folder / "runs.json").read_text())
    ended["killed"]["workers"] = request.param
    return folder, ended


def files_of(output, names=NAMES):
    return {name: {path.name: path.read_bytes() for path in (output / name).iterdir()} for name in names}


# Whole runs


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_two_workers_make_the_students_of_one_process_bit_for_bit(runs):
    folder, _ = runs
    assert files_of(folder / "ray") == files_of(folder / "one")
    weights = [load_file(folder / "ray" / name / "adapter.safetensors") for name in NAMES]
    assert all(tensor.isfinite().all() for tensor in weights[0].values())


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_where_it_stopped_and_leaves_no_process(runs):
    folder, ended = runs
    killed, resumed = ended["killed"], ended["resumed"]
    assert killed["code"] == -signal.SIGKILL
    assert resumed["others"] >= 3  # the processes of Ray
    assert (killed["others"] >= 3) == (killed["workers"] > 0)
    assert killed["left"] == resumed["left"] == 0
    n_made = len(killed["students"])
    assert 1 <= n_made < len(NAMES)
    printed = (folder / "resumed.txt").read_text()
    assert f"5 tenants, {n_made} with a student already; 2 teachers." in printed
    assert f"{len(NAMES) - n_made} students made in" in printed
    assert sorted(path.name for path in (folder / "ray").iterdir()) == sorted([*NAMES, "onboarding.json"])


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("run", "retried"), [("one", ""), ("resumed", " (3 times)")])
def test_tenants_that_fail_are_named_and_the_others_have_students(run, retried, runs):
    folder, ended = runs
    assert ended[run]["code"] == 1
    lines = (folder / f"{run}.txt").read_text().splitlines()
    failed = sorted(line for line in lines if line.startswith("Tenant "))
    assert failed[0] == r"Tenant 'surrogate' failed: 'half \ud800' is not valid Unicode; write the text of the FAQ."
    assert failed[1].startswith(f"Tenant {TOO_LONG!r} failed: [Errno 36] File name too long")
    assert failed[1].endswith(f".partial'{retried}")
    assert len(failed) == 2
    assert lines[-1] == "onboard.py: 2 of 5 tenants failed; the same command tries again."


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_stopped_run_leaves_whole_students_alone(runs):
    folder, ended = runs
    stopped = ended["stopped"]
    assert (stopped["code"], stopped["hidden"]) == (128 + signal.SIGTERM, [])
    assert 1 <= len(stopped["students"]) < len(NAMES)
    assert files_of(folder / "stopped", stopped["students"]) == files_of(folder / "one", stopped["students"])
    assert "\nonboard.py: stopped; the same command goes on.\n" in (folder / "stopped.txt").read_text()


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_student_is_a_plain_adapter_with_its_faqs(runs, tiny_encoder):
    folder, _ = runs
    platform = EmbeddingPlatform(tiny_encoder)
    load_saved_adapter(platform.model, folder / "ray" / "bank", "bank")
    saved = json.loads((folder / "ray" / "bank" / "faqs.json").read_text())
    assert [faq["question"] for faq in saved] == [faq["question"] for faq in FAQS]
    assert [sorted(faq["queries"]) for faq in saved] == [sorted(faq["queries"]) for faq in FAQS]
    assert {path.name for path in (folder / "ray" / "bank").iterdir()} == {
        "adapter.safetensors", "adapter_config.json", "faqs.json"
    }  # fmt: skip


# Workers that die, on a Ray that is played


class Died(Exception):
    pass


class FailedInside(Exception):
    pass


class Played:
    """As much of Ray as the command uses; an actor is a list of what its calls return or raise."""

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=FailedInside)

    def __init__(self, *actors):
        self.actors, self.killed, self.options, self.given = list(actors), [], None, []

    def remote(self, **options):
        self.options = options
        return lambda cls: SimpleNamespace(remote=self.start)

    def start(self, settings, output):
        return Actor(self, self.actors.pop(0))

    def wait(self, references, num_returns):
        return references[:1], references[1:]

    def get(self, reference):
        if isinstance(reference[0], Exception):
            raise reference[0]
        return reference[0]

    def kill(self, actor):
        self.killed.append(actor)


class Actor:
    def __init__(self, ray, ends):
        self.ray, self.ends = ray, ends
        self.ready = SimpleNamespace(remote=self.call)
        self.make = SimpleNamespace(options=lambda retry_exceptions: SimpleNamespace(remote=self.call))

    def call(self, tenant=None):
        self.ray.given.append(tenant and tenant.name)
        return self.ends.pop(0), object()


def play(ray, n_workers, names):
    args = onboard.Arguments(teachers="teachers", output="output", workers=n_workers)
    return list(onboard.run_on_ray(ray, n_workers, args, [Tenant(name, []) for name in names]))


def test_a_tenant_whose_worker_dies_each_time_fails_alone_and_a_new_worker_goes_on():
    made = [tenant_students.Outcome(name) for name in NAMES]
    ray = Played([None, Died("The worker died.")], [None, made[1], made[2]])
    outcomes = play(ray, 1, NAMES)
    assert [(outcome.tenant, outcome.error) for outcome in outcomes] == [
        ("rail", "its worker died 3 times"), ("bank", None), ("post", None),
    ]  # fmt: skip
    assert len(ray.killed) == 1
    assert ray.given == [None, "rail", None, "bank", "post"]
    assert ray.options == {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 2}


def test_the_tenants_wait_for_a_worker_that_starts_and_not_for_one_that_cannot():
    made = [tenant_students.Outcome(name) for name in NAMES]
    assert play(Played([Died("No model.")], [None, *made]), 2, NAMES) == made
    with pytest.raises(ValueError, match="^No worker could start: No such model.$"):
        play(Played([Died("The actor died.\nNo such model.\n")], [Died("No such model.")]), 2, NAMES)


# Wrong input


def write_tenants(folder, *tenants):
    path = folder / "tenants.json"
    path.write_text(json.dumps({"tenants": [{"name": name, "faqs": faqs} for name, faqs in tenants]}))
    return path


def says(monkeypatch, message, *arguments):
    """The command ends with one line, and Ray has not been started."""
    monkeypatch.setattr(onboard, "catch_signals", lambda: None)
    monkeypatch.setattr(onboard, "start_ray", None)
    monkeypatch.setattr(sys, "argv", ["onboard.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        onboard.main()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"onboard.py: {message}"), caught.value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "-1"], "--workers -1 is out of range; it must be at least 0."),
        (["--steps", "0"], "--steps 0 is out of range; it must be at least 1."),
        (["--learning_rate", "0"], "--learning_rate 0.0 is out of range; it must be above 0 and finite."),
        (["--learning_rate", "inf"], "--learning_rate inf is out of range; it must be above 0 and finite."),
        (["--seed", "-1"], "--seed -1 is out of range; it must be from 0 to 4294967295."),
        (["--address", "a:1", "--workers", "0"], "--address a:1 needs workers, and --workers is 0"),
        (["--data", "missing.json"], "--data missing.json does not exist"),
        (["--teachers", "missing"], "--teachers missing is no folder"),
    ],
)
def test_wrong_arguments(arguments, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    output = tmp_path / "new"
    command = ["--teachers", "teachers", "--data", "data.json", "--model", "encoder", "--workers", "0"]
    says(monkeypatch, message, *command, "--output", output, *arguments)
    assert not output.exists()


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ([("bank", FAQS), ("rail", [])], "Tenant 'rail' has no FAQs"),
        (
            [("bank", FAQS), ("rail", [{"question": "why", "queries": []}])],
            "FAQ 'why' of tenant 'rail' has no queries",
        ),
        ([("bank", FAQS), ("rail", FAQS[:1])], "Tenant 'rail' has 1 FAQ"),
        ([("bank", FAQS), ("bank", FAQS)], "Two tenants are named 'bank'"),
        ([("bank", FAQS), ("a/b", FAQS)], "Tenant 'a/b' would be named 'a/b'"),
        ([("banking", FAQS), ("travel", FAQS)], "All 2 tenants of --data"),
    ],
)
def test_tenants_that_cannot_be_onboarded(tenants, message, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(onboard, "import_ray", lambda: None)
    data, output = write_tenants(tmp_path, *tenants), tmp_path / "new"
    says(monkeypatch, message, "--teachers", "teachers", "--data", data, "--model", "encoder", "--output", output)
    assert not output.exists()


def test_a_damaged_teacher_is_named(inputs, tmp_path, monkeypatch):
    shutil.copytree(inputs / "teachers", tmp_path / "teachers")
    weights = tmp_path / "teachers" / "travel" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onboard, "import_ray", lambda: None)
    data = write_tenants(tmp_path, ("bank", FAQS), ("rail", FAQS))
    command = ["--teachers", "teachers", "--data", data, "--model", inputs / "encoder", "--output", "new"]
    says(monkeypatch, f"Teacher '{tmp_path}/teachers/travel' cannot be loaded", *command)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "--address 127.0.0.1:1: no Ray cluster answers there"),
        ("somewhere", "--address somewhere is no address of a cluster"),
    ],
)
def test_an_address_without_a_cluster(address, message, inputs, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.chdir(inputs)
    command = ["--teachers", "teachers", "--data", "data.json", "--model", "encoder", "--output", tmp_path / "new"]
    says(monkeypatch, message, *command, "--address", address)
    assert not (tmp_path / "new").exists()


def test_without_ray_the_command_says_what_installs_it(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(inputs)
    command = ["--teachers", "teachers", "--data", "data.json", "--model", "encoder", "--output", tmp_path / "new"]
    says(monkeypatch, "ray is missing; install it with pip install 'ray[default]', or give --workers 0.", *command)


def onboard_here(monkeypatch, inputs, data, output, *arguments):
    monkeypatch.setattr(onboard, "catch_signals", lambda: None)
    command = ["--teachers", inputs / "teachers", "--data", data, "--model", inputs / "encoder", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["onboard.py", *map(str, [*command, "--output", output, *arguments])])
    onboard.main()


def test_a_folder_of_other_students_stays_as_it_is(inputs, tmp_path, monkeypatch, capsys):
    data, output = write_tenants(tmp_path, ("bank", FAQS), ("rail", FAQS)), tmp_path / "new"
    steps = ["--steps", "2"]
    onboard_here(monkeypatch, inputs, data, output, *steps)
    before = files_of(output, ["bank", "rail"])
    write_tenants(tmp_path, ("rail", FAQS), ("post", FAQS), ("bank", FAQS))  # a tenant more, in another order
    onboard_here(monkeypatch, inputs, data, output, *steps)
    assert "3 tenants, 2 with a student already" in capsys.readouterr().out
    cases = [
        ([], f"--output {output} has students with steps 2, not 50; choose another folder."),
        ([*steps, "--shots", "1"], f"{output}/rail has other FAQs than the tenant now; remove the folder."),
        ([*steps, "--teachers", inputs / "more"], f"--output {output} has students with teacher work None, not "),
        ([*steps, "--output", tmp_path], f"--output {tmp_path} is there already, and not from an onboarding"),
        ([*steps, "--output", inputs / "teachers"], f"--output {inputs}/teachers is the folder of the teachers"),
    ]
    shutil.copytree(inputs / "teachers", inputs / "more")
    shutil.copytree(inputs / "teachers" / "travel", inputs / "more" / "work")
    for arguments, message in cases:
        with pytest.raises(SystemExit) as caught:
            onboard_here(monkeypatch, inputs, data, output, *arguments)
        assert str(caught.value).startswith(f"onboard.py: {message}"), caught.value
    assert files_of(output, ["bank", "rail"]) == before


def test_the_queries_of_a_tenant_do_not_depend_on_the_other_tenants():
    queries = [f"query {number}" for number in range(9)]
    tenants = [Tenant(name, [Faq("one", train=queries), Faq("two", train=queries[::-1])]) for name in NAMES]
    chosen = tenant_students.choose_queries(tenants, 3, seed=1)
    assert tenant_students.choose_queries(tenants[1:2], 3, seed=1) == chosen[1:2]
    assert tenant_students.choose_queries(tenants[1:2], 3, seed=2) != chosen[1:2]
    drawn = [tuple(faq.train) for tenant in chosen for faq in tenant.faqs]
    assert len(set(drawn)) > 1
    assert all(len(set(of_faq)) == 3 for of_faq in drawn)
