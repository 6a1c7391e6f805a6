"""The keyword argument that brings the cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

Newer versions still take the old name from callers; what a hook sees is whichever was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from sar_fast.base.errors import ArgumentTypeError

NEW, OLD = "cache", "past_key_values"


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or None."""
    found = given.get(OLD)
    return given.get(NEW) if found is None else found


def check_cache(cache: Any) -> None:
    """``TypeError`` for a cache of many requests at once, which generate_batch makes."""
    if cache is not None and not hasattr(cache, "get_seq_length"):
        raise ArgumentTypeError(
            "cache",
            (
                f"{type(cache).__name__}, as in continuous batching (generate_batch), which SAR does not "
                "support: use generate, or remove_sar first"
            ),
            "be one of generate's",
        )


def with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Keyword arguments of a decoder layer with another cache."""
    return {**given, (NEW if NEW in given else OLD): cache}


def cache_name(module: nn.Module) -> str:
    """What the forward pass of a module calls it."""
    return NEW if NEW in inspect.signature(type(module).forward).parameters else OLD
