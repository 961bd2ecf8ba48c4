"""Prediction heads: their labels, and the checks of a distillation's needs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from adapters import ModelAdaptersMixin, ModelWithFlexibleHeadsAdaptersMixin
from torch import nn

from .._compat import heads_of, original_class
from ..composition import AdapterDistillation
from .distillation import distillation_of


def head_config(model: ModelAdaptersMixin, name: str) -> dict[str, Any]:
    """Return the config of a head: `head_type`, `num_labels`, `label2id` and others."""
    return vars(heads_of(model)[name])["config"]


def kind_of_labels(model: ModelAdaptersMixin, name: str) -> str:
    """Return the kind of labels that the head of an adapter, or the static head of a model, predicts.

    "values" for a regression, "labels" for several labels at once, "tokens" for classes of tokens, else "classes".
    """
    if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        if type(model).__name__.endswith("ForTokenClassification"):
            return "tokens"
        kinds = {"regression": "values", "multi_label_classification": "labels"}
        is_regression = model.config.problem_type is None and model.config.num_labels == 1
        return "values" if is_regression else kinds.get(model.config.problem_type, "classes")
    config = head_config(model, name)
    if config.get("head_type") == "tagging":
        return "tokens"
    if config.get("head_type") == "multilabel_classification" or config.get("multilabel"):
        return "labels"
    is_regression = config.get("num_labels") == 1 and str(config.get("head_type")).endswith("classification")
    return "values" if is_regression else "classes"


def text_head(model: ModelAdaptersMixin, name: str) -> str | None:
    """Return the kind of the head of an adapter, or of the static head of a model, if it predicts tokens of text.

    "causal_lm", "seq2seq_lm" or "masked_lm"; None for other heads.
    """
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        kind = str(head_config(model, name).get("head_type")) if name in heads_of(model) else ""
        return kind if kind.endswith("_lm") else None
    static = original_class(model).__name__
    if static.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    if static.endswith("ForConditionalGeneration") and model.config.is_encoder_decoder:
        return "seq2seq_lm"
    return "masked_lm" if static.endswith("ForMaskedLM") else None


def predicts_next(model: ModelAdaptersMixin, name: str) -> bool:
    """Return whether the logits of a head for text at a token predict the next token."""
    if text_head(model, name) != "causal_lm":
        return False
    return not heads_of(model) or bool(head_config(model, name).get("shift_labels", True))


def are_alike(heads: Sequence[nn.Module | None]) -> bool:
    """Return whether heads are of one class and form and predict the same labels, so that they have a mean.

    Heads whose labels have no names of their own ("LABEL_0") count as of the same labels.
    """

    def form(head: nn.Module) -> tuple[type, dict[str, torch.Size]]:
        return type(head), {key: value.shape for key, value in head.state_dict().items()}

    present = [head for head in heads if head is not None]
    forms, names = [form(head) for head in present], [name for head in present if (name := _names_of_labels(head))]
    are_same = all(of_head == forms[0] for of_head in forms) and all(of_head == names[0] for of_head in names)
    return len(present) == len(heads) and are_same


def _names_of_labels(head: nn.Module) -> set[str]:
    labels = map(str, (vars(head)["config"] or {}).get("label2id") or ())
    return {name for name in labels if not name.startswith("LABEL_")}


def states_of_heads(student: nn.Module, teachers: Sequence[nn.Module]) -> list[dict[str, torch.Tensor]]:
    """Return the states of teachers' heads that are alike, with the rows of the labels in the student's order."""
    wanted = vars(student)["config"].get("label2id") or {}
    return [_in_order(head, vars(head)["config"].get("label2id") or {}, wanted) for head in teachers]


def _in_order(head: nn.Module, labels: Mapping[str, int], wanted: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the state of a head; with other labels than the wanted ones, or without names of them, as it is."""
    state, numbers = dict(head.state_dict()), list(range(len(wanted)))
    linear = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    is_same = labels.keys() == wanted.keys() and sorted(labels.values()) == sorted(wanted.values()) == numbers
    if not linear or not is_same:
        return state
    order = [labels[name] for name in sorted(wanted, key=wanted.__getitem__)]
    for key in (f"{linear[-1]}.weight", f"{linear[-1]}.bias"):  # the last layer has a row for each label
        if key in state and len(state[key]) == len(order):
            state[key] = state[key][order]
    return state


def shifts_labels(model: ModelAdaptersMixin) -> bool:
    """Return whether an encoder-decoder model makes the inputs of its decoder from the labels."""
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        head = model.active_head
        return isinstance(head, str) and head in model.heads and head_config(model, head)["head_type"] == "seq2seq_lm"
    return not type(model).__name__.endswith(("Classification", "QuestionAnswering"))


def shares_labels(model: ModelAdaptersMixin, student: str, teacher: str) -> bool:
    """Return whether the heads of a student and of a teacher are of one kind and predict the same labels."""
    heads = heads_of(model)
    if student not in heads or teacher not in heads:
        return False
    config, other = head_config(model, student), head_config(model, teacher)
    same_form = type(heads[student]) is type(heads[teacher])
    return same_form and all(config.get(key) == other.get(key) for key in ("num_labels", "num_choices", "label2id"))


def number_of_labels(model: ModelAdaptersMixin, student: str) -> int | None:
    """Return the number of labels of the student's head for sequences or tokens.

    None for a student without a head, and for heads of other kinds (spans, choices, tokens of text).
    """
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
        config = head_config(model, student) if student in heads_of(model) else {}
        kind = str(config.get("head_type"))
        return config.get("num_labels") if kind.endswith("classification") or kind == "tagging" else None
    has_labels = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return model.config.num_labels if has_labels else None


def name_of_head(model: ModelAdaptersMixin, student: str) -> str:
    """Return the name of the head that the student predicts with: the active one, if it has none of its own."""
    heads = heads_of(model)
    return student if student in heads or not heads else str(model.active_head)


def label_names(model: ModelAdaptersMixin, student: str) -> list[str]:
    """Return the names of the labels of the student's head, or else of the active one; "labels" without a head."""
    heads: Mapping[str, Any] = heads_of(model)
    name = name_of_head(model, student)
    return list(heads[name].get_label_names()) if name in heads else ["labels"]


def check_head(model: ModelAdaptersMixin, student: str) -> None:
    """Check that the student has a head, on a model with flexible heads."""
    if isinstance(model, ModelWithFlexibleHeadsAdaptersMixin) and student not in heads_of(model):
        raise ValueError(
            f"{student!r} has no head; add one of that name, "
            f"for instance model.add_classification_head({student!r}, num_labels=2)."
        )


def check_objectives(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Check that the heads allow the objectives."""
    student = block.student
    config = distillation_of(model, student).config
    if "task_specific" in config.objectives and number_of_labels(model, student) is None:
        raise ValueError(
            f"The objective 'task_specific' needs a head for classes, labels or values of sequences or tokens, which "
            f"{student!r} has not; choose 'features'."
        )
    for objective in config.head_objectives:
        label = f"The objective {objective!r}"
        if not isinstance(model, ModelWithFlexibleHeadsAdaptersMixin):
            if objective == "logits" and text_head(model, student) is not None:
                _check_shared_head(model)
                continue
            raise ValueError(
                f"{label} needs a head for each teacher, but a {type(model).__name__} has one for all; "
                "use AutoAdapterModel, or choose 'features'."
            )
        check_head(model, student)
        if objective == "logits" and config.beta and kind_of_labels(model, student) == "values":
            raise ValueError(
                f"beta={config.beta:g} needs a head for classes or text, but {student!r} has one for values; use 0."
            )
        for teacher in block.teachers:
            if teacher not in heads_of(model):
                raise ValueError(
                    f"{label} needs a head of teacher {teacher!r}, which has none on this model; "
                    "load it with its head, or choose 'features'."
                )
            if not shares_labels(model, student, teacher):
                wanted, other = _descriptions(head_config(model, student), head_config(model, teacher))
                raise ValueError(
                    f"{label} needs teachers with the labels of {student!r} ({wanted}), but {teacher!r} has "
                    f"others ({other}); leave it out, or choose 'features'."
                )
        if objective == "cross_task" and not is_binary(model, student):
            raise ValueError(
                f"{label} needs a head with two classes or one label, but that of {student!r} is "
                f"{_describe(head_config(model, student))}; choose 'logits' or 'features'."
            )


def _check_shared_head(model: ModelAdaptersMixin) -> None:
    """Check that no training moves the static head, with which the teachers predict as well."""
    base = {id(parameter) for parameter in model.base_model.parameters()}
    trained = (name for name, p in model.named_parameters() if p.requires_grad and id(p) not in base)
    if (name := next(trained, None)) is not None:
        raise ValueError(
            f"The objective 'logits' needs a frozen head, with which all teachers predict; {name!r} is trained: "
            f"call model.get_parameter({name!r}).requires_grad_(False) after train_adapter."
        )


def _describe(config: dict[str, Any]) -> str:
    kind, count = config.get("head_type"), config.get("num_labels")
    return f"{kind}" if count is None else f"{kind} with {count} label{'s' if count > 1 else ''}"


def _descriptions(*configs: dict[str, Any]) -> list[str]:
    """Return what tells heads apart: their kinds and numbers of labels, and where these are equal the labels."""
    descriptions = list(map(_describe, configs))
    if len(set(descriptions)) > 1:
        return descriptions
    names = [", ".join(map(str, config.get("label2id") or ["without names"])) for config in configs]
    return [f"{description}: {of_one}" for description, of_one in zip(descriptions, names, strict=True)]


def is_of_sequences(model: ModelAdaptersMixin, student: str) -> bool:
    """Return whether a head predicts classes of sequences, or a single label that holds or not."""
    config, kind = head_config(model, student), kind_of_labels(model, student)
    is_classification = str(config.get("head_type")).endswith("classification")
    return is_classification and (kind == "classes" or (kind == "labels" and config.get("num_labels") == 1))


def is_binary(model: ModelAdaptersMixin, student: str) -> bool:
    """Return whether a head predicts two classes of sequences, or one label that holds or not."""
    return is_of_sequences(model, student) and head_config(model, student).get("num_labels") in (1, 2)
