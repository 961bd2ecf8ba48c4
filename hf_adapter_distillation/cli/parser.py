"""The parsers of `adapter-distill`: a light one for the help and for options without a dataclass, and a full one."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, get_args

from ..configuration import AdapterDefaultsMixin, DistillationArgumentsMixin
from ..downloads import suggestion
from .options import USUAL, EvalArguments, PredictArguments, TextArguments, TrainArguments

OPTIONS: dict[str, type[TextArguments]] = {
    "train": TrainArguments,
    "eval": EvalArguments,
    "predict": PredictArguments,
}
DASH = 'write a value that begins with a dash as in --text="-5 degrees"'
CONFIG_HELP = "YAML file of options by name; the command line wins"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formatter that shows defaults, and keeps the line breaks of the examples."""


class Parser(argparse.ArgumentParser):
    """Parser that raises its errors and takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"formatter_class": _Formatter, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print below the usage."""
        if message.endswith((" expected one argument", " expected at least one argument")):
            message += f" ({DASH})"
        raise ValueError(f"{message}; see {self.prog} --help.")

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The options by flag, such as `--learning_rate` and `--learning-rate`."""
        return self._option_string_actions  # argparse has no public list of them

    def hint(self, name: str) -> str:
        """Return a hint at the option that an unknown name may mean."""
        hint = suggestion(name, {action.dest for action in self.flags.values()} - {"config", "help"})
        return f", {hint}" if hint else ""


def full_parser(name: str, prog: str, task: str = "auto") -> Any:
    """Return the parser of a command that runs a model, with all options of transformers for `train`."""
    from transformers import HfArgumentParser

    training_args: Any
    if task == "retrieval":
        from ..integrations.sentence_transformers import SentenceTransformerDistillationTrainingArguments

        training_args = SentenceTransformerDistillationTrainingArguments
    else:
        from ..training.arguments import DistillationTrainingArguments

        training_args = DistillationTrainingArguments

    class FullParser(Parser, HfArgumentParser):
        """Parser of dataclasses."""

    parser = FullParser([OPTIONS[name], training_args] if name == "train" else [OPTIONS[name]], prog=prog)
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    return parser


def describe_options(parser: Parser, name: str) -> None:
    """Add the options of a command that runs a model in groups, with our own first, for its help."""
    own = OPTIONS[name]
    for cls in own.__mro__[:-1]:
        of_class = [field for field in fields(cls) if field.name in vars(cls)["__annotations__"]]
        _describe(parser, str(cls.__doc__).rstrip(".").lower(), of_class)
    if name == "train":
        _describe(parser, "the two stages", fields(DistillationArgumentsMixin))
        group = parser.add_argument_group("training; --help_all lists all options of transformers.TrainingArguments")
        defaults = {field.name: field.default for field in fields(AdapterDefaultsMixin)}
        for flag, text in USUAL.items():
            default = defaults.get(flag, argparse.SUPPRESS)
            group.add_argument(f"--{flag}", metavar="VALUE", help=text, default=default)
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP, default=argparse.SUPPRESS)
    required = [f"--{field.name} {_metavar(field)}" for field in fields(own) if field.default is MISSING]
    parser.usage = " ".join([parser.prog, *required, "[options]"])


def _describe(parser: Parser, title: str, of_group: Iterable[Field]) -> None:
    group = parser.add_argument_group(title)
    for field in of_group:
        is_required = field.default is MISSING
        default = argparse.SUPPRESS if is_required or field.default is None else field.default
        text = field.metadata["help"] + (" Required." if is_required else "")
        group.add_argument(f"--{field.name}", metavar=_metavar(field), help=text, default=default)


def _metavar(field: Field) -> str:
    choices: Sequence[Any] = get_args(field.type)
    if choices and all(isinstance(choice, str) for choice in choices):
        return "{" + ",".join(choices) + "}"
    if field.type is bool:
        return "[true|false]"
    return field.name.upper() + (" ..." if "list" in str(field.type) else "")
