"""Heads scaled by their weights after attention: what every rule costs that the backends do not know.

One pass over the output, and one over its gradient; operators, so that ``torch.compile`` sees one node each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sar_fast.backends.blocks import scale_heads_
from sar_fast.method.value_checks import check_weight_values

_library = torch.library.Library("sar_fast", "FRAGMENT")
_library.define("scale_heads(Tensor out, Tensor c, Tensor? cu_seqlens, str rule) -> Tensor")
_library.define(
    "scale_heads_backward(Tensor grad, Tensor out, Tensor c, Tensor? cu_seqlens, bool need_c)"
    " -> (Tensor grad_out, Tensor grad_c)"
)


def _scaled(out: Tensor, c: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if out.device.type == "cpu":
        scaled = out.clone(memory_format=torch.contiguous_format)
        ends = None if cu_seqlens is None else cu_seqlens.tolist()
        for b, weights in enumerate(c):
            scale_heads_(scaled[b] if ends is None else scaled[ends[b] : ends[b + 1]], weights)
        return scaled
    scaled = torch.empty_like(out, memory_format=torch.contiguous_format)
    return torch.mul(out, _over_rows(c, out, cu_seqlens)[..., None], out=scaled)  # in fp32, without a copy of it


def _over_rows(c: Tensor, out: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """c (B, H) as a factor of out's rows: (B, 1, H), or (total, H) of a packed call."""
    if cu_seqlens is None:
        return c[:, None]
    return c.repeat_interleave(cu_seqlens.diff().long(), dim=0, output_size=out.shape[0])


@torch.library.impl(_library, "scale_heads", "CompositeExplicitAutograd")
def _scale_impl(out: Tensor, c: Tensor, cu_seqlens: Tensor | None, rule: str) -> Tensor:
    if rule:
        check_weight_values(c, rule)
    return _scaled(out, c, cu_seqlens)


@torch.library.register_fake("sar_fast::scale_heads", lib=_library)
def _scale_fake(out: Tensor, c: Tensor, cu_seqlens: Tensor | None, rule: str) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


@torch.library.impl(_library, "scale_heads_backward", "CompositeExplicitAutograd")
def _scale_backward_impl(
    grad: Tensor, out: Tensor, c: Tensor, cu_seqlens: Tensor | None, need_c: bool
) -> tuple[Tensor, Tensor]:
    scaled = _scaled(grad, c, cu_seqlens)
    if not need_c:
        return scaled, c.new_empty(0)
    # summed, not multiplied as matrices: a rule over heads may cancel most of it, so its rounding counts
    products = lambda g, o: (g.to(c.dtype) * o.to(c.dtype)).sum(-1)  # [S, H]
    if cu_seqlens is None:
        grad_c = torch.zeros_like(c)
        for b in range(c.shape[0]):
            grad_c[b] = products(grad[b], out[b]).sum(0)
        return scaled, grad_c
    return scaled, torch.segment_reduce(products(grad, out), "sum", offsets=cu_seqlens.long(), axis=0)


@torch.library.register_fake("sar_fast::scale_heads_backward", lib=_library)
def _scale_backward_fake(
    grad: Tensor, out: Tensor, c: Tensor, cu_seqlens: Tensor | None, need_c: bool
) -> tuple[Tensor, Tensor]:
    scaled = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return scaled, c.new_empty(c.shape if need_c else (0,))


class _ScaleHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out: Tensor, c: Tensor, cu_seqlens: Tensor | None, rule: str) -> Tensor:
        ctx.save_for_backward(out, c, cu_seqlens)
        return torch.ops.sar_fast.scale_heads(out, c, cu_seqlens, rule)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        out, c, cu_seqlens = ctx.saved_tensors
        grad_out, grad_c = torch.ops.sar_fast.scale_heads_backward(grad, out, c, cu_seqlens, ctx.needs_input_grad[1])
        return grad_out, grad_c if ctx.needs_input_grad[1] else None, None, None


def scale_heads(out: Tensor, c: Tensor, cu_seqlens: Tensor | None, rule: str) -> Tensor:
    """``out_h * c_h``, rounded once to out's dtype; differentiable in both.

    Args:
        out: (B, S, H, D), or (total, H, D) with ``cu_seqlens`` (B + 1,) int32.
        c: (B, H) fp32, fp64 for fp64 ``out``. Its values must be finite: on a GPU that is told in a later call.
        rule: what made the weights, for that error; empty: they were looked at before.
    """
    if torch.is_grad_enabled() and (out.requires_grad or c.requires_grad):
        return _ScaleHeads.apply(out, c, cu_seqlens, rule)
    return torch.ops.sar_fast.scale_heads(out, c, cu_seqlens, rule)
