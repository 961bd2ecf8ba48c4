"""Students whose teachers are chosen from a pool before their training."""

import shutil

import pytest
import torch
from adapters import LoRAConfig
from datasets import Dataset
from good_and_harmful import good_and_harmful, sequences
from messages import exactly, one_line
from model_state import everything
from tiny_models import make_batch, make_dataset, make_model, noisy, with_teachers
from torch.utils.data import DataLoader
from trainings import StopAt, trainer_for
from transformers import default_data_collator

import hf_adapter_distillation as had
from hf_adapter_distillation.student.provenance import read_provenance
from hf_adapter_distillation.student.warm_start import is_at_average

N_RANDOM = 12


@pytest.fixture(scope="module")
def harmful_pool(tmp_path_factory):
    """One adapter that knows the task among others that do not."""
    folder, model = tmp_path_factory.mktemp("harmful"), good_and_harmful()
    torch.manual_seed(5)
    for number in range(N_RANDOM):
        model.add_adapter(
            f"random{number}", config="double_seq_bn" if number % 4 else "double_seq_bn[reduction_factor=8]"
        )
        noisy(model, f"random{number}")
    for name in ("good", *(f"random{number}" for number in range(N_RANDOM))):
        model.save_adapter(str(folder / name), name)
    return folder


@pytest.fixture
def pool(tmp_path):
    model = with_teachers(teachers=[f"tenant{number}" for number in range(6)])
    (tmp_path / "pool").mkdir()
    for name in model.adapters_config:
        model.save_adapter(str(tmp_path / "pool" / name), name, use_safetensors=True)
    return tmp_path / "pool"


def student_of(pool, k=2, model=None, config="seq_bn", **settings):
    """A model with nothing but a student and its head."""
    model = model or make_model()
    settings = had.DistillationConfig(teachers=str(pool), teacher_selection=k, **settings)
    model.add_adapter("new", config=config, distill_from=settings)
    model.add_classification_head("new")
    model.train_adapter("new")
    return model


def test_the_adapter_that_knows_the_task_is_chosen_and_the_student_is_that_of_a_list(harmful_pool, trainer_args):
    """A head that is new says nothing, so it is trained first; it learns enough in the steps of the weighing."""
    models, args = [], trainer_args(distillation_start=0.0, weighing_steps=40)
    base = good_and_harmful()
    for name in list(base.adapters_config):
        base.delete_adapter(name)
        base.delete_head(name)
    for from_pool in (True, False):
        model = make_model()
        model.load_state_dict(base.state_dict(), strict=False)
        if from_pool:
            student_of(harmful_pool, 1, model, "double_seq_bn", student_start="teachers")
            assert list(model.adapters_config) == ["new", "new_pool_0"]
        else:
            settings = had.DistillationConfig([str(harmful_pool / "good")], student_start="teachers")
            torch.manual_seed(0)
            model.add_adapter("new", config="double_seq_bn", distill_from=settings)
            model.train_adapter("new")
        trainer = trainer_for(model, args, train_dataset=sequences(128, seed=7))
        models.append(trainer.model)
        if from_pool:
            trainer.create_optimizer_and_scheduler(1)
            assert list(trainer.distillation.ranking) == ["good"]
            assert trainer.block.teachers == ("good",)
        else:
            trainer.create_optimizer_and_scheduler(1)
    chosen, listed = (dict(model.named_parameters()) for model in models)
    assert chosen.keys() == listed.keys()
    assert all(torch.equal(chosen[name], listed[name]) for name in chosen if "distillation_fusion" not in name)


def test_only_the_chosen_are_ever_on_the_model_with_one_stand_in(harmful_pool, monkeypatch):
    model, seen = student_of(harmful_pool, 3, config="double_seq_bn"), []
    original = torch.nn.Module.__call__
    monkeypatch.setattr(
        type(model),
        "__call__",
        lambda self, *a, **k: seen.append(len(self.adapters_config)) or original(self, *a, **k),
    )
    batches = DataLoader(sequences(64, seed=7), batch_size=16, collate_fn=default_data_collator)
    scores = had.choose_teachers(model, batches)
    assert seen
    assert max(seen) == 2, "the student and one stand-in"
    assert len(scores) == N_RANDOM + 1
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    distillation = had.distillation_of(model)
    assert distillation.ranking == dict(list(scores.items())[:3])
    assert list(model.adapters_config) == ["new", *distillation.ranking]
    assert is_at_average(model, "new")
    model(**make_batch())["loss"].backward()
    with pytest.raises(
        ValueError, match=exactly("The teachers of 'new' are chosen already; add it again to choose others.")
    ):
        had.choose_teachers(model, batches)


def test_a_resumed_training_takes_the_same_teachers_without_a_choice(pool, trainer_args, monkeypatch):
    args = trainer_args(save_strategy="steps", save_steps=2, max_steps=4)
    whole = trainer_for(student_of(pool), args)
    whole.train()
    (stopped := trainer_for(student_of(pool), args, callbacks=[StopAt(2)])).train()
    monkeypatch.setattr("hf_adapter_distillation.training.preparation.choose_from_pool", None)
    resumed = trainer_for(student_of(pool), args)
    resumed.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    assert resumed.block == whole.block == stopped.block
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    gone = pool / whole.block.teachers[0]
    model = student_of(pool)
    shutil.rmtree(gone)
    for each in (model, student_of(pool)):
        with pytest.raises(ValueError, match=one_line(part=f"made with the teacher {gone.name!r}, which the pool")):
            trainer_for(each, args).train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")


def test_the_provenance_names_the_chosen_and_where_they_are(pool, trainer_args, tmp_path):
    model = student_of(pool)
    model.save_adapter(str(tmp_path / "untrained"), "new")
    assert read_provenance(tmp_path / "untrained").teachers == []
    trainer = trainer_for(model, trainer_args(max_steps=2))
    trainer.train()
    model.save_adapter(str(tmp_path / "new"), "new")
    saved = read_provenance(tmp_path / "new")
    assert [teacher.source for teacher in saved.teachers] == [str(pool / name) for name in trainer.block.teachers]
    assert saved.run.settings["ranking"] == trainer.distillation.ranking
    assert (len(saved.teachers), saved.settings["teacher_selection"]) == (2, 2)


def test_damaged_weights_are_named_and_the_choice_goes_on(pool, caplog):
    for name in ("tenant0", "tenant3"):
        (pool / name / "adapter.safetensors").write_bytes(b"cut")
    model = student_of(pool, 4)
    with caplog.at_level("WARNING", "hf_adapter_distillation"):
        scores = had.choose_teachers(model, [make_batch()])
    assert sorted(scores) == ["tenant1", "tenant2", "tenant4", "tenant5"]
    (message,) = [message for message in caplog.messages if "cannot be teachers" in message]
    assert "has 2 adapters that cannot be teachers, and goes on without 'tenant0', 'tenant3': Teacher '" in message


def test_a_pool_in_which_all_weights_are_damaged_adds_nothing(pool):
    for path in pool.glob("*/adapter.safetensors"):
        path.write_bytes(b"cut")
    model = make_model()
    before = everything(model)
    with pytest.raises(ValueError, match=one_line(start="Teacher '", part="tenant0' cannot be loaded: ")):
        model.add_adapter("new", config="seq_bn", distill_from=had.DistillationConfig(str(pool), teacher_selection=2))
    assert everything(model) == before


def test_without_a_choice_there_is_no_training_step_and_without_labels_no_choice(pool, trainer_args):
    model = student_of(pool)
    with pytest.raises(RuntimeError, match=one_line(start="The teachers of 'new' are not chosen from their pool yet")):
        model(**make_batch())
    with torch.no_grad():
        model.eval()(**make_batch())
    before = everything(model.train())
    with pytest.raises(
        ValueError, match=exactly("There are no batches to choose teachers with; give at least one, with labels.")
    ):
        had.choose_teachers(model, [])
    with pytest.raises(TypeError, match=exactly("batches is one batch, a dict; put it into a list: [batch].")):
        had.choose_teachers(model, make_batch())
    message = exactly("steps=-1 is out of range; it must be a number of steps, at least 0.")
    with pytest.raises(ValueError, match=message):
        had.choose_teachers(model, [make_batch()], steps=-1)
    with pytest.raises(
        ValueError, match=exactly("The teachers of 'new' are not chosen yet; call had.choose_teachers first.")
    ):
        had.weigh_teachers(model, [make_batch()])
    with pytest.raises(ValueError, match=one_line(start="The teachers of 'new' are chosen from a pool by labelled")):
        trainer_for(model, trainer_args(), train_dataset=make_dataset(1)).train()
    assert everything(model) == before
    unlabelled = Dataset.from_dict({"input_ids": make_dataset()["input_ids"]})
    with pytest.raises(ValueError, match=one_line(start="The training batches have no labels")):
        trainer_for(model, trainer_args(), train_dataset=unlabelled).train()
    with pytest.raises(
        ValueError, match=exactly("BertAdapterModel puts out no loss; give the batches labels, or pass loss=...")
    ):
        had.choose_teachers(model, [make_batch(labels=None)])
    trainer_for(model, trainer_args(max_steps=2)).train()
    assert len(had.distillation_of(model, "new").config.teachers) == 2, "the next try chooses"


def test_settings_of_a_pool(pool):
    with pytest.raises(ValueError, match=one_line(start="teachers='", part="is a pool, of which the best become")):
        make_model().add_adapter("new", distill_from=had.DistillationConfig(str(pool)))
    with pytest.raises(ValueError, match=one_line(start="teacher_selection=0.5 is out of range")):
        had.DistillationConfig("pool", teacher_selection=0.5)
    assert had.DistillationConfig(pool, teacher_selection=2).teachers == str(pool)


def test_a_student_that_is_deleted_or_added_again_takes_its_stand_in_along(pool):
    model = student_of(pool)
    settings = had.DistillationConfig(pool, teacher_selection=2)
    model.add_adapter("new", config="seq_bn", distill_from=settings, overwrite_ok=True)
    assert list(model.adapters_config) == ["new", "new_pool_0"]
    model.delete_adapter("new")
    assert not list(model.adapters_config)


def test_adapters_of_a_method_without_places_inside_the_layers_are_ranked_by_whole_layers(tmp_path):
    model = make_model()
    (tmp_path / "pool").mkdir()
    for number in range(3):
        model.add_adapter(f"prefix{number}", config="prefix_tuning[flat=True]")
        noisy(model, f"prefix{number}")
        model.save_adapter(str(tmp_path / "pool" / f"prefix{number}"), f"prefix{number}")
    model = student_of(tmp_path / "pool", 2)
    scores = had.choose_teachers(model, [make_batch()])
    assert len(set(scores.values())) == 3
    assert had.distillation_of(model).level == "layer"


def test_a_silent_layer_of_the_first_adapter_does_not_change_the_scores_of_others(tmp_path):
    """The first of a config stands in for the others while they are scored."""
    model = make_model()
    for name in ("x", "other"):
        model.add_adapter(name, config=LoRAConfig(r=4))
        noisy(model, name)
    for loras in model.get_adapter("x")[1].values():
        for lora in loras:
            lora.lora_B.data.zero_()
    scores = []
    for silent in ("a", "z"):
        (tmp_path / silent).mkdir()
        model.save_adapter(str(tmp_path / silent / silent), "x")
        model.save_adapter(str(tmp_path / silent / "m"), "other")
        chooser = make_model()
        settings = had.DistillationConfig(str(tmp_path / silent), teacher_selection=1, student_start="random")
        chooser.add_adapter("new", config=LoRAConfig(r=4), distill_from=settings)
        torch.manual_seed(0)
        chooser.add_classification_head("new")
        chooser.train_adapter("new")
        scores.append(had.choose_teachers(chooser, [make_batch(seed=number) for number in range(3)], steps=0))
    assert scores[0]["m"] == pytest.approx(scores[1]["m"], rel=1e-5)
    assert scores[0]["a"] == pytest.approx(scores[1]["z"], rel=1e-5)


def test_layers_on_which_the_loss_does_not_depend_do_not_count(tmp_path):
    model = make_model("t5")
    for name in ("a", "b"):
        model.add_adapter(name, config="ia3")
        noisy(model, name)
        model.save_adapter(str(tmp_path / name), name)
    model = make_model("t5")
    settings = had.DistillationConfig(str(tmp_path), teacher_selection=1, student_start="random")
    model.add_adapter("new", config="ia3", distill_from=settings)
    model.add_seq2seq_lm_head("new")
    model.train_adapter("new")

    def loss(batch):
        return model(**batch).encoder_last_hidden_state.square().mean()

    scores = had.choose_teachers(model, [make_batch(labels="tokens")], loss)
    assert set(scores) == {"a", "b"}
    assert all(scores.values())
