"""What a backend is: whole calls in, outputs, statistics and gradients out, on real tensors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from sar_fast.method.kvcache import Step
from sar_fast.method.values import Call, Result, Scores, Statistics
from sar_fast.method.weighting.softmax import Lowered


@dataclasses.dataclass(frozen=True)
class Request:
    """What a backend must know of a call to say whether it can run it; no values of tensors.

    Attributes:
        padded, masked, bounded: whether a key_padding_mask, a dense attn_mask or bounds are given.
        head_dim: the largest of the queries', keys' and values'; 0 = any that the public functions take.
        packed: whether sequences are. square: whether there are as many queries as keys, in every sequence.
        length: keys of the longest sequence; 0 = not known.
        backward: whether gradients may be asked for. deterministic: whether they must be the same every time.
        decode: whether it is a step over a cache.
    """

    device: torch.device
    dtype: torch.dtype
    scores: Scores = Scores(scale=1.0)  # noqa: RUF009  (frozen)
    padded: bool = False
    masked: bool = False
    bounded: bool = False
    head_dim: int = 0
    packed: bool = False
    square: bool = True
    length: int = 0
    backward: bool = False
    deterministic: bool = False
    decode: bool = False

    @classmethod
    def of(cls, call: Call, *, deterministic: bool = False) -> Request:
        q, k, v = call.q, call.k, call.v
        padded, masked = call.key_padding_mask is not None, call.attn_mask is not None
        known = (q.device, q.dtype, call.scores, padded, masked, call.bounds.given, call.head_dim, call.packed)
        if q.device.type == "cpu":  # where no lengths matter, which a traced graph would be tied to
            return cls(*known)
        return cls(
            *known,
            call.cu_seqlens_q is call.cu_seqlens_k if call.packed else q.shape[1] == k.shape[1],
            call.max_seqlens[1] if call.packed else k.shape[1],
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            deterministic or torch.are_deterministic_algorithms_enabled(),
        )

    @property
    def arch(self) -> str:
        """As compilers name the device's architecture, "sm_90" or "gfx942"; the device's type where no GPU is."""
        return device_arch(self.device)


@functools.cache
def device_arch(device: torch.device) -> str:
    """As :attr:`Request.arch`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


Gradients = tuple[Tensor, Tensor, Tensor]  # of av, sa and c, each [B, H]


class Backend(Protocol):
    """One way to compute attention. ``sar_fast.attention.ops`` calls it below ``torch.compile`` and autograd.

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
