"""Pools of saved adapters: what they hold, and weights that are read into one place."""

import shutil

import pytest
import torch
from messages import one_line
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make_model, noisy, with_teachers
from transformers import AutoModel, set_seed

from hf_adapter_distillation.downloads import is_pool
from hf_adapter_distillation.teachers.loading import load_teacher, locate_teacher
from hf_adapter_distillation.teachers.pool import Slot, add_stand_in, group_by_config, read_pool


@pytest.fixture
def pool(tmp_path):
    """Three adapters of one config, one of another, and one of PEFT."""
    model = with_teachers(teachers=["bank", "travel", "work"])
    model.add_adapter("shop", config="lora")
    noisy(model, "shop")
    (tmp_path / "pool").mkdir()
    for name in model.adapters_config:
        model.save_adapter(str(tmp_path / "pool" / name), name, use_safetensors=True)
    set_seed(0)
    lora = LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(AutoModel.from_config(CONFIGS["bert"]()), lora).save_pretrained(tmp_path / "pool" / "peft")
    return tmp_path / "pool"


def state(model, name):
    return {
        (place, location, key): value
        for place, modules in model.get_adapter(name).items()
        for location, module in modules.items()
        for key, value in module.state_dict().items()
    }


def test_a_slot_takes_the_weights_that_a_loaded_adapter_has(pool):
    model = make_model()
    groups, skipped = group_by_config(model, read_pool(model, pool, "new", 5))
    assert not skipped
    assert sorted(map(sorted, groups)) == [["bank", "travel", "work"], ["peft"], ["shop"]]
    for folders in groups:
        stand_in = add_stand_in(model, folders.values(), _student(model, "new"), "auto")
        assert stand_in.name == "new_pool_0"
        assert stand_in.name not in model.heads
        slot = Slot(model, stand_in.name)
        for name, folder in reversed(folders.items()):
            slot.fill(locate_teacher(model, folder))
            load_teacher(model, locate_teacher(model, folder))
            filled, loaded = state(model, stand_in.name), state(model, name)
            assert filled.keys() == loaded.keys()
            assert all(torch.equal(filled[key], loaded[key]) for key in loaded)
        model.delete_adapter(stand_in.name)


def _student(model, name):
    model.add_adapter(name, config="seq_bn", overwrite_ok=True)
    return name


def test_weights_that_do_not_fit_leave_the_slot_as_it_was(pool):
    model = make_model()
    stand_in = add_stand_in(model, [str(pool / "bank")], _student(model, "new"), "auto")
    slot, before = Slot(model, stand_in.name), {k: v.clone() for k, v in state(model, stand_in.name).items()}
    file = pool / "travel" / "adapter.safetensors"
    weights = load_file(file)
    first = min(weights)
    for wrong, why in (
        ({key: value for key, value in weights.items() if key != first}, "is missing, unknown or of another shape"),
        (weights | {first: weights[first] * torch.nan}, "has weights that are NaN or infinite"),
    ):
        save_file(wrong, file)
        with pytest.raises(ValueError, match=one_line(start="Teacher '", part=why)):
            slot.fill(locate_teacher(model, str(pool / "travel")))
    save_file(weights, file)
    pickled = file.with_name("pytorch_adapter.bin")
    torch.save({key: value + 1 for key, value in weights.items()}, pickled)
    with pytest.raises(ValueError, match=one_line(part="travel holds two versions of the weights, ")):
        slot.fill(locate_teacher(model, str(pool / "travel")))
    pickled.unlink()
    file.write_bytes(b"cut")
    with pytest.raises(ValueError, match=one_line(part="travel' cannot be loaded: ")):
        slot.fill(locate_teacher(model, str(pool / "travel")))
    assert all(torch.equal(value, before[key]) for key, value in state(model, stand_in.name).items())


def test_unsuitable_adapters_are_named_and_left_out(pool, caplog):
    other = with_teachers(make_model("roberta"), teachers=["foreign"])
    other.save_adapter(str(pool / "foreign"), "foreign")
    (pool / "work" / "adapter_config.json").write_text("{")
    shutil.copytree(pool / "bank", pool / "new")
    (pool / "notes").mkdir()
    with caplog.at_level("WARNING", "hf_adapter_distillation"):
        found = read_pool(make_model(), pool, "new", 1)
    assert list(found) == ["bank", "peft", "shop", "travel"]
    (message,) = caplog.messages
    assert "has 3 adapters that cannot be teachers, and goes on without 'foreign', 'new', 'work': " in message
    for part in ("made for model_type 'roberta', the model has 'bert'", "has the name of the student", "is damaged"):
        assert part in message
    assert "\n" not in message


def test_what_is_no_pool(pool, tmp_path):
    model = make_model()
    (tmp_path / "empty").mkdir()
    for folder, n_teachers, why in (
        (tmp_path / "nowhere", 1, "nowhere' is not a folder; give the folder of a pool"),
        (tmp_path / "empty", 1, "empty' holds no folders of saved adapters; save each"),
        (pool / "bank", 1, "bank' holds no folders of saved adapters; save each"),
        (pool, 6, "_selection=6 is more than the 5 suitable adapters in"),
    ):
        with pytest.raises(ValueError, match=one_line(start="teacher", part=why)):
            read_pool(model, folder, "new", n_teachers)
    for path in pool.iterdir():
        (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=one_line(start="No adapter of the pool '", part="can be a teacher")):
        read_pool(model, pool, "new", 1)
    assert not list(model.adapters_config)


def test_a_pool_is_told_from_an_adapter(pool, tmp_path):
    assert is_pool(pool)
    assert not any(map(is_pool, (pool / "bank", tmp_path, tmp_path / "nowhere")))
