"""The command line `adapter-distill`: its options, config files, errors and exit codes."""

import argparse
import difflib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .. import __version__
from ..configuration import DistillationTrainingArguments
from .evaluation import EvalArguments, evaluate
from .saved import inspect, plot, push
from .train import TrainArguments, train

PROGRAM = "adapter-distill"
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

EXAMPLES = {
    "train": """
  adapter-distill train --model bert-base-uncased --teachers adapters/banking someone/faq-travel@v1 \\
      --student insurance --dataset data/train.csv --eval_split 0.2 --output_dir outputs/insurance --analysis
  adapter-distill train --config train.yaml --learning_rate 1e-3 --overwrite_output_dir""",
    "eval": """
  adapter-distill eval --model bert-base-uncased --adapter outputs/insurance/insurance --dataset data/test.csv
  adapter-distill eval --model bert-base-uncased --adapter me/faq-insurance --dataset data/test.csv \\
      --output result.json""",
    "inspect": """
  adapter-distill inspect outputs/insurance/insurance
  adapter-distill inspect me/faq-insurance@main --json""",
    "plot": """
  adapter-distill plot outputs/insurance/insurance -o attention.png
  adapter-distill plot outputs/insurance/insurance -o attention.svg""",
    "push": """
  adapter-distill push outputs/insurance/insurance me/faq-insurance --private
  adapter-distill push outputs/insurance/insurance me/faq-insurance --revision v2 --commit_message "More data" """,
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind the options, and the examples as they are written."""


class Parser(HfArgumentParser):
    """A parser whose errors are exceptions, and that knows its options by name."""

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Adds an option, as argparse does."""
        action = super().add_argument(*args, **kwargs)
        self.all_options.append(action)
        return action

    @property
    def all_options(self) -> list[argparse.Action]:
        """What was added, in that order."""
        return vars(self).setdefault("_added", [])

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The options by the names of what they set; the first of those that set the same."""
        return {action.dest: action for action in reversed(self.all_options)}

    def error(self, message: str) -> Any:
        """Raises what argparse would print below the usage."""
        raise ValueError(f"{message}; see {self.prog} --help.")


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Makes the parser of all commands.

    Returns:
        The parser, and those of the commands by name.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Distils adapters into an adapter for a new task, and tells, draws and pushes what came of it.",
        epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error; goes anywhere")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    parsers: dict[str, Parser] = {}

    def add(name: str, run: Callable[..., str], description: str, *dataclasses: type) -> Parser:
        epilog = f"examples:{EXAMPLES[name]}"
        given: dict[str, Any] = {"description": description, "epilog": epilog, "allow_abbrev": False}
        given |= {"dataclass_types": dataclasses, "formatter_class": _Formatter, "help": description.split(":")[0]}
        parsers[name] = made = commands.add_parser(name, **given)
        made.set_defaults(run=run)
        if dataclasses:
            made.add_argument(
                "--config", metavar="FILE", help="YAML file of options by their names; those of the command line win"
            )
        return made

    add(
        "train",
        train,
        "Distil teachers into a student for text classification: evaluates it, and saves it to OUTPUT_DIR/STUDENT.",
        TrainArguments,
        DistillationTrainingArguments,
    )
    add("eval", evaluate, "Evaluate a saved adapter for text classification, distilled or not.", EvalArguments)
    made = add("inspect", inspect, "Tell what a saved student was distilled from: reads its config alone.")
    made.add_argument("source", help="folder or Hub id, with @revision if wanted")
    made.add_argument("--json", action="store_true", help="for machines")
    made = add("plot", plot, "Draw the attention of a saved student over its teachers, layer by layer.")
    made.add_argument("source", help="folder or Hub id, with @revision if wanted")
    made.add_argument("-o", "--output", metavar="FILE", required=True, help="an image; its ending is the format")
    made = add("push", push, "Push a saved student to the Hub: with a card, without loading the base model.")
    made.add_argument("folder", help="the folder of the student")
    made.add_argument("repo", help="the repository, which is created if it is missing")
    made.add_argument("--private", action="store_true", default=None, help="for a repository that is created")
    made.add_argument("--revision", help="the branch, which is created if it is missing")
    made.add_argument("--create_pr", action="store_true", help="open a pull request instead of pushing")
    made.add_argument("--token", help="a token, if not that of `hf auth login` or HF_TOKEN")
    made.add_argument("--commit_message", help="the title of the commit")
    return parser, parsers


def read_config(path: str, parser: Parser) -> list[str]:
    """Turns a config file into options.

    Args:
        path: The YAML file.
        parser: The parser of the command.

    Returns:
        The options, as they would stand on the command line.

    Raises:
        ValueError: If there is no such file, it is no YAML, or a key or the form of a value is wrong.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path} is no file; give one with options by their names.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no options; write them as `name: value`.")
    options = []
    for key, value in config.items():
        name = str(key).replace("-", "_")
        action = parser.options.get(name)
        if action is None or name in ("config", "help"):
            raise ValueError(f"{path}: unknown option {key!r}{_closest(name, parser)}")
        if isinstance(value, list) and action.nargs != "+":
            raise ValueError(f"{path}: {key} takes one value, not the list {value!r}.")
        if value is None and action.default is not None:
            raise ValueError(f"{path}: {key} has no value; leave it out, or give one.")
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return options


def _closest(name: str, parser: Parser) -> str:
    known = [option for option in parser.options if option not in ("config", "help")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f", did you mean {close[0]!r}?" if close else ""


def _with_config(command: str, parser: Parser, argv: list[str]) -> list[str]:
    """Puts the options of the config file before those of the command line; refuses unknown ones."""
    known = {option for action in parser.all_options for option in action.option_strings}
    for argument in argv:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            parser.error(f"unknown option {name}{_closest(name.lstrip('-'), parser)}")
    if "config" not in parser.options:
        return [command, *argv]
    finder = Parser(add_help=False, allow_abbrev=False, prog=parser.prog)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(argv)
    return [command, *(read_config(found.config, parser) if found.config else []), *rest]


def parse(argv: Sequence[str]) -> tuple[Callable[..., str], list[Any]]:
    """Reads the command line.

    Args:
        argv: The arguments, without the name of the program.

    Returns:
        The function of the command, and its arguments.

    Raises:
        ValueError: If an option is unknown, missing or wrong.
        SystemExit: For `--help` and `--version`.
    """
    parser, parsers = make_parser()
    argv = list(argv)
    if argv and argv[0] in parsers:
        argv = _with_config(argv[0], parsers[argv[0]], argv[1:])
    namespace, rest = parser.parse_known_args(argv)
    chosen = parsers[namespace.command]
    if rest:
        chosen.error(f"unknown argument {rest[0]!r}")
    given = vars(namespace)
    if not chosen.dataclass_types:
        return namespace.run, [argparse.Namespace(**given)]
    fields = [[f.name for f in cls.__dataclass_fields__.values() if f.init] for cls in chosen.dataclass_types]
    made = [
        cls(**{name: given[name] for name in names}) for cls, names in zip(chosen.dataclass_types, fields, strict=True)
    ]
    return namespace.run, made


def one_line(error: BaseException) -> str:
    """What an error says, in one line, with its type where that tells more."""
    text = " ".join(str(error).split())
    return (
        text if text and isinstance(error, OSError | RuntimeError | ValueError) else f"{type(error).__name__}: {text}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: results go to the standard output, all else to the standard error.

    Args:
        argv: The arguments, those of the process by default.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    # Trainer has an option --debug, too, which takes a value: it is --debug=VALUE.
    debug = "--debug" in given
    try:
        run, arguments = parse([argument for argument in given if argument != "--debug"])
        with redirect_stdout(sys.stderr):  # Trainer writes its log there
            result = run(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        stopped = isinstance(error, KeyboardInterrupt)
        sys.stderr.write(f"{PROGRAM}: error: {'stopped by Ctrl-C' if stopped else one_line(error)}\n")
        return INTERRUPTED if stopped else WRONG_INPUT if isinstance(error, ValueError) else FAILED
    if result:
        sys.stdout.write(f"{result}\n")
    return 0
