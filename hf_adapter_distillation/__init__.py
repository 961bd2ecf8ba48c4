"""AdapterDistillation for the adapters library: distil frozen task adapters into a new one.

Importing this package registers it with adapters: `model.add_adapter` takes `distill_from`, `model.train_adapter`
prepares the two-stage training, and `DistillationTrainer` runs it.

Reading order: `composition` and `configuration`, what a user writes; `method`, one forward pass; `teachers` and
`student`, the adapters on a model; `registration`, all changes to adapters; `training`, the two stages; `analysis`;
`hub`; `cli`; `integrations`. All rooms share `downloads` and `_compat`.

Source: Wang et al., "AdapterDistillation: Non-Destructive Task Composition with Knowledge Distillation", EMNLP 2023
Industry, https://arxiv.org/abs/2312.16261.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .analysis.plots import (
    plot_leave_one_teacher_out,
    plot_student_distance,
    plot_teacher_attention,
    plot_teacher_weights,
)
from .composition import AdapterDistillation
from .configuration import (
    DistillationArgumentsMixin,
    DistillationConfig,
    DistillationTrainingArguments,
    Seq2SeqDistillationTrainingArguments,
)
from .method.distillation import StageSettings, distillation_of
from .method.fusion import TeacherFusion
from .method.weights import TeacherWeights
from .registration import register, unregister
from .teachers.weighing import weigh_teachers

if TYPE_CHECKING:
    from .analysis.observe import leave_one_teacher_out, student_distance, teacher_attention, write_analysis
    from .student.peft_export import save_adapter_as_peft
    from .teachers.peft_model import from_peft
    from .training.mixin import DistillationMixin
    from .training.trainers import AdapterDistillationTrainer, DistillationTrainer, Seq2SeqDistillationTrainer

__version__ = "0.1.0"

__all__ = [
    "AdapterDistillation",
    "AdapterDistillationTrainer",
    "DistillationArgumentsMixin",
    "DistillationConfig",
    "DistillationMixin",
    "DistillationTrainer",
    "DistillationTrainingArguments",
    "Seq2SeqDistillationTrainer",
    "Seq2SeqDistillationTrainingArguments",
    "StageSettings",
    "TeacherFusion",
    "TeacherWeights",
    "distillation_of",
    "from_peft",
    "leave_one_teacher_out",
    "plot_leave_one_teacher_out",
    "plot_student_distance",
    "plot_teacher_attention",
    "plot_teacher_weights",
    "register",
    "save_adapter_as_peft",
    "student_distance",
    "teacher_attention",
    "unregister",
    "weigh_teachers",
    "write_analysis",
]

# Imported once they are asked for: they load the Trainer of transformers and datasets, which models do not need.
_LAZY = {
    "DistillationMixin": "training.mixin",
    "from_peft": "teachers.peft_model",
    "save_adapter_as_peft": "student.peft_export",
}
_LAZY |= dict.fromkeys(
    ("AdapterDistillationTrainer", "DistillationTrainer", "Seq2SeqDistillationTrainer"), "training.trainers"
)
_LAZY |= dict.fromkeys(
    ("leave_one_teacher_out", "student_distance", "teacher_attention", "write_analysis"), "analysis.observe"
)

if not TYPE_CHECKING:  # type checkers would take any name for one that is there

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted(globals() | _LAZY)


register()
