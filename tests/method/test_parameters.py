"""The parts of a model, and what may be trained of them."""

import pytest
from tiny_models import TEACHERS, make_dataset, make_model, make_student
from trainings import trainer_for

import hf_adapter_distillation as had


def test_the_table_of_parameters(trainer_args, capsys):
    model = make_student(make_model(), config="double_seq_bn[reduction_factor=0.5]")
    trainer = trainer_for(model, trainer_args(disable_tqdm=False, max_steps=1, logging_strategy="no"))
    lines = trainer.parameter_table().splitlines()
    copied = sum(p.numel() for name, p in model.named_parameters() if any(f".adapters.{t}." in name for t in TEACHERS))
    assert lines[-1] == (
        f"Stage 2 fuses inside the layers, and copies the teachers' weights side by side: {4 * copied / 1e6:.2f} MB."
    )
    assert copied == 50_304
    rows = {line.rsplit(maxsplit=2)[0]: line.rsplit(maxsplit=2)[1:] for line in lines[1:-1]}
    trained = {part for part, (_, count) in rows.items() if count != "0"}
    assert trained == {"student insurance", "fusion (training only)", "head insurance"}
    assert {"base model", "teacher bank", "head bank"} <= set(rows)
    total = sum(int(count.replace(",", "")) for count, _ in rows.values())
    assert total == sum(p.numel() for p in model.parameters())
    trainer.train()
    out = capsys.readouterr().out
    assert out.count("fusion (training only)") == 1


def test_a_head_that_is_added_after_train_adapter_is_refused_by_name(trainer_args):
    model = make_model()
    model.add_adapter("bank", config="seq_bn")
    model.add_adapter("insurance", distill_from=["bank"])
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    model.add_qa_head("last")
    with pytest.raises(ValueError, match=r"heads.last.1.weight is trainable.*train_adapter\('insurance'\) last"):
        had.DistillationTrainer(model, trainer_args(), train_dataset=make_dataset())
