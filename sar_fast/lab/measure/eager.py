"""The research code's eager formulation of SAR attention: every score is materialised.

Demo and benchmarks time the package against it; nothing else uses it. It takes one unpadded sample, as timing needs no
more (``sar_fast.method.reference`` is the definition with every option).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError

ATTENTION_NAME = "eager_sar"


def eager_sar_attention(
    q: Tensor, k: Tensor, v: Tensor, visual_mask: Tensor, text_mask: Tensor, prior: Tensor, *, beta: float = 0.5
) -> Tensor:
    """Causal SAR attention the way the research code computes it.

    Args:
        q: (1, N, H, D). k, v: (1, N, Hkv, D).
        visual_mask, text_mask: (1, N) bool. prior: (1, N).
        beta: temperature of the softmax over heads; the first head is protected.

    Returns:
        (1, N, H, D) in q's dtype. ``ValueError`` for a batch.
    """
    N = q.shape[1]
    mask = torch.full((N, N), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attention(q, k, v, mask, q.shape[-1] ** -0.5, EagerSAR(visual_mask, text_mask, prior, beta=beta))


@dataclasses.dataclass(frozen=True)
class EagerSAR:
    """What a model's attention layers need to know: visual_mask, text_mask (1, N) bool, prior (1, N), the first layer
    that is re-weighted, and beta."""

    visual_mask: Tensor
    text_mask: Tensor
    prior: Tensor
    first_layer: int = 0
    beta: float = 0.5


@contextlib.contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Within the block the text layers of a Hugging Face model run the eager formulation.

    Call the model as ``model(**inputs, eager_sar=EagerSAR(...))``; without the argument it is plain eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION_NAME, _layer_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": ATTENTION_NAME})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def _layer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    eager_sar: EagerSAR | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Signature of transformers' attention functions: query (B, H, Sq, D) to (B, Sq, H, D)."""
    active = eager_sar is not None and module.layer_idx >= eager_sar.first_layer
    return _attention(query, key, value, attention_mask, scaling, eager_sar if active else None), None


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, sar: EagerSAR | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores + mask
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    out = probs @ v
    if sar is not None:
        out = out * _head_factors(scores, probs, sar).to(q.dtype)[:, :, None, None]
    return out.transpose(1, 2)


def _head_factors(scores: Tensor, probs: Tensor, sar: EagerSAR) -> Tensor:
    """c (1, H) from the whole score and probability matrices (1, H, N, N)."""
    if scores.shape[0] != 1:
        raise ArgumentError("q", scores.shape[0], "hold one sample, the eager formulation takes no batch")
    visual, text = sar.visual_mask[0].nonzero()[:, 0], sar.text_mask[0].nonzero()[:, 0]
    alignment_variance = scores[:, :, text][:, :, :, visual].float().var(-1).mean(-1)
    seen = probs[:, :, text][:, :, :, visual].float()
    semantic_alignment = (seen * sar.prior[:, None, None, visual]).sum(-1).mean(-1)
    weights = torch.softmax(alignment_variance * semantic_alignment / sar.beta, dim=-1)
    weights = torch.cat([weights.amax(-1, keepdim=True), weights[:, 1:]], dim=-1)
    return weights.shape[-1] * weights
