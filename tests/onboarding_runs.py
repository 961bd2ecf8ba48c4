"""Runs `examples/platform/onboard.py` in forks of this process, for `test_onboard.py`, which reads what it writes.

python tests/onboarding_runs.py FOLDER WORKERS

The folder has `encoder`, `teachers` and `data.json`. WORKERS is the number of a run that is killed and then resumed by
two workers of Ray. Nothing imports Ray before a fork.
"""

import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

import psutil
from paths import ROOT

sys.path.insert(0, str(ROOT / "examples" / "platform"))

import onboard

COMMAND = ["--teachers", "teachers", "--data", "data.json", "--model", "encoder", "--steps", "3", "--output"]
LEFT_S = 30  # for the processes of a killed run


def start(name, output, *arguments):
    """Runs the command in a fork with a group of processes of its own; what it prints goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    file = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = [str(ROOT / "examples" / "platform" / "onboard.py"), *COMMAND, output, *arguments]
    code = 0
    try:
        onboard.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
        code = 2
    sys.exit(code)  # not os._exit: Ray ends its processes at the exit


def end_of(pid, at=None):
    """Waits for a run, and sends it a signal at a condition; returns how it ended, and how many processes it left."""
    driver, others, number = psutil.Process(pid), set(), None
    while not (waited := os.waitpid(pid, os.WNOHANG))[0]:
        with suppress(psutil.NoSuchProcess):
            others |= set(driver.children(recursive=True))
        if at is not None and at[0]():
            _, send, number = at
            send(pid, number)
            at = None
        time.sleep(0.01 if at else 0.1)
    assert at is None, "the run ended before the signal"
    _, left = psutil.wait_procs(others, timeout=LEFT_S)
    return {"code": os.waitstatus_to_exitcode(waited[1]), "others": len(others), "left": len(left)}


def students_in(output):
    return [path.name for path in Path(output).glob("[!.]*") if path.is_dir()]


def main(workers_of_the_killed_run):
    runs = {"one": end_of(start("one", "one", "--workers", "0"))}
    at_the_first = lambda: students_in("stopped"), os.kill, signal.SIGTERM
    runs["stopped"] = end_of(start("stopped", "stopped", "--workers", "0"), at_the_first)
    runs["stopped"]["students"] = students_in("stopped")
    runs["stopped"]["hidden"] = [path.name for path in Path("stopped").glob(".*")]
    at_the_first = lambda: students_in("ray"), os.killpg, signal.SIGKILL
    runs["killed"] = end_of(start("killed", "ray", "--workers", workers_of_the_killed_run), at_the_first)
    runs["killed"]["students"] = students_in("ray")
    Path("ray/.bank-0.partial").mkdir(exist_ok=True)
    runs["resumed"] = end_of(start("resumed", "ray", "--workers", "2"))
    Path("runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    here = os.getpid()
    try:
        main(sys.argv[2])
    finally:
        if os.getpid() == here:  # and not in a fork
            for process in psutil.Process().children(recursive=True):
                process.kill()
