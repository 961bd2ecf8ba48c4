"""Options, config files, errors and exit codes of `adapter-distill`."""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..downloads import one_line
from .parser import CONFIG_HELP, DASH, OPTIONS, Parser, describe_options, full_parser

PROGRAM = "adapter-distill"
FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
RUN_A_MODEL = {*OPTIONS, "export", "push"}
SOURCE = "folder or Hub id, optionally with @revision"

EXAMPLES = {
    "train": """
  adapter-distill train --model bert-base-uncased --teachers adapters/banking someone/faq-travel@v1 \\
      --student insurance --dataset data/train.csv --eval_split 0.2 --output_dir outputs/insurance --analysis
  adapter-distill train --config train.yaml --learning_rate 2e-3 --overwrite_output_dir
  adapter-distill train --task retrieval --model sentence-transformers/all-MiniLM-L6-v2 --teachers adapters/banking \\
      --student insurance --dataset data/faq.csv --eval_split 0.2 --output_dir outputs/faq""",
    "eval": """
  adapter-distill eval --adapter outputs/insurance/insurance --dataset data/test.tsv --label_column intent
  adapter-distill eval --model bert-base-uncased --adapter me/faq-insurance --dataset test.csv --output result.json
  adapter-distill eval --task retrieval --adapter outputs/faq/insurance --dataset data/faq_test.csv""",
    "predict": """
  adapter-distill predict --adapter outputs/insurance/insurance --text "my card is gone" "what do i pay"
  adapter-distill predict --adapter me/faq-insurance --dataset texts.csv --format csv --output predictions.csv
  adapter-distill predict --task retrieval --adapter outputs/faq/insurance --candidates data/faq.csv --top_k 3""",
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


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the program, and the parsers of its commands by name.

    Those of the commands in `OPTIONS` are for the help alone.
    """
    parser = Parser(
        prog=PROGRAM,
        description="Distil adapters into an adapter for a new task; evaluate, run, inspect, plot, export, push it.",
        epilog="Exit codes: 0 done, 1 the run failed, 2 wrong input, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=version("hf-adapter-distillation"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error; allowed anywhere")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def add(name: str, description: str) -> Parser:
        command = commands.add_parser(
            name, help=description, description=description, epilog=f"examples:{EXAMPLES[name]}"
        )
        if name in OPTIONS:
            describe_options(command, name)
        return command

    add("train", "Distil teachers into a student for labelled texts, and save it to OUTPUT_DIR/STUDENT.")
    add("eval", "Evaluate a saved adapter on labelled texts, distilled or not.")
    add("predict", "Predict labels, numbers or tags for texts with a saved adapter.")
    command = add("inspect", "Show the teachers, settings and results of a saved student.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    command = add("plot", "Draw the attention of a saved student over its teachers, layer by layer.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("-o", "--output", metavar="FILE", required=True, help="image; the extension sets the format")
    command = add("export", "Save a LoRA with its head as PEFT does, for programs that know PEFT alone.")
    command.add_argument("source", help=SOURCE)
    command.add_argument("output", help="folder for the files")
    command.add_argument("--model", help="base model, by default the one that the adapter names")
    command.add_argument("--no_head", action="store_true", help="leave the head out")
    command = add("push", "Push a saved student with its card to the Hub, without loading the base model.")
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
        text = Path(path).read_text(encoding="utf-8")
        config, written = yaml.safe_load(text), yaml.load(text, yaml.BaseLoader)  # to which `no` and 007 are texts
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
            options += [f"--{name}", *map(str, written.get(key, value))]
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else written.get(key, value)}")
        elif action.default is not None:
            raise ValueError(f"{path}: {key} has no value; leave it out, or give one.")
    return options


def parse(argv: Sequence[str]) -> tuple[Callable[..., str], Sequence[Any]]:
    """Return the function of the command, and its arguments."""
    parser, commands = make_parser()
    name = argv[0] if argv else ""
    if name in RUN_A_MODEL and not {"-h", "--help"} & {*argv}:
        import_module("..registration", __package__).register()
    if name in OPTIONS and not {"-h", "--help"} & {*argv}:
        return command_function(name), parse_options(name, list(argv[1:]), commands[name].prog)
    if name in commands:
        reject_unknown(argv, commands[name])
    given, rest = parser.parse_known_args(argv)
    if rest:
        commands[given.command].error(f"unknown argument {rest[0]!r}")
    return command_function(given.command), [given]


def parse_options(name: str, argv: list[str], prog: str) -> Sequence[Any]:
    """Return the dataclasses of a command that runs a model, from its arguments and its config file."""
    parser = full_parser(name, prog)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    reject_unknown(argv, parser)
    config = Parser(prog=prog, add_help=False)
    config.add_argument("--config", help=CONFIG_HELP)
    path = config.parse_known_args(argv)[0].config
    argv = [*(read_config(path, parser) if path else []), *argv]  # the last value of an option wins
    given, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unknown argument {rest[0]!r}")
    if name == "train" and given.task == "retrieval":  # whose trainer has arguments of its own
        parser = full_parser(name, prog, given.task)
    return parser.parse_dict(vars(given), allow_extra_keys=True)


def reject_unknown(argv: Sequence[str], command: Parser) -> None:
    """Raise an error for an unknown option: argparse names missing ones first."""
    for flag in (argument.partition("=")[0] for argument in argv):
        if flag.startswith("--") and flag not in command.flags:
            hint = f" ({DASH})" if " " in flag else command.hint(flag)
            command.error(f"unknown option {flag}{hint}")


def command_function(name: str) -> Callable[..., str]:
    """Import the function of a command."""
    function = {"eval": "evaluate"}.get(name, name)
    module = "saved" if name in ("inspect", "plot", "push") else function
    return getattr(import_module(f".{module}", __package__), function)


def write_result(result: str) -> None:
    """Write a result to the standard output, with the escapes of JSON if its encoding lacks a character.

    A reader such as `head` may close the pipe: that is not an error.

    Raises:
        OSError: If the output cannot be written, as on a full disk.
    """
    try:
        result.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        result = re.sub(r"[^\0-\x7f]", lambda character: json.dumps(character[0])[1:-1], result)
    try:
        sys.stdout.write(f"{result}\n")
        sys.stdout.flush()
    except OSError as error:
        # Python writes the rest at its exit, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


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
        if result:
            write_result(result)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        sys.stderr.write(f"{PROGRAM}: error: {'stopped by Ctrl-C' if interrupted else one_line(error)}\n")
        return INTERRUPTED if interrupted else WRONG_INPUT if isinstance(error, ValueError) else FAILED
    return 0
