"""From statistics to head weights: softmax over heads, protected head, degenerate samples (docs/method.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def head_weights(
    av: Tensor,
    sa: Tensor,
    count: Tensor,
    *,
    beta: float,
    protect_first_head: bool,
    normalize: str,
) -> Tensor:
    """c_h = H * w_h, differentiable in AV and SA.

    Args:
        av, sa: (B, H) fp32 or fp64 means over the counted text queries.
        count: (B,) number of counted queries; rows with 0 get c = 1 exactly.

    Returns:
        (B, H) in the dtype of ``av``.
    """
    w = _softmax_over_heads(av * sa, beta, normalize)[0]
    if protect_first_head:
        w = torch.cat([w.amax(-1, keepdim=True), w[:, 1:]], dim=-1)
    return torch.where(count[:, None] > 0, w.shape[-1] * w, 1.0)


def _softmax_over_heads(sav: Tensor, beta: float, normalize: str) -> tuple[Tensor, Tensor, Tensor]:
    """(w, x, std): weights before protection, the softmax's argument times beta, and what it was divided by."""
    x, std = sav, torch.ones_like(sav[:, :1])
    if normalize == "standardize":
        centred = sav - sav.mean(-1, keepdim=True)
        # once more: the mean's own rounding is large beside heads that nearly agree, and the gradient divides by std
        centred = centred - centred.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        flat = variance == 0  # all heads agree: they stay equal
        std = torch.where(flat, torch.inf, variance.sqrt())
        x = centred / std
    # the largest first: SAV / beta itself may overflow
    return torch.softmax((x - x.amax(-1, keepdim=True)) / beta, dim=-1), x, std


def head_weights_vjp(
    grad_c: Tensor,
    av: Tensor,
    sa: Tensor,
    count: Tensor,
    *,
    beta: float,
    protect_first_head: bool,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Gradients (B, H) for AV and SA of ``head_weights``, given (B, H) for c. Written out: it runs below autograd."""
    w, x, std = _softmax_over_heads(av * sa, beta, normalize)
    grad_w = torch.where(count[:, None] > 0, w.shape[-1] * grad_c, 0)
    if protect_first_head:
        largest = w == w.amax(-1, keepdim=True)
        to_largest = largest * grad_w[:, :1] / largest.sum(-1, keepdim=True)
        grad_w = torch.cat([torch.zeros_like(grad_w[:, :1]), grad_w[:, 1:]], dim=-1) + to_largest
    grad_x = w * (grad_w - (grad_w * w).sum(-1, keepdim=True)) / beta
    # They add up to 0. The largest weight may be 1 but for rounding, and its own difference nothing but that.
    largest = torch.arange(w.shape[-1], device=w.device) == w.argmax(-1, keepdim=True)
    others = torch.where(largest, 0, grad_x)
    grad_x = torch.where(largest, -others.sum(-1, keepdim=True), others)
    if normalize == "standardize":
        mean = lambda t: t.mean(-1, keepdim=True)
        grad_x = (grad_x - mean(grad_x) - x * mean(grad_x * x)) / std
    return grad_x * sa, grad_x * av
