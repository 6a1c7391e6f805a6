"""Figures of a run: the loss, and figures 3 and 4 of the paper from gradient_sparsity.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.training.gradients import AGGREGATE, L1, PER_LAYER

DEPTHS = ("shallow", "middle", "deep")


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
        rows = [(h["step"], h[name]) for h in history if name in h]
        axes.plot(*zip(*rows), label=name)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a gradient_sparsity.jsonl (or the run's folder); ``ValueError`` if there is none."""
    path = path / "gradient_sparsity.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a run with --gradient_analysis writes it")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        raise ValueError(f"{path} is empty")
    return lines


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
            axes.plot(*series(lines, L1.format(kind)), color=colour, label=f"{kind} tokens")
        axes.set(xlabel="optimizer step", title=name, yscale="log")
        axes.legend()
    panels[0, 0].set_ylabel("mean gradient L1 per token")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_figure_4(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Gini coefficients: by depth in the first run, queries (left); by layer, mean over each run (middle); over all
    layers, runs compared (right)."""
    plt = _pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    name, lines = next(iter(runs.items()))
    for depth in DEPTHS:
        left.plot(*series(lines, AGGREGATE.format(depth, "q")), label=depth)
    left.set(xlabel="optimizer step", ylabel="Gini of |gradient|, q", title=f"{name}: by depth")
    for label, rows in runs.items():
        for kind, style in (("q", "o-"), ("k", "s--")):
            layers, means = _means_by_layer(rows, kind)
            middle.plot(layers, means, style, label=f"{label}, {kind}", markersize=3)
        right.plot(*series(rows, AGGREGATE.format("total", "q")), label=label)
    middle.set(xlabel="layer", ylabel="Gini, mean over the run", title="by layer")
    middle.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="optimizer step", ylabel="Gini of |gradient|, q, all layers", title="runs compared")
    for axes in (left, middle, right):
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _means_by_layer(lines: Sequence[Mapping[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    layers, means = [], []
    layer = 0
    while any(PER_LAYER.format(layer, k) in lines[0] for k in ("q", "k")):
        _, values = series(lines, PER_LAYER.format(layer, kind))
        if values:
            layers.append(layer)
            means.append(sum(values) / len(values))
        layer += 1
    return layers, means
