"""Settings that exclude one another."""

import pytest
from marks import needs_compiler
from messages import exactly
from tiny_models import make_dataset, make_model, make_student
from torch.nn.functional import cross_entropy
from trainings import trainer_for
from wrapped_models import Classifier

import hf_adapter_distillation as had


@pytest.mark.parametrize("objective", ["cross_task", "task_specific"])
@pytest.mark.parametrize("setting", ["label_smoothing_factor", "compute_loss_func"])
def test_labels_that_the_model_does_not_see_are_refused(objective, setting, trainer_args):
    model = make_student(make_model(), objective=objective)
    kwargs = {"compute_loss_func": cross_entropy} if setting == "compute_loss_func" else {}
    args = trainer_args(label_smoothing_factor=0.0 if kwargs else 0.1)
    message = (
        f"The objective {objective!r} needs the labels in the model's own forward; leave out label_smoothing_factor "
        "and compute_loss_func, or choose another objective."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, args, **kwargs)


@pytest.mark.parametrize("setting", [{"carrier": "dual"}, {"objective": "task_specific"}, {"objective": "cross_task"}])
def test_a_loss_outside_the_model_is_named_at_construction(setting, trainer_args):
    (name, value) = next(iter(setting.items()))
    model = Classifier(make_student(make_model(kind="base"), **setting))
    message = f"^The {name} '{value}' needs .* the loss of this training is computed outside of BertModel; choose"
    with pytest.raises(ValueError, match=message):
        trainer_for(model, trainer_args())


@needs_compiler
def test_compiled_code_and_predictions_are_refused(trainer_args):
    model = make_student(make_model(), objective="logits")
    message = "torch_compile=True is not supported with the objective 'logits'; leave it out."
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, trainer_args(torch_compile=True))


@needs_compiler
def test_compiled_training_is_refused(trainer_args):
    model = make_student(make_model(), level="layer")
    with pytest.raises(ValueError, match="torch_compile=True is not supported where whole layers are fused"):
        had.DistillationTrainer(model, trainer_args(torch_compile=True), train_dataset=make_dataset())
