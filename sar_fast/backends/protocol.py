"""What a backend is: whole calls in, outputs, statistics and gradients out, on real tensors."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from sar_fast.kvcache import Step
from sar_fast.values import Call, Result, Scores, Statistics
from sar_fast.weighting.softmax import Lowered


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend must know of a call to say whether it can run it; no values of tensors.

    Attributes:
        padded, masked, bounded: whether a key_padding_mask, a dense attn_mask or bounds are given.
        head_dim: the larger of the keys' and the values'; 0 = any that the public functions take.
    """

    device: torch.device
    dtype: torch.dtype
    scores: Scores = Scores(scale=1.0)  # noqa: RUF009  (frozen)
    padded: bool = False
    masked: bool = False
    bounded: bool = False
    head_dim: int = 0

    @classmethod
    def of(cls, call: Call) -> Request:
        padded, masked = call.key_padding_mask is not None, call.attn_mask is not None
        return cls(call.q.device, call.q.dtype, call.scores, padded, masked, call.bounds.given, call.head_dim)


Gradients = tuple[Tensor, Tensor, Tensor]  # of av, sa and c, each [B, H]


class Backend(Protocol):
    """One way to compute attention. ``sar_fast.ops`` calls it below ``torch.compile`` and autograd.

    Attributes:
        name: what users call it.
        waits: whether its calls wait for a GPU anyway, so that values may be looked at on the way.
        on_cpu: whether ``"auto"`` may choose it for CPU tensors.
    """

    name: str
    waits: bool
    on_cpu: bool

    def unsupported(self, request: Request) -> str | None:
        """Why such a call cannot run here, or None."""
        ...

    def forward(self, call: Call, rule: Lowered, *, need_lse: bool) -> Result:
        """Attention; with roles, re-weighted by ``rule``. ``lse`` is empty unless needed."""
        ...

    def backward(
        self, call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dq, dk, dv, dprior) of what the forward returned; dprior is empty without ``through``.

        Args:
            through: gradients of av, sa and c themselves: they flow through the weights too. None: c is constant.
        """
        ...

    def mass(self, call: Call, lse: Tensor, chosen: Tensor) -> Tensor | None:
        """Sums over the counted text queries of their attention on ``chosen`` visual keys, (B, H); None if the backend
        leaves that to PyTorch.

        Args:
            lse: of the call. chosen: bool, as ``roles.visual``.
        """
        ...

    def decode(self, step: Step, *, need_lse: bool) -> Result:
        """Attention of a step's queries over its cache, which its new keys and values extend in place."""
        ...


def nothing_computed(q: Tensor, dtype: torch.dtype) -> tuple[Statistics, Tensor]:
    """Statistics and weights of a call without roles: empty."""
    none = lambda *shape: q.new_empty(shape, dtype=dtype)  # operators may not return one tensor twice
    return Statistics(none(0, 0), none(0, 0), none(0)), none(0, 0)
