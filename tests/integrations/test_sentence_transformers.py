"""The trainers of Sentence Transformers with both stages."""

import json

import numpy as np
import pytest
import torch
from adapters import Stack
from datasets import Dataset
from embedding_models import PAIRS, SCORED, TEXTS, cross_encoder, embedding_model
from messages import exactly, one_line
from model_state import changed, snapshot
from safetensors.torch import load_file
from sentence_transformers import losses
from sentence_transformers.cross_encoder import losses as cross_encoder_losses
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.training_args import BatchSamplers
from tiny_models import TEACHERS
from trainings import StopAt
from without_package import run_without_package

from hf_adapter_distillation.integrations.sentence_transformers import (
    CrossEncoderDistillationTrainer,
    CrossEncoderDistillationTrainingArguments,
    SentenceTransformerDistillationTrainer,
    SentenceTransformerDistillationTrainingArguments,
)
from hf_adapter_distillation.teachers import weighing

SORTED = PAIRS.add_column("label", [i % 2 for i in range(16)])


def softmax_loss(model):
    return losses.SoftmaxLoss(model, sentence_embedding_dimension=16, num_labels=2)


LOSSES = {
    "ranking": (losses.MultipleNegativesRankingLoss, PAIRS),
    "cached ranking": (lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), PAIRS),
    "scores": (losses.CoSENTLoss, SCORED),
    "matryoshka": (
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [16, 8]),
        PAIRS,
    ),
    "own weights": (softmax_loss, SORTED),
}
LOAD = """
    import json, adapters, numpy
    from sentence_transformers import CrossEncoder, SentenceTransformer
    folders, texts, out = json.loads(sys.argv[1])
    for number, folder in enumerate(folders):
        is_cross = folder.endswith("scores")
        model = (CrossEncoder if is_cross else SentenceTransformer)(folder, device="cpu")
        transformer = model.model if is_cross else model[0].auto_model
        assert not hasattr(transformer.config, "adapters")
        adapters.init(transformer)
        transformer.load_adapter(folder + "/insurance", use_safetensors=True, set_active=True)
        assert list(transformer.adapters_config) == ["insurance"]
        output = model.predict([texts[:2], texts[2:]]) if is_cross else model.encode(texts)
        numpy.save(f"{out}/{number}.npy", output)
"""


def arguments(folder, cls=SentenceTransformerDistillationTrainingArguments, **kwargs):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "distillation_start": 0.5,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(str(folder / "training"), **{**defaults, **kwargs})


def trainer_of(folder, encoder, name="ranking", model=None, callbacks=(), **kwargs):
    model = model or embedding_model(folder, encoder)
    loss, dataset = LOSSES[name]
    return SentenceTransformerDistillationTrainer(
        model, arguments(folder, **kwargs), train_dataset=dataset, loss=loss(model), callbacks=list(callbacks)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_student_and_fusion_alone(name, tiny_encoder, tmp_path):
    trainer = trainer_of(tmp_path, tiny_encoder, name, keep_fusion=True)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    for part in (".adapters.insurance.", ".distillation_fusion.insurance."):
        assert any(part in name for name in moved), part
    assert all(".insurance." in name for name in moved)
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert (first["stage"], last["stage"]) == (1, 2)
    assert last["distillation_loss"] > 0
    assert {f"attention/{teacher}" for teacher in TEACHERS} <= last.keys()
    assert last["loss"] == pytest.approx(
        last["task_loss"] + trainer.distillation_weight * last["distillation_loss"] + last["fusion_regularization"],
        abs=2e-3,
    )


def test_saved_models_are_loaded_without_this_package(tiny_encoder, tmp_path):
    folders, outputs = [], []
    for pooling in ("mean", "cls"):
        (tmp_path / pooling).mkdir()
        model = embedding_model(tmp_path / pooling, tiny_encoder, pooling)
        base = load_file(tmp_path / pooling / "base" / "model.safetensors")
        trainer = trainer_of(tmp_path / pooling, tiny_encoder, model=model, save_strategy="steps", save_steps=2)
        trainer.train()
        folder = tmp_path / pooling / "saved"
        trainer.save_model(str(folder))
        for each in (folder, tmp_path / pooling / "training" / "checkpoint-4"):
            saved = load_file(each / "model.safetensors")
            assert saved.keys() == base.keys()
            assert all(torch.equal(saved[name], value) for name, value in base.items())
            assert {path.name for path in each.iterdir() if path.is_dir()} == {"1_Pooling", "insurance"}
            folders.append(str(each))
            outputs.append(model.encode(TEXTS))
        assert not (folder / "distillation_fusion.safetensors").exists()
        assert "save_pretrained" not in vars(model[0].auto_model)
        assert model[0].auto_model.active_adapters == Stack("insurance")
    model = cross_encoder(tmp_path, tiny_encoder)
    args = arguments(tmp_path, CrossEncoderDistillationTrainingArguments)
    trainer = CrossEncoderDistillationTrainer(model, args, train_dataset=SCORED)
    trainer.train()
    trainer.save_model(str(tmp_path / "scores"))
    folders.append(str(tmp_path / "scores"))
    outputs.append(model.predict([TEXTS[:2], TEXTS[2:]]))
    run_without_package(LOAD, json.dumps([folders, TEXTS, str(tmp_path)]))
    for number, output in enumerate(outputs):
        np.testing.assert_array_equal(np.load(tmp_path / f"{number}.npy"), output)


class OtherName(losses.CachedMultipleNegativesRankingLoss):
    """A gradient cache of the user's own."""


@pytest.mark.parametrize(
    "loss",
    [
        losses.CachedMultipleNegativesRankingLoss,
        OtherName,
        pytest.param(
            losses.MegaBatchMarginLoss,
            marks=pytest.mark.skipif(
                not hasattr(losses.MegaBatchMarginLoss, "uses_gradient_cache"), reason="it is no gradient cache yet"
            ),
        ),
        lambda model, mini_batch_size: losses.MegaBatchMarginLoss(model, use_mini_batched_version=False),
    ],
)
def test_terms_do_not_depend_on_the_mini_batches_of_a_gradient_cache(loss, tiny_encoder, tmp_path):
    found = {}
    for size in (8, 2):
        model = embedding_model(tmp_path, tiny_encoder, dropout=0.0, dtype=torch.float64)
        args = arguments(
            tmp_path, per_device_train_batch_size=8, max_steps=1, distillation_start=0.0, max_grad_norm=0.0
        )
        trainer = SentenceTransformerDistillationTrainer(
            model, args, train_dataset=PAIRS.select(range(8)), loss=loss(model, mini_batch_size=size)
        )
        trainer.train()
        log = trainer.state.log_history[0]
        found[size] = [log[key] for key in ("grad_norm/fusion", "distillation_loss", "fusion_regularization")]
    assert found[2] == pytest.approx(found[8], rel=1e-5)


@pytest.mark.parametrize("name", ["ranking", "own weights"])
def test_a_killed_training_of_embeddings_goes_on_to_the_same_weights(name, tiny_encoder, tmp_path):
    def run(folder, noise, resume=None, callbacks=()):
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = {"save_strategy": "steps", "save_steps": 3, "keep_fusion": True}
        trainer = trainer_of(tmp_path / folder, tiny_encoder, name, callbacks=callbacks, **settings)
        with torch.no_grad():
            for parameter in trainer.loss.parameters():  # the model is in it
                if parameter.requires_grad:
                    parameter += noise
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()  # Trainer never clears the gradients of a loss, so it goes on otherwise

    unbroken = run("unbroken", 0)
    run("killed", 0, callbacks=[StopAt(3)])
    resumed = run("killed", 1, resume=str(tmp_path / "killed" / "training" / "checkpoint-3"))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_checkpoint_of_before_leaves_the_weights_of_a_loss(tiny_encoder, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, tiny_encoder, "own weights", **settings).train()
    folder = tmp_path / "training" / "checkpoint-2"
    (folder / "trained_beside_the_student.safetensors").unlink()
    digests = json.loads((folder / "checkpoint_digests.json").read_text())
    del digests["trained_beside_the_student.safetensors"]
    (folder / "checkpoint_digests.json").write_text(json.dumps(digests))
    trainer_of(tmp_path, tiny_encoder, "own weights", **settings).train(resume_from_checkpoint=str(folder))
    assert "lacks the weights of the losses" in caplog.text


def test_embeddings_start_at_the_mean_update_and_choose_their_teachers(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder, teacher_selection=2)
    before = snapshot(model)
    trainer = trainer_of(tmp_path, tiny_encoder, model=model, max_steps=1, learning_rate=0.0)
    trainer.train()
    moved = changed(model, before)
    assert moved
    assert all("insurance.adapter" in name for name in moved), "at a learning rate of 0 only the start moves"
    assert len(trainer.block.teachers) == 2
    assert trainer.distillation.ranking.keys() == set(TEACHERS)
    assert all(-1 <= score <= 1 for score in trainer.distillation.ranking.values())


def test_embeddings_choose_the_teachers_that_the_labels_weigh_most(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder, teacher_selection=1, student_start="weighted")
    trainer = trainer_of(tmp_path, tiny_encoder, model=model, max_steps=1)
    trainer.train()
    weights = trainer.distillation.weights
    assert weights.mean().keys() == set(TEACHERS)
    assert list(trainer.block.teachers) == weights.heaviest(1)


def test_the_analysis_of_embeddings_is_written(tiny_encoder, tmp_path):
    trainer_of(tmp_path, tiny_encoder, max_steps=2, analysis=True).train()
    assert (tmp_path / "training" / "analysis" / "student_distance.csv").is_file()


def test_an_evaluator_sees_the_student(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder)
    evaluator = EmbeddingSimilarityEvaluator(TEXTS, [*TEXTS[1:], TEXTS[0]], [0.1, 0.9, 0.5, 0.3], name="pairs")
    trainer = SentenceTransformerDistillationTrainer(
        model, arguments(tmp_path), train_dataset=PAIRS, loss=losses.MultipleNegativesRankingLoss(model),
        evaluator=evaluator,
    )  # fmt: skip
    trainer.train()
    score = trainer.evaluate()["eval_pairs_pearson_cosine"]
    model[0].auto_model.set_active_adapters("bank")
    assert trainer.evaluate()["eval_pairs_pearson_cosine"] == score
    assert evaluator(model)["pairs_pearson_cosine"] != score
    assert trainer.distillation.run.evaluation["eval_pairs_pearson_cosine"] == pytest.approx(score, abs=1e-6)


def test_several_data_sets_with_losses_of_their_own(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder)
    trainer = SentenceTransformerDistillationTrainer(
        model, arguments(tmp_path), train_dataset={"pairs": PAIRS, "scores": SCORED},
        loss={"pairs": losses.MultipleNegativesRankingLoss(model), "scores": losses.CoSENTLoss(model)},
    )  # fmt: skip
    trainer.train()
    assert trainer.distillation_weight == 1.0
    assert trainer.state.log_history[-2]["distillation_loss"] > 0


def test_texts_without_labels_are_distilled_too(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder)
    trainer = SentenceTransformerDistillationTrainer(
        model, arguments(tmp_path), train_dataset=SCORED, loss=losses.CoSENTLoss(model),
        distillation_dataset=Dataset.from_dict({"text": [f"{text} now" for text in TEXTS]}),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[-2]["distillation_loss"] > 0
    args = arguments(tmp_path, CrossEncoderDistillationTrainingArguments)
    with pytest.raises(ValueError, match="^distillation_dataset is not supported for a CrossEncoder"):
        CrossEncoderDistillationTrainer(None, args, distillation_dataset=PAIRS)


def test_a_student_that_was_added_again_has_the_pooling_of_the_model(tiny_encoder, tmp_path):
    trainer = trainer_of(tmp_path, tiny_encoder, model=embedding_model(tmp_path, tiny_encoder, pooling="cls"))
    model = trainer.model_with_adapters
    model.add_adapter("insurance", config="seq_bn", overwrite_ok=True, distill_from=TEACHERS)
    model.train_adapter("insurance")
    trainer.train()
    assert trainer.distillation.pool == trainer._pool


@pytest.mark.parametrize("name", ["prompts", "router_mapping"])
def test_texts_without_labels_have_no_name_for_a_prompt(name, tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder)
    args = arguments(tmp_path, **{name: {"pairs": {"anchor": "how is "}}})
    with pytest.raises(ValueError, match=f"^{name} are given by the names of data sets, but distillation_dataset has"):
        SentenceTransformerDistillationTrainer(
            model, args, train_dataset={"pairs": PAIRS}, loss=losses.MultipleNegativesRankingLoss(model),
            distillation_dataset=PAIRS,
        )  # fmt: skip


def test_similarities_do_not_go_with_a_pooling_without_the_prompt(tiny_encoder, tmp_path):
    def trainer(**config):
        model = embedding_model(tmp_path, tiny_encoder, **config)
        model.set_pooling_include_prompt(False)
        return trainer_of(tmp_path, tiny_encoder, model=model, prompts="how is ", max_steps=2)

    with pytest.raises(ValueError, match="^The objective 'similarity' pools all tokens, but .* choose 'features'"):
        trainer(objective="similarity")
    trainer().train()


def test_losses_that_train_a_copy_are_named_at_construction(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder)
    with pytest.raises(ValueError, match="^ContrastiveTensionLoss trains another copy .* choose a loss of one model"):
        SentenceTransformerDistillationTrainer(
            model, arguments(tmp_path), train_dataset=PAIRS, loss=losses.ContrastiveTensionLoss(model)
        )


def test_a_finished_student_may_guide_a_loss_if_it_is_frozen(tiny_encoder, tmp_path):
    guide_trainer = trainer_of(tmp_path, tiny_encoder)
    guide_trainer.train()
    guide, model = guide_trainer.model, embedding_model(tmp_path, tiny_encoder)
    loss = losses.GISTEmbedLoss(model, guide)
    with pytest.raises(ValueError, match=r"'guide.0.model', .* freeze a guide with guide.requires_grad_\(False\)"):
        SentenceTransformerDistillationTrainer(model, arguments(tmp_path), train_dataset=PAIRS, loss=loss)
    guide.requires_grad_(False)
    before = snapshot(guide)
    trainer = SentenceTransformerDistillationTrainer(model, arguments(tmp_path), train_dataset=PAIRS, loss=loss)
    trainer.train()
    assert trainer.state.log_history[-2]["distillation_loss"] > 0
    assert not changed(guide, before)


@pytest.mark.parametrize("kind", ["embeddings", "cross-encoder"])
def test_a_model_that_is_made_at_the_training_trains_as_one_that_is_given(kind, tiny_encoder, tmp_path):
    trainer_class, args_class = (
        SentenceTransformerDistillationTrainer,
        SentenceTransformerDistillationTrainingArguments,
    )
    make, config, loss = embedding_model, {"pooling": "max", "objective": "similarity"}, losses.CoSENTLoss
    if kind == "cross-encoder":
        trainer_class, args_class = CrossEncoderDistillationTrainer, CrossEncoderDistillationTrainingArguments
        make, config, loss = cross_encoder, {}, cross_encoder_losses.BinaryCrossEntropyLoss

    def model_init():
        return make(tmp_path, tiny_encoder, dropout=0.0, **config)

    found = []
    for given in ({"model": model_init()}, {"model_init": model_init}):
        args = arguments(tmp_path, args_class, per_device_train_batch_size=16)  # in whatever order
        trainer = trainer_class(args=args, train_dataset=SCORED, loss=loss, **given)
        trainer.train()
        found.append([log for log in trainer.state.log_history if "loss" in log])
        if kind == "embeddings":
            states = torch.randn(2, 3, 16)  # (B, T, d)
            pooled = trainer.distillation.pool(states, torch.ones(2, 3))
            torch.testing.assert_close(pooled, states.amax(dim=1))
    for key in ("loss", "distillation_loss"):
        values = [[log.get(key, 0.0) for log in logs] for logs in found]
        assert values[0] == pytest.approx(values[1], rel=1e-3)
        assert values[0][-1] > 0


@pytest.mark.parametrize(
    "loss",
    [
        None,
        cross_encoder_losses.MultipleNegativesRankingLoss,
        lambda model: cross_encoder_losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    ],
)
def test_a_cross_encoder_trains_student_head_and_fusion_alone(loss, tiny_encoder, tmp_path):
    model = cross_encoder(tmp_path, tiny_encoder)
    before = snapshot(model)
    trainer = CrossEncoderDistillationTrainer(
        model, arguments(tmp_path, CrossEncoderDistillationTrainingArguments, keep_fusion=True),
        train_dataset=SCORED if loss is None else PAIRS, loss=loss and loss(model),
    )  # fmt: skip
    trainer.train()
    moved = changed(model, before)
    assert all(".insurance." in name or ".classifier." in name for name in moved)
    for part in (".adapters.insurance.", ".distillation_fusion.insurance.", ".classifier."):
        assert any(part in name for name in moved), part
    assert trainer.state.log_history[-2]["distillation_loss"] > 0


def test_similarity_is_refused_with_batches_of_two_texts(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder, objective="similarity")
    message = (
        "The objective 'similarity' compares the texts of a batch, which must be three or more; raise "
        "per_device_train_batch_size=2, or choose another objective."
    )
    args = arguments(tmp_path, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=exactly(message)):
        SentenceTransformerDistillationTrainer(
            model, args, train_dataset=PAIRS, loss=losses.MultipleNegativesRankingLoss(model)
        )


def test_similarity_is_refused_with_a_gradient_cache(tiny_encoder, tmp_path):
    model = embedding_model(tmp_path, tiny_encoder, objective={"features": 1, "similarity": 1})
    loss = losses.MatryoshkaLoss(model, losses.CachedMultipleNegativesRankingLoss(model), [16, 8])
    message = "The objective 'similarity' compares the texts of a forward pass, but MatryoshkaLoss runs a batch in"
    with pytest.raises(ValueError, match=one_line(start=message)):
        SentenceTransformerDistillationTrainer(model, arguments(tmp_path), train_dataset=PAIRS, loss=loss)


@pytest.mark.parametrize("case", ["group by label", "no duplicates"])
def test_halves_that_a_sampler_refuses_are_weighed_all_the_same(case, tiny_encoder, tmp_path, caplog):
    """Two examples of each label are one in a half; a half without duplicates may fill no batch."""
    model = embedding_model(tmp_path, tiny_encoder, student_start="weighted")
    few = Dataset.from_dict({"text": PAIRS["anchor"][:8], "label": [0, 0, 0, 0, 1, 1, 2, 2]})
    same = Dataset.from_dict({"anchor": PAIRS["anchor"][:1] * 14 + PAIRS["anchor"][:2], "positive": PAIRS["positive"]})
    if case == "group by label":
        sampler, dataset, loss = BatchSamplers.GROUP_BY_LABEL, few, losses.BatchAllTripletLoss(model)
    else:
        sampler, dataset, loss = BatchSamplers.NO_DUPLICATES, same, losses.MultipleNegativesRankingLoss(model)
    given = arguments(tmp_path, max_steps=1, batch_sampler=sampler, dataloader_drop_last=case == "no duplicates")
    trainer = SentenceTransformerDistillationTrainer(model, given, train_dataset=dataset, loss=loss)
    trainer.fit_start()
    assert trainer.args.batch_sampler == sampler
    assert (trainer.distillation.weights is None) == (case == "no duplicates")
    assert ("get equal weights" in caplog.text) == (case == "no duplicates")


class Several(losses.MultipleNegativesRankingLoss):
    """A loss of several components, which the trainer logs one by one."""

    def forward(self, *args, **kwargs):
        value = super().forward(*args, **kwargs)
        return {"first": value / 4, "second": 3 * value / 4}


@pytest.mark.parametrize("case", ["ranking", "cached ranking", "own weights", "several losses", "components"])
def test_embeddings_weigh_their_teachers(case, tiny_encoder, tmp_path, monkeypatch):
    """With gradient caches, and losses that have weights of their own, which are trained along and put back."""
    monkeypatch.setattr(weighing, "KEPT_SHARES", (1.0,))  # other labels confirm nothing of these teachers
    model = embedding_model(tmp_path, tiny_encoder, student_start="weighted")
    if case == "several losses":
        dataset = {"pairs": PAIRS, "sorted": SORTED}
        loss = {"pairs": losses.MultipleNegativesRankingLoss(model), "sorted": softmax_loss(model)}
    elif case in ("own weights", "components"):
        dataset, loss = (SORTED, softmax_loss(model)) if case == "own weights" else (PAIRS, Several(model))
    else:
        loss, dataset = LOSSES[case][0](model), PAIRS
    trainer = SentenceTransformerDistillationTrainer(
        model, arguments(tmp_path, weighing_steps=8, max_steps=2), train_dataset=dataset, loss=loss
    )
    parts = list(loss.values()) if isinstance(loss, dict) else [loss]
    before, loader = [snapshot(part) for part in parts], trainer.get_train_dataloader()
    trainer.fit_start()
    assert trainer._train_dataloader is loader
    assert trainer.accum_loss_components == {"train": {}, "eval": {}}
    moved = {name for part, start in zip(parts, before, strict=True) for name in changed(part, start)}
    assert all(".insurance." in name for name in moved)
    assert moved or len(trainer.block.teachers) < 3
    weights = trainer.distillation.weights
    assert len({round(weight, 6) for weight in weights.mean().values()}) == 3, "they were learned"
    assert weights.gain != 0
    beside = trainer._labelled().beside
    assert len(beside) == (2 if case in ("own weights", "several losses") else 0)
    trainer.train()
    assert trainer.distillation.run.settings["teacher_gain"] == round(trainer.distillation.weights.gain, 4)
