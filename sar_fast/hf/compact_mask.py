"""Masks in which every query sees one run of keys, in a form that transformers carries: (B or 1, 1, S, 2) int32.

Row i is ``(first, end)``: query i sees the keys ``first <= key < end``, counted from the first key that its layer gets,
in packed rows from the first key of the query's own sequence. Padding is in them: hidden keys lie outside every run,
and a query that is padding has an empty one. Rows are queries as in a dense mask, so that model code which keeps the
last rows keeps the right ones; dense masks are bool or floating point, so the dtype tells the two apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sar_fast.method.values import Bounds


def compact(bounds: Bounds, num_keys: int | Tensor, num_queries: int, device: Any) -> Tensor:
    """The mask that says what ``bounds`` do.

    Args:
        bounds: of (B or 1, S) integers; a side that is None is open.
        num_keys: how many keys there are; a tensor says it by query, (B, S).
    """
    first, end = (
        torch.as_tensor(limit if side is None else side, device=device) for side, limit in zip(bounds, (0, num_keys))
    )
    nothing = torch.zeros(1, num_queries, dtype=torch.int64, device=device)
    sides = torch.broadcast_tensors(first.clamp_min(0), end.clamp_max(num_keys), nothing)
    # each side dense by itself, so that layers take them apart without a copy
    return torch.stack(sides[:2]).to(torch.int32).permute(1, 2, 0)[:, None]


def is_compact(mask: Tensor) -> bool:
    """Whether an attention mask has this form."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[-1] == 2


def bounds_of(mask: Tensor) -> Bounds:
    """The (B or 1, S) bounds of a compact mask."""
    return Bounds(*(x.contiguous() for x in mask[:, 0].unbind(-1)))


def real_queries(mask: Tensor) -> Tensor:
    """(B or 1, S) bool: which queries of a compact mask are not padding."""
    first, end = bounds_of(mask)
    return first < end
