"""Figure 5: the probe's score by layer."""

from __future__ import annotations

from pathlib import Path

from sar_fast.lab.probe.probe import RIGHT_IOU, ProbeResults


def draw_scores(results: ProbeResults, task: str, path: Path) -> None:
    """Scores by layer with their intervals, and the baseline, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = range(len(results.scores))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.fill_between(layers, *results.intervals.T, alpha=0.2, label="95 % interval over pictures")
    axes.plot(layers, results.scores, marker="o", markersize=3, label=f"mean of {len(results.by_seed)} seeds")
    if results.unlearned:
        axes.plot(results.unlearned, results.scores[results.unlearned], "rx", label="head has not learned")
    constant = "median box" if task == "grounding" else "most frequent class"
    axes.axhline(results.baseline, color="grey", linestyle="--", linewidth=1, label=f"{constant}, no features")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(f"share with IoU ≥ {RIGHT_IOU}" if task == "grounding" else "accuracy")
    axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
