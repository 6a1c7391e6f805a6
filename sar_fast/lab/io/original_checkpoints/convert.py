"""``sar-fast convert``: an original checkpoint as a folder that ``from_pretrained`` opens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from sar_fast.base.errors import ArgumentError, check_choice
from sar_fast.base.weight_files import open_to_readers, whole_folder
from sar_fast.lab.io.original_checkpoints import SAM_WIDTHS, grounding_dino, sam
from sar_fast.lab.io.original_checkpoints.reading import read_state


def convert_into(
    source: str | Path,
    output_dir: str | Path,
    *,
    config: str | Path | None = None,
    text_encoder: str | None = None,
    model_type: str | None = None,
) -> Path:
    """Writes weights, configuration and processor of a Grounding DINO or SAM checkpoint into a new folder.

    The folder is there when all of it is. Masks of a model from the folder are those of the file.

    Args:
        source: an original ``.pth``; which of the two it is of shows in its tensors.
        output_dir: a folder that is not there yet, or is empty.
        config, text_encoder: of Grounding DINO: its config file; BERT's folder or hub id, by default the config's.
        model_type: of SAM, to be sure: vit_b, vit_l or vit_h; it shows in the tensors.

    Returns:
        The folder, absolute.

    Raises:
        ArgumentError: a file that is not there, an option of the other model, a folder that is taken.
        ValueError: the file is no checkpoint of either.
    """
    source, path = Path(source).expanduser(), Path(os.path.abspath(Path(output_dir).expanduser()))
    if not source.is_file():
        raise ArgumentError("source", str(source), "be a file that exists")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArgumentError("output_dir", str(output_dir), "be a folder that is not there yet, or empty")
    if model_type is not None:
        check_choice("model_type", model_type, tuple(SAM_WIDTHS))
    model, processor = _load(source, config, text_encoder, model_type)
    try:
        with whole_folder(path) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            open_to_readers(folder)
    except (OSError, SafetensorError) as error:
        raise ArgumentError("output_dir", f"{output_dir}: {error}", "be a folder that can be written") from error
    return path


def _load(
    source: Path, config: str | Path | None, text_encoder: str | None, model_type: str | None
) -> tuple[nn.Module, Any]:
    if sam.MARK in read_state(source):
        for name, value in (("config", config), ("text_encoder", text_encoder)):
            if value is not None:
                raise ArgumentError(name, value, f"be left out: {source} is a SAM checkpoint, which needs none")
        return sam.load_segmenter(source, model_type)
    if model_type is not None:
        raise ArgumentError("model_type", model_type, f"be left out: {source} is no SAM checkpoint")
    if config is None:
        raise ArgumentError("config", None, f"be Grounding DINO's config file: {source} is no SAM checkpoint")
    if not Path(config).is_file():
        raise ArgumentError("config", config, "be a file that exists")
    return grounding_dino.load_detector(source, Path(config), text_encoder)
