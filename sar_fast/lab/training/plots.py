"""Figures of a run: the loss, and figures 3 and 4 of the paper from gradient_sparsity.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.lab.training.gradients import AGGREGATE, FILE_NAME, L1, PER_LAYER

DASHES = (  # of runs that may lie on each other: the first is wide and shows between the dashes of the others
    {"linestyle": "-", "linewidth": 3.5, "alpha": 0.5},
    {"linestyle": "--", "linewidth": 1.5},
    {"linestyle": ":", "linewidth": 1.5},
    {"linestyle": "-.", "linewidth": 1.5},
)
DEPTHS = ("shallow", "middle", "deep")
FEW = 20  # points of a line, up to which each has a marker: a line through one point is not seen


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_loss(history: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Every loss in a Trainer's ``log_history`` against the step; False, and no file, if there is none."""
    names = [n for n in ("loss", "loss_text_gen", "loss_contrastive", "eval_loss") if any(n in h for h in history)]
    if not names:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        _draw(axes, *series(history, name), label=name)
    axes.set(xlabel="optimizer step", ylabel="loss")
    _finish(axes)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a gradient_sparsity.jsonl (or the run's folder); ``ValueError`` if it holds no measurement."""
    path = log_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a run with --gradient_analysis writes it")
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            lines.append(json.loads(line.decode("utf-8")))
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(lines[-1], dict) or "step" not in lines[-1]:
            raise ValueError(f"{path}, line {number} has no step; needed a line that --gradient_analysis writes")
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
    plt = _pyplot()
    figure, panels = plt.subplots(
        1, len(runs), figsize=(5 * len(runs), 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, lines) in zip(panels[0], runs.items()):
        for kind, colour in (("visual", "tab:red"), ("text", "tab:blue")):
            _draw(axes, *series(lines, L1.format(kind)), color=colour, label=f"{kind} tokens")
        axes.set(xlabel="optimizer step", title=name, yscale="log")
        _finish(axes)
    panels[0, 0].set_ylabel("mean gradient L1 per token")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_figure_4(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Gini coefficients: by depth in the first run, queries (left); by layer, mean over each run (middle); over all
    measured layers, runs compared (right). Runs that measured different layers have them in the legend."""
    plt = _pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    name, lines = next(iter(runs.items()))
    for depth in DEPTHS:
        _draw(left, *series(lines, AGGREGATE.format(depth, "q")), label=depth)
    left.set(xlabel="optimizer step", ylabel="Gini of |gradient|, q", title=f"{name}: by depth")
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
    for axes in (left, middle, right):
        _finish(axes)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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


def _draw(axes: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line, with markers if it has few points; nothing, and no place in the legend, if it has none."""
    if y:
        axes.plot(x, y, **{"marker": "o" if len(y) <= FEW else None, "markersize": 4, **style})


def _finish(axes: Any) -> None:
    """Whole steps and layers, and the legend, or words in an empty frame."""
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no value was logged", ha="center", va="center", transform=axes.transAxes)
