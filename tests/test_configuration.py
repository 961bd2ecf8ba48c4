import json
import os
import re

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainerState

from hf_adapter_distillation import DistillationArgumentsMixin, DistillationConfig
from hf_adapter_distillation.integrations import sentence_transformers
from hf_adapter_distillation.training.arguments import (
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
)


def test_defaults():
    config = DistillationConfig(teachers=["a"])
    assert (config.carrier, config.student_start) == ("student", "weighted")


def test_the_setting_of_the_paper():
    config = DistillationConfig.paper(["a", "b"])
    assert (config.teachers, config.carrier, config.student_start) == (["a", "b"], "student", "random")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"carrier": "both"}, "carrier='both' is not supported; choose one of 'student', 'fused', 'mixed', 'dual'"),
        ({"level": "head"}, "level='head' is not supported; choose one of 'auto', 'adapter', 'layer'"),
        ({"student_start": "zero"}, "student_start='zero' is not supported; choose one of 'weighted', 'teachers', "),
        ({"objective": "hidden"}, "objective='hidden' is not supported; choose one of 'features', 'cosine', "),
        ({"objective": {}}, "objective={} is not supported; give a name, or weights by names."),
        ({"objective": ["features"]}, r"objective=\['features'\] is not supported; give a name, or weights by names."),
        (
            {"objective": {"logits": 0}},
            "The weight of objective 'logits'=0 is out of range; it must be a number above",
        ),
        ({"objective": {"logits": "1"}}, "The weight of objective 'logits'='1' is out of range"),
        ({"temperature": 0.0}, "temperature=0.0 is out of range; it must be a number above 0."),
        (
            {"temperature": 5.0},
            "temperature=5 needs an objective of outputs, such as 'logits', not 'features'; leave it out.",
        ),
        ({"temperature": True}, "temperature=True is out of range"),
        ({"beta": 1.5, "objective": "logits"}, "beta=1.5 is out of range; it must be a number from 0 to 1."),
        ({"beta": 0.5}, "beta=0.5 needs the objective 'logits', not 'features'; leave it out."),
        ({"layer_weights": 2}, "layer_weights=2 is out of range; give one number for each layer."),
        (
            {"layer_weights": [1, -1]},
            "A weight in layer_weights=-1 is out of range; it must be finite and not negative",
        ),
        ({"layer_weights": [0, 0]}, r"layer_weights=\[0, 0\] is out of range; at least one must be above 0."),
        ({"layer_weights": []}, r"layer_weights=\[\] is out of range; at least one must be above 0."),
        (
            {"layer_weights": [1], "objective": "logits"},
            "layer_weights needs an objective of layers, not 'logits'; leave it out.",
        ),
        ({"teacher_selection": 0}, "teacher_selection=0 is out of range; it must be 'all' or a number of teachers."),
        ({"teacher_selection": "best"}, "teacher_selection='best' is out of range"),
        ({"teacher_selection": 1.5}, "teacher_selection=1.5 is out of range"),
        ({"fusion_rank": 0}, "fusion_rank=0 is out of range; it must be None or a width."),
        ({"fusion_rank": 1.5}, "fusion_rank=1.5 is out of range"),
        ({"teacher_selection": True}, "teacher_selection=True is out of range"),
        ({"weights_per_layer": 1}, "weights_per_layer=1 is out of range; it must be True or False."),
        (
            {"weights_per_layer": True, "student_start": "teachers"},
            "weights_per_layer=True needs student_start='weighted', not 'teachers'.",
        ),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DistillationConfig(teachers=["a"], **kwargs)


def test_objectives_and_their_weights():
    assert DistillationConfig(["a"]).objectives == {"features": 1.0}
    config = DistillationConfig(["a"], objective={"cosine": 2, "cross_task": 0.5})
    assert (config.layer_objectives, config.output_objectives) == ({"cosine": 2}, {"cross_task": 0.5})


def test_numbers_of_numpy_are_kept_as_numbers_of_python():
    one, half = np.int64(1), np.float32(0.5)
    settings = {"objective": {"logits": half, "features": one}, "layer_weights": [one, half], "temperature": half}
    config = DistillationConfig(["a"], **settings, beta=half)
    assert json.loads(json.dumps(vars(config)))["layer_weights"] == [1, 0.5]
    assert (config.objective, config.temperature, config.beta) == ({"logits": 0.5, "features": 1}, 0.5, 0.5)
    config = DistillationConfig(["a"], teacher_selection=one, fusion_rank=np.int32(32))
    assert [type(number) for number in (config.teacher_selection, config.fusion_rank)] == [int, int]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"distillation_start": 1.5}, "distillation_start=1.5 is out of range; it must be a fraction"),
        ({"distillation_start": -0.1}, "distillation_start=-0.1"),
        ({"distillation_start": float("nan")}, "distillation_start=nan"),
        (
            {"distillation_weight": -1.0},
            "distillation_weight=-1.0 is out of range; it must be finite and not negative",
        ),
        ({"distillation_weight": float("inf")}, "distillation_weight=inf"),
        ({"fusion_learning_rate": -1e-3}, "fusion_learning_rate=-0.001"),
        ({"fusion_regularization": float("nan")}, "fusion_regularization=nan"),
        ({"weighing_steps": 0}, "weighing_steps=0 is out of range; it must be a number of steps, at least 2."),
        ({"weighing_steps": 1}, "weighing_steps=1 is out of range"),
        ({"weighing_steps": True}, "weighing_steps=True is out of range"),
        ({"weighing_steps": 2.5}, "weighing_steps=2.5 is out of range"),
    ],
)
def test_bad_arguments(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DistillationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **kwargs)


@pytest.mark.parametrize("kwargs", [{"torch_compile": True}, {"torch_compile_mode": "default"}])
def test_a_torch_that_cannot_compile_adapters_is_refused(kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_adapter_distillation._compat.COMPILES", False)
    message = f"torch_compile=True needs torch 2.9 or newer, not {torch.__version__}; leave it out."
    with pytest.raises(ValueError, match=re.escape(message)):
        DistillationTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **kwargs)
    assert "ACCELERATE_DYNAMO_BACKEND" not in os.environ


def test_every_argument_has_a_help_text():
    own = set(DistillationArgumentsMixin.__annotations__)
    fields = DistillationTrainingArguments.__dataclass_fields__
    assert own
    assert all(fields[name].metadata["help"] for name in own)


def test_arguments_are_read_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --distillation_start 0.25 --distillation_weight 2 --fusion_learning_rate 1e-4"
    (args,) = HfArgumentParser(DistillationTrainingArguments).parse_args_into_dataclasses(
        [*line.split(), "--keep_fusion", "--use_cpu"]
    )
    assert (args.distillation_start, args.distillation_weight, args.fusion_learning_rate) == (0.25, 2.0, 1e-4)
    assert args.keep_fusion is True


CLASSES = [
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
    sentence_transformers.SentenceTransformerDistillationTrainingArguments,
    sentence_transformers.CrossEncoderDistillationTrainingArguments,
]


@pytest.mark.parametrize("cls", CLASSES)
def test_a_parser_of_the_arguments_prints_its_help(cls):
    assert "--distillation_weight" in HfArgumentParser(cls).format_help()


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_for_adapters_and_values_that_a_user_gives(cls, tmp_path):
    """Also values that are the defaults of Trainer, in code and on a command line."""
    args = cls(str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.logging_steps) == (1e-3, 0.05)
    args = cls(str(tmp_path), use_cpu=True, learning_rate=5e-5, logging_steps=500)
    assert (args.learning_rate, args.logging_steps) == (5e-5, 500)
    line = f"--output_dir {tmp_path} --use_cpu --learning_rate 5e-5 --logging_steps 500"
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(line.split())
    assert (args.learning_rate, args.logging_steps) == (5e-5, 500)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("given", "eval_steps"),
    [
        ({}, 0.05),
        ({"load_best_model_at_end": True}, 500),
        ({"load_best_model_at_end": True, "save_steps": 0.12}, 0.12),
        ({"load_best_model_at_end": True, "eval_steps": 100}, 100),
        ({"load_best_model_at_end": True, "logging_steps": 20}, 20),
        ({"load_best_model_at_end": True, "save_strategy": "best", "metric_for_best_model": "loss"}, 0.05),
    ],
)
def test_evaluations_are_as_frequent_as_lines_or_for_the_best_model_as_checkpoints(cls, given, eval_steps, tmp_path):
    assert cls(str(tmp_path), use_cpu=True, eval_strategy="steps", **given).eval_steps == eval_steps


def test_the_default_logs_at_least_ten_times_whatever_the_number_of_steps(tmp_path):
    args = DistillationTrainingArguments(str(tmp_path), use_cpu=True)
    for steps in range(1, 2000):
        state = TrainerState()
        state.compute_steps(args, steps)
        assert steps // state.logging_steps >= min(10, steps), steps
