"""``sar-fast plot``: figures 3 and 4 of the paper from training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sar_fast.base.extras import need
from sar_fast.cli import options
from sar_fast.cli.errors import UserError


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Output folders of training runs, or their gradient_sparsity.jsonl.", show_default=False),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the figures.")] = Path("results/figures"),
) -> None:
    """Draw gradient sparsity: figure_3.png (visual and text gradients), figure_4.png (Gini by depth, layer and run).

    The first run is the text-only one; runs are compared in figure 4, right.

    **Examples**

    * `sar-fast plot results/mini_sft results/mini_control --output_dir results/mini_figures`
    """
    need("sar-fast plot", "matplotlib")
    from sar_fast.lab.training.plots import log_path, plot_figure_3, plot_figure_4, read_log

    files = [log_path(run).resolve() for run in runs]
    for number, run in enumerate(runs):
        if files[number] in files[:number]:
            raise UserError(f"RUNS: {run} is given twice; needed different runs")
    names = [run.name if run.is_dir() else run.parent.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    try:
        logs = {name: read_log(run) for name, run in zip(names, runs)}
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    options.make_folder(output_dir)
    for name, draw in (("figure_3.png", plot_figure_3), ("figure_4.png", plot_figure_4)):
        draw(logs, output_dir / name)
        typer.echo(str(output_dir / name))
