"""A kernel launch as a value: it can be run, or compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, all its arguments by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launches the kernel on its tensors' device; an empty grid is no launch."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


def run_all(launches: list[Launch]) -> None:
    """Runs launches in order on the current stream."""
    for launch in launches:
        launch.run()
