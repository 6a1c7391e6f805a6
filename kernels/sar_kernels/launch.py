"""A kernel launch as a value: it can be run, or compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sar_kernels.configs import KernelConfig

MAX_GRID = 65535  # programs on CUDA's second and third axis


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, all its arguments by name, and its configuration."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: KernelConfig

    def compiler_options(self) -> dict[str, int]:
        """Warps, stages and, where the configuration limits them, registers, as Triton names them."""
        options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        if self.config.max_registers is not None:
            options["maxnreg"] = self.config.max_registers
        return options

    def check_grid(self) -> None:
        """CUDA takes 65,535 programs on the second and third axis, which are heads and the batch."""
        if max(self.grid[1:], default=0) > MAX_GRID:
            raise ValueError(
                f"batch (or packed sequences) and heads: got a grid of {self.grid}, need at most {MAX_GRID} on its "
                f"second and third axis on a CUDA device"
            )

    def run(self) -> None:
        """Launches the kernel on its tensors' device; an empty grid is no launch."""
        if 0 in self.grid:
            return
        device = next(a.device for a in self.arguments.values() if isinstance(a, torch.Tensor))
        if device.type == "cuda" and not torch.version.hip:
            self.check_grid()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](**self.arguments, **self.compiler_options())


def run_all(launches: list[Launch]) -> None:
    """Runs launches in order on the current stream."""
    for launch in launches:
        launch.run()
