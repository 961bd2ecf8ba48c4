"""Nonsense from a user or from a damaged folder: one line that says what to do, nothing executed, nothing left."""

import json
import os
import pickle
import re
import sys
from functools import partial

import pytest
import torch
from model_state import everything, snapshot
from paths import ROOT
from safetensors.torch import load_file, save_file
from saved_teachers import CONFIG, HEAD, HEAD_WEIGHTS, WEIGHTS, Evil, files_of_a_teacher, write
from tiny_models import TEACHERS, make_batch, make_dataset, make_model, make_student, with_teachers
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.student.provenance import read_provenance

sys.path.insert(0, str(ROOT / "examples"))


def refused(error, message, function, *args, **kwargs):
    """The whole message, in one line; `*` stands for what another library says."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    said = str(caught.value)
    assert re.fullmatch(re.escape(message).replace(r"\*", ".+"), said), said
    assert type(caught.value) is error


NOT_A_LIST = "The teachers must be a list of adapter names, not {0}; write [{0}]."
NOT_A_NAME = "A teacher must be an adapter name, a folder or a Hub id, not {}."
KNOWN = "Adapters on the model: 'bank', 'travel', 'work'."
DISTILL_FROM = [
    *((value, TypeError, NOT_A_LIST.format(repr(value))) for value in (5, True, "", {}, {"bank"}, {"teachers": 1})),
    (had.DistillationConfig(teachers="bank"), TypeError, NOT_A_LIST.format("'bank'")),
    (b"bank", TypeError, NOT_A_NAME.format(98)),
    *((["bank", value], TypeError, NOT_A_NAME.format(repr(value))) for value in (None, "", b"x", ["bank"])),
    (["../bank"], ValueError, f"Unknown teacher '../bank': did you mean 'bank'? {KNOWN}"),
    (["/etc/passwd"], ValueError, f"Unknown teacher '/etc/passwd': it is no local folder or Hub id either. {KNOWN}"),
    (["bank\0"], ValueError, f"Unknown teacher 'bank\\x00': did you mean 'bank'? {KNOWN}"),
    (["x" * 300], ValueError, f"Unknown teacher '{'x' * 300}': it is no local folder or Hub id either. {KNOWN}"),
    (["https://huggingface.co/a/b"], ValueError, f"Unknown teacher 'https://huggingface.co/a/b': * {KNOWN}"),
    (["/"], TypeError, "Teacher '/' would be named ''; rename the folder to have a name that is a string."),
    (["/etc"], ValueError, "Teacher '/etc' holds no adapter_config.json; give a folder made by save_adapter."),
]


@pytest.mark.parametrize(("value", "error", "message"), DISTILL_FROM)
def test_distill_from(value, error, message):
    model = with_teachers()
    before = everything(model)
    refused(error, message, model.add_adapter, "insurance", distill_from=value)
    assert everything(model) == before


NO_PATH = "The student would be named {!r}; rename it to have no dot, comma or slash."
NO_STRING = "The student would be named {!r}; rename it to have a name that is a string."
OF_TORCH = "The student would be named {!r}, as is a part of torch's ModuleDict; rename it."
STUDENTS = [
    *((name, ValueError, NO_PATH.format(name)) for name in ("a.b", "a,b", "../x", "a/b", "/tmp/x", "a\\b", "a\0")),
    *((name, TypeError, NO_STRING.format(name)) for name in ("", None, 5)),
    *((name, ValueError, OF_TORCH.format(name)) for name in ("keys", "forward", "training", "__class__")),
    ("bank", ValueError, "The model already has an adapter 'bank'; pass overwrite_ok=True to replace it."),
]


@pytest.mark.parametrize(("name", "error", "message"), STUDENTS)
def test_names_of_students(name, error, message):
    model = with_teachers()
    before = everything(model)
    refused(error, message, model.add_adapter, name, distill_from=["travel"])
    assert everything(model) == before


NO_CONFIG, NOT_MADE = (
    "Student 'insurance' has no valid adapter config: ",
    "Student 'insurance' cannot be made from its config: ",
)
CONFIGS = [
    ("nope", NO_CONFIG + "Could not identify 'nope' as a valid adapter configuration."),
    (5, NO_CONFIG + "AttributeError: *"),
    ({"architecture": "x"}, NO_CONFIG + "KeyError: 'x'"),
    ("seq_bn[", NO_CONFIG + "Invalid adapter config string format: 'seq_bn['."),
    ("seq_bn[x=1]", NO_CONFIG + "TypeError: *"),
    ("seq_bn[reduction_factor=0]", NOT_MADE + "ZeroDivisionError: *"),
    ("seq_bn[reduction_factor='a']", NOT_MADE + "TypeError: *"),
    ("seq_bn[non_linearity='nope']", NOT_MADE + "KeyError: *"),
    ("seq_bn[phm_layer=True]", NOT_MADE + "AssertionError: *"),
    ("seq_bn[init_weights='x']", NOT_MADE + "Unknown init_weights type: x; choose one that adapters can add*"),
]


@pytest.mark.parametrize(("config", "message"), CONFIGS)
def test_configs_of_students(config, message):
    model = with_teachers()
    model.add_classification_head("insurance")
    before = everything(model)
    refused(ValueError, message, model.add_adapter, "insurance", config=config, distill_from=TEACHERS)
    assert everything(model) == before
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.train_adapter("insurance")
    model.train()(**make_batch()).loss.backward()


NUMBERS = ("distillation_start", "distillation_weight", "fusion_learning_rate", "fusion_regularization")
ARGUMENTS = [
    *(({name: "0.5"}, f"{name}='0.5' is out of range; it must be a number.") for name in NUMBERS),
    ({"distillation_weight": [1]}, "distillation_weight=[1] is out of range; it must be a number."),
    ({"distillation_start": True}, "distillation_start=True is out of range; it must be a number."),
    ({"fusion_regularization": None}, "fusion_regularization=None is out of range; it must be a number."),
    *(
        ({name: value}, f"{name}={value!r} is out of range; it must be True or False.")
        for name, value in (("keep_fusion", "no"), ("stop_on_nan", None), ("save_on_sigterm", 3))
    ),
]


@pytest.mark.parametrize(("kwargs", "message"), ARGUMENTS)
def test_arguments(kwargs, message, tmp_path):
    refused(ValueError, message, had.DistillationTrainingArguments, str(tmp_path), use_cpu=True, **kwargs)


NOT_SHARDED = (
    " is not supported: what is trained is too small to be worth sharding. Leave it out; to shard the frozen base "
    "model, call hf_adapter_distillation.training.sharding.shard_base_model before the trainer is made."
)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_sharded_training(name, trainer_args):
    args = trainer_args()
    setattr(args, name, "x")  # without the library the arguments themselves refuse it
    refused(ValueError, f"{name}='x'{NOT_SHARDED}", trainer_for, make_student(make_model()), args)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_sharded_training_that_accelerate_configures(kind, trainer_args, monkeypatch):
    import accelerate

    made = make_student(make_model()), trainer_args()
    kind_of = property(lambda self: accelerate.DistributedType(kind))
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", kind_of)
    refused(ValueError, f"accelerate's distributed_type {kind}{NOT_SHARDED}", trainer_for, *made)


def test_trainers(trainer_args, tmp_path):
    make = partial(had.DistillationTrainer, train_dataset=make_dataset())
    student, args = make_student(make_model()), trainer_args()
    message = (
        "args must be DistillationTrainingArguments, or a dataclass of your own with DistillationArgumentsMixin, not "
        "dict; they take the same arguments."
    )
    refused(TypeError, message, make, student, {"output_dir": "x"})
    refused(TypeError, "str has no adapters; call adapters.init(model) first.", make, "bert", args)
    trainer = make(student, args)
    message = "nope is no whole checkpoint: checkpoint_digests.json does not exist."
    refused(ValueError, message, trainer.train, resume_from_checkpoint="nope")
    message = f"{args.output_dir} has no whole checkpoint; leave out resume_from_checkpoint."
    refused(ValueError, message, trainer.train, resume_from_checkpoint=True)
    message = "Trainer: training requires a train_dataset."
    refused(ValueError, message, had.DistillationTrainer(student, args).train)


def test_blocks_attention_and_provenance(tmp_path):
    model = with_teachers()
    for block in (had.AdapterDistillation("nope", ["bank"]), had.AdapterDistillation("bank", ["nope"])):
        message = f"{block} names 'nope', which is not on the model; add or load it first."
        refused(ValueError, message, model.train_adapter, block)
    message = "The active setup None distils nothing; call model.train_adapter(student)."
    refused(ValueError, message, had.teacher_attention, model, make_dataset(4))
    message = "The table is empty; make one with teacher_attention(model, dataset)."
    refused(ValueError, message, had.plot_teacher_attention, {})
    message = "There is no attention to show: there are no examples, or the fusion was dropped."
    refused(ValueError, message, had.teacher_attention, make_student(make_model()), [])
    model.save_adapter(str(tmp_path / "bank"), "bank")
    message = f"{tmp_path / 'bank'} holds an adapter that was not distilled; it names no teachers."
    refused(ValueError, message, read_provenance, str(tmp_path / "bank"))


@pytest.mark.parametrize("name", ["steps", "batch_size", "test_queries", "teacher_queries", "teacher_steps", "shots"])
def test_arguments_of_the_example(name, monkeypatch):
    import faq_retrieval

    monkeypatch.setattr("demo_embeddings.train_teachers", None)
    monkeypatch.setattr(sys, "argv", ["faq_retrieval.py", f"--{name}", "0"])
    refused(SystemExit, f"*--{name} 0 *out of range; it must be at least 1.", faq_retrieval.main)


# Folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return files_of_a_teacher(tmp_path_factory.mktemp("saved"))


def edit(name, change):
    def damage(folder):
        path = folder / name
        if name.endswith("json"):
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        else:
            tensors = load_file(path)
            save_file(change(tensors), path)

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def instead(safe_name, name, thing):
    """A pickle in the place of a file of safetensors."""

    def damage(folder):
        (folder / safe_name).unlink()
        torch.save(thing, folder / name)

    return damage


def link(name, target):
    def damage(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def config(**kwargs):
    return edit("adapter_config.json", lambda content: content["config"].update(kwargs))


LOAD, OF_MODEL = (
    "Teacher '{0}' cannot be loaded: ",
    "{} in its files belongs to the model, not to the adapter; save it again.",
)
NO_ADAPTER = "{0}/adapter_config.json is no adapter config (*); save the adapter again."
DAMAGED = "{0}/adapter_config.json is damaged (*); save the adapter again."
NO_CONFIG_FILE = "Teacher '{0}' holds no adapter_config.json; give a folder made by save_adapter."
NO_HEAD_CONFIG = LOAD + "it has the weights of a head, and no head_config.json; save it again."
NO_KIND = "Teacher '{0}' has no adapter config; save it again with save_adapter."
NO_VALID = "Teacher '{0}' has no valid adapter config: "
OBJECTS = " is damaged, or holds other things than weights."
BIAS = "bert.encoder.layer.0.output.adapters.work.adapter_down.0.bias"
FOLDERS = {
    "a list as config": (put(CONFIG, b"[]"), NO_ADAPTER),
    "null as config": (put(CONFIG, b"null"), NO_ADAPTER),
    "half a config": (put(CONFIG, b'{"config": '), DAMAGED),
    "a config that is no text": (put(CONFIG, b"\xff\xfe\x00"), DAMAGED),
    "an empty config": (put(CONFIG, b"{}"), NO_ADAPTER),
    "a deep config": (put(CONFIG, b"[" * 100_000), DAMAGED),
    "config 5": (edit(CONFIG, lambda c: c.update(config=5)), NO_VALID + "AttributeError: *"),
    "config null": (edit(CONFIG, lambda c: c.update(config=None)), NO_KIND),
    "an unknown method": (config(architecture="nope"), NO_VALID + "KeyError: 'nope'"),
    "a width of nothing": (config(reduction_factor=0), LOAD + "ZeroDivisionError: *"),
    "a width of letters": (config(reduction_factor="x"), LOAD + "TypeError: *"),
    "a layer of letters": (config(leave_out=5), LOAD + "TypeError: *"),
    "an unknown activation": (config(non_linearity="nope"), LOAD + "KeyError: *"),
    "half of the weights": (lambda f: os.truncate(f / WEIGHTS, 500), LOAD + "SafetensorError: *"),
    "no byte of weights": (put(WEIGHTS, b""), LOAD + "SafetensorError: *"),
    "a pickle named safetensors": (put(WEIGHTS, pickle.dumps(Evil())), LOAD + "SafetensorError: *"),
    "a pickle": (instead(WEIGHTS, "pytorch_adapter.bin", {"x": Evil()}), LOAD + "pytorch_adapter.bin" + OBJECTS),
    "a pickled head": (
        instead(HEAD_WEIGHTS, "pytorch_model_head.bin", {"x": Evil()}), LOAD + "pytorch_model_head.bin" + OBJECTS
    ),
    "a pickled number": (instead(WEIGHTS, "pytorch_adapter.bin", 5), LOAD + "TypeError: *"),
    "a link to nowhere": (link(WEIGHTS, "/does/not/exist"), LOAD + "No file pytorch_adapter.bin *"),
    "a link to another file": (link(WEIGHTS, "/etc/passwd"), LOAD + "SafetensorError: *"),
    "a link to a folder": (link(WEIGHTS, "."), LOAD + "*"),
    "a link to itself": (link(WEIGHTS, WEIGHTS), LOAD + "No file pytorch_adapter.bin *"),
    "a config that links to nowhere": (link(CONFIG, "/does/not/exist"), NO_CONFIG_FILE),
    "a config that links to another file": (link(CONFIG, "/etc/passwd"), DAMAGED),
    "a config that links to a folder": (link(CONFIG, ".."), NO_CONFIG_FILE),
    "a config that links to itself": (link(CONFIG, CONFIG), NO_CONFIG_FILE),
    "a head that links to a folder": (link(HEAD_WEIGHTS, "."), LOAD + "*"),
    "a head config that links to nowhere": (link(HEAD, "/does/not/exist"), NO_HEAD_CONFIG),
    "a head config that links to itself": (link(HEAD, HEAD), NO_HEAD_CONFIG),
    "no head config": (lambda f: (f / HEAD).unlink(), NO_HEAD_CONFIG),
    "other shapes": (
        edit(WEIGHTS, lambda t: {k: v[:1].contiguous() for k, v in t.items()}),
        "Teacher '{0}' has weights of another size: * is [1, 32], on the model [2, 32]; "
        "use one trained on the same base model.",
    ),
    "no weights": (edit(WEIGHTS, lambda t: {"x": torch.ones(1)}), "Teacher '{0}' lacks 8 weights *"),
    "weights of the base model": (
        edit(WEIGHTS, lambda t: t | {"bert.pooler.dense.bias": torch.ones(32)}),
        LOAD + OF_MODEL.format("bert.pooler.dense.bias"),
    ),
    "weights of the base model without a prefix": (
        edit(WEIGHTS, lambda t: t | {"pooler.dense.bias": torch.ones(32)}), LOAD + OF_MODEL.format("pooler.dense.bias")
    ),
    "weights of another adapter": (
        edit(WEIGHTS, lambda t: t | {BIAS: torch.ones(2)}), LOAD + OF_MODEL.format(BIAS)
    ),
    "base model in the head": (
        edit(HEAD_WEIGHTS, lambda t: t | {"bert.pooler.dense.bias": torch.ones(32)}),
        LOAD + OF_MODEL.format("bert.pooler.dense.bias"),
    ),
    "half a head config": (put(HEAD, b"{"), LOAD + "Expecting property name *"),
    "null as head config": (put(HEAD, b"null"), LOAD + "TypeError: *"),
    "an unknown head": (
        edit(HEAD, lambda c: c["config"].update(head_type="nope")), LOAD + "AttributeError: Given head type 'nope' *"
    ),
    "a head of letters": (put(HEAD_WEIGHTS, b"xx"), LOAD + "SafetensorError: *"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_folders(what, saved, tmp_path):
    damage, message = FOLDERS[what]
    folder = write(tmp_path / "bank", saved)
    damage(folder)
    model = with_teachers(teachers=["work"])
    before, weights = everything(model), snapshot(model)
    refused(ValueError, message.format(folder), model.add_adapter, "insurance", distill_from=["work", str(folder)])
    assert everything(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_a_head_file_changes_no_head_but_the_teachers(tmp_path):
    """adapters writes the head "work2" into the file of "work", too."""
    with_teachers(make_model(seed=1), teachers=["work", "work2"]).save_adapter(
        str(tmp_path / "work"), "work", use_safetensors=True
    )
    model = with_teachers(teachers=["work2"])
    before = snapshot(model.heads["work2"])
    model.add_adapter("insurance", distill_from=["work2", str(tmp_path / "work")])
    assert all(torch.equal(value, before[name]) for name, value in model.heads["work2"].named_parameters())


def test_a_folder_that_is_a_link_has_the_name_of_the_link(saved, tmp_path):
    folder = write(tmp_path / "v7", saved)
    for name, content in saved.items():  # in a store, as a version control system for data keeps them
        (tmp_path / name).write_bytes(content)
        link(name, f"../{name}")(folder)
    (tmp_path / "bank").symlink_to(folder)
    model = with_teachers(teachers=["work"])
    model.add_adapter("insurance", distill_from=["work", str(tmp_path / "bank")])
    assert list(model.adapters_config) == ["work", "bank", "insurance"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    message = f"Unknown teacher '{tmp_path / 'loop'}': it is no local folder or Hub id either. "
    known = "Adapters on the model: 'work', 'bank', 'insurance'."
    refused(ValueError, message + known, model.add_adapter, "other", distill_from=["work", str(tmp_path / "loop")])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "../../bank", ".*", "work", "a\nb", "", None, 5, ["bank"]])
def test_the_name_in_a_config_leads_nowhere(name, saved, tmp_path):
    """The teacher has the name of its folder; a name that is not that of its weights finds none."""
    for folder in ("bank", "other"):
        edit(CONFIG, lambda content: content.update(name=name))(write(tmp_path / folder, saved))
    files, model = sorted(tmp_path.rglob("*")), with_teachers(teachers=["work"])
    before = snapshot(model)
    message = f"Teacher '{tmp_path / 'other'}' lacks 8 weights *"
    refused(ValueError, message, model.add_adapter, "insurance", distill_from=[str(tmp_path / "other")])
    model.add_adapter("insurance", distill_from=[str(tmp_path / "bank")])
    assert list(model.adapters_config) == ["work", "bank", "insurance"]
    assert sorted(tmp_path.rglob("*")) == files
    now = dict(model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in before.items())
    weights = load_file(tmp_path / "bank" / WEIGHTS)
    assert len(weights) == 8
    assert all(torch.equal(now[key], value) for key, value in weights.items())
