"""Whether results can be written where they are wanted, asked before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sar_fast.base.errors import ArgumentError


def check_output_dir(path: str | Path) -> None:
    """``ArgumentError`` where :func:`unwritable` has a reason."""
    if (why := unwritable(path)) is not None:
        raise ArgumentError("output_dir", f"{str(path)!r}: {why}", "be a folder to write into")


def unwritable(path: str | Path) -> str | None:
    """Why no file can be written into the folder, or into the nearest one above it that exists; None if one can.

    Nothing is made. Of several processes the first alone looks, since it alone writes: another machine may not have
    the folder.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    folder = Path(path).expanduser().absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror
