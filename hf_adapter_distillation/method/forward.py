"""A training forward pass from the outside: run the model with a pass, then fold its terms into the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from adapters import AdapterSetup, ModelAdaptersMixin

from .._compat import ForwardContext, forward_arguments
from ..composition import block_of
from .distillation import Distillation, DistillationRecord, distillation_of, distillations
from .heads import check_objectives, kind_of_labels
from .layer_pass import LayerPass, PassInputs
from .losses import CrossTaskLoss, logit_matching_loss, token_weights, value_regularization
from .predictions import calibrated, match_logits, scores, teacher_logits
from .training_pass import TRAINING_PASSES, DualFusedPass, DualStudentPass, TrainingPass
from .whole_layers import prepare_reruns


@dataclass
class _Call:
    """One call of a model, which can run in several contexts."""

    original: Callable
    context_type: type[ForwardContext]
    model: ModelAdaptersMixin
    forward: Callable
    args: tuple
    kwargs: dict[str, Any]

    def new_context(self) -> ForwardContext:
        """Return a new context for another run."""
        context = self.context_type(self.model, *self.args, **self.kwargs)
        _share_parameters(context, self.model)
        return context

    def run(self, context: ForwardContext, layer_pass: LayerPass | None) -> Any:
        """Run the model in a context, with a pass at its layers or without."""
        vars(context)["distillation_pass"] = layer_pass
        return self.original(context, self.model, self.forward, *self.args, **self.kwargs)

    def run_again(self, layer_pass: LayerPass | None = None) -> Any:
        """Run the model in a new context."""
        with self.new_context() as context:
            return self.run(context, layer_pass)


def call_with_distillation(
    original: Callable,
    context: ForwardContext,
    model: ModelAdaptersMixin,
    forward: Callable,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a model's forward, and fold the terms of its layers into the loss of its output.

    Evaluation, and training of anything but a distillation block, runs only `original`, which is adapters' own
    `ForwardContext._call_forward`.
    """
    block = block_of(AdapterSetup.get_context_adapter_setup() or model.adapters_config.active_setup)
    distillation = distillations(model.adapters_config).get(block.student) if block is not None else None
    training = model.training and torch.is_grad_enabled()
    if block is None or distillation is None or not (training or distillation.inspection):
        return original(context, model, forward, *args, **kwargs)

    _share_parameters(context, model)
    call = _Call(original, type(context), model, forward, args, kwargs)
    layer_pass = distillation.inspection or _training_pass(distillation)
    named = dict(zip(forward_arguments(model), args, strict=False)) | kwargs if args else kwargs
    runs_layers_again = distillation.level == "layer" and layer_pass.runs_teachers
    reruns = prepare_reruns(call.new_context, block) if runs_layers_again else {}
    masks = _masks(model, named, is_half=distillation.halves is not None)
    layer_pass.begin(PassInputs(block, masks, named.get("labels"), reruns))
    if not isinstance(layer_pass, TrainingPass):
        return call.run(context, layer_pass)

    if isinstance(layer_pass, DualStudentPass):
        output = _run_both(call, context, layer_pass)
    else:
        output = call.run(context, layer_pass)
    if distillation.settings.enabled and distillation.config.output_objectives:
        check_objectives(model, block)
        _match_predictions(layer_pass, call, named, output)
    if distillation.halves is None:
        distillation.record = fold(layer_pass, output)
    else:
        distillation.halves.append(layer_pass)
    return output


def _share_parameters(context: ForwardContext, model: ModelAdaptersMixin) -> None:
    """Give a context the shared parameters of all adapters; adapters gives it those of the active ones only."""
    if shared := model.base_model.shared_parameters:
        vars(context)["shared_parameters"] = dict(shared)


def _training_pass(distillation: Distillation) -> TrainingPass:
    """Return the pass of the stage and the carrier."""
    config = distillation.config
    if not distillation.settings.enabled or (config.carrier == "student" and not config.layer_objectives):
        return TrainingPass(distillation)
    return TRAINING_PASSES[config.carrier](distillation)


def _run_both(call: _Call, context: ForwardContext, student_pass: DualStudentPass) -> Any:
    """Run both passes of the carrier `dual`; match each layer's output, the logits, and add the fused task loss."""
    fused_pass = DualFusedPass(student_pass.distillation)
    fused_pass.begin(student_pass.inputs)
    fused_output = call.run_again(fused_pass)
    # The head for question answering of adapters 1.3.0 clamps them in place, in the graph of the first pass.
    for name in ("start_positions", "end_positions"):
        if call.kwargs.get(name) is not None:
            call.kwargs[name] = call.kwargs[name].clone()
    output = call.run(context, student_pass)
    if not isinstance(output, dict) or output.get("loss") is None:
        raise ValueError(
            "The carrier 'dual' needs the loss of the model's output; pass labels, or choose the carrier 'mixed'."
        )
    for (fusion, student_output), (_, target) in zip(student_pass.updates, fused_pass.updates, strict=True):
        student_pass.match(fusion, student_output, target)
    for name in (name for name in output if name.endswith("logits")):
        weights = _logit_weights(student_pass, call.model, name, output[name])
        student_pass.logit_loss += logit_matching_loss(output[name], fused_output[name], weights)
    student_pass.fused_task_loss = fused_output["loss"]
    student_pass.fusions, student_pass.attention = fused_pass.fusions, fused_pass.attention
    return output


def _match_predictions(current: TrainingPass, call: _Call, named: dict[str, Any], output: Any) -> None:
    """Compute the objectives of predictions, from stored predictions of the teachers or by running them."""
    config, settings = current.distillation.config, current.distillation.settings
    model, block = call.model, current.inputs.block
    stored = None if settings.predictions is None else settings.predictions.get(named)
    if stored is None:
        teachers = teacher_logits(model, block, call.run_again)
    else:
        teachers = {"logits": stored}
    if "logits" in config.objectives:
        kind = kind_of_labels(model, block.student)
        losses = []
        for name, of_teachers in teachers.items():
            weights = _logit_weights(current, model, name, output[name])
            losses.append(match_logits(output[name], of_teachers, weights, kind, config.temperature))
        current.output_losses["logits"] = torch.stack(losses).mean()
    if "cross_task" in config.objectives:
        student_scores, teacher_scores = scores(output["logits"]), scores(teachers["logits"])  # (B,), (N, B)
        if settings.calibration is not None:
            teacher_scores = calibrated(teacher_scores, settings.calibration)
        loss = CrossTaskLoss(config.temperature)
        current.output_losses["cross_task"] = loss(student_scores, teacher_scores, current.inputs.labels)


def _logit_weights(
    current: TrainingPass, model: ModelAdaptersMixin, name: str, logits: torch.Tensor
) -> torch.Tensor | None:
    """Return the weights of the tokens that logits belong to, (batch, seq_len); None for logits of sequences."""
    mask = current.inputs.masks[model.config.is_encoder_decoder]
    if mask is None or logits.shape[:2] != mask.shape:
        return None
    of_tokens = logits.dim() > 2 or name in ("start_logits", "end_logits")  # the others are (batch, labels)
    return token_weights((mask != 0).to(logits.device)) if of_tokens else None


def fold(current: TrainingPass, output: Any) -> DistillationRecord:
    """Add the terms of a pass to the loss of the output, if it has one, and return the record of what was added."""
    config, settings = current.distillation.config, current.distillation.settings
    added = _parameters_in_graph(current)
    record = DistillationRecord(added, current.attention)
    means, record.layer_losses = _means(current)
    if means:
        weighted = [weight * means[name] for name, weight in config.objectives.items()]
        distillation_loss = sum(weighted[1:], weighted[0]) + current.logit_loss
        regularization = torch.zeros_like(distillation_loss)
        if current.runs_teachers:
            values = (fusion.value.weight for fusion in current.fusions.values())
            regularization = settings.regularization * value_regularization(values)
        added = added + settings.scale * (settings.weight * distillation_loss + regularization)
        record.distillation_loss, record.fusion_regularization = distillation_loss.detach(), regularization.detach()
        if len(means) > 1:
            record.terms = {f"distillation_loss/{name}": mean.detach() for name, mean in means.items()}
    if current.ratios:
        record.terms["task_specific_ratio"] = torch.stack(current.ratios).mean()
    if current.probe_losses:
        probe_loss = torch.stack(current.probe_losses).mean()
        record.terms["probe_loss"] = probe_loss.detach()
        added = added + settings.scale * probe_loss
    if current.fused_task_loss is not None:
        added = added + current.fused_task_loss
        record.fused_task_loss = current.fused_task_loss.detach()
    record.in_loss = _join(added, output)
    record.added = added.detach() if record.in_loss else added
    return record


def _parameters_in_graph(current: TrainingPass) -> torch.Tensor:
    """Return 0, with the fusion's parameters in its graph if DistributedDataParallel could wait for one in vain."""
    zero, config = torch.zeros(()), current.distillation.config
    if current.losses and config.carrier != "mixed" and "task_specific" not in config.objectives:
        return zero
    parameters = (parameter for fusion in current.fusions.values() for parameter in fusion.parameters())
    return sum((parameter.sum() * 0.0 for parameter in parameters), zero)


def _means(current: TrainingPass) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the unweighted mean of each objective, and the weighted loss of each layer, (n_layers,), detached."""
    weights = current.distillation.config.layer_objectives
    if not current.losses or not weights:
        return current.output_losses, None
    layers = {name: torch.stack([losses[name] for losses in current.losses]) for name in weights}  # (L,) each
    of_layers = torch.stack([weight * layers[name].detach() for name, weight in weights.items()]).sum(dim=0)  # (L,)
    return {name: losses.mean() for name, losses in layers.items()} | current.output_losses, of_layers


def _join(added: torch.Tensor, output: Any) -> bool:
    """Add a term to the loss of an output; return False if the output has no loss."""
    if not isinstance(output, dict):
        return False
    if output.get("loss") is not None:
        output["loss"] = output["loss"] + added
        return True
    # DistributedDataParallel takes parameters that no output depends on for unused.
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            output[name] = value + 0.0 * added
            break
    return False


def begin_halves(student: str, model: ModelAdaptersMixin, args: tuple) -> None:
    """Begin to collect the passes of encoder and decoder; a hook before the forward of an `EncoderDecoderModel`.

    adapters gives that model no context of its own, and runs each half as a model.
    """
    distillation_of(model, student).halves = []


def fold_halves(student: str, model: ModelAdaptersMixin, args: tuple, output: Any) -> None:
    """Fold the terms of both halves into the loss; a hook behind the forward of an `EncoderDecoderModel`."""
    distillation = distillation_of(model, student)
    halves, distillation.halves = distillation.halves, None
    if not halves:
        return
    whole, *others = halves
    for half in others:
        whole.losses += half.losses
        whole.fusions |= half.fusions
        whole.attention |= half.attention
    distillation.record = fold(whole, output)


def _masks(model: ModelAdaptersMixin, named: dict[str, Any], is_half: bool) -> dict[bool, torch.Tensor | None]:
    """Return the padding masks by `TeacherFusion.in_decoder`."""
    encoder, decoder, labels = (named.get(name) for name in ("attention_mask", "decoder_attention_mask", "labels"))
    if is_half:
        return {False: named.get("encoder_attention_mask", encoder), True: encoder}
    if decoder is not None or not model.config.is_encoder_decoder:
        return {False: encoder, True: decoder}
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        decoder = labels != -100  # the decoder's inputs are the shifted labels
    elif encoder is not None and all(named.get(f"decoder_{name}") is None for name in ("input_ids", "inputs_embeds")):
        decoder = encoder  # ... the shifted inputs of the encoder, whose last token is cut off in the longest row
    return {False: encoder, True: decoder}
