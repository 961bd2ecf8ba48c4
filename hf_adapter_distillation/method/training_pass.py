"""The passes of a training: for each carrier, the match in the layers and the states that a layer passes on."""

import torch

from .distillation import Distillation
from .fusion import TeacherFusion
from .layer_pass import LayerPass, Place
from .losses import CosineLoss, FeatureLoss

LAYER_LOSSES = {"features": FeatureLoss(), "cosine": CosineLoss()}  # the objectives without weights of their own


class TrainingPass(LayerPass):
    """Forward pass of stage 1, or of stage 2 without a match in the layers: the teachers do not run.

    The terms of all training passes are collected here; `terms.sum_terms` makes one term of them.
    """

    runs_teachers = False

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.fusions: dict[str, TeacherFusion] = {}
        # Gradient checkpointing runs layers again in backward, and appends again: after the lists have been read.
        self.losses: list[dict[str, torch.Tensor]] = []
        self.sizes: list[int] = []  # the number of sequences behind each of them
        self.output_losses: dict[str, torch.Tensor] = {}
        self.probe_losses: list[torch.Tensor] = []
        self.ratios: list[torch.Tensor] = []
        self.attention: dict[str, list[tuple[int, tuple[str, ...], torch.Tensor]]] = {}  # sequences, names, weights
        self.updates: list[
            tuple[TeacherFusion, torch.Tensor]
        ] = []  # of the carrier `dual`, until both passes have run
        self.logit_loss: torch.Tensor | float = 0.0
        self.fused_task_loss: torch.Tensor | None = None

    def visit(self, fusion: TeacherFusion) -> bool:
        """Note the fusion, whose parameters stay in the graph of each step."""
        self.fusions[fusion.location] = fusion
        return self.runs_teachers

    def fuse(self, place: Place, with_student: bool = False) -> torch.Tensor:
        """Return the fused output of a place, (B, T, d), and keep the mean attention over non-padding tokens."""
        fused = place.fuse(with_student)
        _, batch_weights = self.token_weights(place.fusion, fused.output)
        attention = torch.einsum("bt,btn->n", batch_weights, fused.attention.to(batch_weights.dtype))  # (n,)
        self.attention.setdefault(place.fusion.location, []).append((len(fused.output), fused.names, attention))
        return fused.output

    def match(self, fusion: TeacherFusion, student_output: torch.Tensor, target: torch.Tensor) -> None:
        """Compute the objectives of one layer from the student's and the fused update, (batch, seq_len, hidden)."""
        weights, _ = self.token_weights(fusion, student_output)
        losses = {}
        for name in self.distillation.config.layer_objectives:
            loss = LAYER_LOSSES.get(name, fusion.task_specific)
            if loss is None:  # the head was added after `train_adapter`
                student = self.inputs.block.student
                raise ValueError(
                    f"The objective {name!r} needs the head of {student!r} in train_adapter; add one for "
                    f"classes, labels or values, and call model.train_adapter({student!r}) again."
                )
            losses[name] = loss(student_output, target, weights) * fusion.layer_weight
        self.losses.append(losses)
        self.sizes.append(len(student_output))
        if (probe := fusion.task_specific) is not None:
            self.ratios.append(probe.ratio(target, weights))
            if self.inputs.labels is not None:
                self.probe_losses.append(probe.probe_loss(target, weights, self.inputs.labels))


class StudentPass(TrainingPass):
    """Carrier `student`: the task loss trains the student alone, and the fusion learns to explain the student."""

    runs_teachers = True

    def run_layer(self, place: Place) -> None:
        """Match the student with the fused teachers, both of which the distillation loss trains."""
        self.match(place.fusion, place.student_output, self.fuse(place))


class FusedPass(TrainingPass):
    """Carrier `fused`: each layer passes the fused output on, so that the task loss trains the fusion."""

    runs_teachers = True
    joins_student = True

    def run_layer(self, place: Place) -> torch.Tensor:
        """Match the student with the fused output, and pass the fused output on."""
        fused_output = self.fuse(place, with_student=True)  # (B, T, d)
        self.match(place.fusion, place.student_output, fused_output.detach())
        return place.base + fused_output


class MixedPass(FusedPass):
    """Carrier `mixed`: each layer passes on the fused output with a probability, else the student's."""

    def run_layer(self, place: Place) -> torch.Tensor:
        """Match as `FusedPass`, and draw the states that are passed on."""
        fused_states = super().run_layer(place)
        probability = self.distillation.settings.fused_probability
        if torch.compiler.is_compiling():  # compiled code cannot branch on a draw, and computes both
            takes_fused = torch.rand((), device=fused_states.device) < probability
            return torch.where(takes_fused, fused_states, place.student_states)
        return fused_states if bool(torch.rand(()) < probability) else place.student_states


class DualFusedPass(FusedPass):
    """First pass of the carrier `dual`: as `fused`, with the match left to the second pass."""

    def match(self, fusion: TeacherFusion, student_output: torch.Tensor, target: torch.Tensor) -> None:
        """Keep the fused output."""
        self.updates.append((fusion, target))


class DualStudentPass(TrainingPass):
    """Second pass of the carrier `dual`: the student alone, on its own states."""

    runs_teachers = True
    joins_student = True

    def run_layer(self, place: Place) -> None:
        """Keep the student's update."""
        self.updates.append((place.fusion, place.student_output))


TRAINING_PASSES = {"student": StudentPass, "fused": FusedPass, "mixed": MixedPass, "dual": DualStudentPass}
