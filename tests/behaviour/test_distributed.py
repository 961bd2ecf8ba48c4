"""Two processes against one, with the same global batch; each setting is named in `distributed_worker.py`."""

import distributed_worker
import pytest
import torch
from two_processes import run_in_two_processes

TERMS = (
    "task_loss", "distillation_loss", "fusion_regularization", "fused_task_loss",
    "grad_norm/student", "grad_norm/head", "grad_norm/fusion",
)  # fmt: skip

# One launch trains all settings: some minutes on a busy machine.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of the two processes has written, from one launch."""
    return run_in_two_processes("distributed_worker.py", tmp_path_factory.mktemp("two_processes"))


@pytest.mark.parametrize("name", distributed_worker.SETTINGS)
def test_two_processes_equal_one(name, two_processes, tmp_path):
    trained, logs, _ = distributed_worker.train(tmp_path, name)
    tolerance = 1e-6 if name == "float32" else 1e-10
    for of_rank in two_processes:
        result = of_rank["results"][name]
        assert result["trained"].keys() == trained.keys()
        for key, weight in trained.items():
            torch.testing.assert_close(result["trained"][key], weight, rtol=tolerance, atol=tolerance, msg=key)
        assert len(result["logs"]) == len(logs)
        for log, expected in zip(result["logs"], logs, strict=True):
            for term in TERMS:
                assert log.get(term) == (pytest.approx(expected[term], abs=2e-6) if term in expected else None), term


def test_two_processes_are_equal_among_themselves(two_processes):
    for name in distributed_worker.SETTINGS:
        first, second = (of_rank["results"][name]["trained"] for of_rank in two_processes)
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_two_processes_resume_and_end_together(two_processes):
    for of_rank in two_processes:
        facts = {name: of_rank["facts"][name] for name in ("resumed", "terminated")}
        assert facts == {"resumed": True, "terminated": (143, 3, True)}


def test_two_processes_wait_for_each_other_with_less_data_than_processes(two_processes):
    for of_rank in two_processes:
        assert of_rank["facts"]["few"] == dict.fromkeys(distributed_worker.FEW, 8)
