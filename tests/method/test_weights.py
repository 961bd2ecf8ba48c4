"""What is read from learned weights."""

import pytest

from hf_adapter_distillation.method.weights import TeacherWeights

ROWS = {
    "layer.1": {"bank": 0.6, "travel": 0.1, "work": 0.1},
    "layer.10": {"bank": 0.2, "travel": 0.1, "work": 0.5},
}


def test_heavy_teachers_have_half_of_an_even_share_on_average():
    weights = TeacherWeights(ROWS, 0.5)
    assert weights.mean() == pytest.approx({"bank": 0.4, "travel": 0.1, "work": 0.3})
    assert weights.heavy() == ["bank", "work"]
    assert weights.heaviest(2) == ["bank", "work"]
    assert TeacherWeights({"layer": {"bank": 0.1, "travel": 0.9}}, 0.0).heaviest(2) == ["travel", "bank"]
    assert TeacherWeights({"layer": {"bank": 0.01, "travel": 0.02}}, 0.0).heavy() == ["travel"]
    assert TeacherWeights({"layer": {"bank": 1.5, "travel": 0.25, "work": 0.2}}, 0.0).heavy() == ["bank", "travel"]


def test_teachers_that_are_kept_share_what_all_have():
    weights = TeacherWeights(ROWS, 0.5)
    assert weights.at("layer.1", ["bank", "work"]) == pytest.approx({"bank": 0.6 * 8 / 7, "work": 0.1 * 8 / 7})
    assert weights.at("layer.10.loras.insurance", ["work"]) == pytest.approx({"work": 0.8})
    mean = {"bank": 0.4 * 8 / 7, "work": 0.3 * 8 / 7}
    for place in ("", "layer", "layer.100", "pooler"):  # where the teachers were not weighed
        assert weights.at(place, ["bank", "work"]) == pytest.approx(mean)
