"""``sar-fast paper``: the whole paper on what the repository ships."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sar_fast.base.extras import TRAINING, need
from sar_fast.cli import options
from sar_fast.cli.errors import UserError

if TYPE_CHECKING:
    from sar_fast.lab.paper import Commands


def paper(
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder of results, report.html and paper.json.")
    ] = Path("results/paper"),
    k: Annotated[int, typer.Option("--k", help="Re-weighted layers in the tables, 1 to 4.")] = 2,
    beta: Annotated[float, typer.Option("--beta", help="Temperature of the softmax over heads.")] = 0.5,
    max_samples: Annotated[
        int | None, typer.Option("--max_samples", help="Use the first samples of every set, at least 4.")
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Of both trainings. Default: 4.")] = None,
) -> None:
    """Run every experiment of the paper in miniature: two trainings, benchmarks, SFS/FI, probe, ablation.

    Compares the base model, SFT, SFT with SAR, and the control group, and draws Figures 3 to 6. It reports what comes
    out, also where SAR does not help. An interrupted run goes on where it stopped; after a change of options, only what
    depends on them is done again. About ten minutes on 2 cores.
    """
    need("sar-fast paper", *TRAINING, "matplotlib", "skimage")
    from sar_fast.lab.paper import Paper, run

    try:
        wanted = Paper(output_dir, k, beta, max_samples=max_samples, epochs=epochs)
        options.make_folder(output_dir)
        report = run(wanted, commands())
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError.of(error) from error
    typer.echo(f"report: {report}")


def commands() -> Commands:
    """``experiments/evaluate.py`` and ``sar-fast sweep`` in this process."""
    from sar_fast.cli.evaluate import arguments, sweep
    from sar_fast.cli.evaluate.command import evaluate
    from sar_fast.lab.paper import Commands

    return Commands(lambda words: evaluate(arguments.parse(words)), lambda words: sweep.run(sweep.parse(words)))
