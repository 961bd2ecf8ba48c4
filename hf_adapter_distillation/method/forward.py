"""From what a forward pass has gathered to the terms of its loss."""

from typing import TYPE_CHECKING, Any

import torch
from adapters import ModelAdaptersMixin

from .distillation import DistillationRecord
from .heads import kind_of_labels
from .losses import logit_matching_loss, token_weights, value_regularization
from .predictions import output_losses

if TYPE_CHECKING:
    from .layer_pass import DistillationPass


def match_passes(
    current: "DistillationPass", output: Any, fused: "DistillationPass", fused_output: Any, of_decoder: bool
) -> None:
    """Gathers the terms of the carrier `dual` in the student's pass: each layer's output, logits and both task losses.

    Raises:
        ValueError: If the outputs have no loss, which the fusion would have to learn from.
    """
    if not isinstance(output, dict) or output.get("loss") is None:
        raise ValueError(
            "The carrier 'dual' needs the loss of the model's output; pass labels, or choose the carrier 'mixed'."
        )
    for (fusion, student_output), (_, target) in zip(current.outputs, fused.outputs, strict=True):
        current.match(fusion, student_output, target)
    for name in (name for name in output if name.endswith("logits")):
        weights = _token_weights(current, name, output[name], of_decoder)
        current.logit_loss += logit_matching_loss(output[name], fused_output[name], weights)
    current.fused_task_loss = fused_output["loss"]
    current.fusions, current.attention = fused.fusions, fused.attention


def match_predictions(
    current: "DistillationPass", model: ModelAdaptersMixin, output: Any, teachers: dict[str, torch.Tensor]
) -> None:
    """Computes the objectives of what the heads predict."""
    config, student = current.distillation.config, {name: output[name] for name in teachers}
    of_decoder = model.config.is_encoder_decoder
    current.output_losses = output_losses(
        config.output_objectives,
        config.temperature,
        kind_of_labels(model, current.block.student),
        student,
        teachers,
        {name: _token_weights(current, name, logits, of_decoder) for name, logits in student.items()},
        current.labels,
        current.distillation.calibration,
    )


def _token_weights(
    current: "DistillationPass", name: str, logits: torch.Tensor, of_decoder: bool
) -> torch.Tensor | None:
    """The weights of the tokens that logits belong to, (batch, seq_len); None for logits of sequences."""
    mask = current.masks[of_decoder]
    if mask is None or logits.shape[:2] != mask.shape:
        return None
    of_tokens = logits.dim() > 2 or name in ("start_logits", "end_logits")  # the others are (batch, labels)
    return token_weights((mask != 0).to(logits.device)) if of_tokens else None


def _means(current: "DistillationPass") -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The unweighted mean of each objective, and the weighted loss of each layer, (n_layers,), detached."""
    weights = current.distillation.config.layer_objectives
    if not current.losses or not weights:
        return current.output_losses, None
    layers = {name: torch.stack([losses[name] for losses in current.losses]) for name in weights}  # (L,) each
    of_layers = torch.stack([weight * layers[name].detach() for name, weight in weights.items()]).sum(dim=0)  # (L,)
    return {name: losses.mean() for name, losses in layers.items()} | current.output_losses, of_layers


def fold(current: "DistillationPass", output: Any) -> DistillationRecord:
    """Adds the gathered terms to the loss of the output, if it has one.

    Args:
        current: The pass.
        output: The output of the model.

    Returns:
        What was added.
    """
    if not current.training:
        return DistillationRecord(torch.zeros(()), False, None, None, None, {}, observed=current.observed)
    distillation, fusions = current.distillation, current.fusions.values()
    config, added = distillation.config, torch.zeros(())
    if not current.losses or config.carrier == "mixed" or "task_specific" in config.objectives:
        # Each parameter of the fusion stays in the graph of each step, or DistributedDataParallel waits for it.
        added = sum((parameter.sum() * 0.0 for fusion in fusions for parameter in fusion.parameters()), added)
    means, layer_losses = _means(current)
    distillation_loss = regularization = None
    terms: dict[str, torch.Tensor] = {}
    if means:
        weighted = [weight * means[name] for name, weight in config.objectives.items()]
        distillation_loss = sum(weighted[1:], weighted[0]) + current.logit_loss
        regularization = torch.zeros_like(distillation_loss)
        if distillation.fuses:
            regularization = distillation.regularization * value_regularization(f.value.weight for f in fusions)
        added = added + distillation.scale * (distillation.weight * distillation_loss + regularization)
        distillation_loss, regularization = distillation_loss.detach(), regularization.detach()
        if len(means) > 1:
            terms = {f"distillation_loss/{name}": mean.detach() for name, mean in means.items()}
    if current.ratios:
        terms["task_specific_ratio"] = torch.stack(current.ratios).mean()
    if current.probe_losses:
        probe_loss = torch.stack(current.probe_losses).mean()
        terms["probe_loss"] = probe_loss.detach()
        added = added + distillation.scale * probe_loss
    fused_task_loss = current.fused_task_loss
    if fused_task_loss is not None:
        added = added + fused_task_loss
        fused_task_loss = fused_task_loss.detach()
    in_loss = isinstance(output, dict) and output.get("loss") is not None
    if in_loss:
        output["loss"] = output["loss"] + added
        added = added.detach()
    elif isinstance(output, dict):
        # DistributedDataParallel takes parameters that no output depends on for unused.
        for name, value in output.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                output[name] = value + 0.0 * added
                break
    return DistillationRecord(
        added=added,
        in_loss=in_loss,
        distillation_loss=distillation_loss,
        fusion_regularization=regularization,
        fused_task_loss=fused_task_loss,
        attention=current.attention,
        layer_losses=layer_losses,
        terms=terms,
    )
