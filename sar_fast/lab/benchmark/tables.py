"""Benchmark tables: parquet files as lmms-lab publishes them, on disk or from the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from pyarrow import compute
from pyarrow.parquet import read_metadata

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.benchmark.tasks.base import Task
from sar_fast.lab.io.pictures import PictureError, find_picture
from sar_fast.lab.io.records import RecordError, open_image
from sar_fast.lab.io.stamps import content_stamp, file_stamp, files_stamp, stamp

IMAGE_COLUMN = "image"


class Table:
    """A benchmark's rows; pictures are decoded when one is asked for.

    Attributes:
        rows: the columns that the task uses, less the picture.
        stamp: what identifies the data, as plain values: its content, and that of picture files outside the table.
    """

    def __init__(self, dataset: Dataset, task: Task, source: str, folder: Path, origin: dict[str, Any]) -> None:
        needed = (IMAGE_COLUMN, *task.columns)
        missing = [name for name in needed if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"{task.name}: no column {', '.join(missing)} in {source}; it has {', '.join(dataset.column_names)}"
            )
        if not len(dataset):
            raise ValueError(f"{task.name}: {source} has no rows")
        if isinstance(dataset.features[IMAGE_COLUMN], Image):
            dataset = dataset.cast_column(IMAGE_COLUMN, Image(decode=False))
        self._pictures = dataset.select_columns([IMAGE_COLUMN])
        self._folder = folder
        self._keys: dict[int, str] = {}
        used = [*task.columns, *(name for name in task.optional if name in dataset.column_names)]
        self.rows: list[dict[str, Any]] = dataset.select_columns(used).to_list()
        self.stamp = {**origin, "rows": len(dataset)}
        if files := self._picture_files():
            self.stamp["pictures"] = files_stamp(files)

    def picture(self, row: int) -> Any:
        """The picture of a row as it is shown, mode RGB; ``RecordError`` if it cannot be read."""
        return open_image(self.reference(row))

    def picture_key(self, row: int) -> str:
        """Equal for rows with the same picture: POPE has each under several questions, a copy in every row."""
        if row not in self._keys:
            try:
                where = self.reference(row)
                content = where["bytes"]
                self._keys[row] = content_stamp(content) if content else where["path"]
            except RecordError:
                self._keys[row] = f"row {row}"
        return self._keys[row]

    def reference(self, row: int) -> dict[str, Any]:
        """Where the picture of a row is: ``bytes`` or ``path``; ``RecordError`` if it is nowhere."""
        try:
            place = find_picture(self._pictures[row][IMAGE_COLUMN], self._folder)
        except PictureError as error:
            raise RecordError(f"image {error}") from error
        return {"bytes": place, "path": None} if isinstance(place, bytes) else {"bytes": None, "path": str(place)}

    def _picture_files(self) -> list[Path]:
        """Pictures that are files of their own, each once; read by column, so that no other picture is touched."""
        column = self._pictures.data.column(IMAGE_COLUMN)
        if pyarrow.types.is_struct(column.type):
            names = [column.type.field(i).name for i in range(column.type.num_fields)]
            if "path" not in names:
                return []
            paths = compute.struct_field(column, "path")
            if "bytes" in names:
                paths = paths.filter(compute.is_null(compute.struct_field(column, "bytes")))
        else:
            paths = column if pyarrow.types.is_string(column.type) else ()
        places = []
        for path in dict.fromkeys(p.as_py() for p in paths):
            with contextlib.suppress(PictureError):  # its row will be skipped, and the reason listed
                places.append(find_picture(path, self._folder))
        return [place for place in places if isinstance(place, Path)]


def open_table(task: Task, data_dir: str | Path | None, split: str | None) -> Table:
    """The table of a benchmark's split, from ``data_dir`` or, without one, from the hub.

    Raises:
        ArgumentError: a task that is not on the hub, without ``data_dir``.
        FileNotFoundError: no folder, or no parquet file of the split in it.
        ValueError: files of several configurations, a missing column, no rows.
        ConnectionError: the hub cannot be reached.
    """
    split = split or task.split
    if data_dir is None:
        if task.hub_id is None:
            raise ArgumentError("data_dir", data_dir, f"be given for {task.name}, which is not on the hub")
        try:
            dataset = load_dataset(task.hub_id, task.folder, split=split)
        except (ConnectionError, DatasetNotFoundError) as error:
            raise ConnectionError(
                f"{task.name}: {task.hub_id} cannot be had from the hub ({str(error).splitlines()[0]}); "
                "download it and give its folder as data_dir"
            ) from error
        revision = dataset._fingerprint  # of the files that were downloaded
        return Table(dataset, task, task.hub_id, Path(), {"data": task.hub_id, "revision": revision, "split": split})
    files = find_files(Path(data_dir), split, task.folder)
    stamps = {f.name: file_stamp(f) for f in files}
    try:
        if not any(read_metadata(f).num_rows for f in files):
            raise ValueError(f"{task.name}: {data_dir} has no rows")  # datasets would say "BatchSize must be greater"
        # the name, since datasets' own cache of these files goes by their paths and times alone
        dataset = load_dataset("parquet", name=stamp(stamps), data_files={"rows": [*map(str, files)]}, split="rows")
    except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{task.name}: a file of {files[0].parent} cannot be read as parquet: {reason}") from error
    return Table(dataset, task, str(data_dir), files[0].parent, {"files": stamps, "split": split})


def find_files(data_dir: Path, split: str, folder: str | None = None) -> list[Path]:
    """Parquet files ``split-*.parquet`` or ``split.parquet`` below ``data_dir``, all in one folder.

    Where several folders have some, those in a folder called ``folder`` (or ``data``) are meant.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir {data_dir} is no folder")
    parquet = sorted(data_dir.rglob("*.parquet"))
    found = [f for f in parquet if f.stem == split or f.name.startswith(f"{split}-")]
    if not found:
        splits = sorted({f.stem.split("-")[0] for f in parquet})
        has = f"it has {', '.join(splits)}" if splits else "it has no parquet file"
        raise FileNotFoundError(f"data_dir {data_dir} has no {split}-*.parquet; {has}")
    if len({f.parent for f in found}) > 1:
        preferred = [f for f in found if f.parent.name == (folder or "data")]
        found = preferred or found
    folders = sorted({str(f.parent) for f in found})
    if len(folders) > 1:
        raise ArgumentError(
            "data_dir",
            f"{data_dir} with several, give one of them: {', '.join(folders)}",
            f"have {split} in one folder",
        )
    return found
