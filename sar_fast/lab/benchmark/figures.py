"""Drawings of benchmark results: a benchmark's scores, and Figure 6 of a sweep's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sar_fast.lab.run.rules import rule_label
from sar_fast.lab.show.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE = "figure6.png"
PANELS_IN_A_ROW = 4


def draw_scores(headline: Mapping[str, Any], title: str) -> Figure:
    """A bar for each score that is a number."""
    scores = {name: value for name, value in headline.items() if isinstance(value, int | float)}
    figure = new_figure(6.4, 1.2 + 0.3 * len(scores))
    axes = figure.add_subplot()
    bars = axes.barh([*scores], [*scores.values()])
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title)
    return figure


def draw_figure_6(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each headline score against K, a line per beta and per rule; K = 0 is the model without SAR.

    Args:
        rows: the settings of ``sweep.json``.

    Raises:
        ValueError: no score is known under every setting.
    """
    names = [n for n in rows[0]["scores"] if all(isinstance(row["scores"].get(n), int | float) for row in rows)]
    if not names:
        raise ValueError("no score is known under every setting; nothing is drawn")
    columns = min(PANELS_IN_A_ROW, len(names))
    count = -(-len(names) // columns)
    figure = new_figure(3.4 * columns, 3 * count)
    panels = figure.subplots(count, columns, squeeze=False, sharex=True)
    for axes in panels.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(panels.flat, names):
        _draw_panel(axes, rows, name)
    panels[0, 0].legend(fontsize="small")
    return figure


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    base = next((row for row in rows if row["k"] == 0), None)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["k"]:
            lines.setdefault(json.dumps([row.get(n) for n in ("beta", "weighting", "options")]), []).append(row)
    for line in lines.values():
        points = ([base] if base else []) + line
        axes.plot([row["k"] for row in points], [row["scores"][name] for row in points], "o-", label=rule_of(line[0]))
    if base:
        axes.axhline(base["scores"][name], color="grey", linewidth=0.8, linestyle="--", label="without SAR")
    part = rows[0].get("partial", {}).get(name)
    axes.set(title=f"{name}\n{part}" if part else name, xlabel="K, re-weighted layers")
    axes.tick_params(labelbottom=True)  # the panel below may be an empty place


def rule_of(row: Mapping[str, Any]) -> str:
    """A setting's rule as tables and figures name it, of a row of ``sweep.json``; empty without SAR."""
    if not row["k"]:
        return ""
    rule = f"beta {shortest(row['beta'])}" if row.get("weighting") is None else rule_label(row["weighting"])
    return ", ".join([rule, *(f"{name} {value}" for name, value in row.get("options", {}).items())])


def shortest(value: float) -> str:
    """The fewest digits that tell a number from all others: 0.5, 1, 0.50000001."""
    return repr(float(value)).removesuffix(".0")
