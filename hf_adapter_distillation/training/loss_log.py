"""The means of the loss terms between two logs, and the norms of gradients."""

from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from adapters import ModelAdaptersMixin
from torch import nn
from torch.nn.utils import get_total_norm

from ..composition import AdapterDistillation
from ..method.distillation import DistillationRecord, distillation_of
from ..method.parameters import parameter_roles


class LoggedTerms:
    """Sums of the loss terms since the last log, and norms of the last step's gradients.

    Args:
        accelerator: Returns the accelerator of the training; each trial of a search for hyperparameters makes its own.
    """

    def __init__(self, accelerator: Callable[[], Accelerator]) -> None:
        self.accelerator = accelerator
        self.trained: dict[str, list[nn.Parameter]] = {}
        self.of_start: dict[str, float] = {}  # values for the first log
        self.stage = 1  # of the last step
        self.clear()

    def begin(self, model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
        """Begin a training: forget all sums, note the teachers' weights, and collect the parameters of each role."""
        self.clear()
        self.of_start = {}
        if (weights := distillation_of(model, block.student).weights) is not None:
            by_key = {f"teacher_weight/{name}": weight for name, weight in weights.mean().items()}
            self.of_start = {key: round(value, 4) for key, value in {"teacher_gain": weights.gain, **by_key}.items()}
        self.trained = {}
        role_of = parameter_roles(model, block)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.trained.setdefault(role_of[name].split()[0], []).append(parameter)

    def clear(self) -> None:
        """Forget all sums."""
        self.norms: dict[str, torch.Tensor] = {}
        self.sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.accelerator().device))
        self.attention: dict[tuple[str, ...], torch.Tensor] = {}

    def note(
        self, loss: torch.Tensor, record: DistillationRecord, part: float, share: float, loss_factor: float
    ) -> None:
        """Add the terms of a micro-batch with labels, and its loss as Trainer reports it, detached.

        `part` is the share of the micro-batch in an optimizer step, `share` its share in the distillation loss, and
        `loss_factor` the factor of the model's loss in the loss of the step.
        """
        self.sums["steps"] += part
        if record.distillation_loss is None:  # the teachers did not run
            self.sums["task_loss"] += loss
            return
        if record.fused_task_loss is not None:
            fused_task_loss = loss_factor * record.fused_task_loss
            loss = loss - fused_task_loss
            self.sums["fused_task_loss"] += fused_task_loss
        self.sums["task_loss"] += loss
        self.sums["steps_with_teachers"] += part
        self.note_distillation(record, part * share)

    def note_distillation(self, record: DistillationRecord, part: float) -> None:
        """Add the distillation terms of a micro-batch with a share `part` in the distillation loss of a step."""
        assert record.distillation_loss is not None
        assert record.fusion_regularization is not None
        self.sums["distillation_loss"] += part * record.distillation_loss
        self.sums["fusion_regularization"] += part * record.fusion_regularization
        for name, value in record.terms.items():
            self.sums[name] += part * value
        for names, weights in record.attention.values():
            self.attention[names] = self.attention.get(names, 0.0) + part * weights / len(record.attention)

    def note_gradients(self) -> None:
        """Note the norms of the gradients of a step, after its last micro-batch and before clipping.

        A role without gradients, such as the fusion in stage 1, has no norm. All processes have the same gradients.
        """
        scaler = self.accelerator().scaler  # of float16, which Trainer takes out of the gradients where it clips them
        scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.accelerator().device))
        gradients = {role: [p.grad for p in ps if p.grad is not None] for role, ps in self.trained.items()}
        self.norms = {role: get_total_norm(grads) / scale for role, grads in gradients.items() if grads}

    def take_means(self) -> dict[str, float]:
        """Return the means per step since the last call, over all processes, and forget all sums.

        `task_loss` is the mean over all steps; the other terms and `attention/<name>` are means over the steps with
        teachers. `stage` and `grad_norm/<part>` are those of the last step. The first call of a training has
        `teacher_gain` and `teacher_weight/<name>`, too, if teachers were weighed. Empty without steps.
        """
        own = {name: total.item() for name, total in self.sums.items()}
        for names, total in self.attention.items():
            for name, weight in zip(names, total.tolist(), strict=True):
                own[f"attention/{name}"] = own.get(f"attention/{name}", 0.0) + weight
        # One call, whatever a process has summed: with a call for each name, other names would let it wait for ever.
        of_processes = gather_object([own])
        sums: dict[str, float] = defaultdict(float)
        for part in of_processes:
            for name, total in part.items():
                sums[name] += total / len(of_processes)
        if not sums:
            return {}
        norms = {f"grad_norm/{role}": norm.item() for role, norm in self.norms.items()}
        self.clear()
        with_teachers = sums.pop("steps_with_teachers", 0)
        means = {"task_loss": round(sums.pop("task_loss") / sums.pop("steps"), 6)}
        means |= {name: round(total / with_teachers, 6) for name, total in sums.items()}
        of_start, self.of_start = self.of_start, {}
        return of_start | means | norms | {"stage": self.stage}
