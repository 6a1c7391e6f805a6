"""A rule as a user's file has it: ``--sar_weighting tests/training/own_rules.py:Slopes``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sar_fast.weighting import Statistics


class Slopes(nn.Module):
    """c = 1 + (scale - 1) * SAV, a learned scale for every head of every layer: it learns from statistics."""

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(layers, heads))

    def forward(self, statistics: Statistics, layer: int | None) -> Tensor:
        return 1 + (self.scales[layer] - 1) * statistics.sav

    def options(self) -> dict[str, int]:
        return dict(zip(("layers", "heads"), self.scales.shape))
