"""Attention on pictures: from one value per visual token to a heat overlay on what the model saw."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sar_fast.base.errors import ArgumentError
from sar_fast.lab.io.pictures import open_picture

COLOURMAP = "inferno"
LEAST_OPACITY, MOST_OPACITY = 0.25, 0.85  # of the heat; the picture stays visible under its peak


def head_average(rows: Tensor, head_weights: Tensor | None = None) -> Tensor:
    """Mean over heads of attention rows, weighted by the size of the factors that the heads' outputs get.

    Args:
        rows: (H, V) attention of one query over its visual keys.
        head_weights: (H,) c of any sign; all 0 leaves nothing, zeros. None weighs all heads alike.

    Returns:
        (V,) in the units of ``rows``: the share of the query's attention that each visual token receives.
    """
    if head_weights is None:
        return rows.mean(0)
    size = head_weights.abs()
    return (size[:, None] * rows).sum(0) / torch.where(size.sum() > 0, size.sum(), 1)


def visual_grid(inputs: Mapping[str, Tensor], visual_tokens: int, merge_size: int = 1) -> tuple[int, int]:
    """(rows, columns) that the visual tokens of a one-image prompt form, in reading order.

    Args:
        inputs: what the processor made; ``image_grid_thw`` (1, 3) in it counts patches before merging.
        visual_tokens: number of visual tokens in the prompt.
        merge_size: patches per side that one visual token stands for.

    Raises:
        ValueError: the tokens are not one rectangle (tiles, newline tokens, several images).
    """
    if "image_grid_thw" in inputs:
        grids = inputs["image_grid_thw"].tolist()
        rows, columns = grids[0][1] // merge_size, grids[0][2] // merge_size
        if len(grids) == 1 and rows * columns == visual_tokens:
            return rows, columns
    elif math.isqrt(visual_tokens) ** 2 == visual_tokens and visual_tokens > 0:
        return math.isqrt(visual_tokens), math.isqrt(visual_tokens)
    raise ArgumentError("visual_tokens", f"{visual_tokens} of this prompt", "form one rectangle of the picture")


def seen_region(image_processor: object, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box (x1, y1, x2, y2), in pixels of a picture of ``size`` (width, height), that survives the processor's
    centre crop; all of the picture if it crops nothing."""
    width, height = size
    crop = getattr(image_processor, "crop_size", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop:
        return 0, 0, width, height
    target = image_processor.size
    if target.get("shortest_edge"):
        scale_x = scale_y = target["shortest_edge"] / min(width, height)
    else:
        scale_x, scale_y = target["width"] / width, target["height"] / height
    w, h = min(crop["width"] / scale_x, width), min(crop["height"] / scale_y, height)
    left, top = (width - w) / 2, (height - h) / 2
    return round(left), round(top), round(left + w), round(top + h)


def heat_overlay(picture: Image.Image, values: np.ndarray, peak: float) -> Image.Image:
    """``values`` (rows, columns) >= 0 as heat over the picture that they cover, colours from 0 to ``peak``.

    Pictures that shall be compared get the same ``peak``. ``ValueError`` unless peak is positive.
    """
    from matplotlib import colormaps

    if not peak > 0:
        raise ArgumentError("peak", peak, "be positive")
    picture = open_picture(picture)
    field = Image.fromarray(np.asarray(values, dtype=np.float32) / peak)
    strength = np.asarray(field.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    heat = colormaps[COLOURMAP](strength[..., 0])[..., :3]
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    opacity = LEAST_OPACITY + (MOST_OPACITY - LEAST_OPACITY) * strength
    return Image.fromarray(np.rint(255 * ((1 - opacity) * grey + opacity * heat)).astype(np.uint8))


def share_on_mask(values: np.ndarray, mask: np.ndarray) -> float:
    """Share of ``values`` (rows, columns) that falls on ``mask`` (height, width) bool, each token spread evenly over
    the pixels that it covers. A uniform map gets the mask's share of the picture, zeros get 0."""
    covered = Image.fromarray(mask.astype(np.float32)).resize(values.shape[::-1], Image.Resampling.BOX)
    return float((values * np.asarray(covered)).sum() / (values.sum() or 1))


def grid_of(row: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """(V,) as (rows, columns) float32."""
    return row.detach().to("cpu", torch.float32).reshape(grid).numpy()
