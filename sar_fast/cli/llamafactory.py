"""``sar-fast llamafactory``: LLaMA-Factory's ``train`` and ``export``, with SAR."""

from __future__ import annotations

import dataclasses

import typer

from sar_fast.base.extras import need
from sar_fast.cli.errors import Commands, UserError

llamafactory = typer.Typer(cls=Commands, help="LLaMA-Factory, with SAR.", no_args_is_help=True)
NAME = "sar-fast llamafactory"
AS_THEIRS = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@llamafactory.callback()
def _group() -> None:
    """LLaMA-Factory, with SAR."""


@llamafactory.command(context_settings=AS_THEIRS)
def train(context: typer.Context) -> None:
    """Train, evaluate or predict as `llamafactory-cli train` does, with SAR's keys among its own.

    Takes a YAML file and `key=value` after it, or flags. On several devices, or with FORCE_TORCHRUN=1, it starts
    torchrun as LLaMA-Factory does, by the same variables (NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR ...).

    **Examples**

    * `sar-fast llamafactory train examples/llamafactory/miniature_full.yaml use_sar=true sar_beta=0.1`
    * `FORCE_TORCHRUN=1 NPROC_PER_NODE=8 sar-fast llamafactory train qwen2_5vl_full_sft.yaml use_sar=true`
    """
    need(NAME, "llamafactory")
    if _asks_for_help(context):
        from sar_fast.integrations.llamafactory.options import GROUPS

        typer.echo(context.get_help())
        for field in (field for group in GROUPS for field in dataclasses.fields(group)):
            typer.echo(f"  --{field.name:<34} {field.metadata.get('help', '')} [{field.default}]")
        typer.echo("All others are LLaMA-Factory's: llamafactory-cli train -h")
        raise typer.Exit
    from sar_fast.integrations.llamafactory import launch

    if launch.wants_processes():
        raise typer.Exit(launch.launch(context.args))
    from sar_fast.integrations.llamafactory.run import Run

    try:
        run = Run(context.args)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    run()


@llamafactory.command(context_settings=AS_THEIRS)
def export(context: typer.Context) -> None:
    """Merge adapters and write a plain model, as `llamafactory-cli export` does: nothing of SAR is in a saved model.

    **Example**

    * `sar-fast llamafactory export --model_name_or_path BASE --adapter_name_or_path RUN --template llava
      --export_dir OUT`
    """
    need(NAME, "llamafactory")
    if _asks_for_help(context):
        typer.echo(context.get_help())
        raise typer.Exit
    from sar_fast.integrations.llamafactory.run import export as write

    try:
        write(context.args)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error


def _asks_for_help(context: typer.Context) -> bool:
    return not context.args or bool({"--help", "-h"} & set(context.args))
