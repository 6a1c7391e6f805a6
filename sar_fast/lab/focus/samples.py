"""What focus is measured on: pictures with a query and the object that it is about, and where that object is."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.focus.run_lengths import decode_run_lengths
from sar_fast.lab.io.pictures import PictureError, open_mask, open_picture, picture_name, shown_size
from sar_fast.lab.io.skips import (
    BOX_FRACTIONS,
    BOX_OUTSIDE,
    NO_BOX_AREA,
    UNREADABLE,
    SampleSkipped,
)

NOTHING_GROUNDED = "nothing grounded"
EMPTY_MASK = "empty mask"
BAD_MASK = "unreadable mask"
MASK_SHAPE = "mask of another shape than its picture"
TOO_SMALL = "picture too small for SSIM"
SMALLEST_SIDE = 3  # pixels: SSIM compares windows, and the smallest has a middle and its neighbours


@dataclasses.dataclass(frozen=True)
class GroundingSample:
    """One picture, what is asked about it, and where the object of the question is.

    Attributes:
        id: unique in its dataset. picture: a Pillow image, an encoded file's bytes, or its path.
        query: the prompt's words. object_prompt: the object's name, for templates and the grounding model.
        bbox: (x1, y1, x2, y2) of the object in pixels of the picture as it is shown, or None. mask: (height, width) of
            it, non-zero = object; an encoded picture of that (:func:`~.io.pictures.open_mask`); or COCO's polygons
            of x, y, x, y, ... in pixels, or its run lengths ``{"size": [height, width], "counts": ...}``. label: its
            class.
    """

    id: str
    picture: Image.Image | bytes | str | Path
    query: str
    object_prompt: str = ""
    bbox: Sequence[float] | None = None
    mask: np.ndarray | bytes | list | Mapping | None = None
    label: str | None = None

    @property
    def image(self) -> Image.Image:
        """The picture as shown, mode RGB, decoded anew every time; :class:`SampleSkipped` if it cannot be read."""
        return self._read(open_picture)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture as shown, from the file's header where its format allows it."""
        return self._read(shown_size)

    @property
    def picture_key(self) -> str:
        """Equal for samples of one dataset that share a picture."""
        if isinstance(self.picture, (str, Path)):
            return str(self.picture)
        if isinstance(self.picture, bytes):
            return hashlib.sha256(self.picture).hexdigest()
        return self._read(picture_hash)

    def _read(self, how: Callable[[Any], Any]) -> Any:
        try:
            return how(self.picture)
        except PictureError as error:
            named = isinstance(self.picture, (str, Path))
            raise SampleSkipped(
                UNREADABLE, f"{picture_name(self.picture)} {error}" if named else error.reason
            ) from error


class MaskSource(Protocol):
    """Where masks come from."""

    def describe(self) -> dict[str, Any]:
        """Plain values for the run's metadata; equal descriptions give equal masks."""

    def mask(self, sample: GroundingSample) -> np.ndarray:
        """(height, width) bool with at least one pixel set; raises :class:`SampleSkipped`."""

    def note(self, sample: GroundingSample) -> str | None:
        """What to know of the mask that was made for a sample, listed in the results; None if there is nothing."""
        return None


class DatasetMasks(MaskSource):
    """The dataset's own: a sample's mask, or else its box."""

    def describe(self) -> dict[str, Any]:
        return {"source": "dataset"}

    def mask(self, sample: GroundingSample) -> np.ndarray:
        if sample.mask is not None:
            return check_mask(decode_mask(sample.mask, sample.size), sample.size)
        if sample.bbox is None:
            raise ValueError(
                f"sample {sample.id}: the dataset has neither mask nor bbox, needed one of them or a grounding model"
            )
        return box_mask(sample.bbox, sample.size)


def decode_mask(mask: np.ndarray | bytes | list | Mapping, size: tuple[int, int]) -> np.ndarray:
    """A mask in any of the forms of :class:`GroundingSample`, as an array; ``size`` is the picture's, for polygons.

    Raises :class:`SampleSkipped` for bytes that are no picture, polygons of less than three corners or in fractions of
    the picture, and run lengths that do not make up their size.
    """
    if isinstance(mask, Mapping):
        try:
            return decode_run_lengths(mask)
        except ValueError as error:
            raise SampleSkipped(BAD_MASK, str(error)) from error
    if isinstance(mask, bytes):
        try:
            return open_mask(mask)
        except PictureError as error:
            raise SampleSkipped(BAD_MASK, error.reason) from error
    if isinstance(mask, list):
        drawn = Image.new("1", size)
        for polygon in mask if mask and isinstance(mask[0], (list, tuple)) else [mask]:
            if len(polygon) < 6 or len(polygon) % 2:
                raise SampleSkipped(
                    BAD_MASK, f"a polygon needs x, y of three corners or more; got {len(polygon)} numbers"
                )
            try:
                corners = [float(v) for v in polygon]
            except (TypeError, ValueError) as error:
                raise SampleSkipped(BAD_MASK, f"a polygon holds what is no number: {error}") from error
            if not all(map(math.isfinite, corners)):
                raise SampleSkipped(BAD_MASK, f"a polygon holds what is not finite: {corners[:6]}")
            if max(corners) <= 1 < max(size):
                raise SampleSkipped(BAD_MASK, f"a polygon in fractions of the picture, needed pixels: {corners[:6]}")
            ImageDraw.Draw(drawn).polygon(corners, fill=1)
        return np.asarray(drawn)
    return mask


def check_size(picture: Image.Image) -> Image.Image:
    """The picture; :class:`SampleSkipped` if a side is shorter than SSIM's smallest window."""
    width, height = picture.size
    if min(width, height) < SMALLEST_SIDE:
        raise SampleSkipped(
            TOO_SMALL, f"needed {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more; got {width} x {height}"
        )
    return picture


def check_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask as bool; :class:`SampleSkipped` for another shape than the picture's, and if it is empty."""
    mask = np.asarray(mask)
    if mask.shape != size[::-1]:
        raise SampleSkipped(MASK_SHAPE, f"needed (height, width) = {size[::-1]} as its picture; got {mask.shape}")
    mask = mask.astype(bool)
    if not mask.any():
        raise SampleSkipped(EMPTY_MASK)
    return mask


def box_mask(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: pixels whose centre is in the box (x1, y1, x2, y2); what lies beyond the picture is cut.

    Raises :class:`SampleSkipped` for a box without area, outside the picture, or between pixel centres.
    """
    width, height = size
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        raise ArgumentError("bbox", list(box), "be four finite numbers x1, y1, x2, y2 in pixels")
    x1, y1, x2, y2 = map(float, box)
    if problem := box_problem(box, size):
        raise SampleSkipped(problem, f"{[x1, y1, x2, y2]} in {width} x {height}")
    x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
    mask = ((y >= y1) & (y < y2))[:, None] & ((x >= x1) & (x < x2))[None]
    if not mask.any():
        raise SampleSkipped(EMPTY_MASK, f"{[x1, y1, x2, y2]} holds no pixel centre")
    return mask


def box_problem(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """Why (x1, y1, x2, y2) cannot be a box in pixels of a picture, as one of this module's reasons; None if it can."""
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        return NO_BOX_AREA
    if x2 <= 0 or y2 <= 0 or x1 >= size[0] or y1 >= size[1]:
        return BOX_OUTSIDE
    return BOX_FRACTIONS if max(x2, y2) <= 1 < max(size) else None  # nobody annotates the first pixel


def picture_hash(picture: Image.Image) -> str:
    """Hash of a picture's size and RGB values as shown, the same for equal pixels whatever file they came from."""
    picture = open_picture(picture)
    digest = hashlib.sha256(repr(picture.size).encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:32]
