"""How many threads a process of the miniature's takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a user who sets one has chosen


@contextlib.contextmanager
def one_thread_for(model: str) -> Iterator[None]:
    """Within, this process and those it starts take one thread if the model is the miniature; the environment wins.

    Tensors of a few kilobytes gain little from a second thread, and on busy cores threads spin while they wait for one
    another.
    """
    if model != "miniature" or any(name in os.environ for name in VARIABLES):
        yield
        return
    import torch

    before = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(before)
