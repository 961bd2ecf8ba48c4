"""What must not change the result of a training: loaders, orders, precisions, batch sizes that are found."""

import pytest
import torch
from model_state import changed, snapshot
from tiny_models import make_dataset, make_model, make_student
from trainings import gradients, trainer_for


def in_float64(**kwargs):
    return make_student(make_model(dtype=torch.float64).double(), student_start="random", **kwargs).double()


@pytest.mark.parametrize("carrier", ["mixed", "dual"])
def test_workers_of_the_loader_change_nothing(carrier, trainer_args):
    models = []
    for workers in (0, 2):
        model = make_student(make_model(dropout=True), carrier=carrier)
        trainer_for(model, trainer_args(dataloader_num_workers=workers)).train()
        models.append(model)
    assert not changed(models[1], snapshot(models[0]))


def test_groups_by_length_change_nothing_but_the_order(trainer_args):
    """One step over all examples, in another order and in micro-batches of other examples."""
    results = []
    for grouped, batch_size, accumulation in ((False, 8, 1), (True, 8, 1), (True, 2, 4)):
        arguments = {"group_by_length": grouped, "length_column_name": "length"}
        dataset = make_dataset(8).map(lambda row: {"length": sum(row["attention_mask"])})
        found, log = gradients(
            in_float64(), lambda **kwargs: trainer_args(**kwargs, **arguments), batch_size, accumulation,  # noqa: B023
            train_dataset=dataset,
        )  # fmt: skip
        results.append((found, log))
    (expected, log), *others = results
    for found, other in others:
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-9, atol=1e-12)
        assert other["distillation_loss"] == pytest.approx(log["distillation_loss"], abs=2e-6)


@pytest.mark.parametrize("across", [True, False])
def test_tokens_are_averaged_in_one_process_as_in_several(across, trainer_args):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = make_student(
            make_model("gpt2", "causal_lm", dtype=torch.float64).double(), carrier="fused", student_start="random"
        ).double()
        arguments = {"average_tokens_across_devices": across}
        results.append(
            gradients(
                model, lambda **kwargs: trainer_args(**kwargs, **arguments), batch_size, accumulation,  # noqa: B023
                train_dataset=make_dataset(8, "tokens"),
            )[0]
        )  # fmt: skip
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad, rtol=1e-9, atol=1e-12)


def test_a_batch_size_that_is_found_trains_as_one_that_is_given(trainer_args, monkeypatch):
    """Batches above 4 do not fit; the step that failed leaves nothing in the log or in the weights.

    Trainer halves a batch of 8, or with a newer accelerate, goes down from it by tenths: both meet 4.
    """
    results = []
    for found in (True, False):
        model = in_float64(carrier="dual")
        args = trainer_args(
            auto_find_batch_size=found, per_device_train_batch_size=8 if found else 4, max_steps=4,
            lr_scheduler_type="constant",
        )  # fmt: skip
        trainer, sizes = trainer_for(model, args, train_dataset=make_dataset(4).select([0, 1, 2, 3] * 5)), []
        compute_loss = trainer.compute_loss

        def too_large(model, inputs, *args, compute_loss=compute_loss, sizes=sizes, **kwargs):
            sizes.append(len(inputs["input_ids"]))
            result = compute_loss(model, inputs, *args, **kwargs)
            if sizes[-1] > 4:
                raise RuntimeError("CUDA out of memory.")
            return result

        trainer.compute_loss = too_large
        trainer._get_train_sampler = lambda *args: None  # in the order of the data: each batch holds all four
        trainer.train()
        assert (max(sizes) > 4) == found
        assert sizes[-4:] == [4] * 4
        logs = [log["task_loss"] for log in trainer.state.log_history if "task_loss" in log]
        results.append((snapshot(model), logs))
    assert results[0][1] == pytest.approx(results[1][1], abs=2e-6)
    assert len(results[0][1]) == 4
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-9, atol=1e-12)


def test_autocast_in_bfloat16_is_near_and_keeps_the_weights_in_float32(trainer_args):
    logs, models = [], []
    for bf16 in (False, True):
        model = make_student(make_model(), carrier="mixed", student_start="random")
        trainer = trainer_for(model, trainer_args(bf16=bf16))
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "task_loss" in log])
        models.append(model)
    for plain, cast in zip(*logs, strict=True):
        for term in ("task_loss", "distillation_loss"):
            assert cast.get(term) == (pytest.approx(plain[term], rel=0.05, abs=0.02) if term in plain else None)
    assert all(parameter.dtype == torch.float32 for parameter in models[1].parameters())
    assert changed(models[1], snapshot(models[0]))
