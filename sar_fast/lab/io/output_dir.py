"""Whether results can be written where they are wanted, asked before anything is computed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_output_dir(path: str | Path) -> None:
    """``ValueError`` unless files can be written into the folder, or into the nearest one above it that exists.

    Nothing is made. Of several processes the first alone looks, since it alone writes: another machine may not have
    the folder.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(path).expanduser().absolute()
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {str(path)!r} is no folder to write into: {error.strerror}") from error
