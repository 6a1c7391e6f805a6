"""The method's options as types, and what a temperature may be; without torch, for command lines."""

from __future__ import annotations

from typing import Literal

from sar_fast.base.errors import ArgumentError
from sar_fast.base.scalars import number

Normalize = Literal["none", "standardize"]
TextQueries = Literal["after_last_image", "after_first_image"]
PriorSource = Literal["vision_layer", "projected"]
DecodeMode = Literal["running", "step", "prompt"]
RecordRows = Literal["none", "last_text"]


def check_beta(beta: object) -> int | float:
    """beta as a Python number in (0, inf], else an error; ``inf`` gives every head the same weight."""
    beta = number("beta", beta)
    if not beta > 0 or (isinstance(beta, int) and beta.bit_length() > 1023):
        raise ArgumentError("beta", f"{beta!r:.50}", "be > 0 (a softmax temperature) and within a float's range")
    return beta
