"""COCO's run lengths of a mask: lengths of runs of 0 and of 1 in turn, down the columns, as numbers or as a text.

In the text a number is one or more characters, each less 48 holding five bits, the low ones first; 32 says that more
follow, and 16 in the last one that the number is negative. From the fourth run on a number is the difference to the
length of two runs before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

FIRST, BITS, MORE, SIGN = 48, 5, 32, 16
LEAD = 3  # runs that are written as they are


def plain_run_lengths(value: Mapping[str, Any], place: str) -> dict[str, Any]:
    """``{"size": [height, width], "counts": numbers or text}``; ``ValueError`` begins with ``place``."""
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_count(side) and side for side in size):
        raise ValueError(f"{place}: size is {size!r}, needed [height, width] in pixels")
    if isinstance(counts, bytes):
        counts = counts.decode("latin-1")  # byte for byte: what stands for no number is found in decoding
    numbers = isinstance(counts, (list, tuple)) and all(map(_is_count, counts))
    if not numbers and not isinstance(counts, str):
        raise ValueError(f"{place}: counts is {str(counts)[:40]!r}, needed run lengths >= 0, or their text")
    return {"size": list(size), "counts": counts if isinstance(counts, str) else list(counts)}


def decode_run_lengths(mask: Mapping[str, Any]) -> np.ndarray:
    """(height, width) bool of a mask in run lengths; ``ValueError`` if they do not make up its size."""
    mask = plain_run_lengths(mask, "mask")
    (height, width), counts = mask["size"], mask["counts"]
    runs = _read_text(counts) if isinstance(counts, str) else counts
    if sum(runs) != height * width or min(runs) < 0:
        wrong = f"make up {sum(runs)} pixels" if sum(runs) != height * width else "have a negative one"
        raise ValueError(f"run lengths {wrong}, needed {height} x {width} (height, width), as their size says")
    ones = np.arange(len(runs)) % 2 == 1
    return np.repeat(ones, runs).reshape(width, height).T


def _read_text(text: str) -> list[int]:
    runs: list[int] = []
    number = shift = 0
    for character in text:
        code = ord(character) - FIRST
        if not 0 <= code < 2 * MORE:
            raise ValueError(f"the text of the run lengths has {character!r}, which stands for no number")
        number |= (code & (MORE - 1)) << shift
        shift += BITS
        if code & MORE:
            continue
        number -= (1 << shift) if code & SIGN else 0
        runs.append(number + (runs[-2] if len(runs) >= LEAD else 0))
        number = shift = 0
    if shift:
        raise ValueError("the text of the run lengths ends within a number")
    return runs


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
