"""What is noted once a training has ended."""

import pytest
from tiny_models import TEACHERS, make_model, make_student, noisy
from trainings import EachStep, trainer_for

from hf_adapter_distillation.student.provenance import adapter_digest
from hf_adapter_distillation.training.results import check_teachers_unchanged


def test_a_changed_teacher_is_an_error(trainer_args):
    model = make_student(make_model())

    def change(args, state, control, **kwargs):
        noisy(model, "travel")

    with pytest.raises(RuntimeError, match="The weights of teacher 'travel' changed in training"):
        trainer_for(model, trainer_args(max_steps=1), callbacks=[EachStep(change)]).train()


def test_the_teacher_that_changed_is_named():
    model = make_student(make_model())
    digests = {name: adapter_digest(model, name) for name in TEACHERS}
    check_teachers_unchanged(model, digests)
    noisy(model, "work")
    with pytest.raises(RuntimeError, match="The weights of teacher 'work' changed in training"):
        check_teachers_unchanged(model, digests)
