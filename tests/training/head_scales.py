"""Rules with parameters, as a user's file has them: ``--sar_weighting tests/training/head_scales.py:HeadScales``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sar_fast.weighting import Statistics


class HeadScales(nn.Module):
    """A factor on every head of every layer; needs no statistics."""

    needs_statistics = False

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.ones(layers, heads))

    def forward(self, statistics: Statistics, layer: int | None) -> Tensor:
        return self.scales[layer]

    def options(self) -> dict[str, int]:
        return dict(zip(("layers", "heads"), self.scales.shape))


class Slopes(HeadScales):
    """c = 1 + slope * SAV: learns from statistics."""

    needs_statistics = True

    def forward(self, statistics: Statistics, layer: int | None) -> Tensor:
        return 1 + (self.scales[layer] - 1) * statistics.sav
