"""Weightings: how a layer's statistics become the factor on each of its heads' outputs (docs/weighting.md)."""

from sar_fast.method.weighting import (
    Entropy,
    Equal,
    Fixed,
    HeadScales,
    Mass,
    ReinforceHeads,
    Rows,
    RowStatistic,
    ScoreSum,
    SoftmaxOverHeads,
    Split,
    Statistics,
    SuppressHeads,
    ThresholdHeads,
    TopHeads,
    Weighting,
    find_weighting,
    register_weighting,
)
from sar_fast.method.weighting.files import save_weighting

__path__: list[str] = []  # the modules that were below it are found by sar_fast.moved

__all__ = [
    "Entropy",
    "Equal",
    "Fixed",
    "HeadScales",
    "Mass",
    "ReinforceHeads",
    "RowStatistic",
    "Rows",
    "ScoreSum",
    "SoftmaxOverHeads",
    "Split",
    "Statistics",
    "SuppressHeads",
    "ThresholdHeads",
    "TopHeads",
    "Weighting",
    "find_weighting",
    "register_weighting",
    "save_weighting",
]
