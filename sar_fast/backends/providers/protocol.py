"""What a provider is: another library's attention, whole batches in one call, with the log-sum-exp and a backward."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends.protocol import Request
from sar_fast.method.values import Call


class Provider(Protocol):
    """Attention of a plain call: dense, or packed, without roles, padding, dense masks and bounds.

    Nothing may wait for the GPU. A query that sees no key gets out = 0, and an infinite lse of either sign.

    Attributes:
        name: what users call it, as in ``backend="composed:cudnn"``.
    """

    name: str

    def missing(self) -> str | None:
        """Why it cannot be called on this machine, or None."""
        ...

    def unsupported(self, request: Request) -> str | None:
        """Why it lacks such a call, or None; says nothing of the machine."""
        ...

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """out, laid out as q in any strides, and lse as ``call.lse_shape`` fp32, natural."""
        ...

    def backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of that, in the inputs' shapes and dtype; lse is +inf where a query sees no key."""
        ...


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a library's attention takes.

    Attributes:
        archs: prefixes of the architectures' names, as "sm_9".
        head_dim: the largest. equal_head_dims: keys and values need the same; narrower ones are filled with zeros.
        causal: "any", or "square" for as many queries as keys (aligned bottom-right, the two are the same there).
    """

    archs: tuple[str, ...]
    head_dim: int = 256
    equal_head_dims: bool = True
    causal: str = "any"
    packed: bool = True
    window: bool = False
    softcap: bool = False

    def refuse(self, request: Request) -> str | None:
        """Why a call is outside of them, or None."""
        scores = request.scores
        if not request.arch.startswith(self.archs):
            return f"{request.arch}: needs one of {', '.join(x + '*' for x in self.archs)}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"{request.dtype}: needs float16 or bfloat16"
        if request.head_dim > self.head_dim:
            return f"head_dim={request.head_dim}: goes to {self.head_dim}"
        if request.packed and not self.packed:
            return "packed sequences (or padding, which becomes them)"
        if scores.windowed and not self.window:
            return f"window_size={scores.window}"
        if scores.softcap > 0 and not self.softcap:
            return f"softcap={scores.softcap}"
        if scores.causal and self.causal == "square" and not request.square:
            return "causal attention with other keys than queries"
        if request.backward and request.deterministic:
            return "deterministic gradients: its backward adds in any order"
        return None


@functools.cache
def has_gpu() -> bool:
    """Whether torch can use one; asked once, as choosing a backend is a part of every call."""
    return torch.cuda.is_available()


def widened(call: Call, *, equal: bool) -> Call:
    """The call with head dims that are multiples of 8, as every library asks; zeros change neither scores nor outputs.

    The scale is in the call, so it does not follow. Nothing is copied where nothing is missing.
    """
    up = lambda n: -(-n // 8) * 8
    width, width_v = up(call.q.shape[-1]), up(call.v.shape[-1])
    if equal:
        width = width_v = max(width, width_v)
    fill = lambda x, n: x if x.shape[-1] == n else F.pad(x, (0, n - x.shape[-1]))
    return dataclasses.replace(call, q=fill(call.q, width), k=fill(call.k, width), v=fill(call.v, width_v))


def widened_like(x: Tensor, call: Call) -> Tensor:
    """An output, or its gradient, as wide as the widened call's values."""
    width = call.v.shape[-1]
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def narrowed(grads: tuple[Tensor, Tensor, Tensor], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a widened call as the call has its inputs."""
    return tuple(g[..., : x.shape[-1]] for g, x in zip(grads, (call.q, call.k, call.v)))


def checked_lse(lse: Tensor, call: Call, provider: str) -> Tensor:
    """A library's log-sum-exp, if it is laid out as this project has it.

    Raises:
        RuntimeError: another layout, as a library's older or newer release may have: no statistics would be right.
    """
    if tuple(lse.shape) != call.lse_shape or lse.dtype != call.accumulate_dtype:
        raise RuntimeError(
            f"{provider}: got a log-sum-exp {lse.dtype} {tuple(lse.shape)}, need "
            f"{call.accumulate_dtype} {call.lse_shape}; this release of it is not known, take another backend"
        )
    return lse
