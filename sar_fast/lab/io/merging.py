"""``sar-fast merge``: one plain checkpoint out of an adapter and its base."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from sar_fast.base.errors import ArgumentError
from sar_fast.base.weight_files import open_to_readers, whole_folder
from sar_fast.lab.io import adapters
from sar_fast.lab.io.model_errors import ModelError
from sar_fast.lab.io.model_source import ModelSource
from sar_fast.lab.io.models import DTYPES, load_config, load_processor, load_whole
from sar_fast.method.weighting.files import PARAMETERS, RULE


def merge_into(source: ModelSource, output: Path, dtype: str = "auto", overwrite: bool = False) -> Path:
    """Writes the base's weights with the adapter added, processor, chat template and generation config, and copies the
    head weights that were learned beside the adapter.

    The folder is there when all of it is: it is written beside ``output`` and takes its place at the end.

    Args:
        source: an adapter and its base.
        output: a folder that is not there yet, is empty, or with ``overwrite`` holds a model that is replaced.
        dtype: of the weights, ``auto`` for the base's own; an adapter is added in this dtype.

    Returns:
        The folder, absolute.

    Raises:
        ModelError: no adapter, one that cannot be merged or does not fit, NaN, a quantized base.
        ArgumentError: ``output`` cannot be taken.
    """
    if source.adapter is None:
        raise source.error("is no adapter: there is nothing to merge")
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError("{dtype} must be auto, {known}; got {name!r}", known=", ".join(DTYPES), name=dtype)
    path = Path(os.path.realpath(output.expanduser()))
    check_output(path, source, overwrite)
    quantized = getattr(load_config(source), "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise source.error(
            "has a quantized base ({method}), whose weights cannot hold the sum: give the plain one with {base_model}",
            method=method,
        )
    processor = load_processor(source)
    model = load_whole(source, "auto" if dtype == "auto" else DTYPES[dtype])
    model = adapters.merge(adapters.attach(model, source), source)
    try:
        with whole_folder(path) as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            for file in weighting_files(source.adapter):  # head weights that were learned beside the adapter
                shutil.copy(file, folder)
            open_to_readers(folder)
    except (OSError, SafetensorError) as error:
        raise ArgumentError("output", f"{str(output)!r}: {error}", "be a folder to write into") from error
    return path


def check_output(path: Path, source: ModelSource, overwrite: bool) -> None:
    """``ArgumentError`` for a folder that must not be replaced."""
    if path.exists() and not path.is_dir():
        raise ArgumentError("output", f"{str(path)!r}, a file", "be a folder")
    for what, place in (("the adapter", source.adapter), ("its base", source.weights)):
        read = Path(os.path.realpath(place)) if place and Path(place).is_dir() else None
        if read is not None and (path == read or path in read.parents):
            raise ArgumentError("output", f"{str(path)!r}, which holds {what}", "be another folder")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise ArgumentError(
            "output", f"{str(path)!r}, which is not empty", "be an empty or a new folder, or come with {overwrite}"
        )
    if not (path / "config.json").is_file():
        raise ArgumentError(
            "output",
            f"{str(path)!r}, which holds none",
            "be an empty or a new folder, or one of a model that {overwrite} may replace",
        )


def weighting_files(adapter: str) -> list[Path]:
    """The files of a rule that was trained with an adapter (docs/training.md), where there are any."""
    return [path for name in (RULE, PARAMETERS) if (path := Path(adapter) / name).is_file()]
