"""Models on disk: their weight files, with the permissions of any other file, whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHOLE_WEIGHTS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def whole_weights(folder: Path) -> list[Path]:
    """A whole model's files of weights in a folder."""
    return sorted(file for pattern in WHOLE_WEIGHTS for file in folder.glob(pattern))


def adapter_weights(folder: Path) -> list[Path]:
    """An adapter's files of weights in a folder."""
    return [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]


def open_to_readers(folder: Path) -> None:
    """Gives the weights in a folder the mode that any new file gets: safetensors writes them for the owner alone."""
    give_usual_mode(*whole_weights(folder), *adapter_weights(folder))


def give_usual_mode(*files: Path) -> None:
    """Gives files the mode that any new file gets."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in files:
        file.chmod(0o666 & ~mask)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into; it takes the place of ``path`` at the end, and is gone after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (partial / "new").mkdir()  # unlike the temporary folder it has the usual mode
        yield partial / "new"
        if path.exists():
            path.rename(partial / "old")
        try:
            (partial / "new").rename(path)
        except OSError:
            if (partial / "old").exists():
                (partial / "old").rename(path)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
