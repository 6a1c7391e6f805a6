"""Weights that no statistic decides: the same for every head, or given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.scalars import kind
from sar_fast.method.values import Statistics


class Equal:
    """c = 1: plain attention whose statistics are computed and returned. Runs inside the fused kernels."""

    needs_statistics = True

    def __call__(self, statistics: Statistics, layer: int | None = None) -> Tensor:
        return torch.ones_like(statistics.av)

    def options(self) -> dict[str, object]:
        return {}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "Equal()"


class Fixed:
    """Given weights, for every row of the batch, also those without pictures: head ablation, steering.

    Args:
        c: floating point weights (H,), or per sample (B, H), or per layer (layers, H); lists do too, kept in fp64. A
            tensor that ``requires_grad`` gets its gradient.
        per_layer: whether the rows of a 2-dimensional ``c`` are layers. Default: where the caller has a layer index
            (models, :class:`~sar_fast.SARAttention`) they are; in a function call, which has none, they are samples.

    Raises:
        TypeError, ValueError: ``c`` is no table of finite floating point numbers; per layer, a call without a layer
            index or one that is not in the table.
    """

    needs_statistics = False

    def __init__(self, c: Tensor | Sequence[float], *, per_layer: bool | None = None) -> None:
        if not isinstance(c, Tensor):
            c = _table(c)
        if not c.is_floating_point():
            raise ArgumentTypeError("c", c.dtype, "be floating point")
        if c.dim() not in (1, 2) or c.numel() == 0:
            raise ArgumentError("c", tuple(c.shape), "have shape (heads,), (batch, heads) or (layers, heads)")
        if not bool(c.detach().isfinite().all()):
            raise ArgumentError("c", f"{int((~c.isfinite()).sum())} of {c.numel()} that are not", "be finite")
        if per_layer is not None and not isinstance(per_layer, bool):
            raise ArgumentTypeError("per_layer", kind(per_layer), "be a bool or None")
        if per_layer and c.dim() == 1:
            raise ArgumentError("c", tuple(c.shape), "have shape (layers, heads) with per_layer=True")
        self.c, self.per_layer = c, per_layer
        self._placed: dict[tuple[torch.dtype, torch.device], tuple[Tensor, int, Tensor]] = {}

    @property
    def values_known(self) -> bool:
        """Whether no call need look at them: training may change what wants a gradient."""
        return not self.c.requires_grad

    @classmethod
    def of(cls, c: Tensor) -> Fixed:
        """Weights (B, H) of each sample that the library computed: without a look at their values."""
        fixed = cls.__new__(cls)
        fixed.c, fixed.per_layer, fixed._placed = c, False, {}
        return fixed

    def __call__(self, statistics: Statistics, layer: int | None = None) -> Tensor:
        c, (batch, heads) = self._like(statistics.av), statistics.av.shape
        layers = layer is not None if self.per_layer is None else self.per_layer
        if c.dim() == 2 and layers and (c.shape[0] > 1 or self.per_layer):  # one row holds for all unless it is a layer
            if layer is None:
                raise ArgumentError(
                    "weighting",
                    f"Fixed with a table per layer, {tuple(c.shape)}",
                    "be without tables per layer for a call without a layer index",
                )
            if not 0 <= layer < c.shape[0]:
                raise ArgumentError(
                    "weighting", f"Fixed with weights of {c.shape[0]} layers", f"have weights of layer {layer}"
                )
            c = c[layer]
        elif c.dim() == 2 and c.shape[0] not in (1, batch):
            raise ArgumentError(
                "weighting",
                f"Fixed with {tuple(c.shape)}, a table per layer?",
                f"have one row or one of each of the {batch} samples, for a call without a layer index",
            )
        if c.shape[-1] != heads:
            raise ArgumentError("weighting", f"Fixed with {tuple(self.c.shape)}", f"have weights of {heads} heads")
        return c

    def _like(self, statistic: Tensor) -> Tensor:
        """The table in a statistic's dtype and on its device: brought there once, as every layer and step asks."""
        c = self.c
        if (c.dtype, c.device) == (statistic.dtype, statistic.device):
            return c
        if torch.compiler.is_compiling() or c.requires_grad or c.is_inference():  # is traced, or may change unseen
            return c.to(statistic)
        key = statistic.dtype, statistic.device
        source, version, placed = self._placed.get(key, (None, None, None))
        if source is not c or version != c._version:
            with torch.inference_mode(False):  # a later backward may save it
                placed = c.to(statistic)
            self._placed[key] = c, c._version, placed
        return placed

    def options(self) -> dict[str, object]:
        return {"c": self.c.tolist(), "per_layer": self.per_layer}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.per_layer == other.per_layer and self.c.tolist() == other.c.tolist()  # whatever type and device

    def __hash__(self) -> int:
        return hash((type(self), tuple(self.c.shape), self.per_layer))

    def __repr__(self) -> str:
        return f"Fixed(c {tuple(self.c.shape)})"


def _table(c: object) -> Tensor:
    """Lists of numbers in fp64, so that weights of every type come back from JSON as they were."""
    try:
        found = torch.as_tensor(c)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            "c", f"{kind(c)} ({error})", "be a tensor, or lists of numbers of one length"
        ) from error
    if found.dtype == torch.bool or found.is_complex():
        raise ArgumentTypeError("c", found.dtype, "be numbers")
    return torch.as_tensor(c, dtype=torch.float64)
