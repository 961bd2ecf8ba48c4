"""The figures."""

import pytest

import hf_adapter_distillation as had
from hf_adapter_distillation.analysis.plots import Estimate


def overlapping(labels, figure, axis):
    """Pairs of neighbouring tick labels that overlap along an axis (0 is x)."""
    boxes = [label.get_window_extent(figure.canvas.get_renderer()) for label in labels]
    low, high = ("x0", "x1") if axis == 0 else ("y0", "y1")
    boxes.sort(key=lambda box: getattr(box, low))
    return [pair for pair in zip(boxes, boxes[1:], strict=False) if getattr(pair[0], high) > getattr(pair[1], low)]


def drawn(figure):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    return figure


def test_heat_map(tmp_path):
    table = {"layer.0": {"bank": 0.25, "travel": 0.75}, "layer.1": {"bank": Estimate(0.5, 0.1), "travel": 0.5}}
    figure = had.plot_teacher_attention(table, title="Attention")
    (axes, bar) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bank", "travel"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer.0", "layer.1"]
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.75", "0.50", "0.50"]
    assert bar.lines[-1].get_ydata()[0] == 0.5
    colors = axes.images[0].to_rgba([[0.25, 0.5, 0.75]])[0]
    assert colors[0][2] > colors[0][0] + 0.2, "less than the equal share is blue"
    assert min(colors[1][:3]) > 0.95, "the equal share is white"
    assert colors[2][0] > colors[2][2] + 0.2, "more is red"
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.parametrize("draw", [had.plot_teacher_weights, had.plot_leave_one_teacher_out])
def test_names_with_dollar_signs_are_drawn_as_they_are(draw, tmp_path):
    names = ["x_$5_$", "$x^2_$"]
    values = {name: 0.5 if draw is had.plot_teacher_weights else Estimate(0.5, 0.1) for name in names}
    draw(values).savefig(tmp_path / "bars.png")
    had.plot_teacher_attention({"layer": dict.fromkeys(names, 0.5)}).savefig(tmp_path / "heat.png")


def test_even_attention_is_pale_and_small_distances_fill_their_frame():
    even = {f"layer.{i}": {"bank": 0.34, "travel": 0.33, "work": 0.33} for i in range(3)}
    image = had.plot_teacher_attention(even).axes[0].images[0]
    assert image.to_rgba(image.get_array())[..., :3].min() > 0.9
    for distance, right in ((0.02, 0.022), (0.9, 1)):
        axes = had.plot_student_distance({"layer.0": Estimate(distance, float("nan"))}).axes[0]
        assert distance <= axes.get_xlim()[1]
        assert axes.get_xlim()[1] == pytest.approx(right, rel=0.1)
        assert ("at 1, outside" in axes.get_xlabel()) == (distance < 0.1)


@pytest.mark.parametrize("n_teachers", [2, 64])
def test_figures_are_readable_with_few_and_many_teachers(n_teachers):
    names = [f"faq_tenant_{i}" for i in range(n_teachers)]
    layers = [f"encoder.layer.{i}.output_adapters" for i in range(12)]
    table = {layer: {name: Estimate(1 / n_teachers, 0.01) for name in names} for layer in layers}
    figure = drawn(had.plot_teacher_attention(table))
    width, height = figure.get_size_inches()
    assert width <= 30
    assert height <= 30
    if n_teachers == 64:  # two stand far apart, at an angle
        assert not overlapping(figure.axes[0].get_xticklabels(), figure, 0)
    assert not overlapping(figure.axes[0].get_yticklabels(), figure, 1)
    assert bool(figure.axes[0].texts) == (n_teachers == 2)
    differences = {name: Estimate(i / n_teachers - 0.5, 0.1) for i, name in enumerate(names)}
    figure = drawn(had.plot_leave_one_teacher_out(differences))
    assert not overlapping(figure.axes[0].get_yticklabels(), figure, 1)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == names  # the most useful on top
    distances = {layer: Estimate(0.1, float("nan")) for layer in layers}
    figure = drawn(had.plot_student_distance(distances))
    assert not overlapping(figure.axes[0].get_yticklabels(), figure, 1)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.1] * 12


@pytest.mark.parametrize("plot", ["teacher_attention", "student_distance", "leave_one_teacher_out"])
def test_nothing_is_no_figure(plot):
    with pytest.raises(ValueError, match=rf"with {plot}\(model, dataset\)"):
        getattr(had, f"plot_{plot}")({})
