"""The parts of a distillation on a model: what must be there, which parameters belong to it, which are trained."""

from collections.abc import Container

from adapters import ModelAdaptersMixin, Stack
from torch import nn

from ..composition import AdapterDistillation, join_block
from .distillation import distillations
from .layers import adapter_layers
from .stacking import stacked_bytes

# How the modules are named that hold one of each adapter:
OF_ADAPTERS = ("adapters", "shared_parameters", "loras", "prefix_tunings", "prefix_gates", "refts")


def owner(parameter: str, adapters: Container[str]) -> str | None:
    """The adapter that a parameter of the model belongs to by its name, or None."""
    path = parameter.split(".")
    held = (b for a, b in zip(path, path[1:], strict=False) if a.endswith(OF_ADAPTERS))
    return next((name for name in held if name in adapters), None)


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
        adapter = owner(name, roles)
        if is_fusion(name, block.student):
            found[name] = "fusion (training only)"
        elif adapter is not None:
            found[name] = f"{roles[adapter]} {adapter}"
        elif id(parameter) in base:
            found[name] = "base model"
        else:
            found[name] = f"head {name.split('.')[1]}" if name.startswith("heads.") else "head"
    return found


def parameter_table(model: ModelAdaptersMixin, block: AdapterDistillation) -> str:
    """A table of the parts with the numbers of their parameters, in all and trained, and what stage 2 does."""
    counts: dict[str, list[int]] = {}
    part_of = parts(model, block)
    for name, parameter in model.named_parameters():
        row = counts.setdefault(part_of[name], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    lines = [f"{'part':<32}{'parameters':>14}{'trained':>14}"]
    lines += [f"{part:<32}{total:>14,}{trained:>14,}" for part, (total, trained) in counts.items()]
    distillation = distillations(model.adapters_config)[block.student]
    if distillation.level == "layer":
        why = f" ({distillation.level_reason})" if distillation.level_reason else ""
        lines.append(f"Stage 2 fuses whole layers, and runs each {len(block.teachers) + 2} times more{why}.")
        return "\n".join(lines)
    copied = sum(
        stacked_bytes({name: layer.adapter_modules[name] for name in block.teachers if name in layer.adapter_modules})
        for _, layer in adapter_layers(model, block.student)
    )
    size = f"{copied / 1e6:.2f} MB"
    lines.append(f"Stage 2 fuses inside the layers, and copies the teachers' weights side by side: {size}.")
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
    """The distillation block that `train_adapter` has made active, or that a student on top of a `Stack` stands for.

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
    setup, known = model.active_adapters, distillations(model.adapters_config)
    block = join_block(setup)
    if type(setup) is Stack and len(setup) > 1 and all(isinstance(name, str) for name in setup):
        # How adapters puts a task adapter on a language adapter; a Stack of the student alone is plain training.
        distillation = known.get(setup.last())
        if distillation is not None and distillation.config.teachers:
            block = AdapterDistillation(setup, distillation.config.teachers)
    if block is None or block.student not in known:
        raise ValueError(
            f"No distilled student is active (the active setup is {setup}); add one with "
            "model.add_adapter(name, distill_from=[...]) and call model.train_adapter(name). "
            "A student whose teachers were all deleted has nothing to learn from."
        )
    return block
