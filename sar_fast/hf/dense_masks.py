"""Dense attention masks as callers write them: bool, or additive with 0 where a key may be seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sar_fast.base.errors import ArgumentError, ArgumentTypeError

HIDES = -1e4  # an additive mask's value up to this leaves nothing of a score
_looked_at = WeakTensorKeyDictionary()  # tensor -> what was not found in it, each with the tensor's version then


def as_visible(mask: Tensor) -> Tensor:
    """``attention_mask`` of 4 dimensions as bool, True = may be seen; a bias on scores is an error, not a mask.

    Raises:
        TypeError: neither bool nor floating point.
        ValueError: values that are neither 0 nor hide a key. They are looked at where no graph is traced.
    """
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ArgumentTypeError("attention_mask of 4 dimensions", mask.dtype, "be bool or additive floating point")
    if has_values(mask, lambda m: (m != 0) & ~(m <= HIDES)):
        raise ArgumentError(
            "attention_mask of 4 dimensions",
            "other values, and scores with a bias are not supported",
            f"be bool, or 0 where a key may be seen and at most {HIDES:g} where not",
        )
    return mask == 0


def has_values(tensor: Tensor, where: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``where`` is True anywhere in a tensor; False in a graph, which has no values.

    All layers of a model get the same masks and positions: what was found good is not looked at again, since a GPU is
    waited for each time.
    """
    if torch.compiler.is_compiling():
        return False
    asked = where.__code__, -1 if tensor.is_inference() else tensor._version
    missing = _looked_at.setdefault(tensor, set())
    if asked in missing:
        return False
    found = bool(where(tensor).any())
    if not found:
        missing.add(asked)
    return found
