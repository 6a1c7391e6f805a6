"""Attention maps over pictures, and the two scores of them: semantic focus and focus instability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.extras import need
from sar_fast.lab.focus.grids import TokenGrid
from sar_fast.lab.focus.samples import SMALLEST_SIDE

SSIM_WINDOW = 7  # pixels; scikit-image's default


def attention_map(values: Tensor | np.ndarray, grids: Sequence[TokenGrid], size: tuple[int, int]) -> np.ndarray:
    """Attention of visual tokens as a distribution over the pixels of their picture.

    Every grid is resized bicubically to its region, what the cubic undershoots below 0 is cut off, and the grid keeps
    the share of the attention that its tokens have; then the whole sums to 1.

    Args:
        values: (V,) attention >= 0 of one query over the picture's visual tokens.
        grids: where they lie. size: (width, height) of the picture.

    Returns:
        (height, width) fp64, sum 1.

    Raises:
        ValueError: ``values`` holds a negative or non-finite entry, or nothing falls on the picture.
    """
    values = np.asarray(values.detach().to("cpu").float() if isinstance(values, Tensor) else values, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ArgumentError(
            "values", f"{values.min():g} to {values.max():g}", "be finite and >= 0: attention after the softmax"
        )
    width, height = size
    total = np.zeros((height, width))
    for grid in grids:
        field = values[grid.index]
        x1, y1, x2, y2 = grid.region
        fine = Image.fromarray((field / max(field.max(), 1e-30)).astype(np.float32))
        fine = np.asarray(fine.resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC), dtype=np.float64).clip(0)
        fine *= field.sum() / max(fine.sum(), 1e-30)
        top, left = max(y1, 0), max(x1, 0)
        inside = fine[top - y1 : height - y1, left - x1 : width - x1]  # a region may reach beyond the picture
        total[top : top + inside.shape[0], left : left + inside.shape[1]] += inside
    if not total.sum() > 0:
        raise ArgumentError("values", "none", "put attention on the picture")
    return total / total.sum()


def semantic_focus(attention: np.ndarray, mask: np.ndarray) -> float:
    """SFS: the share of ``attention`` (height, width), which sums to 1, inside ``mask`` (height, width) bool."""
    if attention.shape != mask.shape:
        raise ArgumentError("mask", mask.shape, f"have the picture's shape {attention.shape}")
    if mask.dtype != np.bool_:
        raise ArgumentTypeError("mask", mask.dtype, "be bool")
    if not mask.any():
        raise ArgumentError("mask", "an empty one", "have a pixel to focus on")
    return float(attention[mask].sum())


def structural_similarities(attention: np.ndarray, others: Sequence[np.ndarray]) -> list[float]:
    """SSIM of ``attention`` (height, width) to each of ``others``, in [-1, 1], by scikit-image.

    The data range of a pair is the larger of the two peaks, so that SSIM's constants scale with the maps.
    """
    need("focus instability", "skimage")
    from skimage.metrics import structural_similarity

    side = min(attention.shape)
    if side < SMALLEST_SIDE:
        height, width = attention.shape
        raise ArgumentError(
            "attention", f"{width} x {height}", f"have {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels or more for SSIM"
        )
    window = min(SSIM_WINDOW, side - 1 + side % 2)
    return [
        float(structural_similarity(attention, other, data_range=max(attention.max(), other.max()), win_size=window))
        for other in others
    ]


def focus_instability(attention: np.ndarray, paraphrases: Sequence[np.ndarray]) -> float:
    """FI: 1 - mean SSIM of ``attention`` to the maps of the paraphrases; 0 for identical maps."""
    if not paraphrases:
        raise ArgumentError("paraphrases", "none", "be one or more: focus instability compares at least two prompts")
    return 1.0 - float(np.mean(structural_similarities(attention, paraphrases)))
