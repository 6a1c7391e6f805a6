"""Counts operators that sar_fast's own Python calls: those that a GPU is waited for, and those that launch a kernel."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sar_fast

WAITING = {"_local_scalar_dense", "allclose", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
READING = {"tolist", "cpu", "numpy"}  # which no operator tells on a CPU
OURS, THEIRS = Path(sar_fast.__file__).parent, Path(transformers.__file__).parent
FAMILIES = OURS / "hf" / "families"  # what these call of transformers runs for SAR alone
ELSEWHERE = (
    OURS / "method" / "value_checks.py",
    OURS / "backends",
)  # on a GPU: waits for nothing; other ones than the CPU's


@functools.cache
def origin(file: str) -> str:
    """Whose source file it is: "elsewhere", "family", "ours", "theirs", or "" for anybody else's."""
    path = Path(file)
    folders = {"family": (FAMILIES,), "elsewhere": ELSEWHERE, "ours": (OURS,), "theirs": (THEIRS,)}
    return next((name for name, places in folders.items() if any(path.is_relative_to(p) for p in places)), "")


def site() -> str | None:
    """``file:function`` of the caller if the innermost frame of sar_fast or transformers is sar_fast's.

    Also where it is transformers', but a family's entry called that.
    """
    frame, theirs = sys._getframe(1), False
    while frame is not None:
        code = frame.f_code
        whose = origin(code.co_filename)
        if whose == "elsewhere":
            return None
        if whose in ("ours", "family"):
            return None if theirs and whose == "ours" else f"{Path(code.co_filename).name}:{code.co_name}"
        theirs = theirs or whose == "theirs"
        frame = frame.f_back
    return None


class Launches(TorchDispatchMode):
    """In here, how many operators each place of sar_fast calls that are no views.

    Attributes:
        found: place -> number of operators.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not func.is_view and func.namespace != "sar_fast" and (place := site()):
            self.found[place] += 1
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """In here, how often each place of sar_fast waits.

    Attributes:
        found: place -> number of times.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._python = _PythonReads(self)

    def __enter__(self) -> HostReads:
        self._python.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._python.__exit__(*exc)

    def note(self) -> None:
        """Count the operator that runs, if sar_fast called it."""
        if place := site():
            self.found[place] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or repeats:
            self.note()
        return func(*args, **(kwargs or {}))


class _PythonReads(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__name__", "") in READING and args and isinstance(args[0], Tensor):
            self._reads.note()
        return func(*args, **(kwargs or {}))
