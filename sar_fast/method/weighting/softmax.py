"""The paper's rule: a softmax over heads of SAV, with a protected head (docs/method.md, section 2)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeGuard

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError, check_choice
from sar_fast.base.scalars import kind, plain
from sar_fast.method.options import check_beta
from sar_fast.method.values import Statistics
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.protocol import Weighting, check_weighting, name_of


@dataclasses.dataclass(frozen=True)
class SoftmaxOverHeads:
    """``c_h = H * softmax_h(SAV_h / beta)``, and head 0 gets the largest weight.

    Args:
        beta: temperature, > 0; ``inf`` gives every head the same weight.
        protect_first_head: head 0 gets the largest weight.
        normalize: ``"none"``, or ``"standardize"``: SAV standardised over heads (mean 0, std 1) before the softmax.
    """

    beta: float = 0.5
    protect_first_head: bool = True
    normalize: str = "none"

    needs_statistics = True

    def __post_init__(self) -> None:
        check_choice("normalize", self.normalize, ("none", "standardize"))
        protect = plain(self.protect_first_head)
        if not isinstance(protect, bool):
            raise ArgumentTypeError("protect_first_head", kind(protect), "be a bool")
        object.__setattr__(self, "beta", float(check_beta(self.beta)))
        object.__setattr__(self, "protect_first_head", protect)

    def __call__(self, statistics: Statistics, layer: int | None = None) -> Tensor:
        """c (B, H) in the statistics' dtype, 1 where no query counted; differentiable in AV and SA."""
        w = self._softmax(statistics.sav)[0]
        if self.protect_first_head:
            w = torch.cat([w.amax(-1, keepdim=True), w[:, 1:]], dim=-1)
        return torch.where(statistics.count[:, None] > 0, w.shape[-1] * w, 1.0)

    @property
    def about_head_0(self) -> str:
        """A sentence for readers of its weights."""
        state = "protected: it takes the largest factor of its layer" if self.protect_first_head else "not protected"
        return f"Head 0 is {state}."

    def _softmax(self, sav: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(w, x, std): weights before protection, the softmax's argument times beta, and what it was divided by."""
        x, std = sav, torch.ones_like(sav[:, :1])
        if self.normalize == "standardize":
            centred = sav - sav.mean(-1, keepdim=True)
            # once more: the mean's own rounding is large beside heads that nearly agree, and std is divided by
            centred = centred - centred.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
            flat = variance == 0  # all heads agree: they stay equal
            std = torch.where(flat, torch.inf, variance.sqrt())
            x = centred / std
        # the largest first: SAV / beta itself may overflow
        return torch.softmax((x - x.amax(-1, keepdim=True)) / self.beta, dim=-1), x, std

    def vjp(self, grad_c: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Gradients (B, H) for AV and SA, given (B, H) for c. Written out: it runs below autograd."""
        w, x, std = self._softmax(statistics.sav)
        grad_w = torch.where(statistics.count[:, None] > 0, w.shape[-1] * grad_c, 0)
        if self.protect_first_head:
            largest = w == w.amax(-1, keepdim=True)
            to_largest = largest * grad_w[:, :1] / largest.sum(-1, keepdim=True)
            grad_w = torch.cat([torch.zeros_like(grad_w[:, :1]), grad_w[:, 1:]], dim=-1) + to_largest
        grad_x = w * (grad_w - (grad_w * w).sum(-1, keepdim=True)) / self.beta
        # They add up to 0. The largest weight may be 1 but for rounding, and its own difference nothing but that.
        largest = torch.arange(w.shape[-1], device=w.device) == w.argmax(-1, keepdim=True)
        others = torch.where(largest, 0, grad_x)
        grad_x = torch.where(largest, -others.sum(-1, keepdim=True), others)
        if self.normalize == "standardize":
            mean = lambda t: t.mean(-1, keepdim=True)
            grad_x = (grad_x - mean(grad_x) - x * mean(grad_x * x)) / std
        return grad_x * statistics.sa, grad_x * statistics.av


Lowered = SoftmaxOverHeads | Equal  # the rules that the backends themselves know


def is_lowered(rule: Weighting) -> TypeGuard[Lowered]:
    """Whether the backends know a rule; what is derived from one of theirs may be another."""
    return type(rule) in (SoftmaxOverHeads, Equal)


def flatten(rule: Lowered) -> tuple[float, bool, str]:
    """A rule that the backends know, as operators take it: every temperature is the same at infinity."""
    if isinstance(rule, Equal):
        return math.inf, False, "none"
    return rule.beta, rule.protect_first_head, rule.normalize


@functools.lru_cache(maxsize=64)
def unflatten(beta: float, protect: bool, normalize: str) -> Lowered:
    """What :func:`flatten` inverts."""
    return Equal() if beta == math.inf else SoftmaxOverHeads(beta, protect, normalize)


def choose_weighting(
    weighting: Weighting | None,
    beta: float | None = None,
    protect_first_head: bool | None = None,
    normalize: str | None = None,
) -> Weighting:
    """The rule of a call that gives either a weighting or the paper's options, None = not given."""
    given = {"beta": beta, "protect_first_head": protect_first_head, "normalize": normalize}
    given = {name: value for name, value in given.items() if value is not None}
    if weighting is None:
        return SoftmaxOverHeads(**given)
    if given:
        came = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ArgumentError(
            "weighting", f"{name_of(weighting)} and {came}", f"come without {', '.join(given)}, of the paper's rule"
        )
    return check_weighting(weighting)
