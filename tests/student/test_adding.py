"""`add_adapter(..., distill_from=...)`."""

import json

import adapters
import pytest
import torch
from adapters import (
    AdapterPlusConfig,
    ConfigUnion,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    NoReftConfig,
    PromptTuningConfig,
    SeqBnConfig,
    Stack,
)
from messages import one_line
from model_state import everything, snapshot
from tiny_models import TEACHERS, make_model, make_student, noisy, with_teachers

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.student import adding
from hf_adapter_distillation.student.warm_start import is_at_average


@pytest.mark.parametrize("start", ["teachers", "average", "random"])
def test_where_the_student_starts(start):
    model = with_teachers()
    model.add_adapter("insurance", distill_from=had.DistillationConfig(teachers=TEACHERS, student_start=start))
    model.add_classification_head("insurance")
    fresh_head = snapshot(model.heads["insurance"])
    model.train_adapter("insurance")
    for _, layer in adapter_layers(model, "insurance"):
        for key, weight in layer.adapters["insurance"].named_parameters():
            mean = sum(dict(layer.adapters[name].named_parameters())[key] for name in TEACHERS) / 3
            assert torch.allclose(weight, mean, atol=1e-6) == (start != "random")
    for key, weight in model.heads["insurance"].named_parameters():
        mean = sum(dict(model.heads[name].named_parameters())[key] for name in TEACHERS) / 3
        torch.testing.assert_close(weight, fresh_head[key] if start == "random" else mean)


def test_configs_that_disagree_start_at_random_and_say_so(caplog):
    model = with_teachers()
    model.add_adapter("insurance", config="seq_bn[reduction_factor=4]", distill_from=TEACHERS)
    start = "'insurance' starts at random weights: its config is not that of teacher 'bank'"
    assert f"{start} (reduction_factor=4 and not 16), so there is no average" in caplog.text


@pytest.mark.parametrize(
    ("of_teachers", "of_student", "reason"),
    [
        (LoRAConfig(r=4, alpha=2), LoRAConfig(r=8, alpha=8), None),
        (NoReftConfig(r=2), NoReftConfig(r=2), None),
        (NoReftConfig(r=2), NoReftConfig(r=4), "its config is not that of teacher 'bank'"),
        (IA3Config(alpha=1), IA3Config(alpha=4), "its config is not that of teacher 'bank'"),
        (LoReftConfig(r=4), LoReftConfig(r=4), "the average of the teachers' factors does not average their products"),
    ],
)
def test_the_start_of_adapters_with_ranks(of_teachers, of_student, reason, caplog):
    model = with_teachers(config=of_teachers)
    model.add_adapter("insurance", config=of_student, distill_from=TEACHERS)
    assert is_at_average(model, "insurance") == (reason is None)
    assert ("starts at random weights" in caplog.text) == (reason is not None)
    assert reason is None or reason in caplog.text


def test_a_loreft_student_starts_with_an_orthogonal_projection():
    model = with_teachers(config=LoReftConfig(r=4))
    model.add_adapter("insurance", config=LoReftConfig(r=4), distill_from=TEACHERS)
    projection = model.get_adapter("insurance")[0]["output_reft"].units[0].projection.weight
    torch.testing.assert_close(projection @ projection.T, torch.eye(4))


def test_an_error_at_the_start_leaves_the_model_as_it_was(monkeypatch):
    model = with_teachers()
    before = everything(model)
    monkeypatch.setattr(adding, "start_at_average", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.add_adapter("insurance", distill_from=TEACHERS)
    assert everything(model) == before


def test_overwrite_ok_and_set_active():
    model = make_student(make_model())
    with pytest.raises(ValueError, match="already has an adapter 'insurance'; pass overwrite_ok=True"):
        model.add_adapter("insurance", distill_from=["bank"])
    model.add_adapter("insurance", distill_from=["bank"], overwrite_ok=True, set_active=True)
    assert model.active_adapters == Stack("insurance")
    assert not any("distillation_fusion" in name for name, _ in model.named_modules())
    model.train_adapter("insurance")
    assert model.active_adapters == had.AdapterDistillation("insurance", ["bank"])
    model.add_adapter("insurance", overwrite_ok=True)
    assert not distillations(model.adapters_config)


def test_teachers_from_folders(tmp_path):
    other = with_teachers(make_model())
    for name in ("bank", "travel"):
        other.save_adapter(str(tmp_path / f"{name}_v1"), name, use_safetensors=name == "bank")
    model = with_teachers(make_model(), teachers=["work"])
    folders = [str(tmp_path / "bank_v1"), str(tmp_path / "travel_v1"), "work"]
    model.add_adapter("insurance", distill_from=folders)
    assert distillations(model.adapters_config)["insurance"].config.teachers == ["bank_v1", "travel_v1", "work"]
    assert distillations(model.adapters_config)["insurance"].sources["bank_v1"]["source"] == folders[0]
    assert model.active_head == "work"
    for name in ("bank", "travel"):
        for (_, theirs), (_, ours) in zip(
            adapter_layers(other, name), adapter_layers(model, f"{name}_v1"), strict=True
        ):
            for a, b in zip(theirs.adapters[name].parameters(), ours.adapters[f"{name}_v1"].parameters(), strict=True):
                assert torch.equal(a, b)
                assert not b.requires_grad
    model.train_adapter("insurance")
    assert "insurance" in model.heads


def test_a_teacher_from_a_folder_leaves_a_static_head_alone(tmp_path):
    with_teachers(make_model(kind="classification", seed=1), ["bank"]).save_adapter(str(tmp_path / "bank"), "bank")
    model = make_model(kind="classification")
    before = snapshot(model.classifier)
    model.add_adapter("insurance", distill_from=[str(tmp_path / "bank")])
    assert all(torch.equal(before[name], weight) for name, weight in model.classifier.named_parameters())


def test_a_head_with_the_name_of_a_folder_is_not_overwritten(tmp_path):
    with_teachers(teachers=["bank"]).save_adapter(str(tmp_path / "bank"), "bank")
    model = make_model()
    model.add_classification_head("bank", num_labels=7)
    with pytest.raises(ValueError, match="the model has an adapter or head of that name"):
        model.add_adapter("insurance", distill_from=[str(tmp_path / "bank")])
    assert model.heads["bank"].config["num_labels"] == 7


def inside(teachers):
    return had.DistillationConfig(teachers, level="adapter")


BAD_TEACHERS = [
    ([], ValueError, "No teachers are given for 'insurance'"),
    ("bank", TypeError, "must be a list of adapter names, not 'bank'"),
    (["bank", "bank"], ValueError, "Teacher 'bank' is given twice"),
    (["insurance"], ValueError, "'insurance' cannot be its own teacher"),
    (["bnak"], ValueError, "Unknown teacher 'bnak': did you mean 'bank'"),
    (
        ["zzz"],
        ValueError,
        "Unknown teacher 'zzz': it is no local folder or Hub id either. Adapters on the model: 'bank'",
    ),
    (inside(["bank", "lora"]), ValueError, "Teacher 'lora' is a LoRAConfig, the student a SeqBnConfig; inside the"),
    (inside(["plus"]), ValueError, "Teacher 'plus' adds its update at another place of the layer than the student"),
    (["nan"], ValueError, "Teacher 'nan' has weights that are NaN or infinite (encoder.layer.0.output"),
    (inside(["attention"]), ValueError, "Teacher 'attention' sits at mh_adapter, where the student has no modules"),
    (["prompt"], ValueError, "Teacher 'prompt' is a PromptTuningConfig, which makes the sequence longer"),
    (["prompt_union"], ValueError, "Teacher 'prompt_union' is a PromptTuningConfig, which makes the sequence longer"),
    (["upper"], ValueError, "Teacher 'upper' has no layer in common with the student; let the student's config leave"),
    (["me/does-not-exist"], ValueError, "Teacher 'me/does-not-exist' is no adapter on the model, no local folder"),
    (["./no/folder"], ValueError, "Unknown teacher './no/folder'"),
    ([3], TypeError, "A teacher must be an adapter name, a folder or a Hub id, not 3"),
    (had.DistillationConfig(teachers=[]), ValueError, "No teachers are given"),
]


@pytest.mark.parametrize(("teachers", "error", "message"), BAD_TEACHERS)
def test_bad_teachers_leave_the_model_as_it_was(teachers, error, message):
    model = with_teachers()
    attention = SeqBnConfig(mh_adapter=True, output_adapter=False)
    configs = {
        "lora": "lora",
        "plus": AdapterPlusConfig(stochastic_depth=0.0),
        "nan": "seq_bn",
        "attention": attention,
        "prompt": "prompt_tuning",
        "prompt_union": ConfigUnion(LoRAConfig(), PromptTuningConfig()),
        "upper": LoReftConfig(layers=[1]),
    }
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    adapter_layers(model, "nan")[0][1].adapters["nan"].adapter_up.weight.data[0, 0] = float("nan")
    before = everything(model)
    with pytest.raises(error, match=one_line(part=message)):
        model.add_adapter("insurance", config=SeqBnConfig(leave_out=[1]), distill_from=teachers)
    assert everything(model) == before


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("bert", "prompt_tuning", "Student 'insurance' is a PromptTuningConfig, which makes the sequence longer"),
        ("bert", "mtl_lora", "Student 'insurance' is a MTLLoRAConfig, which belongs to several tasks at once"),
        ("gpt2", "dora", "Student 'insurance' cannot be made from its config: The size of tensor"),
    ],
)
def test_bad_students(family, config, message):
    model = make_model(family)
    for teacher in TEACHERS:
        model.add_adapter(teacher, config="seq_bn")
    before = everything(model)
    with pytest.raises(ValueError, match=one_line(start=message)):
        model.add_adapter("insurance", config=config, distill_from=TEACHERS)
    assert everything(model) == before


def damaged(tmp_path, what):
    """A saved teacher with one fault; the second return value is the message."""
    other = make_model()
    if what == "hidden size":
        other = adapters.AutoAdapterModel.from_config(type(other.config)(hidden_size=16, num_attention_heads=4))
    if what == "model type":
        other = make_model("roberta")
    if what == "base model":
        other.config.name_or_path = "someone/cased"
    folder = tmp_path / {"dot": "bank.v1", "taken": "work", "student": "insurance"}.get(what, "bank")
    other.add_adapter("bank", config="seq_bn")
    if what == "not finite":
        noisy(other, "bank", std=float("inf"))
    other.save_adapter(str(folder), "bank")
    if what == "no config":
        (folder / "adapter_config.json").unlink()
    if what == "bad json":
        (folder / "adapter_config.json").write_text("{")
    if what == "no weights":
        (folder / "pytorch_adapter.bin").unlink()
    if what == "cut weights":
        (folder / "pytorch_adapter.bin").write_bytes((folder / "pytorch_adapter.bin").read_bytes()[:100])
    if what == "missing layer":
        state = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
        torch.save({k: v for k, v in state.items() if "layer.1." not in k}, folder / "pytorch_adapter.bin")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hidden size", "was made for hidden_size 16, the model has 32; use one trained on the same base model"),
        ("model type", "was made for model_type 'roberta', the model has 'bert'"),
        ("base model", "was made for model_name 'someone/cased', the model has 'someone/uncased'"),
        ("no config", "holds no adapter_config.json"),
        ("bad json", "adapter_config.json is damaged"),
        ("no weights", "cannot be loaded"),
        ("cut weights", "cannot be loaded"),
        ("missing layer", "lacks 4 weights that this model needs"),
        ("not finite", "has weights that are NaN or infinite"),
        ("dot", "would be named 'bank.v1'; rename the folder to have no dot, comma or slash"),
        ("taken", "would be named 'work', and the model has an adapter or head of that name"),
        ("student", "would have the name of the student, 'insurance'"),
    ],
)
def test_bad_folders_leave_the_model_as_it_was(what, message, tmp_path):
    folder = damaged(tmp_path, what)
    model = with_teachers(make_model(), teachers=["work"])
    model.config.name_or_path = "someone/uncased" if what == "base model" else ""
    with_teachers(other := make_model(), teachers=["good"])
    other.save_adapter(str(tmp_path / "good"), "good")
    before = everything(model)
    with pytest.raises(ValueError, match=one_line(part=message)):
        model.add_adapter("insurance", distill_from=["work", str(tmp_path / "good"), str(folder)])
    assert everything(model) == before


@pytest.mark.parametrize(
    ("of_teacher", "of_model", "fits"),
    [
        ("./models/bert", "bert-base-uncased", True),
        ("../models/bert", "bert-base-uncased", True),
        ("~/models/bert", "bert-base-uncased", True),
        ("C:\\models\\bert", "bert-base-uncased", True),
        ("some/where/bert", "bert-base-uncased", True),
        ("bert-base-uncased", "./models/bert", True),
        ("bert-base-uncased", "google-bert/bert-base-uncased", True),
        ("google-bert/bert-base-uncased", "bert-base-uncased", True),
        (["bert-base-uncased"], "bert-base-uncased", True),
        ("bert-base-cased", "google-bert/bert-base-uncased", False),
        ("someone/bert-base-uncased", "google-bert/bert-base-uncased", False),
    ],
)
def test_only_ids_on_the_hub_tell_base_models_apart(of_teacher, of_model, fits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_teachers(teachers=["bank"]).save_adapter("bank", "bank")
    config = json.loads((tmp_path / "bank" / "adapter_config.json").read_text())
    (tmp_path / "bank" / "adapter_config.json").write_text(json.dumps(config | {"model_name": of_teacher}))
    model = make_model()
    model.config.name_or_path = of_model
    if not fits:
        with pytest.raises(ValueError, match=one_line(part=f"was made for model_name {of_teacher!r}, the model has")):
            model.add_adapter("insurance", distill_from=["./bank"])
        return
    model.add_adapter("insurance", distill_from=["./bank"])
    assert "bank" in model.adapters_config


@pytest.mark.parametrize("config", ["compacter[reduction_factor=4]", "vera"])
def test_a_saved_teacher_without_the_weights_that_its_layers_share_is_named(config, tmp_path):
    """adapters leaves them out where the model has no head, and then loads the adapter with random ones."""
    folder, other = tmp_path / "bank", make_model(kind="base")
    other.add_adapter("bank", config=config)
    other.save_adapter(str(folder), "bank")
    model = make_model()
    before = everything(model)
    with pytest.raises(ValueError, match=one_line(part="lacks the weights that its layers share")):
        model.add_adapter("insurance", config=config, distill_from=[str(folder)])
    assert everything(model) == before
    whole = make_model()
    whole.add_adapter("bank", config=config)
    whole.save_adapter(str(folder), "bank")
    model.add_adapter("insurance", config=config, distill_from=[str(folder)])
    for key, weight in whole.base_model.shared_parameters["bank"].items():
        assert torch.equal(model.base_model.shared_parameters["bank"][key], weight)


@pytest.mark.parametrize(
    ("family", "kind", "warns"), [("deberta", "base", True), ("deberta", "flex", False), ("gpt2", "base", False)]
)
def test_a_student_that_needs_this_package_where_it_is_loaded_is_named(family, kind, warns, caplog):
    make_student(make_model(family, kind), train=False)
    message = (
        "'insurance' computes something else where adapters.init runs without this package, because it gives "
        "encoder.layer.0.attention.self.in_proj a random bias there; import hf_adapter_distillation first, where the "
        "student is loaded, too."
    )
    assert (message in caplog.messages) == warns


@pytest.mark.parametrize("config", ["compacter[reduction_factor=4]", "vera", "seq_bn"])
@pytest.mark.parametrize("kind", ["base", "flex"])
def test_a_student_that_adapters_cannot_save_whole_is_named_before_its_training(config, kind, caplog):
    model = with_teachers(make_model(kind=kind), config=config)
    model.add_adapter("insurance", config=config, distill_from=TEACHERS)
    assert ("'insurance' cannot be saved whole" in caplog.text) == (kind == "base" and config != "seq_bn")
