"""Two processes with half of the frozen base model each, against two with a whole one."""

import pytest
import sharded_worker
import torch
from messages import exactly
from tiny_models import make_model, make_student
from trainings import trainer_for
from two_processes import run_in_two_processes

from hf_adapter_distillation.training import mixin
from hf_adapter_distillation.training.sharding import is_sharded, shard_base_model


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each of the two processes has written, from one launch."""
    return run_in_two_processes("sharded_worker.py", tmp_path_factory.mktemp("two_processes"), timeout=600)


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sharded_worker.SETTINGS)
def test_a_sharded_base_model_trains_the_same_student(name, two_processes):
    for of_rank in two_processes:
        whole, sharded = of_rank[name]
        assert sharded["stage 2"] >= 3
        assert whole.keys() == sharded["trained"].keys()
        for key, weight in whole.items():
            torch.testing.assert_close(sharded["trained"][key], weight, rtol=1e-10, atol=1e-12, msg=key)
        assert 0 < sharded["here"] <= 0.55 * sharded["in all"]
        assert not any(f".{adapter}." in key for key in sharded["shards"] for adapter in ("bank", "insurance"))
    assert sum(of_rank[name][1]["here"] for of_rank in two_processes) == sharded["in all"]


def test_processes_must_run_and_the_student_be_active():
    model = make_student(make_model())
    message = (
        "The processes have not been started; run the script with torchrun or accelerate launch, and create the "
        "training arguments first."
    )
    with pytest.raises(RuntimeError, match=exactly(message)):
        shard_base_model(model)
    with pytest.raises(ValueError, match="No distilled student is active"):
        shard_base_model(make_student(make_model(), train=False))
    assert not is_sharded(model)


def test_a_base_model_that_is_trained_stays_whole(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = make_student(make_model())
    name = "bert.encoder.layer.0.output.dense.bias"
    model.get_parameter(name).requires_grad_(True)
    message = f"{name!r} of the base model is trained, but shards are frozen; call train_adapter first."
    with pytest.raises(ValueError, match=exactly(message)):
        shard_base_model(model)


def test_an_analysis_of_a_sharded_model(trainer_args, monkeypatch):
    monkeypatch.setattr(mixin, "is_sharded", lambda model: True)
    message = "analysis=True runs the model in one process, but its base model lies in shards; leave it out."
    with pytest.raises(ValueError, match=exactly(message)):
        trainer_for(make_student(make_model()), trainer_args(analysis=True))
