"""What a weighting is, and what is asked of the weights that one returns."""

from __future__ import annotations

import inspect
from typing import Protocol

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.method.values import Statistics, StatisticsWithRows


class Weighting(Protocol):
    """A rule for the factor on each head's output.

    A function, an object with ``__call__`` or an ``nn.Module``: its parameters, and tensors with ``requires_grad`` that
    it closes over, get their gradients.

    Attributes:
        needs_statistics: False: no statistics are computed for it, and its weights hold for every row of the batch,
            with pictures or without. A rule without the attribute needs them.
    """

    needs_statistics: bool = True

    def __call__(self, statistics: Statistics, layer: int | None) -> Tensor:
        """The weights c: (B, H), (H,) or (1, H) floating point, any finite numbers.

        Args:
            statistics: of this layer, not to be changed in place; all NaN for a rule that needs none. A row whose
                ``count`` is 0 weighs 1, whatever is returned for it. It holds 0, for a module while gradients are
                recorded other numbers, so that to divide by them spoils no gradient.
            layer: index of the attention layer in a model, as the keys of ``handle.stats``; None in a function call.
        """
        ...


def needs_statistics(weighting: Weighting) -> bool:
    """Whether statistics are to be computed for a rule."""
    return getattr(weighting, "needs_statistics", True)


def check_weighting(weighting: object) -> Weighting:
    """The rule itself; ``TypeError`` unless it can be called as one, ``ValueError`` if it contradicts itself."""
    if inspect.isclass(weighting):
        raise ArgumentTypeError(
            "weighting", f"{weighting.__name__}, need {weighting.__name__}()", "be a rule, not a class"
        )
    if not callable(weighting):
        raise ArgumentTypeError(
            "weighting",
            (f"{type(weighting).__name__}. A name or a file becomes one by sar_fast.method.weighting.find_weighting"),
            "be a callable (statistics, layer) -> c, or None",
        )
    if not isinstance(needs_statistics(weighting), bool):
        raise ArgumentTypeError("weighting.needs_statistics", repr(weighting.needs_statistics), "be a bool")
    if not needs_statistics(weighting) and getattr(weighting, "row_statistics", ()):
        raise ArgumentError(
            "weighting",
            f"{name_of(weighting)} with needs_statistics False",
            "have needs_statistics True beside row_statistics",
        )
    return weighting


def name_of(weighting: object) -> str:
    """A rule's name for messages."""
    return getattr(weighting, "__name__", type(weighting).__name__)


def value_source(weighting: object, layer: int | None) -> str:
    """A rule's name, and the layer's, for errors about its values; empty where those were looked at before."""
    if getattr(weighting, "values_known", False):
        return ""
    return name_of(weighting) if layer is None else f"{name_of(weighting)}, layer {layer},"


def no_statistics(batch: int, heads: int, like: Tensor, dtype: torch.dtype) -> Statistics:
    """What a rule that needs no statistics is called with: NaN, so that one which uses them all the same shows."""
    nothing = torch.full((), torch.nan, dtype=dtype, device=like.device)
    return Statistics(nothing.expand(batch, heads), nothing.expand(batch, heads), nothing.expand(batch))


def head_weights(weighting: Weighting, statistics: Statistics | StatisticsWithRows, layer: int | None) -> Tensor:
    """A rule's weights c (B, H), in the statistics' dtype; exactly 1 in rows in which no query counted.

    Raises:
        TypeError, ValueError: naming the rule and what it returned. Its values are looked at where c is used.
    """
    counts = needs_statistics(weighting)
    learns = counts and isinstance(weighting, nn.Module) and torch.is_grad_enabled()
    given = _without_zeros(statistics) if learns else statistics
    before = _versions(given)
    device = statistics.av.device.type
    if torch.is_autocast_enabled(device):  # its dtype would round fp32 statistics
        with torch.autocast(device, enabled=False):
            c = weighting(given, layer)
    else:
        c = weighting(given, layer)
    if _versions(given) != before:
        raise ArgumentError(
            "weighting", f"{name_of(weighting)}, which does", "not change the statistics that it is given"
        )
    batch, heads = statistics.av.shape
    rule = name_of(weighting)
    if not isinstance(c, Tensor):
        raise ArgumentTypeError("weighting", f"{type(c).__name__} from {rule}", "return a tensor")
    if not c.is_floating_point():
        raise ArgumentTypeError("weighting", f"{c.dtype} from {rule}", "return floating point weights")
    if c.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ArgumentError(
            "weighting",
            f"{tuple(c.shape)} from {rule}",
            f"return weights of shape ({batch}, {heads}), ({heads},) or (1, {heads})",
        )
    if c.device != statistics.av.device:
        raise ArgumentError("weighting", f"{c.device} from {rule}", f"return weights on {statistics.av.device}")
    c = c.to(statistics.av.dtype).expand(batch, heads)
    return torch.where(statistics.count[:, None] > 0, c, 1) if counts else c


def _without_zeros(statistics: Statistics | StatisticsWithRows) -> Statistics | StatisticsWithRows:
    """Numbers that differ in rows in which no query counted: dividing by 0 there makes a parameter's gradient NaN."""
    counted, heads = statistics.count[:, None] > 0, statistics.av.shape[-1]
    numbers = torch.linspace(1, 2, heads, dtype=statistics.av.dtype, device=statistics.av.device)
    fill = lambda x: torch.where(counted, x, numbers)
    rows = {"rows": {name: fill(x) for name, x in statistics.rows.items()}} if hasattr(statistics, "rows") else {}
    return statistics._replace(av=fill(statistics.av), sa=fill(statistics.sa), **rows)


def _versions(statistics: Statistics | StatisticsWithRows) -> list[int]:
    """How often each tensor was changed in place; nothing where that is not known."""
    if torch.compiler.is_compiling() or statistics.av.is_inference():
        return []
    tensors = [*statistics[:3], *getattr(statistics, "rows", {}).values()]
    return [x._version for x in tensors]
