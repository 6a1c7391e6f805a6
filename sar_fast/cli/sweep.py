"""``sar-fast sweep``: a benchmark under many settings."""

from __future__ import annotations

import logging

import typer

from sar_fast.base.extras import TRAINING, need
from sar_fast.cli.errors import UserError


def sweep(context: typer.Context) -> None:
    """Score a benchmark for several K and beta or rules, computing what the settings share once.

    Takes the flags and YAML files of `experiments/evaluate.py --task`, and in place of one setting
    `--k 0 5 10 15 --beta 0.1 0.5 1.0`. `--weighting equal my_rules.py:mine` takes other rules in place of the paper's,
    or beside its betas where they are given. Every setting's folder equals that of a separate run; `sweep.json` and
    `figure6.png` lie beside them. `--compare_batches N` measures the speed-up over separate runs.

    **Example**

    * `sar-fast sweep --model_name_or_path miniature --task mme --data_dir experiments/data/benchmarks/mme --k 0 1 2 4
      --beta 0.1 0.5 --output_dir results/sweep`
    """
    need("sar-fast sweep", *TRAINING, "matplotlib")
    from sar_fast.cli.evaluate import sweep as sweeping
    from sar_fast.lab.benchmark.figures import rule_of

    if not context.args or {"--help", "-h"} & set(context.args):
        typer.echo(context.get_help())
        for name, text in sweeping.flags():
            typer.echo(f"  --{name:<28} {text}")
        raise typer.Exit
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.INFO)
    try:
        summary = sweeping.run(sweeping.parse(context.args))
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    for row in summary.get("settings", ()):
        scores = "  ".join(f"{n} {v:.2f}" for n, v in row["scores"].items() if isinstance(v, int | float))
        rule = rule_of(row)
        typer.echo(f"K {row['k']}{rule and f' {rule}'}: {scores}")
    if "layer_passes" in summary:
        passes = summary["layer_passes"]
        typer.echo(f"layer passes per batch: {passes['branched']} instead of {passes['separate']}")
    if "speed_up" in summary:
        typer.echo(f"{summary['speed_up']:.2f} times faster than setting by setting, answers equal")
