"""A launch of two processes on this machine."""

import os
import subprocess
import sys

import torch
from paths import ROOT


def run_in_two_processes(worker, folder, timeout=None):
    """What each of two processes that run a script of the tests has written into a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            ROOT / "tests" / worker, folder,
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
