"""Where the fusions of a student stand on its model, and that they go into no saved model."""

import logging

import adapters
import pytest
import torch
from tiny_models import TEACHERS, distillation_of, make_batch, make_model, make_student, noisy

import hf_adapter_distillation as had
from hf_adapter_distillation.method.fusion import fusions_of
from hf_adapter_distillation.method.layers import adapter_layers


def test_save_pretrained_leaves_the_fusion_out(tmp_path, caplog):
    model = make_student(make_model())
    logits = model.eval()(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(str(tmp_path / "model"))
        loaded = adapters.AutoAdapterModel.from_pretrained(str(tmp_path / "model"))
    assert "distillation_fusion" not in caplog.text
    loaded.set_active_adapters("insurance")
    assert torch.equal(loaded.eval()(**{"input_ids": torch.tensor([[3, 4, 5]])}).logits, logits)
    assert any("distillation_fusion" in name for name in model.state_dict())


def test_a_layer_that_the_student_leaves_out_has_no_fusion():
    model = make_student(make_model(), train=False)
    model.add_adapter("insurance", config="seq_bn[leave_out=[0]]", distill_from=TEACHERS, overwrite_ok=True)
    model.train_adapter("insurance")
    model.train()(**make_batch())
    record = distillation_of(model).record
    assert len(record.attention) == 1


def test_a_layer_without_the_student_is_left_alone():
    model = make_model(dtype=torch.float64)
    for name in TEACHERS:
        model.add_adapter(name, config="ia3")
    model.add_adapter("insurance", config="seq_bn[leave_out=[0]]", distill_from=TEACHERS)
    model.train_adapter("insurance")
    assert [fusion.location for fusion in fusions_of(model, "insurance")] == ["encoder.layer.1"]


def silence(model, adapter, layers):
    """Sets the up-projections of an adapter in some layers to zero."""
    for _, layer in adapter_layers(model, adapter):
        if layer.layer_idx in layers:
            module = layer.adapter_modules[adapter]
            for parameter in [module.lora_B] if hasattr(module, "lora_B") else module.adapter_up.parameters():
                parameter.data.zero_()


@pytest.mark.parametrize("config", ["seq_bn", "lora", "par_bn", "seq_bn[use_gating=True]"])
def test_a_place_where_no_teacher_has_weights_has_no_fusion(config):
    def layers_with_fusion(silent):
        model = make_student(make_model(), config=config, train=False)
        for teacher, layers in zip(TEACHERS, silent, strict=True):
            silence(model, teacher, layers)
        model.train_adapter("insurance")
        return {fusion.location.split("layer.")[1][0] for fusion in fusions_of(model, "insurance")}

    assert layers_with_fusion([[0], [0], [0]]) == {"1"}
    assert layers_with_fusion([[0], [0, 1], []]) == {"0", "1"}
    assert layers_with_fusion([[0, 1]] * 3) == {"0", "1"}, "untrained teachers are distilled wherever they are"


@pytest.mark.parametrize("level", ["adapter", "layer"])
def test_a_place_that_has_lost_all_its_teachers_has_no_fusion(level):
    model = make_model()
    model.add_adapter("bank", config="seq_bn[leave_out=[0]]")
    model.add_adapter("travel", config="seq_bn")
    for name in ("bank", "travel"):
        noisy(model, name)
    settings = had.DistillationConfig(["bank", "travel"], level=level, student_start="random")
    model.add_adapter("insurance", config="seq_bn", distill_from=settings)
    model.add_classification_head("insurance")
    model.train_adapter("insurance")
    assert {fusion.location.split("layer.")[1][0] for fusion in fusions_of(model, "insurance")} == {"0", "1"}
    with pytest.warns(UserWarning, match="'travel' was a teacher"):
        model.delete_adapter("travel")
    for _ in range(2):
        assert {fusion.location.split("layer.")[1][0] for fusion in fusions_of(model, "insurance")} == {"1"}
        model.train()(**make_batch()).loss.backward()
        assert len(distillation_of(model).take_record().attention) == 1
        model.train_adapter("insurance")


def test_a_replaced_head_has_probes_of_its_own():
    model = make_student(make_model(), student_start="teachers", objective="task_specific")
    model.add_classification_head("insurance", num_labels=5, overwrite_ok=True)
    model.train_adapter("insurance")
    batch = make_batch()
    batch["labels"] = torch.tensor([0, 1, 4, 3])
    model.train()(**batch).loss.backward()
    probes = [fusion.task_specific for fusion in fusions_of(model, "insurance")]
    assert {probe.classifier.out_features for probe in probes} == {5}
    before = [id(probe) for probe in probes]
    model.train_adapter("insurance")
    assert [id(fusion.task_specific) for fusion in fusions_of(model, "insurance")] == before
