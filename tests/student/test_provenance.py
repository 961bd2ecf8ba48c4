"""The provenance of a student, and the digests of adapters."""

import json
import warnings

import adapters
import numpy as np
import pytest
import torch
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy
from trainings import trainer_for

from hf_adapter_distillation.method.distillation import distillation_of
from hf_adapter_distillation.student.digests import adapter_digest, check_teachers_unchanged
from hf_adapter_distillation.student.provenance import Provenance, read_provenance


def test_digest_follows_the_weights_and_nothing_else(tmp_path):
    model = make_model()
    model.add_adapter("bank")
    digest = adapter_digest(model, "bank")
    assert len(digest) == 64
    assert digest == adapter_digest(model.base_model, "bank")
    model.save_adapter(str(tmp_path / "bank"), "bank")
    other = make_model(seed=1)
    other.load_adapter(str(tmp_path / "bank"), load_as="renamed")
    assert adapter_digest(other, "renamed") == digest
    noisy(other, "renamed", std=1e-7)
    assert adapter_digest(other, "renamed") != digest
    model.add_adapter("travel")
    assert adapter_digest(model, "travel") != digest
    model.to(torch.bfloat16)
    assert adapter_digest(model, "bank") != digest


def test_provenance_of_a_plain_adapter_is_refused(tmp_path):
    model = make_model()
    model.add_adapter("bank")
    model.save_adapter(str(tmp_path / "bank"), "bank")
    with pytest.raises(ValueError, match="was not distilled; it names no teachers"):
        read_provenance(str(tmp_path / "bank"))


def test_provenance_of_a_trained_student(trainer_args, tmp_path):
    model = make_student(make_model())
    trainer_for(model, trainer_args()).train()
    model.save_adapter(str(tmp_path / "insurance"), "insurance", meta_dict={"mine": 1})
    saved = json.loads((tmp_path / "insurance" / "adapter_config.json").read_text())
    assert saved["mine"] == 1
    written = saved["distillation"]
    assert [teacher["name"] for teacher in written["teachers"]] == TEACHERS
    assert all(len(teacher["digest"]) == 64 for teacher in written["teachers"])
    assert written["carrier"] == "student"
    assert written["student_start"] == "teachers"
    assert (written["distillation_start"], written["steps"], written["first_distillation_step"]) == (0.5, 8, 4)
    assert written["versions"]["adapters"] == adapters.__version__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in TEACHERS:
            model.delete_adapter(teacher)
    model.save_adapter(str(tmp_path / "later"), "insurance")
    assert json.loads((tmp_path / "later" / "adapter_config.json").read_text())["distillation"] == written
    model.add_adapter("plain")
    model.save_adapter(str(tmp_path / "plain"), "plain")
    assert "distillation" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())


def test_a_student_before_its_first_step_has_its_teachers_weights_in_its_provenance(trainer_args, tmp_path):
    model = make_student(make_model(), student_start="weighted")
    trainer = trainer_for(model, trainer_args())
    trainer.fit_start()
    weights = trainer.distillation.weights
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    run = read_provenance(tmp_path / "insurance").run
    assert run.settings["teacher_weights"] == pytest.approx(weights.mean(), abs=1e-4)
    assert run.settings["teacher_gain"] == pytest.approx(weights.gain, abs=1e-4)
    assert {teacher.name for teacher in run.teachers} == set(trainer.block.teachers)
    model.load_adapter(str(tmp_path / "insurance"))
    assert distillation_of(model).run is None, "it has no training"


def test_a_provenance_holds_arguments_that_were_numbers_of_numpy(trainer_args, tmp_path):
    numbers = {"learning_rate": 1e-2, "distillation_weight": 0.5, "fusion_regularization": 0.5}
    given = {"seed": np.int64(3)} | {name: np.float32(number) for name, number in numbers.items()}
    model = make_student(make_model())
    trainer_for(model, trainer_args(max_steps=2, save_strategy="steps", save_steps=1, **given)).train()
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    settings = read_provenance(tmp_path / "insurance").run.settings
    assert settings["seed"] == 3
    assert {name: settings[name] for name in numbers} == pytest.approx(numbers)


def test_a_teacher_deleted_before_training_is_not_in_the_provenance(trainer_args, tmp_path):
    model = make_student(make_model())
    with pytest.warns(UserWarning, match="keeps 2 others"):
        model.delete_adapter("bank")
    for folder in ("before", "after"):
        model.save_adapter(str(tmp_path / folder), "insurance")
        saved = json.loads((tmp_path / folder / "adapter_config.json").read_text())["distillation"]
        assert [teacher["name"] for teacher in saved["teachers"]] == TEACHERS[1:]
        if folder == "before":
            trainer_for(model, trainer_args()).train()


@pytest.mark.parametrize("start", ["teachers", "random"])
def test_teachers_that_are_deleted_after_a_loop_of_ones_own_stay_in_the_provenance(start, tmp_path):
    model = make_student(make_model(), student_start=start)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        model(**make_batch()).loss.backward()
        optimizer.step()
        distillation_of(model, "insurance").take_record()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in TEACHERS:
            model.delete_adapter(teacher)
    model.save_adapter(str(tmp_path / "insurance"), "insurance")
    teachers = read_provenance(tmp_path / "insurance").teachers
    assert [teacher.name for teacher in teachers] == TEACHERS
    assert all(len(teacher.digest) == 64 for teacher in teachers)


def test_a_provenance_is_read_back_as_it_was_written(trainer_args, tmp_path):
    model = make_student(make_model())
    for trained in (False, True):
        if trained:
            trainer_for(model, trainer_args()).train()
        written = Provenance.of(model, distillation_of(model, "insurance"))
        model.save_adapter(str(tmp_path / str(trained)), "insurance")
        assert read_provenance(str(tmp_path / str(trained))) == written
        assert bool(written.run.losses) == bool(written.run.settings) == trained


def test_a_provenance_of_another_version_keeps_its_keys():
    teacher = {"name": "bank", "source": "bank", "revision": None, "digest": None}
    saved = {
        "method": "of later",
        "teachers": [teacher],
        "versions": {"torch": "9"},
        "seed": 1,
        "new": [2],
        "gone": None,
    }
    provenance = Provenance.from_dict(saved)
    assert provenance.to_dict() == saved
    assert provenance.known_settings == {"new": [2], "seed": 1}
    assert provenance.run.settings == {"seed": 1}
    assert provenance.run.mean_attention("bank") is None


def test_the_teacher_that_changed_is_named():
    model = make_student(make_model())
    digests = {name: adapter_digest(model, name) for name in TEACHERS}
    check_teachers_unchanged(model, digests)
    noisy(model, "work")
    with pytest.raises(RuntimeError, match="The weights of teacher 'work' changed in training"):
        check_teachers_unchanged(model, digests)


def test_weights_that_are_loaded_over_a_student_are_not_its_training(trainer_args, tmp_path):
    model = make_student(make_model())
    trainer_for(model, trainer_args(max_steps=2)).train()
    run = distillation_of(model, "insurance").run
    model.save_adapter(str(tmp_path / "plain"), "bank")
    model.save_adapter(str(tmp_path / "trained"), "insurance")

    def loaded_and_saved(folder):
        model.load_adapter(str(tmp_path / folder), load_as="insurance", with_head=False)
        model.save_adapter(str(tmp_path / "again"), "insurance")
        return json.loads((tmp_path / "again" / "adapter_config.json").read_text()).get("distillation")

    assert loaded_and_saved("plain") is None
    assert distillation_of(model, "insurance").run is None
    trained = json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["distillation"]
    assert loaded_and_saved("trained") == trained
    assert distillation_of(model, "insurance").run.settings == run.settings
    loaded_and_saved("plain")
    model.train_adapter("insurance")
    model.save_adapter(str(tmp_path / "again"), "insurance")
    assert read_provenance(tmp_path / "again").run.settings == {}, "distilled again, by a loop of one's own perhaps"
