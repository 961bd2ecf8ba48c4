import csv
import statistics
from math import isnan, sqrt

import numpy
import pytest
import torch
from adapters import Stack
from tiny_models import TEACHERS, copy_weights, make_batch, make_dataset, make_model, make_student, noisy
from torch.utils.data import DataLoader
from trainings import trainer_for
from transformers import AutoTokenizer, DataCollatorWithPadding

import hf_adapter_distillation as had
from hf_adapter_distillation.analysis.observe import logger
from hf_adapter_distillation.analysis.plots import Estimate
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.layers import adapter_layers

FILES = {
    f"{name}.{kind}"
    for name in ("teacher_attention", "student_distance", "leave_one_teacher_out")
    for kind in ("csv", "png")
}


def looks_at(model, teacher, others):
    """Draws all attention to one teacher: a query along the key of its constant update."""
    for _, layer in adapter_layers(model, "insurance"):
        for name in (teacher, *others):
            up = layer.adapters[name].adapter_up
            up.weight.data.zero_()
            up.bias.data = (1.0 if name == teacher else -1.0) + 0.5 * torch.randn_like(up.bias)
        fusion = layer.distillation_fusion["insurance"]
        torch.nn.init.eye_(fusion.key.weight)
        fusion.query.weight.data.zero_()
        fusion.query.bias.data.fill_(4.0)


def test_estimates_are_those_of_sequences_run_one_by_one():
    """Each sequence alone and without padding: the mean and its error come from these numbers."""
    model = make_student(make_model(), carrier="mixed", student_start="random").double()
    dataset = make_dataset(6)
    lengths = [sum(row["attention_mask"]) for row in dataset]
    assert len(set(lengths)) > 1
    rows = [{"input_ids": row["input_ids"][:n]} for row, n in zip(dataset, lengths, strict=True)]
    model.train()
    attention = had.teacher_attention(model, dataset, batch_size=4)
    distance = had.student_distance(model, dataset, batch_size=4)
    assert model.training
    assert distillations(model.adapters_config)["insurance"].inspection is None
    attention_alone = [had.teacher_attention(model, [row]) for row in rows]
    distance_alone = [had.student_distance(model, [row]) for row in rows]
    assert list(attention) == list(distance) == [name for name, _ in adapter_layers(model, "insurance")]
    for layer, row in attention.items():
        assert list(row) == TEACHERS
        assert sum(map(float, row.values())) == pytest.approx(1, abs=1e-9)
        pairs = [(row[name], [alone[layer][name] for alone in attention_alone]) for name in TEACHERS]
        for found, alone in [*pairs, (distance[layer], [alone[layer] for alone in distance_alone])]:
            values = [float(one) for one in alone]
            assert all(isnan(one.standard_error) for one in alone)
            assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-9)
            assert found.standard_error == pytest.approx(statistics.stdev(values) / sqrt(6), rel=1e-6)


def test_attention_follows_the_query():
    """A query bias along the key of one teacher's constant update draws all attention to it."""
    model = make_student(make_model(), teachers=["bank", "travel"], student_start="random")
    looks_at(model, "bank", ["travel"])
    table = had.teacher_attention(model, make_dataset(4))
    assert all(row["bank"].mean > 0.999 for row in table.values())


def test_steps_without_teachers_do_not_train_the_fusion(caplog):
    model = make_student(make_model(), objective="logits")
    model.train()(**make_batch()).loss.backward()
    logger.warning_once.cache_clear()
    had.teacher_attention(model, make_dataset())
    assert "The fusion of 'insurance' is not trained" in caplog.text


@pytest.mark.parametrize("keep_fusion", [True, False])
def test_the_attention_of_a_fusion_that_is_not_trained_is_said_to_be(keep_fusion, trainer_args, caplog):
    model = make_student(make_model(), student_start="random")
    trainer_for(model, trainer_args(keep_fusion=keep_fusion, distillation_start=0.0)).train()
    model.train_adapter("insurance")
    logger.warning_once.cache_clear()
    had.teacher_attention(model, make_dataset())
    assert ("The fusion of 'insurance' is not trained" in caplog.text) == (not keep_fusion)


def test_the_distance_is_the_loss_of_the_layers():
    model = make_student(make_model(), student_start="random").double().train()
    batch = make_batch()
    model(**batch)
    losses = distillations(model.adapters_config)["insurance"].take_record().layer_losses
    found = had.student_distance(model, DataLoader([batch], batch_size=None))
    assert [float(one) for one in found.values()] == pytest.approx(losses.tolist(), rel=1e-9)


def test_a_copy_of_its_only_teacher_has_no_distance():
    model = make_student(make_model(), teachers=["bank"], student_start="random").double()
    assert all(one.mean > 0.9 for one in had.student_distance(model, make_dataset(4)).values())
    copy_weights(model, "bank", ["insurance"])
    assert all(one.mean < 1e-20 for one in had.student_distance(model, make_dataset(4)).values())


def test_leaving_out_a_teacher_is_running_the_others():
    """All attention is at `bank`, and at `travel` without it: the fused model is the one, then the other."""
    model = make_student(make_model(), teachers=["bank", "travel"]).double()
    looks_at(model, "bank", ["travel"])
    for parameter in model.heads["insurance"].parameters():
        parameter.data *= 20  # or the losses would hardly differ
    dataset = make_dataset(10)
    found = had.leave_one_teacher_out(model, dataset, batch_size=4)
    assert distillations(model.adapters_config)["insurance"].inspection is None

    block, differences, sizes = model.active_adapters, [], []
    model.eval()
    for start in range(0, 10, 4):
        rows = dataset.select(range(start, min(start + 4, 10)))
        losses = []
        for name in ("travel", "bank"):
            model.active_adapters = Stack(name)
            model.active_head = "insurance"
            losses.append(model(**rows.with_format("torch")[:]).loss.item())
        differences.append(losses[0] - losses[1])
        sizes.append(len(rows))
    model.active_adapters = block
    mean = numpy.average(differences, weights=sizes)
    deviations = (numpy.array(sizes) / 10 * (numpy.array(differences) - mean)) ** 2
    assert abs(mean) > 1e-3
    assert found["bank"].mean == pytest.approx(mean, rel=1e-6)
    assert found["bank"].standard_error == pytest.approx(sqrt(deviations.sum() * 3 / 2), rel=1e-5)
    assert found["travel"] == pytest.approx(Estimate(0, 0), abs=1e-9)


def test_whole_layers_are_analysed_alike():
    model = make_model()
    for name, config in (("bank", "lora"), ("travel", "seq_bn"), ("work", "prefix_tuning")):
        model.add_adapter(name, config=config)
    model.add_adapter("insurance", config="seq_bn", distill_from=["bank", "travel", "work"])
    model.train_adapter("insurance")
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    model.double()
    assert distillations(model.adapters_config)["insurance"].level == "layer"
    dataset = make_dataset(6)
    with_all = had.leave_one_teacher_out(model, dataset, batch_size=3)
    for fusion in fusions_of(model, "insurance"):
        torch.nn.init.zeros_(fusion.value.weight)  # what no teacher puts out cannot be missed
    nothing = had.leave_one_teacher_out(model, dataset, batch_size=3)
    assert set(with_all) == set(nothing) == {"bank", "travel", "work"}
    assert all(one == (0, 0) for one in nothing.values())
    assert any(one.mean != 0 for one in with_all.values())
    assert list(had.student_distance(model, dataset)) == ["encoder.layer.0", "encoder.layer.1"]


def test_columns_that_the_model_does_not_take_are_left_out(tiny_encoder):
    model = make_student(make_model())
    dataset = make_dataset(3).remove_columns(["input_ids", "attention_mask"]).add_column("idx", [0, 1, 2])
    dataset = dataset.add_column("input_ids", [[5, 6, 7], [8, 9], [10]])
    assert had.teacher_attention(model, dataset, DataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_encoder)))
    with pytest.raises(ValueError, match=r"make no batch .*; pass data_collator=DataCollatorWithPadding\(tokenizer\)"):
        had.teacher_attention(model, dataset)


def test_bad_calls():
    model = make_student(make_model())
    with pytest.raises(ValueError, match="there are no examples, or the fusion was dropped"):
        had.teacher_attention(model, [])
    with pytest.raises(ValueError, match="There is no loss to compare: there are no examples"):
        had.leave_one_teacher_out(model, [])
    unlabelled = make_dataset(4).remove_columns("labels")
    with pytest.raises(ValueError, match="BertAdapterModel puts out no loss; add a column of labels"):
        had.leave_one_teacher_out(model, unlabelled)
    assert distillations(model.adapters_config)["insurance"].inspection is None
    model.set_active_adapters("insurance")
    for measure in (had.teacher_attention, had.student_distance, had.leave_one_teacher_out):
        with pytest.raises(ValueError, match="distils nothing; call model.train_adapter"):
            measure(model, make_dataset(4))
    single = make_student(make_model(), teachers=["bank"])
    with pytest.raises(ValueError, match="'insurance' has a single teacher, 'bank'; none can be left out"):
        had.leave_one_teacher_out(single, make_dataset(4))


# What the trainer writes


def analysed(trainer_args, model=None, eval_dataset=None, **kwargs):
    model = model or make_student(make_model())
    trainer = had.DistillationTrainer(
        model, trainer_args(**kwargs), train_dataset=make_dataset(), eval_dataset=eval_dataset
    )
    trainer.train()
    return trainer


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_the_trainer_writes_what_the_functions_find(trainer_args, tmp_path):
    eval_dataset = make_dataset(12, seed=5)
    trainer = analysed(trainer_args, eval_dataset=eval_dataset, analysis=True, keep_fusion=True)
    folder, model = tmp_path / "training" / "analysis", trainer.model
    assert {path.name for path in folder.iterdir()} == FILES
    model.train_adapter("insurance")
    attention = had.teacher_attention(model, eval_dataset)
    header, *rows = read(folder / "teacher_attention.csv")
    assert header == ["layer", "teacher", "mean", "standard_error"]
    expected = [cell for row in attention.values() for cell in row.values()]
    assert [[float(n) for n in row[2:]] for row in rows] == [pytest.approx(list(cell), rel=1e-5) for cell in expected]
    assert [row[:2] for row in rows] == [[layer, name] for layer, row in attention.items() for name in row]
    header, *rows = read(folder / "student_distance.csv")
    assert header == ["layer", "mean", "standard_error"]
    assert len(rows) == len(attention)
    header, *rows = read(folder / "leave_one_teacher_out.csv")
    assert header == ["teacher", "mean", "standard_error"]
    assert [row[0] for row in rows] == TEACHERS
    noted = trainer.distillation.run.attention
    assert noted == {
        layer: {name: pytest.approx(cell.mean, abs=6e-5) for name, cell in row.items()}
        for layer, row in attention.items()
    }


def test_an_analysis_changes_nothing_of_the_training(trainer_args, tmp_path):
    weights = []
    for analysis in (False, True):
        model = make_student(make_model(dropout=True))
        trainer = analysed(trainer_args, model, make_dataset(6), analysis=analysis, output_dir=str(tmp_path / "run"))
        weights.append({name: p.clone() for name, p in trainer.model.named_parameters()})
        assert (tmp_path / "run" / "analysis").exists() == analysis
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_cannot_be_analysed_is_said(trainer_args, tmp_path, caplog):
    analysed(trainer_args, analysis=True, distillation_start=1.0)
    assert "There is no analysis: the training ended before stage 2; lower distillation_start." in caplog.text
    assert not (tmp_path / "training").exists() or not (tmp_path / "training" / "analysis").exists()
    analysed(trainer_args, analysis=True, label_smoothing_factor=0.1)
    assert "No teacher was left out: BertAdapterModel puts out no loss" in caplog.text
    written = {path.name for path in (tmp_path / "training" / "analysis").iterdir()}
    assert written == {name for name in FILES if not name.startswith("leave_one")}


def test_an_empty_eval_dataset_leaves_the_training_data(trainer_args, tmp_path):
    model = analysed(trainer_args, eval_dataset=make_dataset().select([]), analysis=True).model
    assert model.active_adapters == Stack("insurance")
    empty = read(tmp_path / "training" / "analysis" / "teacher_attention.csv")
    analysed(trainer_args, analysis=True)
    assert read(tmp_path / "training" / "analysis" / "teacher_attention.csv") == empty


def test_examples_that_cannot_be_read_take_the_analysis_alone(trainer_args, tmp_path, caplog):
    stream = make_dataset().to_iterable_dataset().filter(lambda row: False)
    trainer = analysed(trainer_args, eval_dataset=stream, analysis=True)
    message = "The analysis could not be written: There is no attention to show: there are no examples, or the fusion "
    assert message in caplog.text
    assert trainer.model.active_adapters == Stack("insurance")
    assert trainer.distillation.run.settings["steps"] == trainer.state.max_steps


def test_a_disk_that_fails_takes_the_analysis_alone(trainer_args, tmp_path, caplog):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "analysis").write_text("a file")
    trainer = analysed(trainer_args, analysis=True)
    assert "The analysis could not be written:" in caplog.text
    assert trainer.distillation.run.settings["steps"] == trainer.state.max_steps


def test_matplotlib_is_missed_before_the_training(trainer_args, monkeypatch):
    monkeypatch.setattr("hf_adapter_distillation.training.checks.find_spec", lambda name: None)
    message = "analysis=True draws figures. Plots need matplotlib; install it with pip install matplotlib."
    with pytest.raises(ImportError, match=message):
        had.DistillationTrainer(make_student(make_model()), trainer_args(analysis=True), train_dataset=make_dataset())


def test_an_analysis_in_inference_mode_leaves_the_next_step_alone():
    gradients = []
    for analysed in (False, True):
        model = make_student(make_model())
        if analysed:
            with torch.inference_mode():
                had.teacher_attention(model, make_dataset(4))
            model.train()
        model(**make_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_a_teacher_that_is_alone_at_a_place_can_be_left_out():
    model = make_model()
    for name, config in zip(TEACHERS, ("seq_bn", "seq_bn", "double_seq_bn"), strict=True):
        model.add_adapter(name, config=config)
        noisy(model, name)
    settings = had.DistillationConfig(TEACHERS, student_start="random")
    model.add_adapter("insurance", config="double_seq_bn", distill_from=settings)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    differences = had.leave_one_teacher_out(model, make_dataset(8), batch_size=4)
    assert set(differences) == set(TEACHERS)
    assert all(estimate.mean for estimate in differences.values())
