"""Options, config files, errors and exit codes of `adapter-distill`."""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..configuration import DistillationTrainingArguments
from ..downloads import one_line, suggestion
from .evaluate import EvalArguments, evaluate
from .export import export
from .saved import inspect, plot, push
from .train import TrainArguments, train

PROGRAM = "adapter-distill"
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
SOURCE = "folder or Hub id, optionally with @revision"

EXAMPLES = {
    "train": """
  adapter-distill train --model bert-base-uncased --teachers adapters/banking someone/faq-travel@v1 \\
      --student insurance --dataset data/train.csv --eval_split 0.2 --output_dir outputs/insurance --analysis
  adapter-distill train --config train.yaml --learning_rate 1e-3 --overwrite_output_dir""",
    "eval": """
  adapter-distill eval --model bert-base-uncased --adapter outputs/insurance/insurance --dataset data/test.csv
  adapter-distill eval --model bert-base-uncased --adapter me/faq-insurance --dataset test.csv --output result.json""",
    "inspect": """
  adapter-distill inspect outputs/insurance/insurance
  adapter-distill inspect me/faq-insurance@main --json""",
    "plot": """
  adapter-distill plot outputs/insurance/insurance -o attention.png
  adapter-distill plot me/faq-insurance -o attention.svg""",
    "export": """
  adapter-distill export outputs/insurance/insurance outputs/insurance-peft
  adapter-distill export me/lora-insurance outputs/insurance-peft --model bert-base-uncased --no_head""",
    "push": """
  adapter-distill push outputs/insurance/insurance me/faq-insurance --private
  adapter-distill push outputs/insurance/insurance me/faq-insurance --revision v2 --commit_message "More data" """,
}


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Formatter that shows defaults, and keeps the line breaks of the examples."""


class Parser(HfArgumentParser):
    """Parser that raises its errors and takes no abbreviations."""

    def __init__(self, dataclass_types: Any = (), **kwargs: Any) -> None:
        super().__init__(dataclass_types, formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print below the usage."""
        raise ValueError(f"{message}; see {self.prog} --help.")

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """The options by flag, such as `--learning_rate` and `--learning-rate`."""
        return self._option_string_actions  # argparse has no public list of them

    def hint(self, name: str) -> str:
        """Return a hint at the option that an unknown name may mean."""
        hint = suggestion(name, {action.dest for action in self.flags.values()} - {"config", "help"})
        return f", {hint}" if hint else ""


CONFIG = Parser(prog=PROGRAM, add_help=False)
CONFIG.add_argument("--config", metavar="FILE", help="YAML file of options by name; the command line wins")


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the program, and the parsers of its commands by name."""
    parser = Parser(
        prog=PROGRAM,
        description="Distil adapters into an adapter for a new task; evaluate, inspect, plot, export and push it.",
        epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=version("hf-adapter-distillation"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error; allowed anywhere")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def add(name: str, run: Callable[..., str], description: str, *dataclasses: type) -> Parser:
        command = commands.add_parser(
            name,
            dataclass_types=dataclasses,
            parents=[CONFIG] if dataclasses else [],
            help=description,
            description=description,
            epilog=f"examples:{EXAMPLES[name]}",
        )
        command.set_defaults(run=run)
        return command

    description = "Distil teachers into a student for text classification, and save it to OUTPUT_DIR/STUDENT."
    add("train", train, description, TrainArguments, DistillationTrainingArguments)
    add("eval", evaluate, "Evaluate a saved adapter for text classification, distilled or not.", EvalArguments)
    command = add("inspect", inspect, "Show the teachers, settings and results of a saved student.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command = add("plot", plot, "Draw the attention of a saved student over its teachers, layer by layer.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="image; the extension sets the format")
    command = add("export", export, "Save a LoRA with its head as PEFT does, for programs that know PEFT alone.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("output", help="folder for the files")
    command.add_argument("--model", help="base model, by default the one that the adapter names")
    command.add_argument("--no_head", action="store_true", help="leave the head out")
    command = add("push", push, "Push a saved student with its card to the Hub, without loading the base model.")
    command.add_argument("folder", help="folder of the student")
    command.add_argument("repo", help="repository, created if it is missing")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--revision", help="branch, created if it is missing")
    command.add_argument("--create_pr", action="store_true", help="open a pull request instead of pushing")
    command.add_argument("--token", help="token, by default the token of `hf auth login` or HF_TOKEN")
    command.add_argument("--commit_message", help="title of the commit")
    return parser, commands.choices


def read_config(path: str, parser: Parser) -> list[str]:
    """Return the options of a YAML file as arguments of the command line."""
    if not Path(path).is_file():
        raise ValueError(f"--config {path} is not a file; give a YAML file of options by name.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no options; write them as `name: value`.")
    options = []
    for key, value in config.items():
        name = str(key).replace("-", "_")
        action = parser.flags.get(f"--{name}")
        if action is None or action.dest != name or name in ("config", "help"):
            parser.error(f"{path}: unknown option {key!r}{parser.hint(name)}")
        if isinstance(value, list):
            if action.nargs != "+":
                raise ValueError(f"{path}: {key} takes one value, not the list {value!r}.")
            options += [f"--{name}", *map(str, value)]
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        elif action.default is not None:
            raise ValueError(f"{path}: {key} has no value; leave it out, or give one.")
    return options


def parse(argv: Sequence[str]) -> tuple[Callable[..., str], Sequence[Any]]:
    """Return the function of the command, and its arguments."""
    parser, commands = make_parser()
    argv = list(argv)
    if argv and (command := commands.get(argv[0])):
        for flag in (argument.partition("=")[0] for argument in argv):  # argparse names missing options first
            if flag.startswith("--") and flag not in command.flags:
                command.error(f"unknown option {flag}{command.hint(flag)}")
        path = CONFIG.parse_known_args(argv)[0].config
        argv[1:1] = read_config(path, command) if path else []  # the last value of an option wins
    given, rest = parser.parse_known_args(argv)
    command = commands[given.command]
    if rest:
        command.error(f"unknown argument {rest[0]!r}")
    return given.run, command.parse_dict(vars(given), allow_extra_keys=True) or [given]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default with the arguments of the process, and return the exit code.

    Results go to the standard output, logs and errors to the standard error.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given  # not --debug=VALUE, an option of Trainer
    try:
        run, arguments = parse([argument for argument in given if argument != "--debug"])
        with redirect_stdout(sys.stderr):  # Trainer prints its log
            result = run(*arguments)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        sys.stderr.write(f"{PROGRAM}: error: {'stopped by Ctrl-C' if interrupted else one_line(error)}\n")
        return INTERRUPTED if interrupted else WRONG_INPUT if isinstance(error, ValueError) else FAILED
    if result:
        sys.stdout.write(f"{result}\n")
    return 0
