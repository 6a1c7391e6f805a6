"""Providers that PyTorch ships: its flash attention, whichever implementation is active, and cuDNN's."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.protocol import Limits, checked_lse, has_gpu, narrowed, widened, widened_like
from sar_fast.method.values import Call

_aten = torch.ops.aten


def active_flash_implementation() -> str:
    """ "FA2", or what `torch.nn.attention.activate_flash_attention_impl` (PyTorch 2.12) has put in its place."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return (current and current()) or "FA2"


@dataclasses.dataclass(frozen=True)
class TorchFlash:
    """``aten::_flash_attention_forward``: FlashAttention-2, or -3 or -4 while the user has that activated.

    Activating is left to the user, since it changes every attention of the process.
    """

    name: str
    implementation: str
    limits: Limits

    def missing(self) -> str | None:
        if not has_gpu() or not torch.backends.cuda.is_flash_attention_available():
            return "this PyTorch has no flash attention for a GPU here"
        active = active_flash_implementation()
        if active == self.implementation:
            return None
        if self.implementation == "FA2":
            return f"{active} has taken its place"
        return f'not active; torch.nn.attention.activate_flash_attention_impl("{self.implementation}") makes it so'

    def unsupported(self, request: Request) -> str | None:
        return self.limits.refuse(request)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        wide = widened(call, equal=self.limits.equal_head_dims)
        out, lse, *_ = _aten._flash_attention_forward(
            *(wide.q, wide.k, wide.v, *_lengths(call), 0.0, call.scores.causal, False), **_scores(call)
        )
        return out[..., : call.v.shape[-1]], checked_lse(lse, call, self.name)

    def backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = widened(call, equal=self.limits.equal_head_dims)
        grad, out = (widened_like(x, wide) for x in (grad, out))
        unused = grad.new_empty(0)
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device)  # of dropout
        grads = _aten._flash_attention_backward(
            *(grad, wide.q, wide.k, wide.v, out, lse, *_lengths(call), 0.0, call.scores.causal, state, unused),
            **_scores(call),
        )
        return narrowed(grads, call)


def _lengths(call: Call) -> tuple[Tensor | None, Tensor | None, int, int]:
    """(cum_seq_q, cum_seq_k, max_q, max_k)"""
    if call.packed:
        return call.cu_seqlens_q, call.cu_seqlens_k, *call.max_seqlens
    return None, None, call.q.shape[1], call.k.shape[1]


def _scores(call: Call) -> dict[str, float | int]:
    left, right = call.scores.window
    sides = {"window_size_left": left, "window_size_right": right}
    return {"scale": call.scores.scale, **{name: side for name, side in sides.items() if side >= 0}}


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """``aten::_scaled_dot_product_cudnn_attention``; dense calls, groups of heads without a copy."""

    name = "cudnn"
    limits = Limits(
        archs=("sm_8", "sm_9", "sm_10", "sm_12"), head_dim=128, equal_head_dims=False, causal="square", packed=False
    )

    def missing(self) -> str | None:
        if not has_gpu() or torch.version.hip or not torch.backends.cudnn.is_available():
            return "this PyTorch has no cuDNN for a GPU here"
        return None

    def unsupported(self, request: Request) -> str | None:
        return self.limits.refuse(request)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        wide = widened(call, equal=False)
        q, k, v = _heads_first(wide.q, wide.k, wide.v)
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, call.scores.causal, False, scale=call.scores.scale
        )
        lse = lse.squeeze(-1) if lse.dim() == 4 else lse  # [B, H, Sq, 1]
        return out.transpose(1, 2)[..., : call.v.shape[-1]], checked_lse(lse, call, self.name)

    def backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = widened(call, equal=False)
        grad, out, q, k, v = _heads_first(widened_like(grad, wide), widened_like(out, wide), wide.q, wide.k, wide.v)
        seed, offset = (torch.zeros((), dtype=torch.int64, device=grad.device) for _ in range(2))  # of dropout
        dropout = (seed, offset)
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = _aten._scaled_dot_product_cudnn_attention_backward(
            *(grad, q, k, v, out, lse[..., None], *dropout, None, *lengths, 0.0, call.scores.causal),
            scale=call.scores.scale,
        )
        return narrowed(tuple(g.transpose(1, 2) for g in grads), call)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) seen as (B, H, S, D)."""
    return [x.transpose(1, 2) for x in tensors]
