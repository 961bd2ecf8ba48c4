"""The model card: what it says, what it leaves out, and that the Hub takes it."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from datasets import DatasetInfo
from hub_server import check_card
from huggingface_hub import ModelCard
from tiny_models import TEACHERS, make_dataset, make_model, make_student

import hf_adapter_distillation as had
from hf_adapter_distillation.hub.card import CardFacts, CardOptions, write_card
from hf_adapter_distillation.method.distillation import distillations
from hf_adapter_distillation.student.training_run import finite_metrics, hub_dataset

COMMIT = "0123abcd" * 5


def of_hub(dataset, repo="me/queries"):
    """The data as `load_dataset` would have given it."""
    files = ("train.parquet", "test.parquet")
    dataset.info.download_checksums = {f"hf://datasets/{repo}@{COMMIT}/{name}": {} for name in files}
    return dataset


def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean()), "text": "x"}


def trained(trainer_args, kind="flex", data=make_dataset, eval_dataset=None, **kwargs):
    trainer = had.DistillationTrainer(
        make_student(make_model(kind=kind)),
        trainer_args(**kwargs),
        train_dataset=data(),
        eval_dataset=eval_dataset,
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer


def card_of(model, folder, **kwargs):
    write_card(CardFacts.of_model(model, "insurance"), folder, "me/faq-insurance", CardOptions(**kwargs))
    return (Path(folder) / "README.md").read_text()


def untrained(tmp_path, trainer_args):
    return make_student(make_model()), {}


def without_data_or_results(tmp_path, trainer_args):
    return trained(trainer_args).model, {}


def all_in_stage_1(tmp_path, trainer_args):
    return trained(trainer_args, distillation_start=1.0).model, {}


def static_head(tmp_path, trainer_args):
    return trained(trainer_args, kind="classification").model, {"datasets_tag": "me/queries"}


def without_a_head(tmp_path, trainer_args):
    return make_student(make_model(kind="base")), {"language": ["en", "de"]}


def local_teachers_and_base(tmp_path, trainer_args):
    make_student(make_model()).save_adapter(str(tmp_path / "bank"), "bank")
    model = make_model()
    model.config.name_or_path = str(tmp_path)
    model.add_adapter("insurance", distill_from=[str(tmp_path / "bank")])
    return model, {"tags": "faq", "results": "Fine."}


def all_that_there_is(tmp_path, trainer_args):
    trainer = trained(trainer_args, data=lambda: of_hub(make_dataset()), eval_dataset=make_dataset(seed=1))
    trainer.evaluate()
    trainer.distillation.run.attention = {"layer.0": {"bank": 0.5, "travel": 0.25, "work": 0.25}}
    return trainer.model, {"language": "en", "license": "mit", "dataset_name": "Queries", "dataset_config": "small"}


WAYS = [
    untrained,
    without_data_or_results,
    all_in_stage_1,
    static_head,
    without_a_head,
    local_teachers_and_base,
    all_that_there_is,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_card_has_no_gaps_and_the_hub_takes_it(way, tmp_path, trainer_args):
    model, kwargs = way(tmp_path, trainer_args)
    text = card_of(model, tmp_path, **kwargs)
    assert check_card(text) == []
    assert not re.search(r"\b(None|nan|null)\b", text)
    assert str(tmp_path) not in text
    body = text.partition("\n---\n")[2]
    assert re.findall(r"^## .*\n+(?=#|\Z)", body, flags=re.M) == []
    assert "\n\n\n" not in body
    assert ModelCard.load(tmp_path / "README.md").content == text
    titles = ["Teachers", "Usage", "Training", "Results", "Citation"]
    if way in (untrained, without_a_head):
        titles.remove("Results")
    assert re.findall(r"^## (.*)$", body, flags=re.M) == titles
    assert all(f"arxiv.org/abs/{paper}" in body for paper in ("2312.16261", "2005.00247"))
    for value in kwargs.values():
        assert all(each in text for each in ([value] if isinstance(value, str) else value))


def test_a_card_says_what_the_run_was(tmp_path, trainer_args):
    data = of_hub(make_dataset())
    trainer = trained(trainer_args, data=lambda: data, eval_dataset=make_dataset(seed=1), eval_strategy="epoch")
    trainer.model.config.name_or_path = "someone/uncased"
    sources = trainer.distillation.sources
    sources["bank"] = {"source": "me/faq-bank@v2", "revision": COMMIT}
    bank = trainer.distillation.run.teachers[0]
    bank.source, bank.revision = "me/faq-bank@v2", COMMIT
    trainer.evaluate(make_dataset(seed=2), metric_key_prefix="test")
    text = card_of(trainer.model, tmp_path, language="en", license="mit", dataset_name="FAQ queries")
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        card.data.to_dict().items()
        >= {
            "language": ["en"],
            "license": "mit",
            "library_name": "adapter-transformers",
            "tags": ["adapter-transformers", "adapter-distillation", "bert"],
            "datasets": ["me/queries"],
            "metrics": ["accuracy"],
            "base_model": "someone/uncased",
            "base_model_relation": "adapter",
            "pipeline_tag": "text-classification",
        }.items()
    )
    logged = trainer.state.log_history
    found = {(result.dataset_split, result.metric_type): result for result in card.data.eval_results}
    assert set(found) == {(None, "accuracy"), ("test", "accuracy")}
    assert card.data.model_name == "faq-insurance"
    for (split, _), result in found.items():
        value = [entry[key] for entry in logged if (key := f"{split or 'eval'}_accuracy") in entry][-1]
        assert result.metric_value == round(value, 6)
        assert f"| {key} | {round(value, 6)} |" in text
        assert (result.task_type, result.dataset_type) == ("text-classification", "me/queries")
        assert result.dataset_name == "FAQ queries"
    assert f"- [me/faq-bank@v2](https://huggingface.co/me/faq-bank/tree/{COMMIT}) at `0123abcd`\n- `travel`\n" in text
    stages = {entry["stage"]: entry for entry in logged if "stage" in entry}
    first, second = stages[1], stages[2]
    assert "| stage | loss | task_loss | distillation_loss | fusion_regularization |" in text
    assert f"| 1 | {first['loss']} | {first['task_loss']} | - | - |" in text
    assert f"| 2 | {second['loss']} | {second['task_loss']} | {second['distillation_loss']} |" in text
    assert "\n- steps: 8\n" in text
    assert "\n- batch_size: 4\n" in text
    assert f"With hf-adapter-distillation {version('hf-adapter-distillation')}" in text
    assert "for [someone/uncased](https://huggingface.co/someone/uncased) with a head for text classification" in text
    assert 'from_pretrained("someone/uncased")' in text


@pytest.mark.parametrize("weight", [0, 0.3])
@pytest.mark.parametrize("gain", [0.01, 0.4])
def test_a_card_says_whether_the_teachers_did_not_help(gain, weight, tmp_path, trainer_args):
    model = trained(trainer_args).model
    run = distillations(model.adapters_config)["insurance"].run
    weights = {teacher.name: 0.25 for teacher in run.teachers}
    run.settings |= {"teacher_weights": weights, "teacher_gain": gain, "distillation_weight": weight}
    text = card_of(model, tmp_path)
    assert ("They did not help on held-out labels, so the adapter did not start at them" in text) == (gain < 0.05)
    assert ("and the distillation had the weight 0." in text) == (gain < 0.05 and weight == 0)


def test_results_are_those_of_the_weights_that_were_kept(trainer_args):
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trained(trainer_args, eval_dataset=make_dataset(seed=1), **evaluation, **best)
    state = trainer.state
    assert state.best_global_step < state.global_step
    (entry,) = [e for e in state.log_history if "eval_loss" in e and e["step"] == state.best_global_step]
    run = trainer.distillation.run
    assert run.evaluation["eval_loss"] == round(entry["eval_loss"], 6)
    metrics = trainer.evaluate()
    assert run.evaluation == {key: round(metrics[key], 6) for key in ("eval_loss", "eval_accuracy")}


def test_a_plain_adapter_stands_beside_the_results(tmp_path, trainer_args):
    trainer = trained(trainer_args, eval_dataset=make_dataset(seed=1))
    found = trainer.evaluate()["eval_accuracy"]
    baseline = {"eval_accuracy": 0.25, "test_f1": 0.5, "eval_runtime": 3.0, "eval_loss": float("nan")}
    trainer.create_model_card(baseline=baseline)
    text = (tmp_path / "training" / "README.md").read_text()
    assert "| metric | this adapter | a plain adapter |\n" in text
    assert f"| eval_accuracy | {found} | 0.25 |\n" in text
    assert "| test_f1 | - | 0.5 |\n" in text
    assert "eval_runtime" not in text
    assert "nan" not in text
    assert "| eval_loss | 0" in text
    trainer.create_model_card()
    assert "plain adapter" not in (tmp_path / "training" / "README.md").read_text()


def test_the_card_keeps_what_the_user_says(tmp_path):
    said = {"datasets_tag": "me/other", "results": "Better than plain: 0.9.", "citation": "Me.", "license": "mit"}
    said |= {"architecture_training": "On a laptop.", "task": "token-classification", "base_model": "some/base"}
    text = card_of(make_student(make_model()), tmp_path, **said, metrics=["f1"], tags=["faq"])
    assert all(value in text for value in said.values())
    assert "- f1" in text
    assert "- faq" in text
    assert "2005.00247" not in text


def test_a_base_model_in_a_folder_is_no_repository(tmp_path, monkeypatch):
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = make_student(make_model())
    model.config.name_or_path = "models/minilm"
    text = card_of(model, tmp_path)
    assert 'from_pretrained("path/to/the/base/model")' in text
    assert "minilm" not in text
    assert "base_model" not in text


@pytest.mark.parametrize("installed", [True, False])
def test_the_heat_map(installed, hub, tmp_path, trainer_args, monkeypatch):
    pytest.importorskip("matplotlib")
    trainer = trained(trainer_args, push_to_hub=True, hub_model_id="me/faq")
    table = trainer.distillation.run.attention
    assert all(sum(row.values()) == pytest.approx(1, abs=1e-3) and list(row) == TEACHERS for row in table.values())
    if not installed:
        monkeypatch.setattr("hf_adapter_distillation.hub.card.find_spec", lambda name: None)
    text = card_of(trainer.model, tmp_path)
    assert ("![Attention over teachers by layer](attention.png)" in text) == installed
    assert (tmp_path / "attention.png").exists() == installed
    mean = sum(row["work"] for row in table.values()) / len(table)
    assert f"- `work`, mean attention {mean:.2f}" in text


@pytest.mark.parametrize("kwargs", [{}, {"push_to_hub": True, "hub_model_id": "me/faq", "distillation_start": 1.0}])
def test_no_heat_map_that_nobody_asked_for_or_that_would_show_nothing(kwargs, hub, trainer_args):
    assert "attention" not in trained(trainer_args, **kwargs).distillation.run.to_dict()


def test_what_is_a_metric():
    logged = {"eval_loss": 0.5, "eval_runtime": 1, "eval_samples_per_second": 3, "eval_ok": "x", "epoch": 1.0}
    assert finite_metrics({**logged, "eval_f1": float("nan"), "eval_k": [1]}) == {"eval_loss": 0.5}


def test_the_data_set_is_known_where_it_came_from_the_hub():
    data = of_hub(make_dataset())
    assert hub_dataset(data.map(lambda row: {**row, "x": 1}).train_test_split(4)["train"]) == "me/queries"
    assert hub_dataset(make_dataset()) is None
    assert hub_dataset([1, 2]) is None
    local = make_dataset()
    local.info.update(DatasetInfo(download_checksums={"/home/me/data.csv": {}}))
    assert hub_dataset(local) is None


def test_a_saved_student_says_it_too(tmp_path, trainer_args):
    model = trained(trainer_args, data=lambda: of_hub(make_dataset())).model
    model.save_adapter(str(tmp_path / "saved"), "insurance")
    saved = had.student.provenance.read_provenance(str(tmp_path / "saved")).run
    assert saved.dataset == "me/queries"
    assert set(saved.losses) == {"1", "2"}
    assert saved.losses["2"] == distillations(model.adapters_config)["insurance"].run.losses["2"]
