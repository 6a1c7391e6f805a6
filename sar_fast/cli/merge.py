"""``sar-fast merge``: a plain checkpoint out of an adapter and its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sar_fast.base.errors import arguments_named
from sar_fast.base.extras import need
from sar_fast.cli import options
from sar_fast.cli.errors import UserError

OPTIONS = {"output": "--output_dir", "overwrite": "--overwrite_output_dir"}


def merge(
    adapter: Annotated[
        str, typer.Argument(help="Folder or Hugging Face id of a LoRA or other PEFT adapter.", show_default=False)
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the model.", show_default=False)],
    base_model: options.BaseModel = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the weights: 'auto' (the base's own), 'float32', 'bfloat16', 'float16'.")
    ] = "auto",
    overwrite_output_dir: Annotated[
        bool, typer.Option("--overwrite_output_dir", help="Replace a model that is in the folder.")
    ] = False,
) -> None:
    """Add an adapter to its base's weights, and write a model that needs neither.

    Processor, chat template and generation config come along. Until the new model is whole nothing is replaced.

    **Examples**

    * `sar-fast merge results/lora --output_dir results/lora_merged`
    """
    need("sar-fast merge", "peft")
    from sar_fast.cli import loading
    from sar_fast.lab.io.merging import merge_into
    from sar_fast.lab.io.models import find_model

    try:
        with loading.options_named(model="ADAPTER"), arguments_named(OPTIONS):
            typer.echo(merge_into(find_model(adapter, base_model), output_dir, dtype, overwrite_output_dir))
    except ValueError as error:
        raise UserError.of(error) from error
