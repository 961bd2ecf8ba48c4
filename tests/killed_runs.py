"""Trains in forks of this process, kills them with SIGKILL, resumes them; `test_checkpoint.py` reads what it writes.

python tests/killed_runs.py FOLDER KILLS
"""

import gc
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import adapters.loading
import torch
from tiny_models import make_dataset, make_model, make_student
from transformers import TrainerState
from transformers.utils import logging

import hf_adapter_distillation as had
from hf_adapter_distillation.training import checkpoint

FILES = [
    "adapter.safetensors", "model_head.safetensors", "distillation_fusion.safetensors", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "checkpoint_digests.json", "trainer_state.json",
]  # fmt: skip
TERMS = {"step", "loss", "task_loss", "distillation_loss", "fusion_regularization", "stage", "grad_norm"}
STEPS, STEPS_OF_STAGE_1, SAVE_STEPS = 12, 6, 3


def train(folder, profile=None):
    model = make_student(make_model(dropout=True), carrier="mixed", student_start="random")
    args = had.DistillationTrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=STEPS, distillation_start=STEPS_OF_STAGE_1 / STEPS,
        learning_rate=1e-2, logging_steps=1, save_steps=SAVE_STEPS, save_total_limit=1, keep_fusion=True,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = had.DistillationTrainer(model, args, train_dataset=make_dataset())
    whole = checkpoint.newest_whole_checkpoint(str(folder))
    sys.setprofile(profile)
    trainer.train(resume_from_checkpoint=whole is not None)
    sys.setprofile(None)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    logs = [{k: v for k, v in log.items() if k in TERMS} for log in trainer.state.log_history]
    torch.save({"weights": weights, "logs": logs}, folder / "end.pt")


def in_a_fork(function, *args):
    """Runs a function in a fork; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(folder, number):
    """Dies at the given one of the Python calls of `DistillationTrainer.train`."""
    left = number

    def count(frame, event, arg):
        nonlocal left
        left -= event == "call"
        if left <= 0:
            die()

    train(folder, count)


def count_calls(folder):
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event == "call"

    train(folder, count)
    (folder / "calls").write_text(str(calls))


def die_in_the_middle_of(folder, file, step):
    """Dies when half of a file of the checkpoint of a step is written."""

    def half_written(path):
        path = Path(path)
        if path.name == file and f"checkpoint-{step}" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def patch(owner, attribute, position):
        original = getattr(owner, attribute)

        def write(*args, **kwargs):
            original(*args, **kwargs)
            half_written(args[position])

        setattr(owner, attribute, write)

    patch(torch, "save", 1)
    patch(checkpoint, "save_file", 1)
    patch(adapters.loading, "save_file", 1)
    patch(TrainerState, "save_to_json", 1)
    patch(Path, "write_text", 0)
    train(folder)


def main(out, n_kills):
    logging.set_verbosity_error()
    gc.freeze()  # Trainer collects garbage, and need not look at what the imports have left
    assert in_a_fork(train, out / "unbroken") == 0
    assert in_a_fork(count_calls, out / "counted") == 0
    calls, draw = int((out / "counted" / "calls").read_text()), random.Random(0)
    kills = []

    def kill(folder, how, *args):
        status = in_a_fork(how, folder, *args)
        newest = checkpoint.newest_whole_checkpoint(str(folder)) if folder.is_dir() else None
        kills.append({"folder": folder.name, "status": status, "newest": newest and Path(newest).name})

    for number in range(n_kills):
        kill(out / f"random-{number}", die_at_call, int(calls * (number + draw.random()) / n_kills))
        assert in_a_fork(train, out / f"random-{number}") == 0
    for _ in range(3):  # the resumed run is killed, too
        kill(out / "again", die_at_call, calls // 3)
    assert in_a_fork(train, out / "again") == 0
    for index, file in enumerate(FILES):
        kill(out / file, die_in_the_middle_of, file, (6, 9)[index % 2])
        assert in_a_fork(train, out / file) == 0
    (out / "kills.json").write_text(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
