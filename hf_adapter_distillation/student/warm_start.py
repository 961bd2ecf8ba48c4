"""Start of a student: the weighted mean of its teachers' weights, then of their updates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from adapters import AdapterConfig, ConfigUnion, LoRAConfig, ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from torch import nn
from transformers.utils import logging

from .._compat import LoRA, heads_of
from ..method.distillation import distillation_of
from ..method.heads import are_alike, states_of_heads
from ..method.layer_pass import LayerPass, Place
from ..method.layers import AdapterPlace, adapter_layers, adapters_of
from ..method.losses import in_float64
from ..method.nonfinite import find_overflow, start_message
from ..method.predictions import without_dropout
from ..method.stacking import ends_in_up_projection
from ..method.weights import weight_of_none
from .digests import adapter_weights, rounded_digests, value_digest
from .least_squares import UpProjectionFit

logger = logging.get_logger(__name__)

START_EXAMPLES = 1024  # of the training data


def _mean(states: Sequence[Mapping[str, torch.Tensor]], shares: Sequence[float]) -> dict[str, torch.Tensor]:
    if len(set(shares)) == 1:
        return {key: torch.stack([state[key] for state in states]).mean(dim=0) for key in states[0]}

    def mean(key: str) -> torch.Tensor:
        values = in_float64(torch.stack([state[key] for state in states]))
        return torch.tensordot(values.new_tensor(shares), values, dims=1)

    return {key: mean(key) for key in states[0]}


def _shares(teachers: Sequence[str], weights: Mapping[str, float] | None) -> list[float]:
    """Return the share of each teacher in a mean; equal ones without weights."""
    if weights is None:
        return [1 / len(teachers)] * len(teachers)
    total = sum(weights[name] for name in teachers)
    return [weights[name] / total for name in teachers]


@torch.no_grad()
def average_lora(student: LoRA, teachers: Sequence[LoRA], shares: Sequence[float]) -> None:
    r"""Set a LoRA module to the best approximation of the teachers' mean weight change by a matrix of its rank.

    .. math::
        \min_{A, B} \Big\lVert B A - \sum_n w_n B_n A_n \Big\rVert_F

    LoRA is linear, so the mean weight change gives the mean update. A truncated singular value decomposition, computed
    from the factors, is the minimum (Eckart and Young, https://doi.org/10.1007/BF02288367). The average of A times the
    average of B would differ: it is not the average of the products. The ranks may differ.
    """
    scales = [share * teacher.scaling / student.scaling for teacher, share in zip(teachers, shares, strict=True)]
    ups = [in_float64(teacher.lora_B) * scale for teacher, scale in zip(teachers, scales, strict=True)]
    up = torch.cat(ups, dim=1)  # (out, N r)
    down = torch.cat([in_float64(t.lora_A) for t in teachers])  # (N r, in)
    up_basis, up_factor = torch.linalg.qr(up)
    down_basis, down_factor = torch.linalg.qr(down.T)
    left, sizes, right = torch.linalg.svd(up_factor @ down_factor.T)
    rank = min(student.r, int((sizes > 1e-9 * sizes[0]).sum()))  # the rest of A stays random, or it could not learn
    roots = sizes[:rank].sqrt()
    student.lora_B[:, :rank] = (up_basis @ left[:, :rank] * roots).to(student.lora_B)
    student.lora_A[:rank] = (roots.unsqueeze(1) * (right[:rank] @ down_basis.T)).to(student.lora_A)
    student.lora_B[:, rank:] = 0


def start_at_average(
    model: ModelAdaptersMixin, student: str, weights: Callable[[str], Mapping[str, float]] | None = None
) -> None:
    """Set the student to the mean of its teachers' weights, if there is one; `start_head` sets the head.

    `weights` returns the weights of the teachers for the task in a module of the base model, by its name. Their sum
    may leave a share to the null teacher. By default all are equal.
    """
    distillation, config = distillation_of(model, student), model.adapters_config.get(student)
    teachers, reason = distillation.config.teachers, ""
    form = _form(config)
    forms = {name: _form(model.adapters_config.get(name)) for name in teachers}
    if others := [name for name in teachers if forms[name] != form]:
        differences = _differences(form, forms[others[0]])
        reason = f"its config is not that of teacher {others[0]!r}{differences}, so there is no average to start from"
    elif _has_factors(config, distillation.level):
        reason = "the average of the teachers' factors does not average their products"
    if reason:
        weighed = (
            ", which also leaves the teachers unweighed" if distillation.config.student_start == "weighted" else ""
        )
        logger.warning(
            f"{student!r} starts at random weights: {reason}. "
            f"Pass DistillationConfig(student_start='random') to silence this{weighed}."
        )
        return
    modules_of_teachers = adapters_of(model, teachers)
    names = {module: name for name, module in model.base_model.named_modules()}

    def weights_of(module: nn.Module) -> Mapping[str, float] | None:
        return None if weights is None else weights(names.get(module, ""))

    for place, modules in model.get_adapter(student).items():
        for location, module in modules.items():
            of_teachers = {name: held[place][location] for name, held in modules_of_teachers.items() if place in held}
            if of_teachers:
                _start_module(module, of_teachers, weights_of)
    distillation.start_digests = rounded_digests(model, student)


def _form(config: AdapterConfig) -> dict[str, Any]:
    """Return the part of a config that adapters with an average share."""
    # These keys do not change what the weights compute. A layer that some leave out has the average of the others.
    ignored = {"dropout", "init_weights", "init_weights_seed", "dtype", "leave_out"}
    if isinstance(config, LoRAConfig) and config.composition_mode == "add":
        ignored |= {"r", "alpha"}  # `average_lora` averages products
    form = {key: value for key, value in config.to_dict().items() if key not in ignored}
    if "attn_matrices" in form:
        form["attn_matrices"] = sorted(form["attn_matrices"])  # LoRA of PEFT are converted in this order
    return form


def _differences(form: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the settings in which two adapters of one method differ, for a message; "" for two methods."""
    if form.keys() != other.keys():
        return ""
    differ = [f"{key}={form[key]!r} and not {other[key]!r}" for key in form if form[key] != other[key]]
    return f" ({', '.join(differ)})"


def _has_factors(config: AdapterConfig, level: str) -> bool:
    """Return whether an adapter multiplies factors that are not averaged as a product (`average_lora` does that)."""
    if isinstance(config, ConfigUnion):
        return any(_has_factors(part, level) for part in config.configs)
    if isinstance(config, LoRAConfig):
        return level == "layer" and config.composition_mode != "scale"
    return bool(config.get("phm_layer") or config.get("orthogonality"))


def _start_module(
    student: nn.Module, teachers: Mapping[str, Any], weights_of: Callable[[nn.Module], Mapping[str, float] | None]
) -> None:
    if isinstance(student, nn.ModuleList):  # several projections with LoRA at one location
        for number, module in enumerate(student):
            _start_module(module, {name: modules[number] for name, modules in teachers.items()}, weights_of)
        return
    weights = weights_of(student)
    shares = _shares(list(teachers), weights)
    if isinstance(student, LoRA):
        if weights is not None:  # the null teacher takes its share of the mean
            here, total = sum(weights[name] for name in teachers), sum(weights.values())
            of_all = max(1.0, total) * here / (here + weight_of_none([total]))
            shares = [share * of_all for share in shares]
        average_lora(student, list(teachers.values()), shares)
    else:
        student.load_state_dict(_mean([module.state_dict() for module in teachers.values()], shares))


def is_at_average(model: ModelAdaptersMixin, student: str) -> bool:
    """Return whether a student is still at the average of its teachers, where it started; a cast does not move it."""
    starts = distillation_of(model, student).start_digests
    return bool(starts) and value_digest(model, student) in starts


def start_head(
    model: ModelWithFlexibleHeadsAdaptersMixin, student: str, weights: Mapping[str, float] | None = None
) -> None:
    """Set the student's head to the mean of its teachers' heads, where these are alike; add it if missing.

    A student that was trained or loaded since it was added keeps its head.
    """
    distillation = distillation_of(model, student)
    teachers = distillation.config.teachers
    if any(name not in model.heads for name in teachers) or not is_at_average(model, student):
        return
    heads = [model.heads[name] for name in teachers]
    if is_new := student not in model.heads:
        if any(head.config != heads[0].config for head in heads):
            return
        distillation.added_head, distillation.head_before = True, model.active_head
        model.average_head(student, list(teachers))
    head, own_start = model.heads[student], distillation.own_start
    if are_alike([head, *heads]):
        for place, weight in _head_weights(head) if own_start and not is_new else ():
            own_start.setdefault(place, weight.clone())
        mean = _mean(states_of_heads(head, heads), _shares(teachers, weights))
        base = set(map(id, model.base_model.parameters()))  # a head for text may share its weights, which stay frozen
        own = {key: weight for key, weight in head.state_dict(keep_vars=True).items() if id(weight) not in base}
        head.load_state_dict({key: mean[key] for key in own}, strict=False)


def is_head_at_average(model: ModelAdaptersMixin, student: str, weights: Mapping[str, float] | None = None) -> bool:
    """Return whether a student's head is still the mean of its teachers' heads, where `start_head` has set it.

    Differences by the rounding of its data type do not count, so that a cast does not move it.
    """
    heads = dict(heads_of(model).items())
    teachers = distillation_of(model, student).config.teachers
    if not are_alike([heads.get(name) for name in (student, *teachers)]):
        return False
    states = states_of_heads(heads[student], [heads[name] for name in teachers])
    mean = _mean(states, _shares(teachers, weights))

    def is_mean(key: str, weight: torch.Tensor) -> bool:
        if not weight.is_floating_point():
            return torch.equal(weight, mean[key])
        largest = max(state[key].abs().max().item() for state in states)
        return bool(((weight - mean[key]).abs() <= 2 * torch.finfo(weight.dtype).eps * largest).all())

    return all(is_mean(key, weight) for key, weight in heads[student].state_dict().items())


def _head_weights(head: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights and buffers of a head with their places."""
    for key, tensor in head.state_dict().items():
        yield f"head.{key}", tensor


def keep_own_start(model: ModelAdaptersMixin, student: str) -> None:
    """Keep a copy of the weights of a new student, and of its head from `start_head` on, for `start_as_new`."""
    own_start = {place: weight.clone() for place, weight in adapter_weights(model, student)}
    distillation_of(model, student).own_start = own_start


@torch.no_grad()
def start_as_new(model: ModelAdaptersMixin, student: str) -> None:
    """Set a student, and its head, back to the weights that they had before they started at their teachers."""
    heads = dict(heads_of(model).items())
    weights = dict(adapter_weights(model, student)) | dict(_head_weights(heads[student]) if student in heads else ())
    for place, own in distillation_of(model, student).own_start.items():
        if place in weights and weights[place].shape == own.shape:  # not those of a head that was replaced since
            weights[place].copy_(own)


def can_be_fitted(model: ModelAdaptersMixin, student: str) -> bool:
    """Return whether a student's up-projections can be fitted to updates; LoRA starts at the exact mean already."""
    if distillation_of(model, student).level == "layer":
        return False
    modules = [layer.adapter_modules[student] for _, layer in adapter_layers(model, student)]
    return all(ends_in_up_projection(module) and not isinstance(module, LoRA) for module in modules)


class FittingPass(LayerPass):
    """Pass that adds each place to the fit of its up-projection, and passes the teachers' mean update on.

    Where the fusions have weights, the mean is weighted, with the null teacher.
    """

    def __init__(self) -> None:
        self.fits: dict[str, UpProjectionFit] = {}

    def run_layer(self, place: Place) -> torch.Tensor:
        """Add the tokens of one place to its fit."""
        assert isinstance(place, AdapterPlace)
        update = place.mix(place.fusion.weights_of)  # (B, T, d)
        features = place.student.adapter_down(place.student_input.hidden_states)  # (B, T, m)
        sequence_weights, _ = self.token_weights(place.fusion, update)
        fit = self.fits.setdefault(place.fusion.location, UpProjectionFit())
        fit.add(features, update / place.student.scaling, sequence_weights)
        return place.base + update


def fit_start(
    model: ModelAdaptersMixin,
    student: str,
    forward_passes: Callable[[], None],
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Move a student from the average of its teachers' weights to the average of their updates.

    The average of the weights has smaller updates than the teachers on average, since the teachers use different
    features. The student, after its `train_adapter`, keeps the averaged down-projections. Its up-projections are
    fitted to the mean of the teachers' updates by least squares, in a forward pass that passes this mean on, as
    `TeacherFusion` does before its training. No labels are used.

    Args:
        forward_passes: Runs the model on the data.
        reduce: Averages a tensor over the processes, which hold the same up to rounding.

    Returns:
        The share of the mean update's squares that the student now explains, averaged over the layers.

    Raises:
        FloatingPointError: If the mean update is not finite. The student is then unchanged.
    """
    distillation = distillation_of(model, student)

    def run() -> None:
        with without_dropout(model), torch.no_grad():
            forward_passes()

    fitting_pass = FittingPass()
    with distillation.inspected_by(fitting_pass):
        run()
    for fit in fitting_pass.fits.values():
        fit.reduce(reduce)  # before any process can raise: the others would wait for it
    for name, fit in fitting_pass.fits.items():
        if not fit.square.isfinite():
            overflow = find_overflow(distillation, run, passes_fused_on=False)
            cause = overflow or f"the state of the model is not finite in {name}"
            raise FloatingPointError(start_message(student, cause))
    unexplained = []
    for name, layer in adapter_layers(model, student):
        if name in fitting_pass.fits:
            fit, up = fitting_pass.fits[name], layer.adapter_modules[student].adapter_up
            weight, bias, error = fit.solve(up.weight.data, up.bias.data)
            up.weight.data.copy_(weight)
            up.bias.data.copy_(bias)
            unexplained.append(error)
    return 1 - torch.stack(unexplained).mean().item()
