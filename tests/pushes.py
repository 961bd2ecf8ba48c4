"""Pushes of trained students, and the messages of those that failed."""

import pytest
from messages import exactly
from tiny_models import make_dataset, make_model, make_student

import hf_adapter_distillation as had

OF_A_PUSH = {
    "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin", "head_config.json",
    "model_head.safetensors", "pytorch_model_head.bin", "README.md",
}  # fmt: skip
NO_TOKEN = "there is no token; log in with `hf auth login`, or pass one."
NOT_PUSHED = "'insurance' was not pushed to 'me/faq': "


def pushed(repo):
    return set(repo.files) - {".gitattributes"}


def trained(trainer_args, kind="flex", config="seq_bn", **kwargs):
    model = make_student(make_model(kind=kind), config=config)
    model.config.name_or_path = f"me/tiny-{kind}"
    trainer = had.DistillationTrainer(model, trainer_args(**kwargs), train_dataset=make_dataset())
    trainer.train()
    return trainer


def refused(error, message, function, *args, **kwargs):
    """The whole message, in one line."""
    with pytest.raises(error, match=exactly(message)):
        function(*args, **kwargs)


def full_disk(*args, **kwargs):
    raise OSError("no space left")
