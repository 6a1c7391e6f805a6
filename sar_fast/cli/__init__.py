"""``sar-fast``: demo, generate, inspect, doctor, paper, plot, sweep, merge, convert; data, bench, llamafactory."""

from __future__ import annotations

from typing import Annotated

import typer

from sar_fast import __version__
from sar_fast.cli.bench import bench
from sar_fast.cli.convert import convert
from sar_fast.cli.data import data
from sar_fast.cli.demo import demo
from sar_fast.cli.doctor import doctor
from sar_fast.cli.errors import Commands, one_spelling
from sar_fast.cli.generate import generate
from sar_fast.cli.inspect import inspect
from sar_fast.cli.llamafactory import llamafactory
from sar_fast.cli.merge import merge
from sar_fast.cli.paper import paper
from sar_fast.cli.plot import plot
from sar_fast.cli.sweep import sweep

app = typer.Typer(
    cls=Commands,
    help="Semantic Attention Re-weighting (SAR) for multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": one_spelling},
)
for command in (demo, generate, inspect, doctor, paper, plot, merge, convert):
    app.command()(command)
flags_of_its_own = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
app.command(context_settings=flags_of_its_own)(sweep)
app.add_typer(data, name="data")
app.add_typer(bench, name="bench")
app.add_typer(llamafactory, name="llamafactory")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sar_fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
