"""Models and pictures that options name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from sar_fast.cli.errors import UserError
from sar_fast.lab.io import models
from sar_fast.lab.io.model_errors import ModelError
from sar_fast.lab.io.pictures import PictureError, find_picture, open_picture, picture_name

OPTIONS = {"model": "--model", "base_model": "--base_model", "device": "--device", "dtype": "--dtype"}


@contextlib.contextmanager
def options_named(**others: str) -> Iterator[None]:
    """A :class:`ModelError` within becomes a :class:`UserError` that names the options of ``sar-fast``, or others."""
    try:
        yield
    except ModelError as error:
        raise UserError(error.worded(**{**OPTIONS, **others})) from error


def load_model(
    name: str, device: str = "auto", dtype: str = "auto", base_model: str | None = None
) -> tuple[nn.Module, Any]:
    """:func:`sar_fast.lab.io.models.load_model` of a model or an adapter by name."""
    with options_named():
        return models.load_model(models.find_model(name, base_model), device, dtype)


def open_image(image: str | Path) -> Image.Image:
    """The picture of ``--image`` as it is shown, mode RGB."""
    try:
        place = find_picture(image, Path())
    except PictureError as error:
        raise UserError(f"--image {error}") from error
    try:
        return open_picture(place)
    except PictureError as error:
        raise UserError(f"--image {picture_name(str(image))!r} {error}") from error
