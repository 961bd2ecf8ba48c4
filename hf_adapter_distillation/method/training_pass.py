"""The passes of a training: for each carrier, the match in the layers and the states that a layer passes on."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .distillation import Distillation
from .fusion import TeacherFusion
from .layer_match import LayerMatch
from .layer_pass import LayerPass, Place
from .losses import CosineLoss, FeatureLoss

# The objectives without weights of their own.
LAYER_LOSSES: dict[str, FeatureLoss | CosineLoss] = {"features": FeatureLoss(), "cosine": CosineLoss()}


class LayerTerms(NamedTuple):
    """Terms of one layer in one call of the base model."""

    call: int  # the number of the call
    sequences: int
    weight: float  # of the layer
    matches: Mapping[str, LayerMatch | torch.Tensor]  # by the objective; losses with a bound of their own are tensors


class Updates(NamedTuple):
    """Updates of one layer, which the carrier `dual` keeps until both of its passes have run, (B, T, d) each."""

    fusion: TeacherFusion
    output: torch.Tensor  # the fused output, or the student's
    hidden_states: torch.Tensor  # which the adapters read
    call: int


class TrainingPass(LayerPass):
    """Forward pass of stage 1, or of stage 2 without a match in the layers: the teachers do not run.

    The terms of all training passes are collected here; `terms.sum_terms` makes one term of them.
    """

    runs_teachers = False

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation
        self.fusions: dict[str, TeacherFusion] = {}
        # Gradient checkpointing runs layers again in backward, and appends again: after the lists have been read.
        self.layers: list[LayerTerms] = []
        self.output_losses: dict[str, torch.Tensor] = {}
        self.probe_losses: list[torch.Tensor] = []
        self.ratios: list[torch.Tensor] = []
        self.attention: dict[str, list[tuple[int, tuple[str, ...], torch.Tensor]]] = {}  # sequences, names, weights
        self.updates: list[Updates] = []
        self.logit_loss: torch.Tensor | float = 0.0
        self.fused_task_loss: torch.Tensor | None = None

    def visit(self, fusion: TeacherFusion) -> bool:
        """Note the fusion, whose parameters stay in the graph of each step."""
        self.fusions[fusion.location] = fusion
        return self.runs_teachers

    def fuse(self, place: Place, with_student: bool = False) -> torch.Tensor:
        """Return the fused output of a place, (B, T, d), and keep the mean attention over non-padding tokens."""
        fused = place.fuse(with_student)
        self._note_attention(place.fusion, fused.names, fused.attention)
        return fused.output

    def _note_attention(self, fusion: TeacherFusion, names: tuple[str, ...], attention: torch.Tensor) -> None:
        _, batch_weights = self.token_weights(fusion, attention)
        mean = torch.einsum("bt,btn->n", batch_weights, attention.to(batch_weights.dtype))  # (n,)
        self.attention.setdefault(fusion.location, []).append((len(attention), names, mean))

    def updates_of(self, place: Place, output: torch.Tensor) -> Updates:
        """Return the student's or the fused update of a place."""
        return Updates(place.fusion, output, place.query_states, len(self.calls))

    def match(self, student: Updates, target: torch.Tensor) -> None:
        """Match one layer from the student's and the fused update, (batch, seq_len, hidden)."""
        fusion = student.fusion
        weights, _ = self.token_weights(fusion, student.output)
        matches = {}
        for name in self.distillation.config.layer_objectives:
            loss = LAYER_LOSSES.get(name) or fusion.task_specific
            if loss is None:  # the head was added after `train_adapter`
                name_of_student = self.inputs.block.student
                raise ValueError(
                    f"The objective {name!r} needs the head of {name_of_student!r} in train_adapter; add one for "
                    f"classes, labels or values, and call model.train_adapter({name_of_student!r}) again."
                )
            matches[name] = loss.match(student.output, target, weights, student.hidden_states)
        self.layers.append(LayerTerms(student.call, len(student.output), fusion.layer_weight, matches))
        if (probe := fusion.task_specific) is not None:
            self.ratios.append(probe.ratio(target, weights))
            if self.inputs.labels is not None:
                self.probe_losses.append(probe.probe_loss(target, weights, self.inputs.labels))


class StudentPass(TrainingPass):
    """Carrier `student`: the task loss trains the student alone, and the fusion learns to explain the student."""

    runs_teachers = True

    def run_layer(self, place: Place) -> None:
        """Match the student with the fused teachers, both of which the distillation loss trains."""
        matches_features_alone = set(self.distillation.config.layer_objectives) == {"features"}
        low_rank = place.low_rank() if matches_features_alone else None
        if low_rank is None:
            self.match(self.updates_of(place, place.student_output), self.fuse(place))
            return
        self._note_attention(place.fusion, low_rank.names, low_rank.attention)
        weights, _ = self.token_weights(place.fusion, low_rank.attention)
        matches = {"features": low_rank.updates.match(weights, place.query_states)}
        self.layers.append(LayerTerms(len(self.calls), len(weights), place.fusion.layer_weight, matches))


class FusedPass(TrainingPass):
    """Carrier `fused`: each layer passes the fused output on, so that the task loss trains the fusion."""

    runs_teachers = True
    keeps_graph = True

    def run_layer(self, place: Place) -> torch.Tensor:
        """Match the student with the fused output, and pass the fused output on."""
        fused_output = self.fuse(place, with_student=True)  # (B, T, d)
        self.match(self.updates_of(place, place.student_output), fused_output.detach())
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

    def match(self, student: Updates, target: torch.Tensor) -> None:
        """Keep the fused output."""
        self.updates.append(student._replace(output=target))


class DualStudentPass(TrainingPass):
    """Second pass of the carrier `dual`: the student alone, on its own states."""

    runs_teachers = True
    keeps_graph = True

    def run_layer(self, place: Place) -> None:
        """Keep the student's update."""
        self.updates.append(self.updates_of(place, place.student_output))


TRAINING_PASSES = {"student": StudentPass, "fused": FusedPass, "mixed": MixedPass, "dual": DualStudentPass}
