"""``dataset_info.json``: names of datasets, as LLaMA-Factory writes them."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.records import SUFFIXES, Layout
from sar_fast.lab.io.stamps import file_stamp

REGISTRY_NAME = "dataset_info.json"
DEFAULT_DIR = Path(__file__).parents[3] / "experiments" / "data"
SUPPORTED_KEYS = ("file_name", "hf_hub_url", "subset", "split", "formatting", "columns", "tags", "num_samples")


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """One dataset: the files it is made of, a hub id, or rows in memory; and how its rows are laid out.

    ``media_dir`` is what relative image paths start from; ``num_samples`` keeps that many rows, the first ones.
    """

    name: str
    files: tuple[Path, ...]
    layout: Layout
    media_dir: Path
    hub_id: str | None = None
    subset: str | None = None
    split: str = "train"
    num_samples: int | None = None
    rows: tuple[Mapping[str, Any], ...] = ()

    @property
    def content(self) -> tuple[str, ...]:
        """A hash of each file, as it is now."""
        return tuple(file_stamp(path) for path in self.files)


def find_datasets(
    names: str, dataset_dir: Path | None, media_dir: Path | None = None, max_samples: int | None = None
) -> list[DatasetInfo]:
    """Datasets by comma-separated names of ``dataset_dir/dataset_info.json``, or by paths of files.

    ``dataset_dir`` None: the registry is that of ``experiments/data``, and files are where their paths say
    (:func:`find_file`). ``max_samples`` limits each of the datasets.

    Raises:
        ValueError: an unknown name (with the nearest known one), an entry that asks for what is not supported, a
            ``media_dir`` that is no folder.
        FileNotFoundError: no registry, or an entry whose file is not there.
    """
    wanted = split_names(names)
    folder = dataset_dir or DEFAULT_DIR
    if not wanted:
        raise ArgumentError("dataset", repr(names), f"be names of {folder / REGISTRY_NAME}, or files")
    check_media_dir(media_dir)
    found = [
        _file(find_file(name, dataset_dir), media_dir)
        if is_file_name(name)
        else _entry(name, load_registry(folder), folder, media_dir)
        for name in wanted
    ]
    if max_samples is None:
        return found
    limits = [max_samples if info.num_samples is None else min(max_samples, info.num_samples) for info in found]
    return [dataclasses.replace(info, num_samples=limit) for info, limit in zip(found, limits)]


def check_media_dir(media_dir: str | Path | None) -> None:
    """``ValueError`` if pictures are to be found in a folder that is none."""
    if media_dir is not None and not Path(media_dir).is_dir():
        raise ArgumentError("media_dir", repr(str(media_dir)), "be a folder")


def split_names(names: str | None) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def is_file_name(name: str) -> bool:
    """Whether a dataset's name is that of a file, not of an entry in a registry."""
    return Path(name).suffix in SUFFIXES


def find_file(name: str, dataset_dir: Path | None) -> Path:
    """A dataset's file: a relative path starts from ``dataset_dir``, from the working directory if that is None."""
    path = dataset_dir / name if dataset_dir is not None else Path(name)
    if not path.is_file():
        here = f"; {name} exists, but paths start from dataset_dir: leave that out" if Path(name).is_file() else ""
        raise FileNotFoundError(f"dataset file {path} does not exist{here}")
    return path


def load_registry(dataset_dir: Path) -> dict[str, dict[str, Any]]:
    """The entries of ``dataset_dir/dataset_info.json``."""
    path = dataset_dir / REGISTRY_NAME
    if not path.is_file():
        raise FileNotFoundError(f"dataset_dir is {dataset_dir}, which has no {REGISTRY_NAME}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} holds a {type(entries).__name__}, needed an object of datasets by name")
    return entries


def _file(path: Path, media_dir: Path | None) -> DatasetInfo:
    return DatasetInfo(path.stem, (path,), Layout(), media_dir or path.parent)


def _entry(name: str, entries: dict[str, dict], dataset_dir: Path, media_dir: Path | None) -> DatasetInfo:
    if name not in entries:
        near = difflib.get_close_matches(name, entries, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ArgumentError(
            "dataset", f"{name!r}{hint}", f"be names in {dataset_dir / REGISTRY_NAME} ({', '.join(entries)}) or files"
        )
    entry = entries[name]
    unsupported = sorted(set(entry) - set(SUPPORTED_KEYS))
    if unsupported:
        raise ValueError(
            f"dataset {name!r}: {', '.join(unsupported)} not supported; known: {', '.join(SUPPORTED_KEYS)}"
        )
    count = entry.get("num_samples")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"dataset {name!r}: num_samples must be a whole number, at least 1; got {count!r}")
    layout = Layout(entry.get("formatting", "alpaca"), entry.get("columns", {}), entry.get("tags", {}))
    shared = {
        "layout": layout,
        "media_dir": media_dir or dataset_dir,
        "subset": entry.get("subset"),
        "split": entry.get("split", "train"),
        "num_samples": count,
    }
    if "hf_hub_url" in entry:
        return DatasetInfo(name, (), hub_id=entry["hf_hub_url"], **shared)
    if "file_name" not in entry:
        raise ValueError(f"dataset {name!r} has neither file_name nor hf_hub_url")
    path = dataset_dir / entry["file_name"]
    files = tuple(sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"dataset {name!r}: {path} does not exist or holds no {', '.join(SUFFIXES)} file")
    return DatasetInfo(name, files, **shared)
