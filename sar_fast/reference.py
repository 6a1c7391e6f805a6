"""The oracle: SAR attention in eager PyTorch, every tensor materialised.

Written to be read beside docs/method.md, with the same symbols in the same order. Runs in any float dtype; in fp64 it
is what every backend is measured against, in the input dtype it gives the error that a backend is allowed (method.md,
section 5). Used by tests and benchmarks only; no backend imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.types import SARStats


def sar_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float = 0.5,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool = True,
    normalize: str = "none",
    sav_grad: bool = False,
    return_stats: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """SAR attention, O(Sq * Sk) memory. Arguments and returns as :func:`sar_fast.sar_attn_func`, in q's dtype.

    Statistics are computed in q's dtype and returned as fp64 for fp64 input, fp32 otherwise.
    """
    B, Sq, H, D = q.shape
    Sk, Hkv = k.shape[1], k.shape[2]
    scale = D**-0.5 if softmax_scale is None else softmax_scale
    dtype = q.dtype

    # head h reads kv head h // (H // Hkv)
    k_h = k.repeat_interleave(H // Hkv, dim=2)  # [B, Sk, H, D]
    v_h = v.repeat_interleave(H // Hkv, dim=2)  # [B, Sk, H, Dv]

    # s_ij: what softmax sees
    s = scale * torch.einsum("bihd,bjhd->bhij", q, k_h)  # [B, H, Sq, Sk]
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)

    # which keys query i may see
    i = torch.arange(Sq, device=q.device)[:, None] + (Sk - Sq)  # position of query i among the keys, bottom-right
    j = torch.arange(Sk, device=q.device)[None, :]
    sees = torch.ones(B, 1, Sq, Sk, dtype=torch.bool, device=q.device)
    if causal:
        sees = sees & (j <= i)
    left, right = window_size
    if left >= 0:
        sees = sees & (j >= i - left)
    if right >= 0:
        sees = sees & (j <= i + right)
    if key_padding_mask is not None:
        sees = sees & key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        sees = sees & attn_mask

    # p_ij: softmax over all keys that query i may see; a query that sees nothing gives 0
    sees_any = sees.any(-1, keepdim=True)  # [B, 1, Sq, 1]
    s_seen = torch.where(sees_any, s.masked_fill(~sees, -torch.inf), 0)
    lse = torch.logsumexp(s_seen, dim=-1)  # [B, H, Sq]
    p = torch.softmax(s_seen, dim=-1) * sees_any
    attention = torch.einsum("bhij,bjhd->bihd", p, v_h)  # [B, Sq, H, Dv]

    # V_i, and the queries that count: in T, with |V_i| >= 2
    V_i = sees & visual_mask[:, None, None, :]  # [B, 1, Sq, Sk]
    n = V_i.sum(-1)  # [B, 1, Sq]
    counts = text_mask[:, None, :] & (n >= 2)  # [B, 1, Sq]
    T = counts.sum(-1)  # [B, 1]

    # AV_h = mean over i in T of the unbiased variance of s_ij over V_i
    mean = (s * V_i).sum(-1, keepdim=True) / n.clamp_min(1)[..., None]
    var = (((s - mean) * V_i) ** 2).sum(-1) / (n - 1).clamp_min(1)  # [B, H, Sq]
    AV = (var * counts).sum(-1) / T.clamp_min(1)  # [B, H]

    # SA_h = mean over i in T of sum over V_i of p_ij * prior_j
    sa = (p * V_i * prior.to(dtype)[:, None, None, :]).sum(-1)  # [B, H, Sq]
    SA = (sa * counts).sum(-1) / T.clamp_min(1)  # [B, H]

    # weights
    SAV = AV * SA
    x = SAV
    if normalize == "standardize":
        std = SAV.std(dim=-1, correction=0, keepdim=True) if H > 1 else torch.zeros_like(SAV)
        flat = std == 0  # heads that all agree stay equal
        x = torch.where(flat, 0, SAV - SAV.mean(-1, keepdim=True)) / torch.where(flat, 1, std)
    w = torch.softmax(x / beta, dim=-1)  # [B, H]
    if protect_first_head:
        w = torch.cat([w.amax(-1, keepdim=True), w[:, 1:]], dim=-1)
    c = torch.where(T > 0, H * w, 1)

    out = (c if sav_grad else c.detach())[:, None, :, None] * attention
    if not return_stats:
        return out
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.where(sees_any[..., 0], lse, -torch.inf)
    fields = (t.to(stats_dtype) for t in (lse, AV, SA, SAV, c, T[:, 0]))
    return out, SARStats(*fields, backend="reference")
