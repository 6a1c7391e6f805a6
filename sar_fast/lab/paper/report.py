"""The report of ``sar-fast paper``: tables and Figures 3 to 6 in one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.lab.paper.settings import TASKS, Paper

FIGURES = {
    3: "Gradient L1 at visual and at text tokens while training",
    4: "Sparsity of the attention projections' gradients",
    5: "What every layer's last token says about where the object is",
    6: "Benchmark score against the number of re-weighted layers",
}


NOTE = (
    "Higher is better; MME's categories reach 200. POPE's mean yes_ratio is no score: the nearer to the questions' own "
    "share of yes, 50 %, the less the model leans to one answer."
)
FOCUS_NOTE = (
    "Higher SFS is better, and more than a uniform map's is more than chance. Lower FI is better. 95 % intervals by "
    "bootstrap over pictures."
)


def write_report(paper: Paper, summary: Mapping[str, Any]) -> Path:
    """Draw the figures and write ``report.html``; its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    stages = {stage["title"]: stage for stage in summary["stages"]}
    figures = _figures(paper)
    environment = Environment(
        loader=PackageLoader("sar_fast.lab.show", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("paper.html.j2").render(
        summary=summary,
        groups=list(paper.groups),
        tables=[_benchmarks(paper, stages), _focus(paper, stages)],
        figures=[(n, FIGURES[n], _data_uri(path)) for n, path in figures.items()],
        findings=findings(paper, stages),
        sweep=stages["Ablation over K and beta"]["results"],
    )
    path = paper.out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _benchmarks(paper: Paper, stages: Mapping[str, Any]) -> dict[str, Any]:
    """Main scores, a row per score, a column per group."""
    rows = []
    for task in TASKS:
        scores = {group: stages[f"{task}: {group}"]["results"]["headline"] for group in paper.groups}
        partial = stages[f"{task}: Base"]["results"].get("partial", {})  # results of an earlier version have none
        for name in scores["Base"]:
            values = [scores[group].get(name) for group in paper.groups]
            part = f" ({partial[name]})" if name in partial else ""
            rows.append((f"{task}: {name}{part}", [_number(v) for v in values]))
    return {"title": "Benchmarks (section 6.2)", "rows": rows, "note": NOTE}


def _focus(paper: Paper, stages: Mapping[str, Any]) -> dict[str, Any]:
    results = {group: stages[f"SFS and FI: {group}"]["results"] for group in paper.groups}

    def cell(group: str, key: str) -> str:
        low, high = results[group][f"{key}_ci95"]
        return f"{results[group][key]:.3f} ({low:.3f} to {high:.3f})"

    rows = [
        ("SFS, share of attention on the object", [cell(g, "semantic_focus_score") for g in results]),
        ("FI, instability under paraphrase", [cell(g, "focus_instability") for g in results]),
        ("SFS of a uniform map", [f"{r['uniform_focus_score']:.3f}" for r in results.values()]),
    ]
    return {"title": "Semantic focus (section 4)", "rows": rows, "note": FOCUS_NOTE}


def findings(paper: Paper, stages: Mapping[str, Any]) -> list[str]:
    """Plain sentences on what came out, for or against the method."""
    found = []
    mean = {g: _mean_score(stages, g) for g in paper.groups}
    change = mean["SFT + SAR"] - mean["SFT"]
    word = "raises" if change > 0.05 else "lowers" if change < -0.05 else "does not change"
    found.append(
        f"SAR (K = {paper.k}, beta = {paper.beta:g}) {word} the mean accuracy over the {len(TASKS)} benchmarks: "
        f"{mean['SFT']:.2f} % without, {mean['SFT + SAR']:.2f} % with it."
    )
    found.append(
        f"Fine-tuning takes that mean from {mean['Base']:.2f} % to {mean['SFT']:.2f} %; the control group's to "
        f"{mean['Control']:.2f} %."
    )
    key = "semantic_focus_score"
    sfs = {g: stages[f"SFS and FI: {g}"]["results"] for g in paper.groups}
    (low, high), value = sfs["SFT"][f"{key}_ci95"], sfs["SFT + SAR"][key]
    beyond = "beyond" if not low <= value <= high else "within"
    found.append(
        f"With SAR the SFS is {value:.3f} against {sfs['SFT'][key]:.3f}, {beyond} the 95 % interval of SFT alone."
    )
    return found


def _mean_score(stages: Mapping[str, Any], group: str) -> float:
    """Mean over the benchmarks of the share of right answers, in percent."""
    return sum(stages[f"{task}: {group}"]["results"]["main"] for task in TASKS) / len(TASKS)


def _figures(paper: Paper) -> dict[int, Path]:
    from sar_fast.lab.training.plots import plot_figure_3, plot_figure_4, read_log

    folder = paper.out / "figures"
    folder.mkdir(exist_ok=True)
    paths = {n: folder / f"figure{n}.png" for n in (3, 4, 5)} | {6: paper.out / "sweep" / "figure6.png"}
    logs = {"SFT": read_log(paper.out / "sft"), "Control": read_log(paper.out / "control")}
    plot_figure_3(logs, paths[3])
    plot_figure_4(logs, paths[4])
    _figure_5(paper, paths[5])
    return {n: path for n, path in paths.items() if path.is_file()}


def _figure_5(paper: Paper, path: Path) -> None:
    """Probe scores by layer, a line per group with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for group in paper.groups:
        details = json.loads((paper.folder("probe", group) / "layerwise_probe_details.json").read_text())
        layers = sorted(details["scores"], key=int)
        scores = [details["scores"][layer] for layer in layers]
        bounds = list(zip(*(details["scores_ci95"][layer] for layer in layers)))
        axes.plot(range(len(layers)), scores, "o-", markersize=3, label=group)
        axes.fill_between(range(len(layers)), *bounds, alpha=0.15)
    axes.axhline(details["baseline"], color="grey", linestyle="--", linewidth=1, label="no features")
    axes.set(xlabel="decoder layer", ylabel="share with IoU of 0.5 or more", ylim=(0, 1))
    axes.set_xticks(range(len(layers)))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
