"""AdapterDistillation for the adapters library: distil frozen task adapters into a new one.

Importing this package registers it with adapters: `model.add_adapter` takes `distill_from`, `model.train_adapter`
prepares the two-stage training, and `DistillationTrainer` runs it.

Reading order: `composition` and `configuration`, what a user writes; `method`, one forward pass; `teachers` and
`student`, the adapters on a model; `registration`, all changes to adapters; `training`, the two stages; `analysis`;
`hub`; `cli`; `integrations`. All rooms share `downloads` and `_compat`.

Source: Wang et al., "AdapterDistillation: Non-Destructive Task Composition with Knowledge Distillation", EMNLP 2023
Industry, https://arxiv.org/abs/2312.16261.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .analysis.plots import (
    plot_leave_one_teacher_out,
    plot_student_distance,
    plot_teacher_attention,
    plot_teacher_weights,
)
from .configuration import DistillationArgumentsMixin, DistillationConfig
from .method.weights import TeacherWeights

if TYPE_CHECKING:
    from .analysis.observe import leave_one_teacher_out, student_distance, teacher_attention, write_analysis
    from .composition import AdapterDistillation
    from .method.distillation import StageSettings, distillation_of
    from .method.fusion import TeacherFusion
    from .registration import register, unregister
    from .student.choosing import choose_teachers
    from .student.peft_export import save_adapter_as_peft
    from .teachers.peft_model import from_peft
    from .teachers.weighing import weigh_teachers
    from .training.arguments import DistillationTrainingArguments, Seq2SeqDistillationTrainingArguments
    from .training.mixin import DistillationMixin
    from .training.trainers import AdapterDistillationTrainer, DistillationTrainer, Seq2SeqDistillationTrainer

__version__ = "0.2.0"

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
    "choose_teachers",
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

# Imported once they are asked for: the Trainer of transformers and datasets, which models do not need, and torch and
# adapters, which parts of the command line do not need.
_LAZY = {
    "AdapterDistillation": "composition",
    "DistillationMixin": "training.mixin",
    "TeacherFusion": "method.fusion",
    "choose_teachers": "student.choosing",
    "from_peft": "teachers.peft_model",
    "save_adapter_as_peft": "student.peft_export",
    "weigh_teachers": "teachers.weighing",
}
_LAZY |= dict.fromkeys(("register", "unregister"), "registration")
_LAZY |= dict.fromkeys(("StageSettings", "distillation_of"), "method.distillation")
_LAZY |= dict.fromkeys(("DistillationTrainingArguments", "Seq2SeqDistillationTrainingArguments"), "training.arguments")
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


def _starts_command_line() -> bool:
    """Return whether Python is about to run `adapter-distill`, or to find `-m hf_adapter_distillation.cli`."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "adapter-distill" or (program == "-m" and f"{__name__}.cli" in sys.orig_argv)


# The command line registers the package for the commands that run a model, and its help is there at once.
if not _starts_command_line():
    import_module(".registration", __name__).register()
