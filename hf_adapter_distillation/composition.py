"""The composition block of a student adapter and the teachers that it is distilled from."""

from collections.abc import Sequence

from adapters import AdapterCompositionBlock, AdapterSetup, ModelAdaptersConfig, Stack
from torch import nn


class AdapterDistillation(Stack):
    """A student adapter together with the frozen teacher adapters that it learns from.

    The block is a `Stack` of the student alone: the teachers are an attribute, not children. Everything in adapters
    that walks over a setup (freezing, heads, saving, prefixes, invertible adapters) therefore sees the student only.
    In training mode the teachers run beside the student in each layer; in evaluation mode the block equals the plain
    `Stack` of its student.

    Source: Wang et al., EMNLP 2023 Industry, https://arxiv.org/abs/2312.16261, Figure 2.

    Args:
        student: The name of the adapter to be trained, or a `Stack` of names whose last one is the student (MAD-X:
            a frozen language adapter below the task adapter).

    Raises:
        TypeError: If the student is neither a name nor a flat `Stack` of names, or a teacher is not a name.
        ValueError: If the list of teachers is empty, repeats a teacher or names the student, or the student stands
            below itself.
    """

    def __init__(self, student: str | Stack, teachers: Sequence[str]) -> None:
        names = [student] if isinstance(student, str) else student.children if type(student) is Stack else None
        if not names or not all(isinstance(name, str) and name for name in names):
            raise TypeError(f"The student must be an adapter name or a Stack of adapter names, not {shown(student)}.")
        if names[-1] in names[:-1]:
            raise ValueError(
                f"The student {names[-1]!r} stands twice in {shown(student)}; only frozen adapters go below it."
            )
        check_teachers(names[-1], teachers)
        super().__init__(*names)
        self.teachers: tuple[str, ...] = tuple(teachers)

    @property
    def student(self) -> str:
        """Return the name of the adapter that is trained."""
        return self.children[-1]

    def __eq__(self, other: object) -> bool:
        # The parent zips the children, so to it Stack("a") equals Stack("a", "b").
        if not isinstance(other, AdapterDistillation):
            return False
        return (self.children, self.teachers) == (other.children, other.teachers)

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.children), self.teachers))

    def __repr__(self) -> str:
        return _escape(f"AdapterDistillation[{', '.join(self.children)}; teachers: {', '.join(self.teachers)}]")

    def to_dict(self) -> dict:
        """Describe the setup that runs at inference: a plain `Stack`, which adapters loads without this package."""
        return Stack(*self.children).to_dict()


def _escape(text: str) -> str:
    return repr(text)[1:-1]


def shown(setup: object) -> str:
    """Return a setup in one line; the blocks of adapters do not escape the names in them."""
    return _escape(str(setup)) if isinstance(setup, AdapterCompositionBlock) else repr(setup)


def check_name(name: str, owner: str, remedy: str) -> None:
    """Check that an adapter can have a name, on a model and as a folder.

    Messages begin with `owner`, for instance "The student", and advise `remedy`, for instance "rename the folder".

    Raises:
        TypeError: If the name is not a string, or is empty.
        ValueError: If torch, adapters or the file system would not read it as one name.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"{owner} would be named {name!r}; {remedy} to have a name that is a string.")
    if not set(name).isdisjoint(".,/\\\0"):
        raise ValueError(f"{owner} would be named {name!r}; {remedy} to have no dot, comma or slash.")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{owner} would be named {name!r}, as is a part of torch's ModuleDict; {remedy}.")


def check_teachers(student: str, teachers: Sequence[str]) -> None:
    """Check the list of a student's teachers, given as names, folders or Hub ids.

    Raises:
        TypeError: If `teachers` is a single string, or an entry is not a string.
        ValueError: If it is empty, repeats a teacher or names the student.
    """
    if isinstance(teachers, str) or not isinstance(teachers, Sequence):
        raise TypeError(f"The teachers must be a list of adapter names, not {teachers!r}; write [{teachers!r}].")
    if not teachers:
        raise ValueError(f"No teachers are given for {student!r}: name at least one adapter to distill from.")
    for index, teacher in enumerate(teachers):
        if not isinstance(teacher, str) or not teacher:
            raise TypeError(f"A teacher must be an adapter name, a folder or a Hub id, not {teacher!r}.")
        if teacher in teachers[:index]:
            raise ValueError(f"Teacher {teacher!r} is given twice; name each teacher once.")
        if teacher == student:
            raise ValueError(f"{student!r} cannot be its own teacher; leave it out of the list of teachers.")


def block_of(setup: AdapterCompositionBlock | str | None) -> AdapterDistillation | None:
    """Return the distillation block of a setup, with the adapters that are stacked below it; None if it has none.

    `Stack("german", AdapterDistillation(student, teachers))` is the same as
    `AdapterDistillation(Stack("german", student), teachers)`.

    Raises:
        ValueError: If anything is stacked on top of the student, or the block stands anywhere else.
    """
    block = find_block(setup)
    if block is None or block is setup:
        return block
    assert isinstance(setup, AdapterCompositionBlock)
    *below, last = setup.children
    if type(setup) is Stack and block in below:
        raise ValueError(
            f"{shown(last)} is stacked on top of the student {block.student!r}; the student must come last."
        )
    if type(setup) is not Stack or block is not last or not all(isinstance(name, str) for name in below):
        raise ValueError(f"{block} stands inside {shown(setup)}; only a Stack may hold it, after names of adapters.")
    return AdapterDistillation(Stack(*below, *block.children), block.teachers)


def running_setup(adapters_config: ModelAdaptersConfig) -> AdapterCompositionBlock | None:
    """Return the setup that a forward pass runs: that of the innermost `AdapterSetup`, or else the active one."""
    context = AdapterSetup.get_context()
    return adapters_config.active_setup if context is None else context.adapter_setup


def find_block(setup: AdapterCompositionBlock | str | None) -> AdapterDistillation | None:
    """Return the first distillation block in a setup, however deep."""
    if isinstance(setup, AdapterDistillation):
        return setup
    children = setup.children if isinstance(setup, AdapterCompositionBlock) else ()
    return next(filter(None, map(find_block, children)), None)
