"""What the figures of training runs show, read off their axes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from sar_fast.lab.training import plots
from sar_fast.lab.training.gradients import AGGREGATE, L1, PER_LAYER


@pytest.fixture
def drawn(monkeypatch):
    """Axes of the figures that are drawn; a warning of matplotlib is an error."""
    figures, write = [], plots.written
    monkeypatch.setattr(plots, "written", lambda figure, path: figures.append(write(figure, path)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield lambda: [axes for figure in figures for axes in figure.axes]


def log(layers, steps=3, kinds=("q", "k")):
    """Lines as the callback writes them for a model whose trained layers are these."""
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, L1.format("visual"): 0.1 * step, L1.format("text"): 0.2 * step}
        line |= {PER_LAYER.format(layer, kind): 0.01 * layer + 0.1 for layer in layers for kind in kinds}
        line |= {AGGREGATE.format(depth, kind): 0.3 for depth in ("deep", "total") for kind in kinds}
        lines.append(line)
    return lines


def texts(axes):
    legend = axes.get_legend()
    return [t.get_text() for t in legend.get_texts()] if legend else [t.get_text() for t in axes.texts]


def visible(line):
    return len(line.get_xdata()) > 1 or line.get_marker() not in ("", "None", None)


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_every_line_is_seen_however_few_points_it_has(drawn, tmp_path, steps):
    history = [{"step": step, "loss": 1.0, "eval_loss": 2.0} for step in range(1, steps + 1)]
    assert plots.plot_loss(history, tmp_path / "loss.png")
    plots.plot_figure_3({"run": log([0, 1], steps)}, tmp_path / "3.png")
    plots.plot_figure_4({"run": log([0, 1], steps)}, tmp_path / "4.png")
    lines = [line for axes in drawn() for line in axes.get_lines()]
    assert len(lines) == 2 + 2 + 1 + 2 + 1
    assert all(map(visible, lines))
    ticks = drawn()[0].get_xticks()
    assert (ticks == ticks.round()).all()
    assert (drawn()[0].get_lines()[0].get_marker() == "o") == (steps < 100)  # a crowd of markers hides the line


def test_frozen_layers_are_left_out_and_the_others_drawn(drawn, tmp_path):
    lines = log([2, 3, 5])
    for key in [key for key in lines[0] if "layer_" in key]:  # the first line may know less
        del lines[0][key]
    plots.plot_figure_4({"run": lines}, tmp_path / "4.png")
    _, middle, _ = drawn()
    assert [line.get_xdata().tolist() for line in middle.get_lines()] == [[2, 3, 5], [2, 3, 5]]
    assert middle.get_lines()[0].get_ydata().tolist() == pytest.approx([0.12, 0.13, 0.15])


def test_ten_layers_are_in_the_order_of_numbers():
    assert plots.measured_layers(log(range(12))) == list(range(12))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([0, 1, 2, 3], "layers 0-3"),
        ([3], "layer 3"),
        ([0, 2, 3, 7], "layers 0, 2-3, 7"),
        ([], "no layer"),
    ],
)
def test_layers_in_words(layers, expected):
    assert plots.describe_layers(layers) == expected


def test_runs_over_different_layers_say_which(drawn, tmp_path):
    plots.plot_figure_4({"a": log([0, 1]), "b": log(range(4))}, tmp_path / "4.png")
    _, middle, right = drawn()
    assert texts(right) == ["a (layers 0-1)", "b (layers 0-3)"]
    assert right.get_title() == "runs compared, each over its own layers"
    assert texts(middle)[0] == "a (layers 0-1), q"


def test_runs_over_the_same_layers_need_no_such_words(drawn, tmp_path):
    plots.plot_figure_4({"a": log([0, 1]), "b": log([0, 1])}, tmp_path / "4.png")
    assert texts(drawn()[2]) == ["a", "b"]
    assert drawn()[2].get_title() == "runs compared"


def test_a_panel_without_values_says_so(drawn, tmp_path: Path):
    lines = log([0, 1], kinds=("k",))  # of the queries nothing is trained
    plots.plot_figure_4({"run": lines}, tmp_path / "4.png")
    left, middle, right = drawn()
    assert texts(left) == texts(right) == ["no value was logged"]
    assert texts(middle) == ["run, k"]
