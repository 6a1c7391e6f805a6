"""What tells data and weights from others that lay in the same place: short hashes of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

BLOCK = 1 << 16  # bytes
BLOCKS = 256
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.bin",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


def stamp(facts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def content_stamp(content: bytes) -> str:
    """A short hash of bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def file_stamp(path: Path) -> str:
    """A short hash of all bytes of a file, about a second per gigabyte; whatever its name and times."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK * 16):
            digest.update(block)
    return digest.hexdigest()


def sampled_stamp(path: Path) -> str:
    """A short hash of a file of weights: its size and content; of more than 16 MiB, 256 blocks of 64 KiB spread evenly.

    The first and the last block are among them, so a safetensors header is.
    """
    size = path.stat().st_size
    if size <= BLOCK * BLOCKS:
        return file_stamp(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def model_stamp(folder: Path) -> str:
    """A hash of a model's folder: its weights, configuration, tokenizer and processor. Other files do not count."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and any(fnmatch(f.name, p) for p in MODEL_FILES))
    return stamp([(f.name, sampled_stamp(f)) for f in files])


def files_stamp(paths: Iterable[Path]) -> str:
    """A hash of what several files hold, in their order; a missing one counts as such."""
    return stamp([file_stamp(path) if path.is_file() else None for path in paths])
