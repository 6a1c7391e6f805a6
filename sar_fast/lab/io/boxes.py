"""Boxes in words: how model families write them, and what they mean in pixels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from sar_fast.base.errors import ArgumentError

BOX_BINS = 16  # of the miniature's boxes

Box = tuple[float, float, float, float]
Size = Sequence[int]
Corners = Callable[[float, float, float, float], Box]

NUMBER = r"(-?\d+(?:\.\d+)?)"
GAP = r"[\s,()\[\]]+"
BRACKETED = re.compile(r"[(\[]\s*" + GAP.join([NUMBER] * 4))
LOCATIONS = re.compile(r"<loc(\d{4})>" * 4)
DESCRIBE = "Please provide the bounding box coordinate of the region this sentence describes: {}"


@dataclasses.dataclass(frozen=True)
class BoxFormat:
    """How boxes are asked for and read.

    Attributes:
        prompt: with ``{}`` for the expression.
        pattern: finds four numbers in a reply, in the order that ``order`` gives as indices of (x1, y1, x2, y2).
        scale: (image size, frame) -> (width, height) in pixels of the picture per unit of the numbers, and the pixels
            that the origin is shifted by.
    """

    prompt: str
    pattern: re.Pattern[str]
    scale: Callable[[Size, Size | None], tuple[tuple[float, float], tuple[float, float]]]
    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    offset: float = 0.0  # added to every number first: half a bin where numbers are bins

    def read(self, reply: str, size: Size, frame: Size | None, corners: Corners | None = None) -> Box | None:
        """The first box of a reply in pixels of the picture, None if there is none of positive size.

        ``corners`` makes (x1, y1, x2, y2) of the numbers, where they are something else.
        """
        found = self.pattern.search(reply)
        if found is None:
            return None
        numbers = [float(found[1 + index]) + self.offset for index in self.order]
        numbers = numbers if corners is None else corners(*numbers)
        (width, height), (left, top) = self.scale(size, frame)
        x1, y1, x2, y2 = (v * s - o for v, s, o in zip(numbers, (width, height) * 2, (left, top) * 2))
        return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _per(parts: float) -> Callable[[Size, Size | None], tuple[tuple[float, float], tuple[float, float]]]:
    return lambda size, frame: ((size[0] / parts, size[1] / parts), (0.0, 0.0))


def _as_they_are(size: Size, frame: Size | None) -> tuple[tuple[float, float], tuple[float, float]]:
    return (1.0, 1.0), (0.0, 0.0)


def _square(size: Size, frame: Size | None) -> tuple[tuple[float, float], tuple[float, float]]:
    """The picture is in the middle of a square as long as its longer side."""
    side = max(size)
    return (side, side), ((side - size[0]) / 2, (side - size[1]) / 2)


def _frame(size: Size, frame: Size | None) -> tuple[tuple[float, float], tuple[float, float]]:
    if frame is None:
        raise ArgumentError(
            "box_format",
            "resized_pixels",
            "be another one for a model whose processor does not report the resized picture's grid",
        )
    return (size[0] / frame[0], size[1] / frame[1]), (0.0, 0.0)


FORMATS = {
    # the prompt of lmms-eval's bbox_rec tasks
    "fraction": BoxFormat(
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y)."
        " All values are floating point numbers bounded between 0 and 1. " + DESCRIBE,
        BRACKETED,
        _per(1),
    ),
    "square_fraction": BoxFormat(DESCRIBE, BRACKETED, _square),
    "percent": BoxFormat(DESCRIBE, BRACKETED, _per(100)),
    "thousandths": BoxFormat(DESCRIBE, BRACKETED, _per(1000)),
    "pixels": BoxFormat(DESCRIBE, BRACKETED, _as_they_are),
    "resized_pixels": BoxFormat(
        "Locate {} in this image and output its bounding box coordinates in JSON format.", BRACKETED, _frame
    ),
    "qwen3": BoxFormat(
        "Locate {} in this image and output its bounding box coordinates in JSON format.", BRACKETED, _per(1000)
    ),
    "internvl": BoxFormat(DESCRIBE.format("<ref>{}</ref>"), BRACKETED, _per(1000)),
    "paligemma": BoxFormat("detect {}", LOCATIONS, _per(1024), order=(1, 0, 3, 2)),
    "miniature": BoxFormat(
        "Give the box of the {}.", re.compile(r"^\s*" + r"\s+".join([r"(\d+)"] * 4)), _per(BOX_BINS), offset=0.5
    ),
}
NEED_FRAMES = ("resized_pixels",)


def choose_format(name: str | None, model_type: str) -> str:
    """The name of a format: the one asked for, or the family's; fractions of the picture where none is known."""
    if name is None:
        from sar_fast.hf.families import known_family  # records' boxes are read without torch

        family = known_family(model_type)
        return "fraction" if family is None else family.box_formats.get(model_type, "fraction")
    if name not in FORMATS:
        raise ArgumentError("box_format", repr(name), f"be one of {', '.join(FORMATS)}")
    return name


def box_iou(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Intersection over union, 0 to 1 in fp64, of boxes (..., 4) as (x1, y1, x2, y2), broadcast; a box whose corners
    are the wrong way round has no area."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    area = lambda low, high: np.maximum(high - low, 0).prod(-1)
    overlap = area(np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - overlap
    return overlap / np.maximum(union, np.finfo(np.float64).tiny)
