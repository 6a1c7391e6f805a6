"""Results as tables, and in folders of the caller's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.base.extras import need


def data_frame(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A ``pandas.DataFrame`` of plain values, a row for each; ``MissingExtraError`` without pandas."""
    need("to_pandas()", "pandas")
    import pandas

    return pandas.DataFrame([dict(row) for row in rows])


def new_folder(folder: str | Path) -> Path:
    """A folder to save into; ``ArgumentError`` if anything lies there: nothing is overwritten."""
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArgumentError("folder", str(path), "be a new folder, or an empty one")
    path.mkdir(parents=True, exist_ok=True)
    return path
