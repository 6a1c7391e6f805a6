"""Numbers and flags as callers write them: Python's, NumPy's, and tensors or arrays of one entry."""

from __future__ import annotations

import math
import numbers
from typing import Any

from sar_fast.base.errors import ArgumentTypeError


def plain(value: Any) -> Any:
    """The Python value in a NumPy scalar, or in a tensor or array of one entry; anything else as it came.

    A tensor that wants a gradient is left as it is, since none would reach it: what needs a number then refuses it.
    """
    if type(value) in (bool, int, float):  # of a traced symbol nothing else can be asked
        return value
    shape = getattr(value, "shape", None)
    if shape is None or math.prod(shape) != 1 or getattr(value, "requires_grad", False):
        return value
    return value.item()


def is_integer(value: object) -> bool:
    """Whether a plain value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def number(name: str, value: object, needed: str = "a number") -> int | float:
    """The int or float in ``value``; ``TypeError`` if it holds none."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise ArgumentTypeError(name, kind(found), f"be {needed}")
    return found if isinstance(found, (int, float)) else float(found)  # a fraction, NumPy's longdouble


def kind(value: object) -> str:
    """A type's name, NumPy's with its module, and whether a tensor wants a gradient."""
    found = type(value)
    name = found.__name__ if found.__module__ in ("builtins", "torch") else f"{found.__module__}.{found.__name__}"
    return f"{name} with requires_grad" if getattr(value, "requires_grad", False) else name
