"""``refcoco_val_sar`` and datasets like it: a picture, a query, the object's name, and where the object is."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.focus.run_lengths import plain_run_lengths
from sar_fast.lab.focus.samples import GroundingSample, picture_hash
from sar_fast.lab.io.datasets import (
    DEFAULT_DIR,
    REGISTRY_NAME,
    check_media_dir,
    find_file,
    is_file_name,
    load_registry,
)
from sar_fast.lab.io.pictures import PictureError, find_picture
from sar_fast.lab.io.records import check_text, read_rows
from sar_fast.lab.io.stamps import content_stamp, file_stamp, stamp

NEEDED = ("image", "query", "object_prompt")
OPTIONAL = ("bbox", "mask", "segmentation", "label", "id")


@dataclasses.dataclass(frozen=True)
class GroundingDataset:
    """Samples of an analysis, and what their dataset is called; None for samples that the caller has."""

    samples: Sequence[GroundingSample]
    name: str | None = None

    @classmethod
    def find(
        cls,
        samples: Sequence[GroundingSample] | str | Path,
        dataset_dir: str | Path | None = None,
        media_dir: str | Path | None = None,
        limit: int | None = None,
    ) -> GroundingDataset:
        """The caller's samples, or those of a dataset by its name or file (:func:`load_grounding_samples`).

        ``ArgumentError`` for an argument that is none of these, samples of one id, a ``limit`` that leaves none.
        """
        if limit is not None and limit < 1:
            raise ArgumentError("max_samples", limit, "be at least 1")
        if isinstance(samples, (str, Path)):
            return cls(load_grounding_samples(str(samples), dataset_dir, media_dir, limit), str(samples))
        for name, value in (("dataset_dir", dataset_dir), ("media_dir", media_dir)):
            if value is not None:
                raise ArgumentError(name, value, "be left out where {samples} is no name of a dataset")
        if not isinstance(samples, Sequence) or not all(isinstance(s, GroundingSample) for s in samples):
            kinds = sorted({type(s).__name__ for s in samples}) if isinstance(samples, Sequence) else []
            came = f"{type(samples).__name__}{(kinds and ' of ' + ', '.join(kinds)) or ''}"
            raise ArgumentError("samples", came, "be a sequence of GroundingSample, or a dataset's name or file")
        taken = samples[:limit]
        if not taken:
            raise ArgumentError("samples", "none", "be at least one GroundingSample")
        if twice := [i for i, count in Counter(s.id for s in taken).items() if count > 1]:
            raise ArgumentError("samples", f"{twice[0]!r} twice", "be of different ids")
        return cls(taken)

    def settings(self) -> dict[str, Any]:
        """What tells it from others, as plain values (:func:`dataset_settings`)."""
        return dataset_settings(self.name, self.samples)


def load_grounding_samples(
    name: str, dataset_dir: str | Path | None, media_dir: str | Path | None = None, limit: int | None = None
) -> list[GroundingSample]:
    """Samples of a dataset by its name in ``dataset_dir/dataset_info.json``, or of a file; pictures are not decoded.

    Columns: ``image`` (a path, encoded bytes, or an object with ``bytes`` or ``path``), ``query``, ``object_prompt``;
    then ``bbox`` (x1, y1, x2, y2 in pixels), ``mask`` (an encoded picture, non-zero = object) or ``segmentation``
    (COCO's: polygons of x, y, ... in pixels, or run lengths ``{"size", "counts"}``; either column takes either form),
    ``label`` (default: the object's name), ``id`` (default: the row's number).
    The registry's ``columns`` may give a column another name. ``dataset_dir`` None: the registry is that of
    ``experiments/data``, and a file is where its path says. Relative paths of pictures start from ``media_dir``, by
    default the file's folder. ``limit`` takes the first rows.

    Raises:
        ValueError: an unknown name, a ``media_dir`` that is no folder, a row without a needed column or with a wrong
            value in one, two rows of one id.
        FileNotFoundError: no registry, or no file.
    """
    check_media_dir(media_dir)
    path, columns = _find(name, Path(dataset_dir) if dataset_dir is not None else None)
    media = Path(media_dir) if media_dir is not None else path.parent
    samples: dict[str, GroundingSample] = {}
    for number, row in read_rows(path):
        if limit is not None and number >= limit:
            break
        place = f"{path}, row {number}"
        sample = to_sample(row, number, place, columns, media)
        if sample.id in samples:
            raise ValueError(f"{place}: id {sample.id!r} occurs twice")
        samples[sample.id] = sample
    if not samples:
        raise ValueError(f"dataset {name!r}: {path} has no rows")
    return list(samples.values())


def to_sample(row: Any, number: int, place: str, columns: Mapping[str, str], media: Path) -> GroundingSample:
    """One row as a sample; ``ValueError`` begins with ``place`` and says what is wrong. Pictures are not decoded."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is a {type(row).__name__}, needed an object")
    missing = [c for c in NEEDED if row.get(columns.get(c, c)) is None]
    if missing:
        raise ValueError(f"{place}: no {', '.join(missing)}; it has {', '.join(row)}")
    return _sample({c: row.get(columns.get(c, c)) for c in (*NEEDED, *OPTIONAL)}, str(number), place, media)


def dataset_settings(name: str | None, samples: Sequence[GroundingSample]) -> dict[str, Any]:
    """What tells a dataset from others, as plain values: its name, size, and a hash of what it asks.

    Pictures and masks count by their bytes, whether they lie in the table or in files; each file is read once. Those
    in memory count by their values.
    """
    files: dict[Path, str | None] = {}

    def content(value: Any) -> Any:
        if isinstance(value, Path):
            if value not in files:
                files[value] = file_stamp(value) if value.is_file() else None
            return files[value]
        if isinstance(value, Image.Image):
            return picture_hash(value)
        if isinstance(value, np.ndarray):
            return [value.shape, str(value.dtype), content_stamp(np.ascontiguousarray(value).tobytes())]
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Mapping):
            return {name: content(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return [content(part) for part in value]
        return content_stamp(value) if isinstance(value, bytes) else value

    picture = lambda s: Path(s.picture) if isinstance(s.picture, str) else s.picture
    shown = ((content(value) for value in (s.bbox, s.mask, picture(s))) for s in samples)
    asked = [(s.id, s.query, s.object_prompt, s.label, *values) for s, values in zip(samples, shown)]
    return {"dataset": name, "samples": len(samples), "asked": stamp(asked)}


def _find(name: str, dataset_dir: Path | None) -> tuple[Path, Mapping[str, str]]:
    needed = f"needed its columns {', '.join(NEEDED)}, bbox"
    if is_file_name(name):
        try:
            return find_file(name, dataset_dir), {}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {needed}") from error
    folder = dataset_dir or DEFAULT_DIR
    entries = load_registry(folder)
    if name not in entries:
        raise ValueError(f"dataset {name!r} is not in {folder / REGISTRY_NAME}; known: {', '.join(entries)}")
    if "file_name" not in entries[name]:
        raise ValueError(f"dataset {name!r} has no file_name; download it and name its file")
    path, columns = folder / entries[name]["file_name"], entries[name].get("columns", {})
    unknown = sorted(set(columns) - {*NEEDED, *OPTIONAL})
    if unknown:
        raise ValueError(f"dataset {name!r}: columns may name {', '.join((*NEEDED, *OPTIONAL))}; got {unknown}")
    if not path.is_file():
        raise FileNotFoundError(f"dataset {name!r}: {path} does not exist; {needed}")
    return path, columns


def _sample(row: Mapping[str, Any], number: str, place: str, media: Path) -> GroundingSample:
    for column in ("query", "object_prompt"):
        if not isinstance(row[column], str) or not row[column].strip():
            raise ValueError(f"{place}: {column} is {row[column]!r}, needed words")
        check_text(row[column], f"{place}: {column}")
    box = row["bbox"]
    if box is not None and (not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_finite, box))):
        raise ValueError(f"{place}: bbox is {box!r}, needed four numbers x1, y1, x2, y2 in pixels")
    try:
        picture = find_picture(row["image"], media)
    except PictureError as error:
        raise ValueError(f"{place}: image {error}") from error
    column = "segmentation" if row["mask"] is None else "mask"
    return GroundingSample(
        id=number if row["id"] is None else check_text(str(row["id"]), f"{place}: id"),
        picture=picture,
        query=row["query"].strip(),
        object_prompt=row["object_prompt"].strip(),
        bbox=box,
        mask=_mask(row[column], f"{place}: {column}", media),
        label=row["object_prompt"].strip() if row["label"] is None else str(row["label"]),
    )


def _mask(value: Any, place: str, media: Path) -> bytes | list | Mapping | None:
    """A mask as :class:`GroundingSample` takes it; ``ValueError`` for what is none, and for a file that is missing."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, Mapping) and not {"size", "counts"}.isdisjoint(value):
        return plain_run_lengths(value, place)
    try:
        file = find_picture(value, media)
    except PictureError as error:
        raise ValueError(f"{place} {error}; or polygons, or run lengths with size and counts") from error
    try:
        return file.read_bytes() if isinstance(file, Path) else file
    except OSError as error:
        raise ValueError(f"{place} file {file} cannot be read: {error.strerror}") from error


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
