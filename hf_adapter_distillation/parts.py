"""The parts of a distillation on a model: what must be there, which parameters belong to it, which are trained."""

from adapters import ModelAdaptersMixin
from torch import nn

from .composition import AdapterDistillation, find_block
from .layers import adapter_layers
from .stacked import stacked_bytes
from .state import distillations

OF_ADAPTERS = ("adapters", "shared_parameters", "loras")  # how the modules are named that hold one of each adapter


def is_fusion(parameter: str, student: str) -> bool:
    """Whether a parameter, by its name, belongs to the fusion of a student."""
    return f".distillation_fusion.{student}." in parameter


def parts(model: ModelAdaptersMixin, block: AdapterDistillation) -> dict[str, str]:
    """The part of each parameter.

    Args:
        model: The model.
        block: The distillation block.

    Returns:
        `{parameter name: part}`, a part being `"base model"`, `"fusion (training only)"`, `"head"` (a static one),
        or `"student"`, `"teacher"`, `"adapter"` or `"head"` with a name.
    """
    base = {id(parameter) for parameter in model.base_model.parameters()}
    roles = dict.fromkeys(model.adapters_config, "adapter") | dict.fromkeys(block.teachers, "teacher")
    roles[block.student] = "student"
    found = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        adapter = next(
            (b for a, b in zip(path, path[1:], strict=False) if a.endswith(OF_ADAPTERS) and b in roles), None
        )
        if is_fusion(name, block.student):
            found[name] = "fusion (training only)"
        elif adapter is not None:
            found[name] = f"{roles[adapter]} {adapter}"
        elif id(parameter) in base:
            found[name] = "base model"
        else:
            found[name] = f"head {path[1]}" if path[0] == "heads" else "head"
    return found


def parameter_table(model: ModelAdaptersMixin, block: AdapterDistillation) -> str:
    """A table of the parts with the numbers of their parameters, in all and trained, and the copy of stage 2."""
    counts: dict[str, list[int]] = {}
    part_of = parts(model, block)
    for name, parameter in model.named_parameters():
        row = counts.setdefault(part_of[name], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    lines = [f"{'part':<32}{'parameters':>14}{'trained':>14}"]
    lines += [f"{part:<32}{total:>14,}{trained:>14,}" for part, (total, trained) in counts.items()]
    copied = sum(
        stacked_bytes({name: layer.adapter_modules[name] for name in block.teachers if name in layer.adapter_modules})
        for _, layer in adapter_layers(model, block.student)
    )
    lines.append(f"Stage 2 copies the teachers' weights side by side: {copied / 1e6:.2f} MB.")
    return "\n".join(lines)


def check_trainable(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Refuses a model with anything trainable but the student, its head and the fusion.

    Raises:
        ValueError: With the first such parameter.
    """
    allowed = {f"student {block.student}", f"head {block.student}", "head", "fusion (training only)"}
    part_of = parts(model, block)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and part_of[name] not in allowed:
            raise ValueError(
                f"{name} is trainable, but distillation trains the student, its head and the fusion alone; "
                f"call model.train_adapter({block.student!r}) last."
            )


def active_block(model: nn.Module) -> AdapterDistillation:
    """The distillation block that `train_adapter` has made active.

    Args:
        model: The model.

    Returns:
        The block.

    Raises:
        TypeError: If the model has no adapters.
        ValueError: If no distilled student is active, or it has no teachers.
    """
    if not isinstance(model, ModelAdaptersMixin):
        raise TypeError(f"{type(model).__name__} has no adapters; call adapters.init(model) first.")
    block = find_block(model.active_adapters)
    if block is None or block.student not in distillations(model.adapters_config):
        raise ValueError(
            f"No distilled student is active (the active setup is {model.active_adapters}); add one with "
            "model.add_adapter(name, distill_from=[...]) and call model.train_adapter(name). "
            "A student whose teachers were all deleted has nothing to learn from."
        )
    return block


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
