"""Weightings: how a layer's statistics become the factor on each of its heads' outputs (docs/weighting.md).

A weighting is any callable ``(statistics, layer) -> c``. The paper's, :class:`SoftmaxOverHeads`, and :class:`Equal` run
inside the fused kernels; every other one costs one more pass over the output.
"""

from sar_fast.method.values import Statistics
from sar_fast.method.weighting.constant import Equal, Fixed
from sar_fast.method.weighting.find import find_weighting
from sar_fast.method.weighting.heads import HeadScales, SuppressHeads, ThresholdHeads, TopHeads
from sar_fast.method.weighting.protocol import Weighting
from sar_fast.method.weighting.registry import register_weighting
from sar_fast.method.weighting.rows import Entropy, Mass, Rows, RowStatistic, ScoreSum
from sar_fast.method.weighting.softmax import SoftmaxOverHeads
from sar_fast.method.weighting.split import Split
from sar_fast.method.weighting.vision_aware import ReinforceHeads

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
]
