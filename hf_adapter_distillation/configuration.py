"""Settings of the distillation (`DistillationConfig`) and of the training (`DistillationArgumentsMixin`).

The module imports neither torch nor transformers, so that `adapter-distill --help` is there at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from math import inf
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from transformers import TrainingArguments

    _Arguments: TypeAlias = TrainingArguments
else:
    _Arguments = object  # the fields and defaults of the other base of a class must win

Carrier = Literal["student", "fused", "mixed", "dual"]
StudentStart = Literal["weighted", "teachers", "average", "random"]
Level = Literal["auto", "adapter", "layer"]
LayerObjective = Literal["features", "cosine", "task_specific"]  # match the outputs of layers
OutputObjective = Literal["logits", "cross_task", "similarity"]  # match the outputs of the model


def option(help: str, default: Any = MISSING) -> Any:
    """Return a field of a dataclass that `HfArgumentParser` makes an option with this help."""
    return field(default=default, metadata={"help": help})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not supported; choose one of {', '.join(map(repr, choices))}.")


def _out_of_range(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name}={value!r} is out of range; it must be {allowed}.")


def _plain_number(value: Any) -> Any:
    """Return a number of numpy as one of Python, which JSON can hold; all other values as they are."""
    if isinstance(value, int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _read_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _out_of_range(name, value, "a number")
    return float(value)


def _check_positive(name: str, value: object) -> None:
    if not 0 < _read_number(name, value) < inf:
        raise _out_of_range(name, value, "a number above 0")


def _check_not_negative(name: str, value: object) -> None:
    if not 0 <= _read_number(name, value) < inf:
        raise _out_of_range(name, value, "finite and not negative")


def _check_count(name: str, value: object, unset: object, allowed: str) -> None:
    if value != unset and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _out_of_range(name, value, allowed)


@dataclass
class DistillationConfig:
    """Settings of the distillation of a student adapter, for `model.add_adapter(..., distill_from=config)`.

    A plain list of teachers is the same as `DistillationConfig(teachers=[...])`.

    Args:
        teachers: Names of adapters on the model, local folders of saved adapters, or Hub ids (`"user/adapter"`,
            `"user/adapter@revision"`). Or a pool: the path of one folder that holds the folders of saved adapters, of
            which `teacher_selection` become teachers.
        carrier: The output that a layer passes on in stage 2. `"student"`: the student's, which the fusion of the
            teachers learns to explain; `"fused"`: the fusion of teachers and student, which then learns from the task
            as AdapterFusion does; `"mixed"`: the fused output with a probability that falls from 1 to 0 over stage 2,
            else the student's (as in BERT-of-Theseus, https://arxiv.org/abs/2002.02925); `"dual"`: two passes, with
            the task loss for each, matched in each layer and in the logits, at twice the cost.
        student_start: The student's initial weights. `"average"`: the average of the teachers' weights and of their
            heads, where their configurations agree with the student's; `"teachers"`: the same, which
            `DistillationTrainer` then fits to the average of the teachers' updates on the training inputs, before the
            first step and without labels (`fit_start`); `"weighted"`: the same with a weight for each teacher, which
            `DistillationTrainer` learns from the labels first, and with which the fusions start; light teachers are
            left out (`weigh_teachers`), and a student whose teachers do not help starts at random; `"random"`: the
            adapter's own initialisation.
        level: The place where teachers are fused and the student is matched. `"adapter"`: each place inside a layer
            where bottleneck adapters or LoRA add their updates; `"layer"`: the output of each layer, which is run
            again with each teacher, at a higher cost and for any mixture of methods; `"auto"`: `"adapter"` if student
            and teachers share such places, else `"layer"`.
        objective: One name, or several with weights, `{"features": 1.0, "logits": 0.5}`. In each layer,
            `"features"`: the squared error of its update (`FeatureLoss`); `"cosine"`: the angle (`CosineLoss`);
            `"task_specific"`: the squared error in the subspace that matters for the task (`TaskSpecificLoss`). With
            the teachers' own heads, which must have the student's labels, or a language model's frozen head,
            `"logits"`: their mean prediction (`LogitLoss`). With the teachers' own heads for two classes,
            `"cross_task"`: their calibrated scores, and the order of the items (`CrossTaskLoss`). For
            embedding models, `"similarity"`: the similarities between the texts of a batch (`SimilarityLoss`).
        layer_weights: The weight of each layer of the base model in the mean over layers, from the first (of an
            encoder-decoder model, of the encoder) to the last, for objectives of layers. Default: all equal.
        temperature: The temperature of the objectives `"logits"`, `"cross_task"` and `"similarity"`.
        beta: The divergence of the objective `"logits"`: 0 for the forward Kullback-Leibler divergence, 1 for the
            reverse, and between them the generalised Jensen-Shannon divergence, as in trl's `GKDConfig`.
        weights_per_layer: Whether the weights of `student_start="weighted"` are learned for each layer apart.
        teacher_selection: `"all"`, or the maximal number of teachers: `DistillationTrainer` then ranks them on the
            training data before the first step (`rank_teachers`) and keeps the best ones above chance; where their
            heads do not know the labels, it keeps the heaviest ones. Of a pool it loads the best ones alone
            (`choose_teachers`).
        fusion_rank: The width of query and key of the fusions, which then have no value matrix. Default: the width of
            the updates, with a value matrix, as in the paper; three such matrices in each projection of a language
            model can hold more weights than the model.

    Raises:
        ValueError: If a value is unknown or out of its range. `add_adapter` and `DistillationTrainer.train` check the
            teachers and the needs of the objectives against the student and the model.
    """

    teachers: Sequence[str]
    carrier: Carrier = "student"
    student_start: StudentStart = "weighted"
    level: Level = "auto"
    objective: str | Mapping[str, float] = "features"
    layer_weights: Sequence[float] | None = None
    temperature: float = 2.0
    beta: float = 0.0
    teacher_selection: int | Literal["all"] = "all"
    weights_per_layer: bool = False
    fusion_rank: int | None = None

    @classmethod
    def paper(cls, teachers: Sequence[str]) -> "DistillationConfig":
        """Return the setting of the paper: a student that starts at random and learns from its teachers in stage 2.

        Its `carrier="student"` and `student_start="random"` make half of the steps stage 1.
        """
        return cls(teachers, carrier="student", student_start="random")

    def __post_init__(self) -> None:
        _check_choice("carrier", self.carrier, get_args(Carrier))
        _check_choice("student_start", self.student_start, get_args(StudentStart))
        _check_choice("level", self.level, get_args(Level))
        if not isinstance(self.objective, str | Mapping) or not self.objective:
            raise ValueError(f"objective={self.objective!r} is not supported; give a name, or weights by names.")
        if isinstance(self.objective, Mapping):
            self.objective = {name: _plain_number(weight) for name, weight in self.objective.items()}
        self.temperature, self.beta = _plain_number(self.temperature), _plain_number(self.beta)
        for name, weight in self.objectives.items():
            _check_choice("objective", name, get_args(LayerObjective) + get_args(OutputObjective))
            _check_positive(f"The weight of objective {name!r}", weight)
        _check_positive("temperature", self.temperature)
        if not 0 <= _read_number("beta", self.beta) <= 1:
            raise _out_of_range("beta", self.beta, "a number from 0 to 1")
        if self.beta and "logits" not in self.objectives:
            raise ValueError(f"beta={self.beta:g} needs the objective 'logits', not {self.objective!r}; leave it out.")
        if self.temperature != type(self).temperature and not self.output_objectives:
            what = f"temperature={self.temperature:g} needs an objective of outputs, such as 'logits'"
            raise ValueError(f"{what}, not {self.objective!r}; leave it out.")
        if self.layer_weights is not None:
            self._check_layer_weights(self.layer_weights)
            self.layer_weights = [_plain_number(weight) for weight in self.layer_weights]
        self.teachers = str(self.teachers) if isinstance(self.teachers, PathLike) else self.teachers
        self.teacher_selection, self.fusion_rank = map(_plain_number, (self.teacher_selection, self.fusion_rank))
        _check_count("teacher_selection", self.teacher_selection, "all", "'all' or a number of teachers")
        _check_count("fusion_rank", self.fusion_rank, None, "None or a width")
        if not isinstance(self.weights_per_layer, bool):
            raise _out_of_range("weights_per_layer", self.weights_per_layer, "True or False")
        if self.weights_per_layer and self.student_start != "weighted":
            raise ValueError(f"weights_per_layer=True needs student_start='weighted', not {self.student_start!r}.")

    def _check_layer_weights(self, weights: object) -> None:
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise ValueError(f"layer_weights={weights!r} is out of range; give one number for each layer.")
        for weight in weights:
            _check_not_negative("A weight in layer_weights", weight)
        if not any(weights):
            raise ValueError(f"layer_weights={weights!r} is out of range; at least one must be above 0.")
        if not self.layer_objectives:
            raise ValueError(f"layer_weights needs an objective of layers, not {self.objective!r}; leave it out.")

    @property
    def objectives(self) -> dict[str, float]:
        """Return the weight of each objective."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(self.objective)

    @property
    def layer_objectives(self) -> dict[str, float]:
        """Return the weights of the objectives that match the outputs of layers."""
        return {name: weight for name, weight in self.objectives.items() if name in get_args(LayerObjective)}

    @property
    def output_objectives(self) -> dict[str, float]:
        """Return the weights of the objectives that match the outputs of the model: predictions or embeddings."""
        return {name: weight for name, weight in self.objectives.items() if name in get_args(OutputObjective)}

    @property
    def head_objectives(self) -> dict[str, float]:
        """Return the weights of the objectives that match the predictions of the teachers' heads."""
        return {name: weight for name, weight in self.output_objectives.items() if name != "similarity"}


@dataclass
class DistillationArgumentsMixin(_Arguments):
    """Arguments of the two stages, for a dataclass of training arguments.

    A trainer with `DistillationMixin` takes arguments with this mixin, for instance
    `@dataclass class MyArguments(DistillationArgumentsMixin, TheirArguments)`, where `TheirArguments` belongs to the
    other base of the trainer.

    Raises:
        ValueError: If a value is out of its range, or this torch is too old for `torch_compile`.
    """

    distillation_start: float | None = option(
        "Fraction of all steps that is spent in stage 1, plain training of the student on its own data. 0 distils "
        "from the first step, 1 never distils. Default: 0 for a student that starts at its teachers, 0.5 for a "
        "student that starts at random.",
        None,
    )
    distillation_weight: float | None = option(
        "Weight of the distillation loss beside the task loss in stage 2. Default: 1 for up to 200 training "
        "examples, 200 / n for n examples: with more data, the teachers count less. For weighted teachers this is "
        "multiplied by their gain on held-out labels (0 if it is below 0.05), and falls to 0 over stage 2. A weight "
        "that is given holds in all steps.",
        None,
    )
    distillation_share: float | None = option(
        "Share of the steps of stage 2 in which the teachers run. They are spread evenly, from a step that the seed "
        "draws, and their distillation loss is divided by the share, so its gradient is unbiased. Below 1, for the "
        "carrier `student`. Default: a quarter, with at least 16 steps, for weighted teachers without "
        "distillation_dataset; else 1.",
        None,
    )
    weighing_steps: int = option(
        "Steps before the training in which one weight for each teacher is learned, with student_start='weighted'. "
        "Fewer steps have a higher learning rate, which reaches its maximum at 16.",
        16,
    )
    fusion_learning_rate: float | None = option(
        "Peak learning rate of the fusion (query, key, value). Default: half of learning_rate.", None
    )
    fusion_regularization: float = option(
        "Weight of the squared distance of each value matrix from the identity, in stage 2.", 0.01
    )
    keep_fusion: bool = option(
        "Keep the fusion (query, key, value) on the model after training, for analysis. By default it is dropped, "
        "and the student is an adapter like any other.",
        False,
    )
    analysis: bool = option(
        "Analyse the student at the end of the training: write the attention over the teachers, the student's "
        "distance to them and the value of each teacher to output_dir/analysis, as tables and figures, on up to 256 "
        "examples of eval_dataset, or of train_dataset if eval_dataset is not a single data set.",
        False,
    )
    stop_on_nan: bool = option(
        "Stop when the loss is NaN or infinite, before the step changes a weight, with an error that names the term "
        "and the layer, or the teacher. The check waits for the device at each step, as logging_nan_inf_filter does.",
        True,
    )
    save_on_sigterm: bool = option(
        "Finish the running step at SIGTERM, write a checkpoint and exit with status 143 (for spot machines and "
        "schedulers with a time limit).",
        False,
    )

    def __post_init__(self) -> None:
        import torch
        from transformers import TrainingArguments

        from ._compat import COMPILES

        if not isinstance(self, TrainingArguments):
            raise TypeError(
                f"{type(self).__name__} needs training arguments as its second base, for instance "
                "class MyArguments(DistillationArgumentsMixin, TrainingArguments) with @dataclass above it."
            )
        if not COMPILES and (self.torch_compile or self.torch_compile_backend or self.torch_compile_mode):
            raise ValueError(f"torch_compile=True needs torch 2.9 or newer, not {torch.__version__}; leave it out.")
        vars(self).update({name: _plain_number(value) for name, value in vars(self).items()})
        super().__post_init__()
        start = self.distillation_start
        if start is not None and not 0 <= _read_number("distillation_start", start) <= 1:
            raise _out_of_range("distillation_start", start, "a fraction of all steps, from 0 to 1")
        share = self.distillation_share
        if share is not None and not 0 < _read_number("distillation_share", share) <= 1:
            raise _out_of_range("distillation_share", share, "a fraction above 0, up to 1")
        for name in ("distillation_weight", "fusion_learning_rate"):
            if (value := vars(self)[name]) is not None:
                _check_not_negative(name, value)
        _check_not_negative("fusion_regularization", self.fusion_regularization)
        steps = self.weighing_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
            raise _out_of_range("weighing_steps", steps, "a number of steps, at least 2")
        for name in ("keep_fusion", "analysis", "stop_on_nan", "save_on_sigterm"):
            if not isinstance(value := vars(self)[name], bool):
                raise _out_of_range(name, value, "True or False")


@dataclass
class AdapterDefaultsMixin(DistillationArgumentsMixin):
    """Arguments of the two stages, with defaults for adapters in place of two defaults of the other base.

    A value that the user gives always wins. `logging_steps` is a share of the steps, which Trainer rounds up to whole
    steps: at 0.05 a training of ten or more steps logs at least ten times. Without `eval_steps`, Trainer evaluates as
    often as it logs. With the default it evaluates as often as it saves if the best checkpoint is to be loaded, which
    needs `save_steps` that are a multiple of `eval_steps`.
    """

    learning_rate: float = option(
        "Peak learning rate of the student and its head. Adapters need a higher one than whole models.", 1e-3
    )
    logging_steps: float = option("Steps between two lines of the log; below 1, a share of all steps.", 0.05)

    def __post_init__(self) -> None:
        loads_best = self.load_best_model_at_end and self.eval_strategy == self.save_strategy == "steps"
        if loads_best and not self.eval_steps and self.logging_steps == AdapterDefaultsMixin.logging_steps:
            self.eval_steps = self.save_steps
        super().__post_init__()
