"""Figures of a run: the loss, and figures 3 and 4 of the paper from gradient_sparsity.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sar_fast.lab.show.figures import new_figure, written
from sar_fast.lab.training.gradients import AGGREGATE, FILE_NAME, L1, PER_LAYER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORM = "mean gradient L1 per token"
DASHES = (  # of runs that may lie on each other: the first is wide and shows between the dashes of the others
    {"linestyle": "-", "linewidth": 3.5, "alpha": 0.5},
    {"linestyle": "--", "linewidth": 1.5},
    {"linestyle": ":", "linewidth": 1.5},
    {"linestyle": "-.", "linewidth": 1.5},
)
DEPTHS = ("shallow", "middle", "deep")
FEW = 20  # points of a line, up to which each has a marker: a line through one point is not seen


def plot_loss(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Every loss in a Trainer's ``log_history`` against the step; False, and no file, if there is none."""
    if not loss_names(history):
        return False
    figure = new_figure(6, 4)
    draw_loss(figure.add_subplot(), history)
    written(figure, path)
    return True


def loss_names(history: Sequence[Mapping[str, float]]) -> list[str]:
    """The losses that a Trainer's ``log_history`` has."""
    return [n for n in ("loss", "loss_text_gen", "loss_contrastive", "eval_loss") if any(n in h for h in history)]


def draw_loss(axes: Axes, history: Sequence[Mapping[str, float]]) -> None:
    """Every loss against the step."""
    for name in loss_names(history):
        _draw(axes, *series(history, name), label=name)
    axes.set(xlabel="optimizer step", ylabel="loss")
    _finish(axes)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a gradient_sparsity.jsonl (or the run's folder); ``ValueError`` if it holds no measurement."""
    path = log_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a run that measures gradients writes it")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lines.append(json.loads(line.decode("utf-8")))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(lines[-1], dict) or "step" not in lines[-1]:
            raise ValueError(f"{path}, line {number} has no step; needed a line of gradient measurements")
    wanted = [*(L1.format(kind) for kind in ("visual", "text")), AGGREGATE.format("total", "q")]
    if not any(line.get(key) is not None for line in lines for key in wanted):
        raise ValueError(f"{path} holds no gradient measurement ({', '.join(wanted)}) in {len(lines)} lines")
    return lines


def log_path(path: Path) -> Path:
    """The gradient_sparsity.jsonl of a run's folder, or the file itself."""
    return path / FILE_NAME if path.is_dir() else path


def series(lines: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a key where it is known."""
    known = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [s for s, _ in known], [v for _, v in known]


def plot_figure_3(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Gradient L1 at visual and at text tokens against the step, one panel per run, logarithmic."""
    figure = new_figure(5 * len(runs), 4)
    (panels,) = figure.subplots(1, len(runs), sharey=True, squeeze=False)
    for axes, (name, lines) in zip(panels, runs.items()):
        draw_norms(axes, lines, name)
    panels[0].set_ylabel(NORM)
    written(figure, path)


def draw_norms(axes: Axes, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Gradient L1 at visual and at text tokens against the step, logarithmic."""
    for kind, colour in (("visual", "tab:red"), ("text", "tab:blue")):
        _draw(axes, *series(lines, L1.format(kind)), color=colour, label=f"{kind} tokens")
    axes.set(xlabel="optimizer step", title=title, yscale="log")
    _finish(axes)


def draw_ginis(axes: Axes, lines: Sequence[Mapping[str, Any]], title: str) -> None:
    """Gini coefficients of the queries' gradients against the step, by depth."""
    for depth in DEPTHS:
        _draw(axes, *series(lines, AGGREGATE.format(depth, "q")), label=depth)
    axes.set(xlabel="optimizer step", ylabel="Gini of |gradient|, q", title=title)
    _finish(axes)


def plot_figure_4(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Gini coefficients: by depth in the first run, queries (left); by layer, mean over each run (middle); over all
    measured layers, runs compared (right). Runs that measured different layers have them in the legend."""
    figure = new_figure(15, 4)
    left, middle, right = figure.subplots(1, 3)
    name, lines = next(iter(runs.items()))
    draw_ginis(left, lines, f"{name}: by depth")
    layers = {label: measured_layers(rows) for label, rows in runs.items()}
    comparable = len({tuple(found) for found in layers.values()}) == 1
    for number, (run, rows) in enumerate(runs.items()):
        label = run if comparable else f"{run} ({describe_layers(layers[run])})"
        line = DASHES[number % len(DASHES)]
        for kind, marker in (("q", "o"), ("k", "s")):
            means = _means_by_layer(rows, layers[run], kind)
            _draw(middle, [*means], [*means.values()], label=f"{label}, {kind}", **{"marker": marker, **line})
        _draw(right, *series(rows, AGGREGATE.format("total", "q")), label=label, **line)
    middle.set(xlabel="layer", ylabel="Gini, mean over the run", title="by layer")
    title = "runs compared" if comparable else "runs compared, each over its own layers"
    right.set(xlabel="optimizer step", ylabel="Gini of |gradient|, q, mean of layers", title=title)
    for axes in (middle, right):
        _finish(axes)
    written(figure, path)


def measured_layers(lines: Sequence[Mapping[str, Any]]) -> list[int]:
    """Layers with a Gini coefficient in any line: frozen ones have none."""
    pattern = re.compile(re.escape(PER_LAYER.format("#", "@")).replace("\\#", r"(\d+)").replace("@", "[qk]"))
    return sorted({int(found[1]) for line in lines for key in line if (found := pattern.fullmatch(key))})


def describe_layers(layers: Sequence[int]) -> str:
    """``layers 0-3, 6``: runs of numbers as their ends."""
    if not layers:
        return "no layer"
    starts = [i for i, layer in enumerate(layers) if i == 0 or layers[i - 1] != layer - 1]
    parts = [layers[start:end] for start, end in zip(starts, [*starts[1:], len(layers)])]
    words = ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"{'layer' if len(layers) == 1 else 'layers'} {words}"


def _means_by_layer(lines: Sequence[Mapping[str, Any]], layers: Sequence[int], kind: str) -> dict[int, float]:
    known = {layer: series(lines, PER_LAYER.format(layer, kind))[1] for layer in layers}
    return {layer: sum(values) / len(values) for layer, values in known.items() if values}


def _draw(axes: Axes, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line, with markers if it has few points; nothing, and no place in the legend, if it has none."""
    if y:
        axes.plot(x, y, **{"marker": "o" if len(y) <= FEW else None, "markersize": 4, **style})


def _finish(axes: Axes) -> None:
    """Whole steps and layers, and the legend, or words in an empty frame."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no value was logged", ha="center", va="center", transform=axes.transAxes)
