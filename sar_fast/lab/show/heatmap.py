"""Heads by layers: the factors c as a picture and as coloured cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

COLOURMAP = "PuOr_r"  # purple: held back, white: as before, orange: amplified; safe for the colour-blind
LEAST_SPAN = 0.25  # octaves; keeps rounding noise around 1 from looking like an effect


def log_span(weights: np.ndarray) -> float:
    """Half-width of the colour scale in octaves: the largest ``|log2 c|``."""
    return max(LEAST_SPAN, float(np.abs(np.log2(weights.clip(2**-6, 2**6))).max()))


def cell_colours(weights: np.ndarray) -> list[list[tuple[str, str]]]:
    """(background, text) CSS colours of each weight of (layers, heads), on a scale symmetric about 1 in log2 c."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    span = log_span(weights)
    shades = colormaps[COLOURMAP](0.5 + np.log2(weights.clip(2**-6, 2**6)) / span / 2)
    dark = shades[..., :3] @ (0.299, 0.587, 0.114) < 0.5
    return [[(to_hex(c), "#ffffff" if d else "#1b1b1f") for c, d in zip(row, ds)] for row, ds in zip(shades, dark)]


def save_heatmap(weights: np.ndarray, layers: Sequence[int], path: Path, title: str) -> None:
    """Writes (layers, heads) factors c as a PNG. ``OSError`` if the path cannot be written."""
    from matplotlib.figure import Figure

    rows, heads = weights.shape
    figure = Figure(figsize=(2.5 + 0.32 * heads, 1.6 + 0.32 * rows), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    draw_heatmap(axes, weights, layers)
    axes.set_title(title, fontsize=9)
    figure.savefig(path)


def draw_heatmap(axes: Any, weights: np.ndarray, layers: Sequence[int]) -> None:
    """Draws (layers, heads) factors c on axes of matplotlib, with a bar of colours beside them."""
    rows, heads = weights.shape
    span = log_span(weights)
    drawn = axes.imshow(np.log2(weights.clip(2**-6, 2**6)), cmap=COLOURMAP, vmin=-span, vmax=span, aspect="equal")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, heads, 1 + heads // 24))
    axes.set_yticks(range(rows), [str(i) for i in layers])
    bar = axes.figure.colorbar(drawn, ax=axes, shrink=0.9)
    ticks = np.linspace(-span, span, 5)
    bar.set_ticks(ticks, labels=[f"{2**t:.2f}" for t in ticks])
    bar.set_label("c, factor on the head's output")
