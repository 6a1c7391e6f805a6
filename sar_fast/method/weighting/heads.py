"""Rules that keep the heads that look at the picture and damp the others, and scales that training learns.

Which heads are kept is a step function of the statistics: these weights are constants, and no gradient reaches q, k or
v through them. Only :class:`HeadScales` has something to learn.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import is_integer, kind, number
from sar_fast.method.values import Statistics, StatisticsWithRows
from sar_fast.method.weighting.rows import BY_NAME, RowStatistic

STATISTICS = ("sav", "av", "sa")


@dataclasses.dataclass(frozen=True)
class TopHeads:
    """The heads with the largest statistic weigh 1, the others ``damp``; chosen per sample and layer.

    Head ablation as of Michel et al. ("Are Sixteen Heads Really Better than One?", 2019, arXiv 1905.10650), ordered by
    how much a head looks at the picture. Of equal heads those with the lower index are kept. The weights are constants:
    no gradient reaches the statistics.

    Args:
        keep: number of heads, an int >= 1, or a share of the layer's, a float in (0, 1): rounded down, one at least.
        damp: weight of the others, any finite number.
        by: ``"sav"``, ``"av"``, ``"sa"``, or a row statistic: ``"mass"``, ``"entropy"``, ``"score_sum"``.

    Raises:
        TypeError, ValueError: naming the option. In a call: a layer has fewer heads than ``keep``.
    """

    keep: int | float
    damp: float = 0.0
    by: str = "sav"

    needs_statistics = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _check_keep(self.keep))
        object.__setattr__(self, "damp", check_finite("damp", self.damp))
        _check_by(self.by)

    @property
    def row_statistics(self) -> tuple[RowStatistic, ...]:
        """What the library is to compute beside AV and SA."""
        return _row_statistics(self.by)

    def __call__(self, statistics: Statistics | StatisticsWithRows, layer: int | None = None) -> Tensor:
        """c (B, H) in the statistics' dtype."""
        x = _read(statistics, self.by)
        return damped(x, largest(x, heads_kept(self.keep, x.shape[-1])), self.damp)


@dataclasses.dataclass(frozen=True)
class ThresholdHeads:
    """Heads whose statistic is below a share of the layer's mean weigh ``damp``, the others 1; per sample and layer.

    The mean is over the sample's heads, so that one threshold means the same in every layer and for every number of
    visual tokens; all heads may lie above it. Meant for statistics that are never negative. The weights are constants:
    no gradient reaches the statistics.

    Args:
        threshold: share of the mean, > 0; a head that is exactly there is kept.
        damp: weight of the heads below it, any finite number.
        by: ``"sav"``, ``"av"``, ``"sa"``, or a row statistic: ``"mass"``, ``"entropy"``, ``"score_sum"``.

    Raises:
        TypeError, ValueError: naming the option.
    """

    threshold: float
    damp: float = 0.0
    by: str = "sa"

    needs_statistics = True

    def __post_init__(self) -> None:
        threshold = check_finite("threshold", self.threshold)
        if threshold <= 0:
            raise ArgumentError("threshold", threshold, "be > 0, a share of the mean over heads")
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "damp", check_finite("damp", self.damp))
        _check_by(self.by)

    @property
    def row_statistics(self) -> tuple[RowStatistic, ...]:
        """What the library is to compute beside AV and SA."""
        return _row_statistics(self.by)

    def __call__(self, statistics: Statistics | StatisticsWithRows, layer: int | None = None) -> Tensor:
        """c (B, H) in the statistics' dtype."""
        x = _read(statistics, self.by)
        first = x[:, :1]
        mean = first + (x - first).mean(-1, keepdim=True)  # exact where all heads agree: none is below then
        return damped(x, x >= self.threshold * mean, self.damp)


@dataclasses.dataclass(frozen=True)
class SuppressHeads:
    """SPIN's rule: heads that score the picture low are suppressed (Sarkar et al., EMNLP 2025, arXiv 2505.16411).

    A head's statistic is the sum of the last text query's scores, before the softmax, over the visual keys, divided by
    its standard deviation over the layer's heads. The ``keep`` largest weigh 1, the others ``damp``. The division
    changes no order, so it chooses the same heads; the authors' code (github.com/YUECHE77/SPIN) makes gates of the
    quotient by a softmax, whose temperature then is the same in every layer. Of equal heads those with the lower index
    are kept. The weights are constants: no gradient reaches the statistics.

    The authors choose anew for each query, and in the prompt scale the last one's output only. Here a sample's weights
    hold for all its queries; ``decode="step"`` chooses anew for each new token as they do.

    Args:
        keep: number of heads, an int >= 1, or a share of the layer's, a float in (0, 1): rounded down, one at least.
            The default is that of the authors' code, whose README uses 0.7 to 0.95 by model and benchmark.
        damp: weight of the others, any finite number.

    Raises:
        TypeError, ValueError: naming the option. In a call: a layer has fewer heads than ``keep``.
    """

    keep: int | float = 0.95
    damp: float = 0.05

    needs_statistics = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _check_keep(self.keep))
        object.__setattr__(self, "damp", check_finite("damp", self.damp))

    @property
    def row_statistics(self) -> tuple[RowStatistic, ...]:
        """The sums of the last row's scores."""
        return _row_statistics("score_sum")

    def statistic(self, statistics: StatisticsWithRows) -> Tensor:
        """(B, H): what heads are chosen by; the sums themselves where all heads agree."""
        x = _read(statistics, "score_sum")
        std = x.std(-1, correction=min(1, x.shape[-1] - 1), keepdim=True)
        return x / torch.where(std > 0, std, 1)

    def __call__(self, statistics: StatisticsWithRows, layer: int | None = None) -> Tensor:
        """c (B, H) in the statistics' dtype."""
        x = self.statistic(statistics)
        return damped(x, largest(x, heads_kept(self.keep, x.shape[-1])), self.damp)


class HeadScales(nn.Module):
    """A learned scale per layer and head, for every row of the batch, with pictures or without.

    ``scales`` (layers, heads) is a parameter that starts at 1, plain attention: the head scale of NormFormer (Shleifer
    et al. 2021, arXiv 2110.09456). Its values are saved with ``state_dict``; they are no option.

    Args:
        layers, heads: of the model, >= 1. ``find_weighting`` fills them in where it is told.

    Raises:
        TypeError, ValueError: naming the argument. In a call: a layer, or a number of heads, that it does not have.
    """

    needs_statistics = False

    def __init__(self, layers: int, heads: int) -> None:
        super().__init__()
        self.layers, self.heads = (_check_size(name, n) for name, n in (("layers", layers), ("heads", heads)))
        self.scales = nn.Parameter(torch.ones(self.layers, self.heads))

    def forward(self, statistics: Statistics, layer: int | None = None) -> Tensor:
        """The layer's scales (H,), differentiable. ``layer`` may be None where there is one layer only."""
        heads = statistics.av.shape[-1]
        if heads != self.heads:
            raise ArgumentError(
                "weighting", f"HeadScales with scales of {self.heads}", f"have scales of the layer's {heads} heads"
            )
        if layer is None and self.layers == 1:
            layer = 0
        if layer is None:
            raise ArgumentError(
                "weighting",
                f"HeadScales with scales of {self.layers}",
                "have scales of one layer for a call without a layer index",
            )
        if not 0 <= layer < self.layers:
            raise ArgumentError(
                "weighting", f"HeadScales with scales of {self.layers} layers", f"have scales of layer {layer}"
            )
        return self.scales[layer].to(statistics.av.device)  # a model may lie on several devices

    def options(self) -> dict[str, object]:
        return {"layers": self.layers, "heads": self.heads}

    def extra_repr(self) -> str:
        return f"layers={self.layers}, heads={self.heads}"


def heads_kept(keep: int | float, heads: int) -> int:
    """How many of a layer's heads ``keep`` stands for; ``ValueError`` if it has fewer."""
    if isinstance(keep, float):
        return max(1, int(keep * heads + 1e-9))  # 0.29 of 100 heads are 29, whatever the product rounds to
    if keep > heads:
        raise ArgumentError("weighting", f"keep={keep}", f"keep at most the layer's number of heads, {heads}")
    return keep


def largest(x: Tensor, n: int) -> Tensor:
    """(B, H) bool: the n largest entries of each row, of equal ones those that come first."""
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order[:, :n], True)


def damped(x: Tensor, kept: Tensor, damp: float) -> Tensor:
    """(B, H): 1 for heads that are kept, else ``damp``; NaN for rows whose statistic x is not finite, as it decides
    nothing."""
    c = torch.where(kept, torch.ones_like(x), damp)
    return c.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)


def _read(statistics: Statistics | StatisticsWithRows, by: str) -> Tensor:
    """(B, H): the statistic of that name, a constant."""
    if by in STATISTICS:
        return getattr(statistics, by).detach()
    rows = getattr(statistics, "rows", {})
    if by not in rows:
        raise ArgumentError(
            "weighting",
            ", ".join(map(repr, rows)) or "none",
            f"be given the row statistic {by!r}, which the call did not compute",
        )
    return rows[by].detach()


def _row_statistics(by: str) -> tuple[RowStatistic, ...]:
    """The row statistic of that name; none for AV, SA and SAV."""
    return () if by in STATISTICS else (BY_NAME[by],)


def _check_by(by: object) -> None:
    known = (*STATISTICS, *BY_NAME)
    if not isinstance(by, str) or by not in known:
        raise ArgumentError("by", repr(by), f"be one of {', '.join(map(repr, known))}")


def _check_keep(keep: object) -> int | float:
    needed = "a number of heads, an int >= 1, or a share of them, a float in (0, 1)"
    found = number("keep", keep, needed)
    if not (found >= 1 if is_integer(found) else 0 < found < 1):
        raise ArgumentError("keep", repr(found), f"be {needed}")
    return found


def check_finite(name: str, value: object) -> float:
    found = number(name, value)
    if not abs(found) <= sys.float_info.max:  # an int may be too large to be a float
        raise ArgumentError(name, f"{found!r:.50}", "be finite")
    return float(found)


def _check_size(name: str, value: object) -> int:
    found = number(name, value, "an int >= 1")
    if not is_integer(found):
        raise ArgumentTypeError(name, kind(found), "be an int >= 1")
    if found < 1:
        raise ArgumentError(name, found, "be an int >= 1")
    return found
