"""Fixtures of all tests. Nothing is downloaded."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")

from types import SimpleNamespace

import huggingface_hub
import pytest
from accelerate.state import AcceleratorState
from hub_server import Hub
from huggingface_hub import constants
from tiny_encoder import save_tiny_encoder
from transformers import logging, set_seed

import hf_adapter_distillation as had

VERBOSITY = logging.get_verbosity()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keep the ids of all tests before some are deselected."""
    config.collected = [item.nodeid for item in items]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Start each test, and its fixtures, at the same random numbers, whatever ran before it in the process."""
    set_seed(0)


@pytest.fixture(scope="module", autouse=True)
def no_garbage_is_looked_for_in_what_is_imported():
    """Each training collects garbage, which takes as long as a tiny training if it walks over all modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def trainer_args(tmp_path):
    def make(**kwargs):
        defaults = {
            "output_dir": str(tmp_path / "training"),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "distillation_start": 0.5,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "weighing_steps": 2,
        }
        return had.DistillationTrainingArguments(**{**defaults, **kwargs})

    return make


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub on the loopback interface, where huggingface_hub is logged in as `me`."""
    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))
        huggingface_hub.utils.reset_sessions()  # the last one is offline
        yield server
    huggingface_hub.utils.reset_sessions()


@pytest.fixture(autouse=True)
def no_mixed_precision_or_compiler_for_the_next_test():
    """TrainingArguments(bf16=True, torch_compile=True) leave environment variables and accelerate's state behind."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]
    if os.environ.pop("ACCELERATE_MIXED_PRECISION", "no") != "no":
        AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def verbosity_of_transformers():
    """The examples silence transformers for their process, and TrainingArguments show no progress then."""
    yield
    logging.set_verbosity(VERBOSITY)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """The folder of a tiny BERT with a tokenizer for a few sentences."""
    return save_tiny_encoder(str(tmp_path_factory.mktemp("encoder")))
