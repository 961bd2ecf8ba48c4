"""What tests of the command line share."""

import csv
import re

from hf_adapter_distillation.cli.main import main

QUICK = [
    "--use_cpu", "--report_to=none", "--max_steps=2", "--save_strategy=no", "--per_device_train_batch_size=4",
    "--dataloader_pin_memory=false", "--weighing_steps=4",
]  # fmt: skip


def write_csv(path, columns, n=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(values for _ in range(n // 4) for values in zip(*columns.values(), strict=True))
    return path


def run(capsys, *argv):
    """The exit code, what stands on the standard output, and the errors of the program."""
    capsys.readouterr()
    code = main(list(argv))
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("adapter-distill: error: ")]
    assert "Traceback" not in err
    assert len(errors) == (code != 0)
    assert not errors or err.endswith(errors[0] + "\n")
    return code, out, errors[0].removeprefix("adapter-distill: error: ") if errors else ""


def says_why(capsys, code, message, *argv):
    """The whole line, in which `*` stands for anything."""
    all_say_why(capsys, [(code, argv, message)])


def all_say_why(capsys, cases):
    wrong = []
    for code, argv, message in cases:
        found = run(capsys, *argv)
        if found[:2] != (code, "") or not re.fullmatch(re.escape(message).replace(r"\*", ".*"), found[2]):
            wrong.append((argv, found))
    assert not wrong, "\n".join(map(str, wrong))
