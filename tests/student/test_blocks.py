"""The blocks with which users train or activate a student."""

import warnings

import pytest
import torch
from adapters import Stack
from model_state import everything, trainable
from tiny_models import TEACHERS, make_model, make_student, with_teachers
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.student.warm_start import is_at_average


def up_projection(model, name):
    return model.get_adapter(name)[0]["output_adapter"].adapter_up.weight.detach()


def test_train_adapter_takes_a_list_and_a_block_and_a_plain_stack():
    model = make_student(make_model())
    model.train_adapter(["insurance"])
    assert isinstance(model.active_adapters, had.AdapterDistillation)
    model.train_adapter(Stack("insurance"))
    assert type(model.active_adapters) is Stack
    assert not any("distillation_fusion" in name for name in trainable(model))
    model.train_adapter(had.AdapterDistillation("insurance", ["bank", "work"]))
    assert model.active_adapters.teachers == ("bank", "work")
    assert distillations(model.adapters_config)["insurance"].config.teachers == ["bank", "work"]


def test_a_block_written_by_hand_distils_a_plain_adapter():
    model = with_teachers()
    model.add_adapter("insurance", config="seq_bn")
    model.train_adapter(had.AdapterDistillation("insurance", TEACHERS))
    assert any("distillation_fusion.insurance" in name for name in trainable(model))
    with pytest.raises(ValueError, match="names 'x', which is not on the model"):
        model.train_adapter(had.AdapterDistillation("insurance", ["x"]))


@pytest.mark.filterwarnings("ignore:Passing list objects for adapter activation:FutureWarning")
@pytest.mark.parametrize("call", ["train_adapter", "set_active_adapters"])
def test_a_stack_in_a_list_is_an_error_before_it_is_active(call):
    """adapters makes a Stack of the list, and runs no Stack inside a Stack."""
    model = make_student(make_model())
    before = everything(model)
    block = had.AdapterDistillation("insurance", TEACHERS)
    with pytest.raises(ValueError, match=r"stands inside Stack\[Stack\[.*; only a Stack may hold it"):
        getattr(model, call)([Stack(block)])
    assert everything(model) == before


@pytest.mark.parametrize("teachers", [["work", "bank", "travel"], ["bank", "travel"]], ids=["order", "fewer"])
def test_a_block_with_other_teachers_keeps_a_student_at_its_start(teachers):
    """At the average of the teachers of the block, and with the head there."""
    model = with_teachers()
    model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, student_start="average"))
    model.train_adapter("insurance")
    model.train_adapter(had.AdapterDistillation("insurance", teachers))
    assert list(model.active_adapters.teachers) == teachers
    assert is_at_average(model, "insurance")
    mean = torch.stack([up_projection(model, name) for name in sorted(teachers)]).mean(dim=0)
    torch.testing.assert_close(up_projection(model, "insurance"), mean)
    heads = [model.heads[name][1].weight for name in sorted(teachers)]
    torch.testing.assert_close(model.heads["insurance"][1].weight, torch.stack(heads).mean(dim=0))


def test_a_trained_student_stays_trained_with_other_teachers(trainer_args):
    model = make_student(make_model())
    trainer_for(model, trainer_args(max_steps=2)).train()
    model.train_adapter(had.AdapterDistillation("insurance", ["bank", "travel"]))
    distillation = had.distillation_of(model)
    assert distillation.has_run
    assert distillation.run is None, "its teachers were others"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.delete_adapter("travel")


def test_settings_of_the_former_teachers_are_left_out():
    model = make_student(make_model())
    distillation = had.distillation_of(model)
    distillation.settings = had.StageSettings(weight=0.5, calibration=torch.ones(3, 2))
    model.train_adapter(had.AdapterDistillation("insurance", TEACHERS[::-1]))
    assert had.distillation_of(model).settings.weight == 0.5
    assert had.distillation_of(model).settings.calibration is None


def test_the_stand_in_of_a_pool_goes_with_the_pool(tmp_path):
    model = with_teachers()
    for name in TEACHERS:
        model.save_adapter(str(tmp_path / f"saved_{name}"), name)
    settings = had.DistillationConfig(str(tmp_path), teacher_selection=1, student_start="random")
    model.add_adapter("insurance", config="seq_bn", distill_from=settings)
    model.train_adapter("insurance")
    assert len(list(model.adapters_config)) == len(TEACHERS) + 2
    model.train_adapter(had.AdapterDistillation("insurance", ["bank", "travel"]))
    assert list(model.adapters_config) == [*TEACHERS, "insurance"]
