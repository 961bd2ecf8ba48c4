import pytest
import torch
from conftest import TEACHERS, make_batch, make_model, make_student

import hf_adapter_distillation as had
from hf_adapter_distillation.layers import adapter_layers
from hf_adapter_distillation.state import distillations


def test_attention_table():
    model = make_student(make_model(), carrier="mixed")
    batches = [make_batch(seed=seed) for seed in (0, 1)]
    model.train()
    table = had.teacher_attention(model, batches)
    assert model.training and not distillations(model.adapters_config)["insurance"].observing
    assert list(table) == [name for name, _ in adapter_layers(model, "insurance")]
    for row in table.values():
        assert list(row) == TEACHERS
        assert sum(row.values()) == pytest.approx(1, abs=1e-6)
    alone = [had.teacher_attention(model, [batch]) for batch in batches]
    layer = next(iter(table))
    assert table[layer]["bank"] == pytest.approx(sum(part[layer]["bank"] for part in alone) / 2)


def test_attention_follows_the_query():
    """A query bias along the key of one teacher's constant update draws all attention to it."""
    model = make_student(make_model(), teachers=["bank", "travel"], student_start="random")
    for _, layer in adapter_layers(model, "insurance"):
        for name, sign in (("bank", 1.0), ("travel", -1.0)):
            layer.adapters[name].adapter_up.weight.data.zero_()
            layer.adapters[name].adapter_up.bias.data.fill_(sign)
        fusion = layer.distillation_fusion["insurance"]
        torch.nn.init.eye_(fusion.key.weight)
        fusion.query.weight.data.zero_()
        fusion.query.bias.data.fill_(1.0)
    table = had.teacher_attention(model, [make_batch()])
    assert all(row["bank"] > 0.999 for row in table.values())


def test_bad_calls():
    model = make_student(make_model())
    with pytest.raises(ValueError, match="no batches were given, or the fusion was dropped"):
        had.teacher_attention(model, [])
    model.set_active_adapters("insurance")
    with pytest.raises(ValueError, match="distils nothing; call model.train_adapter"):
        had.teacher_attention(model, [make_batch()])


def test_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    table = {"layer.0": {"bank": 0.25, "travel": 0.75}, "layer.1": {"bank": 0.5, "travel": 0.5}}
    figure = had.plot_teacher_attention(table, title="Attention")
    (axes, _) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bank", "travel"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer.0", "layer.1"]
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.75", "0.50", "0.50"]
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000
