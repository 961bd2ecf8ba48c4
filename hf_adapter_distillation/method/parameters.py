"""The role of each parameter in a distillation: base model, student, teacher, head, or fusion."""

from collections.abc import Container

from adapters import ModelAdaptersMixin

from ..composition import AdapterDistillation
from .distillation import distillation_of
from .layers import adapter_layers
from .stacking import stacked_bytes

# Endings of the names of modules that hold one module per adapter.
ADAPTER_CONTAINERS = ("adapters", "shared_parameters", "loras", "prefix_tunings", "prefix_gates", "refts")


def owner(parameter: str, adapters: Container[str]) -> str | None:
    """Return the adapter that a parameter belongs to by its name, or None."""
    path = parameter.split(".")
    names = (b for a, b in zip(path, path[1:], strict=False) if a.endswith(ADAPTER_CONTAINERS))
    return next((name for name in names if name in adapters), None)


def is_fusion(parameter: str, student: str) -> bool:
    """Return whether a parameter, by its name, belongs to the fusion of a student."""
    return f".distillation_fusion.{student}." in parameter


def parameter_roles(model: ModelAdaptersMixin, block: AdapterDistillation) -> dict[str, str]:
    """Return the role of each parameter by its name.

    A role is `"base model"`, `"fusion (training only)"`, `"head"` (a static one), or `"student"`, `"teacher"`,
    `"adapter"` or `"head"` with a name.
    """
    base = {id(parameter) for parameter in model.base_model.parameters()}
    kinds = dict.fromkeys(model.adapters_config, "adapter") | dict.fromkeys(block.teachers, "teacher")
    kinds[block.student] = "student"
    roles = {}
    for name, parameter in model.named_parameters():
        adapter = owner(name, kinds)
        if is_fusion(name, block.student):
            roles[name] = "fusion (training only)"
        elif adapter is not None:
            roles[name] = f"{kinds[adapter]} {adapter}"
        elif id(parameter) in base:
            roles[name] = "base model"
        else:
            roles[name] = f"head {name.split('.')[1]}" if name.startswith("heads.") else "head"
    return roles


def parameter_table(model: ModelAdaptersMixin, block: AdapterDistillation) -> str:
    """Return a table of the roles with their numbers of parameters, total and trained, and the costs of stage 2."""
    counts: dict[str, list[int]] = {}
    role_of = parameter_roles(model, block)
    for name, parameter in model.named_parameters():
        row = counts.setdefault(role_of[name], [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    lines = [f"{'part':<32}{'parameters':>14}{'trained':>14}"]
    lines += [f"{role:<32}{total:>14,}{trained:>14,}" for role, (total, trained) in counts.items()]
    distillation = distillation_of(model, block.student)
    if distillation.level == "layer":
        reason = f" ({distillation.level_reason})" if distillation.level_reason else ""
        lines.append(f"Stage 2 fuses whole layers, and runs each {len(block.teachers) + 2} times more{reason}.")
        return "\n".join(lines)
    copied = sum(
        stacked_bytes({name: layer.adapter_modules[name] for name in block.teachers if name in layer.adapter_modules})
        for _, layer in adapter_layers(model, block.student)
    )
    lines.append(
        f"Stage 2 fuses inside the layers, and copies the teachers' weights side by side: {copied / 1e6:.2f} MB."
    )
    return "\n".join(lines)


def check_trainable(model: ModelAdaptersMixin, block: AdapterDistillation) -> None:
    """Check that nothing is trainable but the student, its head and the fusion."""
    allowed = {f"student {block.student}", f"head {block.student}", "head", "fusion (training only)"}
    role_of = parameter_roles(model, block)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and role_of[name] not in allowed:
            raise ValueError(
                f"{name} is trainable, but distillation trains the student, its head and the fusion alone; "
                f"call model.train_adapter({block.student!r}) last."
            )
