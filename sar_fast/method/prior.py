"""The semantic prior: L2 norms of visual features, normalised over a sample's visual tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError


def semantic_prior(features: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
    """``prior_j = n_j / sum n`` with ``n_j`` the fp32 L2 norm of visual token j's feature (docs/method.md, section 2).

    Args:
        features: features of the visual tokens in reading order: (total_visual, F) for the whole batch, a sequence of
            such tensors (per sample or per image), or (B, S, F) aligned with ``mask``.
        mask: (B, S) bool, the visual positions.

    Returns:
        (B, S) fp32, 0 outside ``mask``; rows without visual tokens are 0. A row whose features are all 0 says nothing
        about its tokens and gets the uniform prior.
    """
    _check_mask(mask)
    if not isinstance(features, Tensor):
        features = list(features) or [torch.empty(0, 1, device=mask.device)]  # a batch without images
        features = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
    if features.dim() == 3 and tuple(features.shape[:2]) == tuple(mask.shape):
        features = features[mask]
    if features.dim() != 2:
        raise ArgumentError(
            "features",
            tuple(features.shape),
            f"be (total_visual, F), or (B, S, F) with mask's (B, S) = {tuple(mask.shape)}",
        )
    if not features.is_floating_point():
        raise ArgumentTypeError("features", features.dtype, "be floating point")
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32  # vector_norm never narrows
    norms = torch.linalg.vector_norm(features, dim=-1, dtype=dtype)
    if not bool(norms.isfinite().all()):
        raise ArgumentError("features", f"{int((~norms.isfinite()).sum())} of {len(norms)} that are not", "be finite")
    return prior_from_norms(norms, mask)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ArgumentTypeError("mask", f"{mask.dtype} {tuple(mask.shape)}", "be a (batch, seqlen) bool tensor")


def prior_from_norms(norms: Tensor, mask: Tensor) -> Tensor:
    """(B, S) fp32 prior from the norms (total_visual,) of the positions in ``mask`` (B, S) bool, in reading order."""
    _check_mask(mask)
    total = int(mask.sum())
    if norms.numel() != total:
        raise ArgumentError("features", norms.numel(), f"hold one vector per visual token, of which mask has {total}")
    weights = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    weights = weights.masked_scatter(mask, norms.to(weights))
    sums = weights.sum(-1, keepdim=True)
    weights = torch.where((sums == 0) & mask, 1.0, weights)
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
