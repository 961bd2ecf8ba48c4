"""Settings that exclude one another."""

import pytest
import torch
from marks import needs_compiler
from messages import exactly
from tiny_models import make_batch, make_dataset, make_model, make_student
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


@pytest.mark.parametrize(
    ("family", "config"), [("bert", "lora"), ("bert", "seq_bn"), ("bert", "loreft"), ("gpt2", "lora")]
)
def test_a_student_in_another_data_type_than_the_base_model_is_named(family, config, trainer_args):
    model = make_student(make_model(family, dtype=torch.bfloat16), config=config)
    message = (
        "Student 'insurance' is in float32 and the base model in bfloat16, which torch cannot multiply; call "
        "model.to(torch.bfloat16) after add_adapter, or pass bf16=True."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(model, trainer_args())
    model.set_active_adapters("insurance")
    with pytest.raises(RuntimeError, match="dtype"):
        model(**make_batch())


@pytest.mark.parametrize("remedy", ["cast", "autocast"])
def test_a_student_in_the_data_type_of_the_base_model_or_under_autocast_trains(remedy, trainer_args):
    model = make_student(make_model(dtype=torch.bfloat16), config="lora")
    if remedy == "cast":
        model.to(torch.bfloat16)
    trainer = trainer_for(model, trainer_args(bf16=remedy == "autocast", max_steps=2))
    assert trainer.train().global_step == 2


@pytest.mark.parametrize("config", ["ia3", "prefix_tuning"])
def test_a_student_whose_data_type_torch_promotes_is_taken(config, trainer_args):
    model = make_student(make_model(kind="classification", dtype=torch.float64), config=config)
    model.set_active_adapters("insurance")
    assert model(**make_batch()).loss.isfinite()
    model.train_adapter("insurance")
    trainer_for(model, trainer_args())
