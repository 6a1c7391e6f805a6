"""Figures that need no display and are not pyplot's: a notebook shows them, a path keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sar_fast.base.extras import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches; ``MissingExtraError`` without matplotlib."""
    need("plot()", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def written(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, in a file too if a path is given, whose suffix names the format."""
    if path is not None:
        figure.savefig(Path(path).expanduser(), dpi=DPI)
    return figure
