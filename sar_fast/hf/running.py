"""What runs on this thread's stack: forward passes, calls of the vision encoder, assistants that draft.

Other threads run other passes of the same model, and ``generate`` calls the vision encoder outside any pass, so neither
the model nor a keyword argument can say it.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from types import FrameType
from typing import Any, TypeVar

import torch

HERE = os.path.dirname(__file__)
T = TypeVar("T")
Entry = tuple[Any, FrameType | None]  # what runs, and the frame that it runs under; None = it was traced

_this_thread = threading.local()  # entries: the innermost last; set at first use, as a graph loses a class's default


def enter(what: Any, *, alone: bool = False) -> None:
    """``what`` starts, in the frame that called this package.

    What ``KeyboardInterrupt`` ends tells nobody: it runs as long as that frame is on the stack. Where a graph breaks
    inside this package, some of its frames end before a pass does.

    Args:
        alone: what was traced before and has no frame is over: its graph ended without saying so.
    """
    if torch.compiler.is_compiling():
        _this_thread.entries = (*(() if alone else _entries()), (what, None))
        return
    frame = sys._getframe(1)
    while frame is not None and os.path.dirname(frame.f_code.co_filename) == HERE:
        frame = frame.f_back
    outer = [e for e in _on_stack() if e[1] is not None or not alone]
    _this_thread.entries = (*outer, (what, frame))


def leave(what: Any) -> None:
    """``what`` ends, and all that runs inside it."""
    _this_thread.entries = tuple(itertools.takewhile(lambda entry: entry[0] is not what, _entries()))


def innermost(kind: type[T]) -> T | None:
    """The innermost of a kind that runs on this thread's stack."""
    if not torch.compiler.is_compiling() and _entries():
        _this_thread.entries = _on_stack()
    return next((what for what, _ in reversed(_entries()) if isinstance(what, kind)), None)


def _entries() -> tuple[Entry, ...]:
    return getattr(_this_thread, "entries", ())


def _on_stack() -> tuple[Entry, ...]:
    """The entries whose frame is on the stack, and those that were traced, which have none."""
    frame, alive = sys._getframe(1), set()
    while frame is not None:
        alive.add(id(frame))
        frame = frame.f_back
    return tuple(e for e in _entries() if e[1] is None or id(e[1]) in alive)
