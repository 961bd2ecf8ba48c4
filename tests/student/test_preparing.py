"""`train_adapter` and `delete_adapter`."""

import warnings

import pytest
import torch
from adapters import Fuse, LoRAConfig, Stack
from model_state import changed, everything, snapshot, trainable
from tiny_models import TEACHERS, make_batch, make_model, make_student, noisy, with_teachers
from trainings import trainer_for

import hf_adapter_distillation as had
from hf_adapter_distillation.method.distillation import active_block, distillations
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.weights import TeacherWeights
from hf_adapter_distillation.student.digests import value_digest
from hf_adapter_distillation.student.preparing import start_at_weights


@pytest.mark.parametrize("kind", ["flex", "classification", "base"])
def test_train_adapter_leaves_student_head_and_fusion_trainable(kind):
    model = make_student(make_model(kind=kind))
    names = trainable(model)
    parts = (".adapters.insurance.", ".distillation_fusion.insurance.")
    head = {"flex": "heads.insurance.", "classification": "classifier.", "base": "no head"}[kind]
    assert all(any(part in name for part in parts) or name.startswith(head) for name in names)
    for part in (*parts, *([head] if kind != "base" else [])):
        wanted = {name for name, _ in model.named_parameters() if part in f".{name}" or name.startswith(part)}
        assert wanted
        assert wanted <= names
    assert model.active_adapters == had.AdapterDistillation("insurance", TEACHERS)
    if kind == "flex":
        assert model.active_head == "insurance"


def test_the_students_head_is_active_even_if_another_was_added_last():
    model = with_teachers()
    model.add_classification_head("insurance")
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.add_classification_head("last")
    model.train_adapter("insurance")
    assert model.active_head == "insurance"
    assert not any(name.startswith("heads.last") for name in trainable(model))


@pytest.mark.parametrize("then", ["train_adapter", "train_adapter_fusion", "delete_adapter"])
def test_other_heads_are_trainable_again_after_the_student(then):
    model = with_teachers()
    model.heads["work"].requires_grad_(False)
    model.add_adapter("insurance", distill_from=TEACHERS)
    for _ in range(2):
        model.train_adapter("insurance")
    of_heads = ("heads.bank.", "heads.travel.")
    assert not any(name.startswith(of_heads) for name in trainable(model))
    model.add_adapter_fusion(fuse := Fuse("bank", "travel"))
    argument = {"train_adapter": "bank", "train_adapter_fusion": fuse, "delete_adapter": "insurance"}[then]
    getattr(model, then)(argument)
    assert {name for name, _ in model.named_parameters() if name.startswith(of_heads)} <= trainable(model)
    assert not any(name.startswith("heads.work") for name in trainable(model))


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize(("family", "head"), [("gpt2", "causal_lm"), ("bert", "masked_lm")])
def test_heads_that_share_their_weights_with_the_base_leave_it_as_it_was(family, head, has_head):
    model = with_teachers(make_model(family), head=head)
    embeddings = model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    model.add_adapter("insurance", distill_from=TEACHERS)
    if has_head:
        getattr(model, f"add_{head}_head")("insurance")
    model.train_adapter("insurance")
    assert torch.equal(embeddings, before)
    assert model.heads["insurance"].get_output_embeddings().weight is embeddings
    model.delete_adapter("insurance")
    assert not embeddings.requires_grad


def test_a_missing_head_is_made_from_the_teachers_heads():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.train_adapter("insurance")
    heads = [dict(model.heads[name].named_parameters()) for name in TEACHERS]
    for key, weight in model.heads["insurance"].named_parameters():
        torch.testing.assert_close(weight, sum(head[key] for head in heads) / 3)


@pytest.mark.parametrize("adapter_trained", [False, True])
def test_the_start_is_not_repeated(adapter_trained):
    model = make_student(make_model())
    if adapter_trained:
        noisy(model, "insurance")
    model.heads["insurance"][1].weight.data += 1
    before = snapshot(model)
    model.train_adapter("insurance")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_student_that_was_trained_or_loaded_first_keeps_its_head():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.add_classification_head("insurance")
    noisy(model, "insurance")
    before = snapshot(model.heads["insurance"])
    model.train_adapter("insurance")
    assert all(torch.equal(before[key], weight) for key, weight in model.heads["insurance"].named_parameters())


def test_heads_of_other_shapes_are_not_averaged():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.add_classification_head("insurance", num_labels=5)
    before = snapshot(model.heads["insurance"])
    model.train_adapter("insurance")
    assert all(torch.equal(before[key], weight) for key, weight in model.heads["insurance"].named_parameters())


@pytest.mark.parametrize("has_heads", [False, True])
def test_deleting_the_student_leaves_nothing(has_heads):
    model = with_teachers()
    if not has_heads:
        model.delete_head("bank")
    model.active_head = "travel"
    before = everything(model)
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.train_adapter("insurance")
    model.delete_adapter("insurance")
    after = everything(model)
    assert after[:5] == (*before[:2], ("None", before[2][1]), *before[3:5])
    model.train()
    assert torch.isfinite(model(**make_batch()).loss)


@pytest.mark.parametrize("how", ["own head", "overwritten"])
def test_a_head_that_is_the_users_stays_when_the_student_is_deleted(how):
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS)
    if how == "own head":
        model.add_classification_head("insurance")
    model.train_adapter("insurance")
    if how == "overwritten":
        model.add_adapter("insurance", overwrite_ok=True)
    model.delete_adapter("insurance")
    assert "insurance" in model.heads


def test_deleting_a_teacher_leaves_the_others():
    model = make_student(make_model())
    model.active_head = "travel"
    with pytest.warns(
        UserWarning, match="'bank' was a teacher of 'insurance', which is not trained yet and keeps 2 others"
    ):
        model.delete_adapter("bank")
    assert model.active_adapters == had.AdapterDistillation("insurance", ["travel", "work"])
    assert model.active_head == "travel"
    model.train()
    model(**make_batch()).loss.backward()
    for teacher in ("travel", "work"):
        with pytest.warns(UserWarning, match=f"'{teacher}' was a teacher of 'insurance'"):
            model.delete_adapter(teacher)
    assert model.active_adapters == Stack("insurance")
    assert not any("distillation_fusion" in name for name, _ in model.named_modules())
    model(**make_batch()).loss.backward()


def test_a_warning_that_is_an_error_leaves_the_teacher_and_its_students_as_they_were():
    model = make_student(make_model())
    before = everything(model), snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'bank' was a teacher of 'insurance'"):
            model.delete_adapter("bank")
    assert (everything(model), bool(changed(model, before[1]))) == (before[0], False)
    assert distillations(model.adapters_config)["insurance"].config.teachers == TEACHERS


@pytest.mark.parametrize("selection", ["all", 2])
def test_what_a_user_freezes_after_train_adapter_stays_frozen_in_a_training(selection, trainer_args):
    model = make_student(make_model(), student_start="random", teacher_selection=selection)
    up = "encoder.layer.0.output.adapters.insurance.adapter_up"
    model.base_model.get_submodule(up).requires_grad_(False)
    model.heads["insurance"].requires_grad_(False)
    before = snapshot(model)
    trainer_for(model, trainer_args(max_steps=2)).train()
    moved = changed(model, before)
    assert any(".adapters.insurance." in name for name in moved)
    assert not any(up in name or name.startswith("heads.") for name in moved)
    model.train_adapter("insurance")
    assert {"heads.insurance.1.weight", f"bert.{up}.weight"} <= trainable(model)


def test_a_student_of_which_nothing_is_trainable_is_trained_whole(trainer_args):
    model = make_student(make_model())
    model.freeze_model(True)
    before = snapshot(model)
    trainer_for(model, trainer_args(max_steps=2)).train()
    assert any(".adapters.insurance." in name for name in changed(model, before))


@pytest.mark.parametrize("start", ["weighted", "average"])
@pytest.mark.parametrize("head", ["own", "missing", "trained"])
def test_a_teacher_that_is_deleted_before_the_training_leaves_the_average(head, start):
    def student_of(teachers):
        model = with_teachers()
        settings = had.DistillationConfig(teachers, student_start=start)
        model.add_adapter("insurance", config="seq_bn", distill_from=settings)
        if head != "missing":
            model.add_classification_head("insurance")
        model.train_adapter("insurance")
        return model

    model, others = student_of(TEACHERS), student_of(TEACHERS[1:])
    if head == "trained":
        model.heads["insurance"][1].weight.data += 1
    before = snapshot(model.heads["insurance"])
    with pytest.warns(UserWarning, match="'bank' was a teacher of 'insurance'"):
        model.delete_adapter("bank")
    assert value_digest(model, "insurance") == value_digest(others, "insurance")
    wanted = before if head == "trained" else snapshot(others.heads["insurance"])
    assert all(torch.equal(wanted[key], weight) for key, weight in model.heads["insurance"].named_parameters())


def test_a_student_that_was_trained_keeps_its_weights_when_a_teacher_is_deleted():
    model = make_student(make_model())
    noisy(model, "insurance")
    before = snapshot(model)
    with pytest.warns(UserWarning, match="'bank' was a teacher of 'insurance'"):
        model.delete_adapter("bank")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("how", ["replaced", "other teachers"])
def test_heads_are_trainable_again_after_a_student_that_was_changed(how):
    model = with_teachers()
    model.add_adapter("insurance", distill_from=TEACHERS)
    model.train_adapter("insurance")
    if how == "replaced":
        model.add_adapter("insurance", distill_from=["bank"], overwrite_ok=True)
    else:
        model.train_adapter(had.AdapterDistillation("insurance", ["bank", "travel"]))
        assert frozen_heads(model)
    model.delete_adapter("insurance")
    model.train_adapter("bank")
    assert frozen_heads(model) == []
    assert ("insurance" in model.heads) == (how == "replaced"), "the head of a replaced adapter stays for the new one"


def frozen_heads(model):
    return [name for name, parameter in model.heads.named_parameters() if not parameter.requires_grad]


@pytest.mark.parametrize("config", ["nonsense", "prompt_tuning"])
@pytest.mark.parametrize("name", ["insurance", "bank"])
def test_a_config_that_adapters_refuses_replaces_nothing(name, config):
    model = make_student(make_model("gpt2"), head="causal_lm")
    before = everything(model)
    with pytest.raises(ValueError, match="."):
        model.add_adapter(name, config=config, overwrite_ok=True)
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore:'.*' was a teacher of:UserWarning")
def test_a_replaced_teacher_takes_its_head_out_of_the_students():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, student_start="average"))
    model.train_adapter("insurance")
    model.add_adapter("bank", config="seq_bn", overwrite_ok=True)
    heads = [model.heads[name][1].weight for name in ("travel", "work")]
    torch.testing.assert_close(model.heads["insurance"][1].weight, torch.stack(heads).mean(dim=0))


@pytest.mark.filterwarnings("ignore:'.*' was a teacher of:UserWarning")
def test_a_cast_does_not_move_a_head_from_its_mean():
    model = with_teachers()
    model.add_adapter("insurance", distill_from=had.DistillationConfig(TEACHERS, student_start="average"))
    model.train_adapter("insurance")
    model.half()
    model.delete_adapter("bank")
    heads = [model.heads[name][1].weight for name in ("travel", "work")]
    torch.testing.assert_close(model.heads["insurance"][1].weight, torch.stack(heads).mean(dim=0))


@pytest.mark.filterwarnings("ignore:'.*' was a teacher of:UserWarning")
def test_weights_that_the_next_training_keeps_stay_when_a_teacher_is_deleted(trainer_args):
    model = make_model()
    for name in TEACHERS:
        model.add_adapter(name, config=LoRAConfig(r=4))
        noisy(model, name)
        model.add_classification_head(name)
    settings = had.DistillationConfig(TEACHERS, student_start="weighted")
    model.add_adapter("insurance", config=LoRAConfig(r=12), distill_from=settings)
    model.train_adapter("insurance")
    learned = {"bank": 0.9, "travel": 0.4, "work": 0.1}
    block, distillation = active_block(model), had.distillation_of(model)
    places = [fusion.location for fusion in fusions_of(model, "insurance")]
    start_at_weights(model, block, TeacherWeights(dict.fromkeys(places, learned), gain=0.5))
    distillation.is_weighed = True
    kept = distillation.config.teachers
    model.delete_adapter(kept[-1])

    def change(name):
        lora = model.bert.encoder.layer[0].attention.self.query.loras[name]
        return (lora.lora_B @ lora.lora_A * lora.scaling).detach()

    left = distillation.config.teachers
    weights = distillation.weights.at(places[0], left)
    expected = sum(weights[name] * change(name) for name in left)
    torch.testing.assert_close(change("insurance"), expected, rtol=1e-4, atol=1e-5)
