"""``sar-fast convert``: original checkpoints of Grounding DINO and SAM as folders of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sar_fast.base.errors import arguments_named
from sar_fast.cli.errors import UserError

OPTIONS = {"source": "SOURCE"} | {n: f"--{n}" for n in ("output_dir", "config", "text_encoder", "model_type")}


def convert(
    source: Annotated[Path, typer.Argument(help="The original checkpoint, a .pth file.", show_default=False)],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for the model.", show_default=False)],
    config: Annotated[
        Path | None, typer.Option("--config", help="Grounding DINO's config file, GroundingDINO_SwinT_OGC.py or so.")
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option("--text_encoder", help="Grounding DINO: BERT's folder or hub id. Default: the config's."),
    ] = None,
    model_type: Annotated[
        str | None, typer.Option("--model_type", help="SAM, to be sure: vit_b, vit_l or vit_h. It shows in the file.")
    ] = None,
) -> None:
    """Write an original checkpoint of Grounding DINO or SAM as a folder that transformers opens.

    Weights, configuration and processor; the folder is there when all of it is. `--gd_checkpoint_path` and
    `--sam_checkpoint_path` take the folder as they take the file.

    **Examples**

    * `sar-fast convert groundingdino_swint_ogc.pth --config GroundingDINO_SwinT_OGC.py --output_dir models/dino`
    * `sar-fast convert sam_vit_b_01ec64.pth --output_dir models/sam`
    """
    from sar_fast.lab.io.original_checkpoints.convert import convert_into

    try:
        with arguments_named(OPTIONS):
            made = convert_into(source, output_dir, config=config, text_encoder=text_encoder, model_type=model_type)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    typer.echo(made)
