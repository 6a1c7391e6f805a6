"""The provider of a CPU: PyTorch's flash attention, which also takes a mask."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends.protocol import Request
from sar_fast.method.validation import MAX_HEAD_DIM
from sar_fast.method.values import Call

_aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class CPUFlash:
    """``aten::_scaled_dot_product_flash_attention_for_cpu``, one sample at a time.

    Beside what every provider takes, ``attn_mask`` (1, 1 or Hkv, Sq or 1, Sk) bool: what a kv head's queries see.
    """

    name = "cpu-flash"

    def missing(self) -> str | None:
        return None

    def unsupported(self, request: Request) -> str | None:
        if request.head_dim > MAX_HEAD_DIM:
            return f"head_dim={request.head_dim}: fused kernels go to {MAX_HEAD_DIM}"
        if request.dtype not in _DTYPES:
            return f"{request.dtype}: PyTorch's flash kernel for cpu does not take it"
        if request.scores.softcap > 0:
            return f"softcap={request.scores.softcap}: PyTorch's fused kernels have no soft-capping"
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        q, k, v = _grouped(call)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, call.scores.causal, attn_mask=_bias(call), scale=call.scores.scale
        )
        out = out.permute(2, 0, 1, 3)[..., : call.v.shape[-1]]  # [Sq, Hkv, G, Dv]
        lse = lse.to(call.accumulate_dtype)
        if call.attn_mask is not None:  # of a row that sees nothing the kernel reports 0
            lse = lse.masked_fill(_dead_rows(call), -torch.inf)
        return out.flatten(1, 2)[None], lse.flatten(0, 1)[None]

    def backward(self, call: Call, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the protocol's, but dk and dv in the accumulators' dtype: they are sums over a group's heads."""
        q, k, v = _grouped(call)
        Hkv, _, _, width = q.shape
        D, Dv = call.q.shape[-1], call.v.shape[-1]
        group = lambda x: _widened(x[0], width).unflatten(1, (Hkv, -1)).permute(1, 2, 0, 3)
        row_lse = lse[0].unflatten(0, (Hkv, -1))
        row_lse = torch.where(row_lse.isinf(), 0, row_lse).contiguous()
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(group(grad), q, k, v, group(out), row_lse, 0.0, call.scores.causal),
            attn_mask=_bias(call),
            scale=call.scores.scale,
        )
        dq = dq.permute(2, 0, 1, 3).flatten(1, 2)[..., :D]
        dk, dv = (x.sum(1, dtype=call.accumulate_dtype).transpose(0, 1) for x in (dk, dv))
        return dq[None], dk[None, ..., :D], dv[None, ..., :Dv]


def _grouped(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (Hkv, G, S, D): kv heads are the batch, so that a group shares its keys without a copy."""
    q, k, v = call.q[0], call.k[0], call.v[0]
    Hkv, width = k.shape[1], max(q.shape[-1], v.shape[-1])  # the kernel has one width
    G = q.shape[1] // Hkv
    spread = lambda x: _widened(x, width).transpose(0, 1)[:, None].expand(-1, G, -1, -1)
    return _widened(q, width).unflatten(1, (Hkv, G)).permute(1, 2, 0, 3), spread(k), spread(v)


def _widened(x: Tensor, width: int) -> Tensor:
    """With zeros at the end of the last dimension; F.pad would copy what is wide enough."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _bias(call: Call) -> Tensor | None:
    """(1 or Hkv, 1, Sq or 1, Sk) additive mask: 0 or -inf."""
    seen = call.attn_mask
    if seen is None:
        return None
    bias = torch.zeros(seen.shape, dtype=call.q.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return bias.transpose(0, 1)


def _dead_rows(call: Call) -> Tensor:
    """(1 or Hkv, 1, Sq or 1) bool: queries that see no key."""
    seen = call.attn_mask.transpose(0, 1)
    if call.scores.causal:  # square, and the mask is one of keys
        return (seen.cumsum(-1) == 0).squeeze(-2)
    return ~seen.any(-1)


CPU_FLASH = CPUFlash()
