"""The trainings that `test_distributed.py` compares: in one process there, in two here.

torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER
"""

import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from chats import chat_tokenizer, chats
from embedding_models import SCORED, embedding_model
from own_trainers import Twice, two_sided
from sentence_transformers.losses import CosineSimilarityLoss
from tiny_encoder import save_tiny_encoder
from tiny_models import make_dataset, make_model, make_student
from torch.nn.parallel import DistributedDataParallel
from trainings import EachStep, StopAt

import hf_adapter_distillation as had
from hf_adapter_distillation.integrations import sentence_transformers as embeddings

GLOBAL_BATCH = 8


def summed_loss(outputs, labels, num_items_in_batch):
    return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


# What differs from a training of the carrier "student" on a flex model, with 16 examples.
SETTINGS = {
    "plain": {},
    "unused parameters": {"ddp_find_unused_parameters": True},
    "checkpointing": {"gradient_checkpointing": True, "carrier": "mixed"},
    "checkpointing, unused parameters": {
        "gradient_checkpointing": True, "carrier": "fused", "ddp_find_unused_parameters": True
    },
    "dual": {"carrier": "dual", "ddp_find_unused_parameters": False},
    "accumulation": {"gradient_accumulation_steps": 2, "carrier": "mixed"},
    "a start fitted on 19 examples": {"examples": 19, "max_steps": 2, "distillation_start": 0.0, "start": "teachers"},
    "a share of the steps": {"distillation_share": 0.5, "distillation_start": 0.0},
    "weighed teachers": {"start": "weighted", "weighing_steps": 4, "max_steps": 2, "distillation_start": 0.0},
    "weighed teachers, a head of its own": {
        "start": "weighted", "weighing_steps": 4, "max_steps": 2, "distillation_start": 0.0, "own_head": True
    },
    "a start fitted on 3 examples": {"examples": 3, "max_steps": 0, "start": "teachers"},
    "static head": {"kind": "classification", "label_smoothing_factor": 0.1},
    "lora": {"config": "lora", "start": "average"},
    "whole layers": {"config": "ia3", "level": "layer"},
    "whole layers, checkpointing": {"level": "layer", "carrier": "mixed", "gradient_checkpointing": True},
    "loss function": {"compute_loss_func": summed_loss, "gradient_accumulation_steps": 2},
    "tokens": {"family": "gpt2", "kind": "causal_lm", "labels": "tokens"},
    "tokens, accumulation": {
        "family": "gpt2", "kind": "causal_lm", "labels": "tokens", "gradient_accumulation_steps": 2
    },
    "tokens of each process": {
        "family": "gpt2", "kind": "causal_lm", "labels": "all tokens", "average_tokens_across_devices": False
    },
    "objectives": {"objective": {"features": 1.0, "logits": 0.5, "task_specific": 1.0}, "teacher_selection": 2},
    "without labels": {"unlabelled": 20, "objective": {"features": 1.0, "logits": 0.5}},
    "without labels, unused parameters": {
        "unlabelled": 20, "ddp_find_unused_parameters": True, "objective": "task_specific", "carrier": "fused"
    },
    "without labels, accumulation": {"unlabelled": 20, "gradient_accumulation_steps": 2},
    "float32": {"dtype": torch.float32},
    "a loss of two passes": {"trainer": "two passes"},
    "sentence embeddings": {"trainer": "embeddings", "gradient_accumulation_steps": 2},
}  # fmt: skip
if find_spec("trl"):
    SETTINGS["chats"] = {"trainer": "chats", "gradient_accumulation_steps": 2}


def trainer_of(
    folder, examples=16, family="bert", kind="flex", labels="classification", config="seq_bn", carrier="student",
    level="auto", start="random", dtype=torch.float64, callbacks=(), compute_loss_func=None,
    gradient_accumulation_steps=1, objective="features", teacher_selection="all", unlabelled=0,
    own_head=False, **kwargs,
):  # fmt: skip
    head = "tagging" if labels == "tags" else "classification"
    model = make_student(
        make_model(family, kind, dtype=dtype), head=head, config=config, carrier=carrier, level=level,
        student_start=start, objective=objective, teacher_selection=teacher_selection,
    ).to(dtype)  # fmt: skip
    if own_head:
        model.add_classification_head("insurance", num_labels=2, layers=1, overwrite_ok=True)
        model.to(dtype).train_adapter("insurance")
    dataset = make_dataset(examples, labels.split()[-1])
    if labels == "tags":
        dataset = dataset.map(lambda row: {"labels": [token % 2 for token in row["input_ids"]]})
    if labels == "all tokens":
        dataset = dataset.map(lambda row: {"attention_mask": [1] * 8, "labels": row["input_ids"]})
    processes = int(os.environ.get("WORLD_SIZE", 1))
    defaults = {"max_steps": 4, "distillation_start": 0.5, "logging_steps": 1}
    args = had.DistillationTrainingArguments(
        str(folder), per_device_train_batch_size=GLOBAL_BATCH // processes // gradient_accumulation_steps,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=1e-2, keep_fusion=True,
        ddp_timeout=60,
        report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
        **{"save_strategy": "no", **defaults, **kwargs},
    )  # fmt: skip
    return had.DistillationTrainer(
        model, args, train_dataset=dataset, callbacks=list(callbacks), compute_loss_func=compute_loss_func,
        distillation_dataset=make_dataset(unlabelled, seed=5) if unlabelled else None,
    )  # fmt: skip


class InDtypeOfScores(torch.nn.MSELoss):
    """The squared error of scores in float64 and labels that CosineSimilarityLoss casts to float32."""

    def forward(self, scores, labels):
        return super().forward(scores, labels.to(scores))


def other_trainer_of(folder, trainer, gradient_accumulation_steps=1):
    batch_size = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", 1)) // gradient_accumulation_steps
    arguments = {
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_steps": 4, "distillation_start": 0.5, "learning_rate": 1e-2, "logging_steps": 1, "keep_fusion": True,
        "ddp_timeout": 60, "report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False,
        "save_strategy": "no",
    }  # fmt: skip
    if trainer == "two passes":
        model = make_student(make_model(kind="base", dtype=torch.float64)).double()
        args = had.DistillationTrainingArguments(str(folder), remove_unused_columns=False, **arguments)
        return Twice(model, args, train_dataset=two_sided())
    if trainer == "chats":
        from hf_adapter_distillation.integrations.trl import SFTDistillationConfig, SFTDistillationTrainer

        model = make_student(make_model("llama", "causal_lm"), config="lora", student_start="average").double()
        args = SFTDistillationConfig(str(folder), bf16=False, assistant_only_loss=True, **arguments)
        data = {"train_dataset": chats(GLOBAL_BATCH), "processing_class": chat_tokenizer()}
        return SFTDistillationTrainer(model, args, **data)
    base = tempfile.mkdtemp()  # for this process alone
    model = embedding_model(Path(base), save_tiny_encoder(base), dropout=0.0, dtype=torch.float64)
    args = embeddings.SentenceTransformerDistillationTrainingArguments(str(folder), **arguments)
    loss = CosineSimilarityLoss(model, loss_fct=InDtypeOfScores())
    data = SCORED.select(range(GLOBAL_BATCH))  # all in each step, since the order is another in two processes
    return embeddings.SentenceTransformerDistillationTrainer(model, args, train_dataset=data, loss=loss)


def train(folder, name, **kwargs):
    make = other_trainer_of if "trainer" in SETTINGS[name] else trainer_of
    trainer = make(folder / "training", **SETTINGS[name], **kwargs)
    if trainer.args.max_steps:
        trainer.train()
    else:
        trainer.fit_start()
    trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trained |= {n: p.detach() for n, p in trainer.model.named_parameters() if ".insurance" in n}
    return trained, trainer.state.log_history, trainer


def resumed(folder, rank):
    """Step 2 of 4 in a first training, the others in a second."""
    arguments = {"save_strategy": "steps", "save_steps": 2, "carrier": "mixed"}
    trainer_of(folder / "resumed", callbacks=[StopAt(2)], **arguments).train()
    second = trainer_of(folder / "resumed", **arguments)
    second.train(resume_from_checkpoint=True)
    unbroken = trainer_of(folder / "unbroken", **arguments)
    unbroken.train()
    pairs = zip(second.model.parameters(), unbroken.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def terminated(folder, rank):
    """SIGTERM reaches the second process alone; both must leave at the same step."""

    def terminate(args, state, control, **kwargs):
        if state.global_step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_of(folder / "terminated", callbacks=[EachStep(terminate)], save_on_sigterm=True)
    try:
        trainer.train()
    except SystemExit as stop:
        return stop.code, trainer.state.global_step, (folder / "terminated" / "checkpoint-3").is_dir()


# Trainings with less data than processes, and with heads of tokens: each collective call is reached by both processes.
FEW = {
    "one example": {"examples": 1, "objective": {"features": 1.0, "logits": 1.0}, "unlabelled": 1},
    "three examples": {"examples": 3, "objective": "cross_task", "teacher_selection": 2, "start": "teachers"},
    "tokens of one example": {"examples": 1, "labels": "tags", "objective": {"features": 1.0, "logits": 1.0}},
    "tokens of one batch": {"examples": 8, "labels": "tags", "objective": {"features": 1.0, "logits": 1.0}},
    "fewer than a batch, stage 2 alone": {"examples": 5, "distillation_start": 0.0, "carrier": "mixed"},
    "checkpoints": {"examples": 1, "save_strategy": "steps", "save_steps": 1},
    "an analysis": {"examples": 3, "analysis": True},
    "weighed teachers": {"examples": 3, "start": "weighted", "weighing_steps": 4},
    "one example to weigh teachers": {"examples": 1, "start": "weighted"},
}


def with_few_examples(folder):
    """The steps of each training, which a process that waits would never finish."""
    steps = {}
    for name, settings in FEW.items():
        trainer = trainer_of(folder / name, dtype=torch.float32, **{"max_steps": 8, "logging_steps": 3, **settings})
        trainer.train()
        steps[name] = trainer.state.global_step
    return steps


def main(folder):
    rank = int(os.environ["RANK"])
    # Trainer resumes optimizers to "cpu:0", a place that torch does not know.
    torch.serialization.register_package(0, lambda storage: None, lambda storage, place: storage)
    results = {}
    for name in SETTINGS:
        trained, logs, trainer = train(folder, name)
        assert trainer.args.world_size == 2
        if trainer.args.max_steps:
            assert isinstance(trainer.model_wrapped, DistributedDataParallel)
        results[name] = {"trained": trained, "logs": logs}
    facts = {
        "resumed": resumed(folder, rank),
        "terminated": terminated(folder, rank),
        "few": with_few_examples(folder),
    }
    torch.save({"results": results, "facts": facts}, folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
