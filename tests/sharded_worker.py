"""The trainings that `test_sharding.py` compares, with the base model whole and in shards.

torchrun --nproc-per-node 2 tests/sharded_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from tiny_models import IN_ALL, make_dataset, make_model, make_student
from torch.distributed.tensor import DTensor

import hf_adapter_distillation as had
from hf_adapter_distillation.training.sharding import shard_base_model

# What differs from LoRA teachers and the objective of features, on a decoder.
SETTINGS = {
    "LoRA in all layers": {"config": IN_ALL},
    "bottlenecks, weighted": {"family": "bert", "config": "seq_bn", "student_start": "weighted"},
    "whole layers, checkpointing": {"level": "layer", "gradient_checkpointing": True},
    "predictions of classes": {"family": "bert", "config": "seq_bn", "objective": "logits", "max_steps": 8},
    "text, resumed": {"objective": "logits", "beta": 0.5, "resumes": True},
}


def trainer_of(folder, is_sharded, family="llama", gradient_checkpointing=False, max_steps=4, resumes=False, **kwargs):
    args = had.DistillationTrainingArguments(
        str(folder), max_steps=max_steps, distillation_start=0.25, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_checkpointing=gradient_checkpointing, weighing_steps=4, keep_fusion=True, ddp_timeout=60,
        save_strategy="steps" if resumes else "no", save_steps=2, logging_steps=1,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    settings = {"config": "lora", "student_start": "random", **kwargs}
    model = make_model(family, "causal_lm" if family == "llama" else "flex", dtype=torch.float64)
    model = make_student(model, **settings).double()
    if is_sharded:
        shard_base_model(model)
    labels = "tokens" if family == "llama" else "classification"
    return had.DistillationTrainer(model, args, train_dataset=make_dataset(16, labels))


def train(folder, is_sharded, resumes=False, **kwargs):
    """The trained weights, and the elements of the layers' base weights in this process and in all."""
    trainer = trainer_of(folder, is_sharded, resumes=resumes, **kwargs)
    trainer.train()
    if resumes:
        trainer = trainer_of(folder, is_sharded, resumes=True, **kwargs)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    named = dict(trainer.model.named_parameters())
    shards = [parameter for parameter in named.values() if isinstance(parameter, DTensor)]
    return {
        "trained": {name: p.detach().clone() for name, p in named.items() if ".insurance." in name},
        "here": sum(shard.to_local().numel() for shard in shards),
        "in all": sum(shard.numel() for shard in shards),
        "shards": [name for name, parameter in named.items() if isinstance(parameter, DTensor)],
        "stage 2": sum("distillation_loss" in log for log in trainer.state.log_history),
    }


def main(folder):
    # Trainer resumes optimizers to "cpu:0", a place that torch does not know.
    torch.serialization.register_package(0, lambda storage: None, lambda storage, place: storage)
    results = {}
    for name, settings in SETTINGS.items():
        whole = train(folder / name / "whole", False, **settings)
        results[name] = whole["trained"], train(folder / name / "sharded", True, **settings)
    torch.save(results, folder / f"rank-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
