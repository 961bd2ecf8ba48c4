"""A training forward pass from the outside: run the model with a pass, then let its terms ride on the output."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from adapters import ModelAdaptersMixin
from transformers.utils import logging

from .._compat import ForwardContext, named_arguments
from ..composition import block_of, running_setup
from .answers import AnswerMixture, answer_loss, answer_mask
from .calls import masks_of, number_of_sequences
from .distillation import DEFAULTS, Distillation, StageSettings, distillation_of, distillations
from .embeddings import EnsemblePass, SimilarityLoss, last_hidden_state
from .heads import check_objectives, kind_of_labels, predicts_next, text_head
from .layer_pass import LayerPass, PassInputs
from .logit_losses import CrossTaskLoss, LogitLoss, logit_matching_loss
from .losses import token_weights
from .predictions import calibrated, match_logits, run_teachers, scores, teacher_logits, without_dropout
from .term_gradient import carry
from .terms import sum_terms
from .training_pass import TRAINING_PASSES, DualFusedPass, DualStudentPass, TrainingPass, Updates
from .whole_layers import prepare_reruns

logger = logging.get_logger(__name__)


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
        contexts = ForwardContext.get_contexts()
        depth = len(contexts)
        try:
            return self.original(context, self.model, self.forward, *self.args, **self.kwargs)
        except BaseException:
            del contexts[depth:]  # that of a call of the base model
            raise

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
    """Run a model's forward; in training the distillation terms ride on its output.

    Evaluation, and training of anything but a distillation block, runs only `original`, which is adapters' own
    `ForwardContext._call_forward`.

    Raises:
        RuntimeError: If the student's teachers are not chosen from their pool yet.
    """
    block = block_of(running_setup(model.adapters_config))
    distillation = distillations(model.adapters_config).get(block.student) if block is not None else None
    training = model.training and torch.is_grad_enabled()
    if block is None or distillation is None or not (training or distillation.inspection):
        return original(context, model, forward, *args, **kwargs)

    if distillation.candidates and not distillation.inspection:
        raise RuntimeError(
            f"The teachers of {block.student!r} are not chosen from their pool yet; call had.choose_teachers(model, "
            "batches) first, or train with had.DistillationTrainer."
        )
    _share_parameters(context, model)
    layer_pass = distillation.inspection or _training_pass(distillation)
    named = named_arguments(model, args, kwargs)
    returns_dict = named.get("return_dict")
    returns_dict = model.config.use_return_dict if returns_dict is None else returns_dict
    returns_tuple = _reads_output(distillation) and not returns_dict
    if returns_tuple:
        args, kwargs = (), named | {"return_dict": True}
    call = _Call(original, type(context), model, forward, args, kwargs)
    runs_ensemble = distillation.settings.enabled and "similarity" in distillation.config.objectives
    runs_layers_again = distillation.level == "layer" and (layer_pass.runs_teachers or runs_ensemble)
    reruns = prepare_reruns(model, block, call.new_context) if runs_layers_again else {}
    masks = masks_of(model, named, is_half=distillation.halves is not None)
    layer_pass.begin(PassInputs(block, masks, named.get("labels"), reruns))
    if not isinstance(layer_pass, TrainingPass):
        return call.run(context, layer_pass)

    _warn_of_defaults(distillation, block.student)
    if isinstance(layer_pass, DualStudentPass):
        output = _run_both(call, context, layer_pass)
    else:
        output = call.run(context, layer_pass)
    if distillation.settings.enabled and distillation.config.output_objectives:
        check_objectives(model, block)
        _match_predictions(layer_pass, call, named, output)
    if distillation.halves is None:
        output = _finish(layer_pass, output, sum(layer_pass.calls) or number_of_sequences(named))
    else:
        distillation.halves.append(layer_pass)
    return output.to_tuple() if returns_tuple else output


def _reads_output(distillation: Distillation) -> bool:
    """Return whether the pass reads parts of the model's output by their names."""
    config = distillation.config
    return distillation.settings.enabled and bool(config.output_objectives or config.carrier == "dual")


def _share_parameters(context: ForwardContext, model: ModelAdaptersMixin) -> None:
    """Give a context the shared parameters of all adapters; adapters gives it those of the active ones only."""
    if shared := model.base_model.shared_parameters:
        vars(context)["shared_parameters"] = dict(shared)


def _warn_of_defaults(distillation: Distillation, student: str) -> None:
    """Say once how a training that has never set the settings distils."""
    if distillation.settings is DEFAULTS and not torch.compiler.is_compiling():
        distillation.settings = StageSettings()
        logger.warning(
            f"{student!r} is distilled from its teachers in each training step, with weight {DEFAULTS.weight:g}. For "
            "two stages, a fitted start, logged terms and checkpoints, take had.DistillationTrainer, the trainers of "
            "hf_adapter_distillation.integrations, or put had.DistillationMixin before the class of your trainer. Set "
            "had.distillation_of(model).settings = had.StageSettings() to silence this."
        )


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
    fused_updates = _by_run(fused_pass.updates)
    for run, student in _by_run(student_pass.updates).items():
        if run in fused_updates:  # layerdrop may have left it out
            student_pass.match(student, fused_updates[run].output)
    for name in (name for name in output if name.endswith("logits")):
        weights = _logit_weights(student_pass, call.model, name, output[name])
        student_pass.logit_loss += logit_matching_loss(output[name], fused_output[name], weights)
    student_pass.fused_task_loss = fused_output["loss"]
    output["loss"] = output["loss"] + fused_output["loss"].detach()  # the gradient is carried
    student_pass.fusions, student_pass.attention = fused_pass.fusions, fused_pass.attention
    return output


def _by_run(updates: Iterable[Updates]) -> dict[tuple[tuple[int, str], int], Updates]:
    """Return updates by their call, their place, and how often it ran before, as layers that are shared do."""
    runs: Counter[tuple[int, str]] = Counter()
    found = {}
    for update in updates:
        place = (update.call, update.fusion.location)
        found[place, runs[place]] = update
        runs[place] += 1
    return found


def _match_predictions(current: TrainingPass, call: _Call, named: dict[str, Any], output: Any) -> None:
    """Compute the objectives of outputs: of embeddings, and of predictions, stored ones or those of another run."""
    config, settings = current.distillation.config, current.distillation.settings
    model, block = call.model, current.inputs.block
    if "similarity" in config.objectives:
        current.output_losses["similarity"] = _match_similarities(current, call, output)
    if not config.head_objectives:
        return
    if not any(name.endswith("logits") for name in output.keys()):  # noqa: SIM118 - several heads iterate over outputs
        raise ValueError(
            f"The objectives of predictions need one active head, not {model.active_head}; set model.active_head = "
            f"{block.student!r}."
        )
    loss = LogitLoss(config.temperature, config.beta)
    if text_head(model, block.student) is not None:  # for which `logits` is the only such objective
        current.output_losses["logits"] = _match_answers(current, call, named, output["logits"], loss)
        return
    stored = None if settings.predictions is None else settings.predictions.get(named)
    if stored is None:
        teachers = teacher_logits(model, block, call.run_again)
    else:
        teachers = {"logits": stored}
    if "logits" in config.objectives:
        kind, shares = kind_of_labels(model, block.student), current.distillation.shares(block.teachers)
        losses = []
        for name, of_teachers in teachers.items():
            weights = _logit_weights(current, model, name, output[name])
            losses.append(match_logits(output[name], of_teachers, weights, kind, loss, shares))
        current.output_losses["logits"] = torch.stack(losses).mean()
    if "cross_task" in config.objectives:
        student_scores, teacher_scores = scores(output["logits"]), scores(teachers["logits"])  # (B,), (N, B)
        if settings.calibration is not None:
            teacher_scores = calibrated(teacher_scores, settings.calibration)
        cross_task = CrossTaskLoss(config.temperature)
        current.output_losses["cross_task"] = cross_task(student_scores, teacher_scores, current.inputs.labels)


def _match_answers(
    current: TrainingPass, call: _Call, named: dict[str, Any], logits: torch.Tensor, loss: LogitLoss
) -> torch.Tensor:
    """Run the teachers, and match their mean distribution on the tokens of the answer, without labels on all."""
    model, block, labels = call.model, current.inputs.block, named.get("labels")
    if labels is None:
        weights = _logit_weights(current, model, "logits", logits)  # (B, T)
        mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if weights is None else weights > 0
    else:
        mask = answer_mask(labels.to(logits.device), predicts_next(model, block.student))  # (B, T)
    if not model.config.is_encoder_decoder:  # which makes the inputs of its decoder from the labels
        named = {name: value for name, value in named.items() if name != "labels"}
    teachers_call = replace(call, args=(), kwargs=named | {"return_dict": True})
    mixture, shares = AnswerMixture(mask, loss.temperature), iter(current.distillation.shares(block.teachers))
    run_teachers(model, block, lambda: mixture.add(teachers_call.run_again()["logits"], next(shares)))
    return answer_loss(logits, mixture, loss)


def _match_similarities(current: TrainingPass, call: _Call, output: Any) -> torch.Tensor:
    """Run the ensemble of the teachers, and match the similarities of the embeddings of the batch."""
    distillation = current.distillation
    student = last_hidden_state(output)  # (B, T, d)
    mask = current.inputs.masks[call.model.config.is_encoder_decoder]
    mask = torch.ones(student.shape[:2], device=student.device) if mask is None else mask.to(student.device)
    ensemble_pass = EnsemblePass()
    ensemble_pass.begin(current.inputs)
    with torch.no_grad(), without_dropout(call.model):
        ensemble = last_hidden_state(call.run_again(ensemble_pass))
    pool, temperature = distillation.pool, distillation.config.temperature
    return SimilarityLoss(temperature)(pool(student, mask), pool(ensemble, mask))


def _logit_weights(
    current: TrainingPass, model: ModelAdaptersMixin, name: str, logits: torch.Tensor
) -> torch.Tensor | None:
    """Return the weights of the tokens that logits belong to, (batch, seq_len); None for logits of sequences."""
    mask = current.inputs.masks[model.config.is_encoder_decoder]
    if mask is None or logits.shape[:2] != mask.shape:
        return None
    of_tokens = logits.dim() > 2 or name in ("start_logits", "end_logits")  # the others are (batch, labels)
    return token_weights((mask != 0).to(logits.device)) if of_tokens else None


def _finish(current: TrainingPass, output: Any, sequences: int) -> Any:
    """Let the terms of a pass ride on its output, add their record to the step, and return the output."""
    distillation = current.distillation
    settings, is_compiling = distillation.settings, torch.compiler.is_compiling()
    has_ended = distillation.step.ended and distillation.step.sequences >= settings.sequences
    if is_compiling or has_ended:  # compiled code cannot tell when a step ends
        distillation.begin_step()
    step = distillation.step
    terms, record = sum_terms(current)
    step.add(record, sequences, settings.sequences)
    if settings.enabled:
        distillation.has_run = True
        if current.runs_teachers:
            distillation.has_new_fusion = False
    if not terms.requires_grad:
        return output
    scale = 1.0 if settings.scale is None else settings.scale
    factor = sequences * torch.as_tensor(scale, dtype=None if torch.is_tensor(scale) else torch.float64)
    output, zero = carry(output, terms, factor, step.total, follows_loss=settings.scale is None)
    if current.fused_task_loss is not None:
        output, _ = carry(output, current.fused_task_loss, factor, step.total, follows_loss=True)
    if not is_compiling:
        zero.register_hook(step.end)
    return output


def begin_halves(student: str, model: ModelAdaptersMixin, args: tuple) -> None:
    """Begin to collect the passes of encoder and decoder; a hook before the forward of an `EncoderDecoderModel`.

    adapters gives that model no context of its own, and runs each half as a model.
    """
    distillation_of(model, student).halves = []


def join_halves(student: str, model: ModelAdaptersMixin, args: tuple, output: Any) -> Any:
    """Let the terms of both halves ride on the output; a hook behind the forward of an `EncoderDecoderModel`."""
    distillation = distillation_of(model, student)
    halves, distillation.halves = distillation.halves, None
    if not halves:
        return None
    whole, *others = halves
    for half in others:
        whole.layers += half.layers
        whole.fusions |= half.fusions
        whole.attention |= half.attention
    return _finish(whole, output, max((layer.sequences for layer in whole.layers), default=1))
