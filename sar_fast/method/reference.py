"""The oracle: SAR attention in eager PyTorch, every tensor materialised.

Written to be read beside docs/method.md, with the same symbols in the same order. Runs in any float dtype; in fp64 it
is what every backend is measured against, in the input dtype it gives the error that a backend is allowed (method.md,
section 5). Used by tests and benchmarks only; no backend imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.method import validation
from sar_fast.method.state import SARStats
from sar_fast.method.value_checks import check_prior_values
from sar_fast.method.values import Statistics
from sar_fast.method.weighting.protocol import Weighting, head_weights
from sar_fast.method.weighting.softmax import SoftmaxOverHeads, choose_weighting


def sar_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    beta: float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    protect_first_head: bool | None = None,
    normalize: str | None = None,
    weighting: Weighting | None = None,
    sav_grad: bool = False,
    return_stats: bool = False,
    attn_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, SARStats]:
    """SAR attention, O(Sq * Sk) memory. Arguments and returns as :func:`sar_fast.sar_attn_func`, in q's dtype.

    Every query's statistics are computed in q's dtype; their means over T and the weights in fp32 at least, fp64 for
    fp64 input, as they are returned.
    """
    validation.check_qkv(q, k, v)
    validation.check_roles(visual_mask, text_mask, prior, q, k, key_padding_mask=key_padding_mask, attn_mask=attn_mask)
    if not prior.requires_grad:  # finite differences step below zero
        check_prior_values(prior)
    rule = choose_weighting(weighting, beta, protect_first_head, normalize)
    scores = validation.make_scores(
        q, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap
    )
    causal, (left, right), softcap = scores.causal, scores.window, scores.softcap
    sav_grad = validation.check_flag("sav_grad", sav_grad)
    return_stats = validation.check_flag("return_stats", return_stats)
    B, Sq, H, _ = q.shape
    Sk, Hkv = k.shape[1], k.shape[2]
    scale, dtype = scores.scale, q.dtype

    # head h reads kv head h // (H // Hkv)
    k_h = k.repeat_interleave(H // Hkv, dim=2)  # [B, Sk, H, D]
    v_h = v.repeat_interleave(H // Hkv, dim=2)  # [B, Sk, H, Dv]

    # which keys query i may see
    i = torch.arange(Sq, device=q.device)[:, None] + (Sk - Sq)  # position of query i among the keys, bottom-right
    j = torch.arange(Sk, device=q.device)[None, :]
    sees = torch.ones(B, 1, Sq, Sk, dtype=torch.bool, device=q.device)
    if causal:
        sees = sees & (j <= i)
    if left >= 0:
        sees = sees & (j >= i - left)
    if right >= 0:
        sees = sees & (j <= i + right)
    if key_padding_mask is not None:
        sees = sees & key_padding_mask[:, None, None, :]
    if attn_mask is not None:
        sees = sees & attn_mask

    # s_ij: what softmax sees. Products take 0 for what is not finite (0 * NaN is NaN); where it is seen, it `shows`
    finite = lambda x: torch.where(x.isfinite(), x, 0)
    shows = lambda seen: torch.where(seen, torch.nan, 1).to(dtype)
    bad_q, bad_k = ((~x.isfinite()).any(-1).transpose(1, 2) for x in (q, k_h))  # [B, H, Sq], [B, H, Sk]
    s = scale * torch.einsum("bihd,bjhd->bhij", finite(q), finite(k_h))  # [B, H, Sq, Sk]
    s = s * shows((bad_q[..., None] | bad_k[:, :, None, :]) & sees)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)

    # p_ij: softmax over all keys that query i may see; a query that sees nothing gives 0
    sees_any = sees.any(-1, keepdim=True)  # [B, 1, Sq, 1]
    s_seen = torch.where(sees_any, s.masked_fill(~sees, -torch.inf), 0)
    lse = torch.logsumexp(s_seen, dim=-1)  # [B, H, Sq]
    p = torch.where(sees, torch.softmax(s_seen, dim=-1), 0)
    attention = torch.einsum("bhij,bjhd->bihd", p, finite(v_h))  # [B, Sq, H, Dv]
    sees_bad = torch.einsum("bij,bjhd->bihd", sees[:, 0].to(dtype), (~v_h.isfinite()).to(dtype)) > 0
    attention = attention * shows(sees_bad)

    # V_i, and the queries that count: in T, with |V_i| >= 2
    V_i = sees & visual_mask[:, None, None, :]  # [B, 1, Sq, Sk]
    n = V_i.sum(-1)  # [B, 1, Sq]
    counts = text_mask[:, None, :] & (n >= 2)  # [B, 1, Sq]
    T = counts.sum(-1)  # [B, 1]
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    # AV_h = mean over i in T of the unbiased variance of s_ij over V_i
    mean = torch.where(V_i, s, 0).sum(-1, keepdim=True) / n.clamp_min(1)[..., None]
    var = (torch.where(V_i, s - mean, 0) ** 2).sum(-1) / (n - 1).clamp_min(1)  # [B, H, Sq]
    AV = torch.where(counts, var, 0).to(stats_dtype).sum(-1) / T.clamp_min(1)  # [B, H]

    # SA_h = mean over i in T of sum over V_i of p_ij * prior_j
    prior_V = torch.where(visual_mask, prior, 0).to(dtype)
    sa = torch.where(V_i, p * prior_V[:, None, None, :], 0).sum(-1)  # [B, H, Sq]
    SA = torch.where(counts, sa, 0).to(stats_dtype).sum(-1) / T.clamp_min(1)  # [B, H]

    # weights: the paper's rule, or the one that is asked for
    SAV = AV * SA
    if type(rule) is SoftmaxOverHeads:
        x = SAV - SAV.amax(-1, keepdim=True)  # the same softmax; SAV / beta itself may overflow
        if rule.normalize == "standardize":
            std = SAV.std(dim=-1, correction=0, keepdim=True) if H > 1 else torch.zeros_like(SAV)
            flat = std == 0  # heads that all agree stay equal
            x = torch.where(flat, 0, x) / torch.where(flat, 1, std)
        w = torch.softmax(x / rule.beta, dim=-1)  # [B, H]
        if rule.protect_first_head:
            w = torch.cat([w.amax(-1, keepdim=True), w[:, 1:]], dim=-1)
        c = torch.where(T > 0, H * w, 1)
        c = c if sav_grad else c.detach()
    else:
        given = Statistics(AV, SA, T[:, 0].to(stats_dtype))
        c = head_weights(rule, given if sav_grad else Statistics(*(t.detach() for t in given)), None)

    out = c.to(dtype)[:, None, :, None] * attention
    if not return_stats:
        return out
    lse = torch.where(sees_any[..., 0], lse, -torch.inf)
    fields = (t.to(stats_dtype) for t in (lse, AV, SA, SAV, c, T[:, 0]))
    return out, SARStats(*fields, backend="reference")
