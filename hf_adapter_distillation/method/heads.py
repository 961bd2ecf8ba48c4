"""What the heads of a model predict, and what a distillation needs of them."""

from typing import Any

from adapters import ModelAdaptersMixin

from ..composition import AdapterDistillation
from .distillation import distillations


def head_config(model: ModelAdaptersMixin, name: str) -> dict[str, Any]:
    """What a head says about itself: `head_type`, `num_labels`, `label2id` and others."""
    return vars(model.heads[name])["config"]


def kind_of_labels(model: ModelAdaptersMixin, name: str) -> str:
    """What the head of an adapter predicts.

    Args:
        model: The model, which has a head of that name.
        name: The name of the adapter.

    Returns:
        `"values"` for a regression, `"labels"` for several labels at once, else `"classes"`.
    """
    config = head_config(model, name)
    if config.get("head_type") == "multilabel_classification" or config.get("multilabel"):
        return "labels"
    is_regression = config.get("num_labels") == 1 and str(config.get("head_type")).endswith("classification")
    return "values" if is_regression else "classes"


def shares_labels(model: ModelAdaptersMixin, student: str, teacher: str) -> bool:
    """Whether the heads of a student and of a teacher are of one kind and predict the same labels."""
    heads = getattr(model, "heads", {})
    if student not in heads or teacher not in heads:
        return False
    own, other = head_config(model, student), head_config(model, teacher)
    same_form = type(heads[student]) is type(heads[teacher])
    return same_form and all(own.get(key) == other.get(key) for key in ("num_labels", "num_choices", "label2id"))


def number_of_labels(model: ModelAdaptersMixin, student: str) -> int | None:
    """The number of labels that the student's head tells apart: in a sequence, or in each token.

    Args:
        model: The model.
        student: The name of the student.

    Returns:
        The number; None for a student without a head, and for heads of other kinds (spans, choices, tokens of text).
    """
    if hasattr(model, "heads"):
        config = head_config(model, student) if student in model.heads else {}
        kind = str(config.get("head_type"))
        return config.get("num_labels") if kind.endswith("classification") or kind == "tagging" else None
    has_labels = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return model.config.num_labels if has_labels else None


def check_head(model: ModelAdaptersMixin, student: str) -> None:
    """Refuses a student without a head, on a model whose heads are added one by one.

    Raises:
        ValueError: With what to call.
    """
    if hasattr(model, "heads") and student not in model.heads:
        raise ValueError(
            f"{student!r} has no head; add one of that name, "
            f"for instance model.add_classification_head({student!r}, num_labels=2)."
        )


def check_objectives(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Refuses objectives whose needs the heads do not meet.

    Args:
        model: The model.
        block: The distillation block.

    Raises:
        ValueError: With the head that is missing or has other labels.
    """
    student = block.student
    config = distillations(model.adapters_config)[student].config
    if "task_specific" in config.objectives and number_of_labels(model, student) is None:
        raise ValueError(
            f"The objective 'task_specific' needs a head for classes, labels or values of sequences or tokens, which "
            f"{student!r} has not; choose 'features'."
        )
    for objective in config.output_objectives:
        who = f"The objective {objective!r}"
        if not hasattr(model, "heads"):
            raise ValueError(
                f"{who} needs a head for each teacher, but a {type(model).__name__} has one for all; "
                "use AutoAdapterModel, or choose 'features'."
            )
        check_head(model, student)
        for teacher in block.teachers:
            if teacher not in model.heads:
                raise ValueError(
                    f"{who} needs a head of teacher {teacher!r}, which has none on this model; "
                    "load it with its head, or choose 'features'."
                )
            if not shares_labels(model, student, teacher):
                own, other = head_config(model, student), head_config(model, teacher)
                raise ValueError(
                    f"{who} needs teachers with the labels of {student!r} ({_described(own)}), but {teacher!r} has "
                    f"others ({_described(other)}); leave it out, or choose 'features'."
                )
        if objective == "cross_task" and not is_binary(model, student):
            raise ValueError(
                f"{who} needs a head with two classes or one label, but that of {student!r} is "
                f"{_described(head_config(model, student))}; choose 'logits' or 'features'."
            )


def _described(config: dict[str, Any]) -> str:
    kind, count = config.get("head_type"), config.get("num_labels")
    return f"{kind}" if count is None else f"{kind} with {count} label{'s' if count > 1 else ''}"


def is_of_sequences(model: ModelAdaptersMixin, student: str) -> bool:
    """Whether a head predicts classes of sequences, or whether single labels hold for them."""
    config = head_config(model, student)
    kind = kind_of_labels(model, student)
    if not str(config.get("head_type")).endswith("classification"):
        return False
    return kind == "classes" or (kind == "labels" and config.get("num_labels") == 1)


def is_binary(model: ModelAdaptersMixin, student: str) -> bool:
    """Whether a head tells two classes of sequences apart, or says whether one label holds."""
    return is_of_sequences(model, student) and head_config(model, student).get("num_labels") in (1, 2)
