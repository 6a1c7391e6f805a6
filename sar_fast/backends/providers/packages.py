"""Providers that are packages of their own: FlashAttention-2, -3 and -4.

They are imported when they are asked about; what they lack here is a reason, never an error.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.protocol import Limits, checked_lse, has_gpu, narrowed, widened, widened_like
from sar_fast.method.values import Call


@functools.cache
def _imported(module: str) -> ModuleType | str:
    """The module, or why it does not import."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a shared object of another build
        return f"{module} does not import here ({error})"


@dataclasses.dataclass(frozen=True)
class Package(abc.ABC):
    """What the three have in common."""

    name: str
    module: str
    limits: Limits

    def missing(self) -> str | None:
        found = _imported(self.module)
        if isinstance(found, str):
            return found
        return None if has_gpu() else "no GPU that torch can use"

    def unsupported(self, request: Request) -> str | None:
        return self.limits.refuse(request)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        wide = widened(call, equal=self.limits.equal_head_dims)
        run = self._module.flash_attn_varlen_func if call.packed else self._module.flash_attn_func
        out, lse, *_ = run(wide.q, wide.k, wide.v, **_lengths(call), **self._scores(call), **self._with_lse)
        return out[..., : call.v.shape[-1]], checked_lse(lse, call, self.name)

    def backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = widened(call, equal=self.limits.equal_head_dims)
        grad, out = (widened_like(x, wide) for x in (grad, out))
        return narrowed(self._run_backward(wide, grad, out, lse), call)

    @property
    def _module(self) -> ModuleType:
        return _imported(self.module)

    _with_lse = {"return_attn_probs": True}  # noqa: RUF012  (read only)

    def _scores(self, call: Call) -> dict[str, Any]:
        scores = call.scores
        return {
            "softmax_scale": scores.scale,
            "causal": scores.causal,
            "window_size": scores.window,
            "softcap": scores.softcap,
        }

    @abc.abstractmethod
    def _run_backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a widened call, as the package's own autograd calls its backward."""


def _lengths(call: Call) -> dict[str, Any]:
    if not call.packed:
        return {}
    longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), call.max_seqlens))
    return {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k, **longest}


def _empty_gradients(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (call.q, call.k, call.v))


def _window(call: Call) -> dict[str, int]:
    return dict(zip(("window_size_left", "window_size_right"), call.scores.window))


class FlashAttention2(Package):
    """Package ``flash-attn`` from 2.7.3, module ``flash_attn.flash_attn_interface``."""

    def _run_backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module, scores = self._module, call.scores
        run = module._flash_attn_varlen_backward if call.packed else module._flash_attn_backward
        grads = _empty_gradients(call)
        run(
            *(grad, call.q, call.k, call.v, out, lse, *grads),
            **_lengths(call),
            dropout_p=0.0,
            softmax_scale=scores.scale,
            causal=scores.causal,
            **_window(call),
            softcap=scores.softcap,
            alibi_slopes=None,
            deterministic=False,
        )
        return grads


class FlashAttention3(Package):
    """Package of FlashAttention's ``hopper`` folder, module ``flash_attn_interface``."""

    def _run_backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _empty_gradients(call)
        self._module._flash_attn_backward(
            *(grad, call.q, call.k, call.v, out, lse),
            **_lengths(call),
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=call.scores.scale,
            is_causal=call.scores.causal,
            **_window(call),
            softcap=call.scores.softcap,
        )
        return dq, dk, dv


class FlashAttention4(Package):
    """Package ``flash-attn-4``, module ``flash_attn.cute.interface``."""

    _with_lse = {"return_lse": True}  # noqa: RUF012  (read only)

    def _scores(self, call: Call) -> dict[str, Any]:
        return {**super()._scores(call), "window_size": tuple(_open(call))}

    def _run_backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = _open(call)
        return self._module._flash_attn_bwd(
            *(call.q, call.k, call.v, out, grad, lse),
            softmax_scale=call.scores.scale,
            causal=call.scores.causal,
            softcap=call.scores.softcap,
            window_size_left=left,
            window_size_right=right,
            **_lengths(call),
        )[:3]


def _open(call: Call) -> list[int | None]:
    """The window with None for a side that is open."""
    return [side if side >= 0 else None for side in call.scores.window]
