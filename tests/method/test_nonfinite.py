"""Losses that are NaN or infinite: the error names the term, the layer and the teacher."""

import pytest
import torch
from messages import exactly
from model_state import changed, snapshot
from tiny_models import make_batch, make_model, make_student
from torch.nn.functional import cross_entropy
from trainings import EachStep, float16_trainer, trainer_for
from transformers import TrainerCallback

from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.layers import adapter_layers
from hf_adapter_distillation.method.nonfinite import nonfinite_term
from hf_adapter_distillation.method.whole_layers import whole_layers


class Break(TrainerCallback):
    """Breaks the model before a step, and notes its weights then."""

    def __init__(self, model, step, function):
        self.model, self.step, self.function = model, step, function

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function(self.model)
            self.weights = snapshot(self.model)


def layer_of(model, number):
    return adapter_layers(model, "insurance")[number][1]


BREAKS = {
    "student": (
        6, "dual", lambda model: layer_of(model, 0).adapters["insurance"].adapter_up.weight.data.fill_(float("nan")),
        "nan: distillation_loss, first in encoder.layer.0.output",
    ),
    "fusion": (
        6, "student", lambda model: layer_of(model, 1).distillation_fusion["insurance"].value.weight.data.fill_(1e30),
        "nan: distillation_loss, first in encoder.layer.1.output",
    ),
    "head": (
        6, "mixed", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: task_loss, while distillation_loss is finite in all layers",
    ),
    "logits": (
        6, "dual", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: distillation_loss, in the logits",
    ),
    "stage 1": (
        2, "student", lambda model: model.heads["insurance"][1].bias.data.fill_(float("nan")),
        "nan: task_loss, in stage 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_loss_that_is_no_number_names_the_term_and_the_layer(what, trainer_args):
    step, carrier, function, message = BREAKS[what]
    model = make_student(make_model(), carrier=carrier, student_start="random")
    breaking = Break(model, step, function)
    trainer = trainer_for(model, trainer_args(), callbacks=[breaking])
    labels = "check that the batch has labels other than -100, " if message.startswith("nan: task_loss") else ""
    whole_message = (
        f"The loss of step {step + 1} is {message}. No weight has changed in this step; {labels}lower the learning "
        "rate, or pass stop_on_nan=False to go on."
    )
    with pytest.raises(FloatingPointError, match=exactly(whole_message)):
        trainer.train()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name].nan_to_num(0), value.nan_to_num(0)) for name, value in breaking.weights.items())


def test_the_regularisation_is_named(trainer_args):
    """Of a value matrix whose square is infinite, while what it puts out is matched by no layer."""
    model = make_student(make_model(), student_start="random")
    distillation = distillations(model.adapters_config)["insurance"]
    model.train()
    model(**make_batch())
    record = distillation.take_record()
    assert nonfinite_term(record) == "task_loss, while distillation_loss is finite in all layers"
    record.fusion_regularization = torch.tensor(float("inf"))
    assert nonfinite_term(record) == "fusion_regularization"


def test_stop_on_nan_can_be_unset(trainer_args):
    model = make_student(make_model())
    breaking = Break(model, 6, BREAKS["head"][2])
    trainer = trainer_for(model, trainer_args(stop_on_nan=False), callbacks=[breaking])
    trainer.train()
    assert trainer.state.global_step == 8


# float16, whose largest number is 65504

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU; CUDA_VISIBLE_DEVICES=0 shows the first one")
ON_GPU = pytest.param("gpu", marks=[pytest.mark.gpu, NO_GPU])


@torch.no_grad()
def enlarge(model, name, number=1):
    """Gives a teacher weights in one layer that are finite in float16, while what they put out is not."""
    _, layer = whole_layers(model, name)[number]
    for key, parameter in layer.named_parameters():
        if f".{name}." in key and key.endswith(("adapter_up.weight", "lora_B")):
            parameter.fill_(60_000.0)
        elif f".{name}." in key and key.endswith("adapter_down.0.bias"):
            parameter.fill_(2.0)


TOO_LARGE = (
    "the update of teacher 'travel' is not finite in encoder.layer.1{}. No weight has changed in this step; "
    "train in bf16 or float32, leave this teacher out, or pass stop_on_nan=False to go on."
)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize(
    ("config", "level", "carrier", "place"),
    [
        ("seq_bn", "auto", "student", ".output"),
        ("seq_bn", "auto", "dual", ".output"),
        ("seq_bn[use_gating=True]", "auto", "fused", ".output"),
        ("lora", "auto", "mixed", ".attention.self.query"),
        ("seq_bn", "layer", "student", ""),
        ("lora", "layer", "fused", ""),
    ],
)
def test_a_teacher_that_overflows_in_float16_is_named(device, config, level, carrier, place, trainer_args):
    model = make_student(make_model(), config=config, level=level, carrier=carrier, student_start="random")
    enlarge(model, "travel")
    trainer = float16_trainer(device, model, trainer_args, distillation_start=0.0)
    before = snapshot(model)
    with pytest.raises(FloatingPointError, match=exactly(f"The loss of step 1 is nan: {TOO_LARGE.format(place)}")):
        trainer.train()
    assert not changed(model, before)
    assert trainer.distillation.inspection is trainer.distillation.record is None


def mean_of_items(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("loss", [None, mean_of_items])
def test_two_teachers_that_overflow_in_a_half_model_are_named(loss, trainer_args):
    model = make_student(make_model(), student_start="random").half()
    for name in ("work", "bank"):
        enlarge(model, name)
    trainer = trainer_for(model, trainer_args(distillation_start=0.0), compute_loss_func=loss)
    with pytest.raises(FloatingPointError, match=r"the update of teacher 'bank' and 'work' is not finite in encoder"):
        trainer.train()


def test_a_teacher_that_overflows_where_the_student_starts_is_named(trainer_args):
    """A fit to infinite updates would leave a student with NaN in its weights."""
    model = make_student(make_model())
    enlarge(model, "travel")
    before = snapshot(model)
    trainer = float16_trainer("cpu", model, trainer_args)
    message = (
        "'insurance' cannot start at its teachers: the update of teacher 'travel' is not finite in "
        "encoder.layer.1.output; train in bf16 or float32, leave this teacher out."
    )
    with pytest.raises(FloatingPointError, match=exactly(message)):
        trainer.train()
    assert not changed(model, before)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_both_stages_in_float16_have_the_terms_of_float32(device, level, trainer_args):
    def train(trainer):
        before = snapshot(trainer.model)
        trainer.train()
        moved = changed(trainer.model, before)
        assert any("distillation_fusion" in name for name in moved)
        assert all(".insurance." in name for name in moved)
        return [log for log in trainer.state.log_history if "task_loss" in log]

    models = [make_student(make_model(), carrier="dual", level=level) for _ in range(2)]
    arguments = {"use_cpu": device == "cpu", "max_grad_norm": 0.0, "keep_fusion": True}
    exact = train(trainer_for(models[0], trainer_args(**arguments)))
    half = train(float16_trainer(device, models[1], trainer_args, keep_fusion=True))
    assert [log["stage"] for log in half] == [1] * 4 + [2] * 4
    for log, expected in zip(half, exact, strict=True):
        terms = {"task_loss", "distillation_loss", "fused_task_loss", "fusion_regularization"} & expected.keys()
        assert len(terms) == (1 if log["stage"] == 1 else 4)
        assert {term: log[term] for term in terms} == pytest.approx(
            {t: expected[t] for t in terms}, rel=0.05, abs=0.01
        )


def test_steps_that_the_scaler_of_float16_skips_are_no_error(trainer_args):
    """Gradients that are infinite since the loss was scaled too far; the loss itself is finite."""
    model, still = make_student(make_model(), student_start="random"), []
    trainer = float16_trainer("cpu", model, trainer_args, init_scale=2.0**30, max_steps=24)
    before = snapshot(model)
    trainer.add_callback(EachStep(lambda args, state, control, **kwargs: still.append(not changed(model, before))))
    trainer.train()
    assert still[0]
    assert not still[-1]
    assert trainer.accelerator.scaler.get_scale() < 2.0**30
