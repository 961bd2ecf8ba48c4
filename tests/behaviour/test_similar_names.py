"""Names that begin like others, in all that tells adapters apart by their names."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_state import changed, snapshot
from safetensors.torch import load_file
from tiny_models import make_batch, make_model, noisy
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.hub.push import checkpoint_to_share
from hf_adapter_distillation.method.distillation import active_block, distillations
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.parameters import parameter_roles
from hf_adapter_distillation.training.checkpoint import load_student, save_student

WORDS = st.sampled_from(
    ["bank", "bank2", "ban", "a", "aa", "b", "s", "bank_bank", "heads", "adapters", "loras", "0", "1"]
)


@st.composite
def similar_names(draw):
    """A student and two teachers, each name a prefix, a suffix or a part of another."""
    first = draw(WORDS)
    second = draw(st.sampled_from([f"{first}2", f"2{first}", f"{first}_{first}", f"x{first}x", first[:-1] or "y"]))
    third = draw(st.sampled_from([f"{second}s", f"{first}s", f"_{first}", f"{first}-{second}"]))
    names = draw(st.permutations([first, second, third]))
    return names if len(set(names)) == 3 else [first, f"{first}2", f"{first}23"]


def model_of(student, teachers, config):
    model = make_model()
    for teacher in teachers:
        model.add_adapter(teacher, config=config)
        noisy(model, teacher)
        model.add_classification_head(teacher)
    model.add_adapter(student, config=config, distill_from=teachers)
    model.add_classification_head(student)
    model.train_adapter(student)
    return model


def belongs(key, name):
    return name in key.split(".")


@pytest.mark.parametrize("config", ["seq_bn", "lora"])
def test_an_adapter_is_not_taken_for_one_whose_name_begins_like_its_own(config, trainer_args, tmp_path):
    @settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(similar_names())
    def check(names):
        student, *teachers = names
        model = model_of(student, teachers, config)
        roles = parameter_roles(model, active_block(model))
        for key, role in roles.items():
            assert role.split()[-1] in key.split(".") or "fusion" in role or role == "base model", (key, role)

        before = snapshot(model)
        trainer = trainer_for(model, trainer_args(max_steps=1, keep_fusion=True, distillation_start=0.0))
        trainer.train()
        moved = changed(model, before)
        assert moved
        assert all(belongs(key, student) for key in moved)

        folder = tmp_path / "-".join(names)
        save_student(model, student, str(folder))
        for path in (folder / student).glob("*.safetensors"):
            assert all(belongs(key, student) for key in load_file(path)), path
        saved = json.loads((folder / student / "adapter_config.json").read_text())
        assert [teacher["name"] for teacher in saved["distillation"]["teachers"]] == teachers
        with checkpoint_to_share(folder, student) as shared:
            assert {p.name for p in Path(shared).iterdir()} == {p.name for p in folder.iterdir()}

        other = model_of(student, teachers, config)
        for teacher in teachers:
            for place, modules in model.get_adapter(teacher).items():
                for location, module in modules.items():
                    other.get_adapter(teacher)[place][location].load_state_dict(module.state_dict())
        before = snapshot(other)
        load_student(other, active_block(other), str(folder))
        assert all(belongs(key, student) for key in changed(other, before))
        own, loaded = dict(model.named_parameters()), dict(other.named_parameters())
        assert all(torch.equal(own[key], loaded[key]) for key in own if belongs(key, student))

        with pytest.warns(UserWarning, match="keeps 1 others"):
            other.delete_adapter(teachers[0])
        assert distillations(other.adapters_config)[student].config.teachers == teachers[1:]
        assert fusions_of(other, student)
        left = dict(other.named_parameters())
        gone = {key for key in loaded if key not in left}
        assert gone
        assert all(belongs(key, teachers[0]) for key in gone)
        assert other.train()(**make_batch()).loss.isfinite()
        assert isinstance(active_block(other), had.AdapterDistillation)

    check()
