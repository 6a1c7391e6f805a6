"""Backend ``"torch"``: public PyTorch API only, every option, every device and float dtype.

The output comes from ``scaled_dot_product_attention``, on blocks of query rows wherever one call would need a mask over
all rows or has no fused kernel; soft-capping, which SDPA lacks, is computed block by block. The log-sum-exp is computed
only where it is needed. Backward recomputes blocks of rows from the log-sum-exp. Memory: one (rows, Sk) block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends.blocks import row_blocks, scores, sees
from sar_fast.backends.protocol import Request
from sar_fast.backends.sequence import Sequence

_FUSED_DTYPES = {"cpu": {torch.float16, torch.bfloat16, torch.float32, torch.float64}}
_FUSED_DTYPES_DEVICE = {torch.float16, torch.bfloat16, torch.float32}


def unsupported(request: Request) -> str | None:
    """Why such a call cannot run here, or None: this backend runs everything."""
    return None


def attention(seq: Sequence, *, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Plain attention of one sequence.

    Returns:
        out (Sq, H, Dv) in the input dtype, 0 for rows that see nothing, and lse (H, Sq) or None.
    """
    Sq, H, _ = seq.q.shape
    Dv = seq.v.shape[-1]
    if Sq == 0 or seq.k.shape[0] == 0:
        lse = seq.q.new_full((H, Sq), -torch.inf, dtype=seq.accumulate_dtype) if need_lse else None
        return seq.q.new_zeros(Sq, H, Dv), lse
    if _one_fused_call(seq):
        out = _sdpa(seq.q, seq.k, seq.v, seq.scores.scale, causal=seq.scores.causal and Sq > 1)
    else:
        out = seq.q.new_empty(Sq, H, Dv)
        for rows, key_range in row_blocks(seq):
            _attend_rows(seq, rows, key_range, out)
    return out, log_sum_exp(seq) if need_lse else None


def log_sum_exp(seq: Sequence, text_rows: Tensor | None = None) -> Tensor:
    """(H, r) natural log-sum-exp of every query, or of ``text_rows`` (r,) int64; -inf where nothing is visible."""
    H = seq.q.shape[1]
    count = seq.q.shape[0] if text_rows is None else text_rows.numel()
    lse = torch.full((H, count), -torch.inf, dtype=seq.accumulate_dtype, device=seq.q.device)
    at = 0
    for rows, key_range in row_blocks(seq, text_rows):
        s = scores(seq, rows, key_range)
        lse[:, at : at + rows.numel()] = torch.logsumexp(s, dim=-1).view(H, -1)
        at += rows.numel()
    return lse


def attention_backward(
    seq: Sequence,
    grad_out: Tensor,
    out: Tensor,
    c: Tensor,
    lse: Tensor,
    extra_delta: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add the gradients of scaled attention to dq, dk, dv (accumulate dtype, shapes of q, k, v).

    Args:
        grad_out: (Sq, H, Dv) gradient of the scaled output ``out``; ``delta = sum_d grad_out * out`` needs no c.
        c: (H,) head weights. lse: (H, Sq). extra_delta: (H, Sq) addition to delta, or None.
    """
    H, Hkv = seq.q.shape[1], seq.k.shape[1]
    G, acc = H // Hkv, seq.accumulate_dtype
    for rows, (k0, k1) in row_blocks(seq, copies=3):
        i0, i1 = int(rows[0]), int(rows[-1]) + 1
        s = scores(seq, rows, (k0, k1))  # [Hkv, G, r, n]
        row_lse = lse[:, i0:i1].view(Hkv, G, -1, 1)
        p = torch.exp(s - torch.where(row_lse.isinf(), 0, row_lse))  # dead rows: exp(-inf) = 0
        g = grad_out[i0:i1].to(acc)  # [r, H, Dv]
        delta = (g * out[i0:i1].to(acc)).sum(-1).T  # [H, r]
        if extra_delta is not None:
            delta = delta + extra_delta[:, i0:i1]
        g = (g * c[:, None].to(acc)).view(-1, Hkv, G, g.shape[-1])
        v = seq.v[k0:k1].to(acc)
        hidden = None
        if seq.marks is not None:  # a row that is NaN must not reach the keys that it does not see
            hidden = torch.isneginf(s)
            p.masked_fill_(hidden, 0)
        dv[k0:k1] += torch.einsum("kgrn,rkgd->nkd", p, g)
        dp = torch.einsum("rkgd,nkd->kgrn", g, v)
        if seq.marks is not None:
            dp.masked_fill_(seq.marks.v[k0:k1].any(-1).T[:, None, None, :], torch.nan)
        ds = p * (dp - delta.view(Hkv, G, -1, 1))
        if seq.scores.softcap > 0:
            ds = torch.where(p == 0, 0, ds * (1 - (s / seq.scores.softcap).square()))
        if hidden is not None:
            ds.masked_fill_(hidden, 0)
        ds = ds * seq.scores.scale
        k = seq.k[k0:k1].to(acc)
        q = seq.q[i0:i1].to(acc).view(-1, Hkv, G, seq.q.shape[-1])
        dq[i0:i1] += torch.einsum("kgrn,nkd->rkgd", ds, k).reshape(i1 - i0, H, -1)
        dk[k0:k1] += torch.einsum("kgrn,rkgd->nkd", ds, q)


def _one_fused_call(seq: Sequence) -> bool:
    """One SDPA call without a mask, on a device whose SDPA has a fused kernel for it."""
    Sq, Sk, device = seq.q.shape[0], seq.k.shape[0], seq.q.device.type
    return (
        seq.scores.softcap == 0
        and not seq.scores.windowed
        and seq.marks is None
        and seq.key_valid is None
        and seq.mask is None
        and seq.first is None
        and seq.end is None
        and (not seq.scores.causal or Sq in (1, Sk))
        and seq.q.shape[-1] == seq.v.shape[-1]
        and seq.q.dtype in _FUSED_DTYPES.get(device, _FUSED_DTYPES_DEVICE)
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """SDPA of one sequence in (S, H, D) layout; heads of a group share their kv head without a copy."""
    Sq, H, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    q = q.view(Sq, Hkv, G, D).permute(1, 2, 0, 3)  # [Hkv, G, Sq, D]
    k, v = (x.transpose(0, 1)[:, None].expand(Hkv, G, x.shape[0], x.shape[-1]) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(Sq, H, v.shape[-1])


def _attend_rows(seq: Sequence, rows: Tensor, key_range: tuple[int, int], out: Tensor) -> None:
    """Plain attention of one block of rows into ``out``."""
    i0, i1 = int(rows[0]), int(rows[-1]) + 1
    k0, k1 = key_range
    if k1 <= k0:
        out[i0:i1] = 0
        return
    if seq.scores.softcap > 0 or seq.marks is not None:
        s = scores(seq, rows, key_range)  # [Hkv, G, r, n]
        hidden = torch.isneginf(s)
        p = torch.softmax(s, dim=-1).masked_fill_(hidden, 0)
        o = torch.einsum("kgrn,nkd->rkgd", p, seq.v[k0:k1].to(p.dtype))
        if seq.marks is not None:
            sees_bad = torch.einsum("kgrn,nkd->rkgd", (~hidden).to(p.dtype), seq.marks.v[k0:k1].to(p.dtype))
            o.masked_fill_(sees_bad > 0, torch.nan)
        out[i0:i1] = o.reshape(i1 - i0, seq.q.shape[1], -1).to(out.dtype)
        return
    visible = sees(seq, rows, torch.arange(k0, k1, device=rows.device))
    block = _sdpa(seq.q[i0:i1], seq.k[k0:k1], seq.v[k0:k1], seq.scores.scale, mask=visible)
    if visible is not None:
        dead = ~visible.any(-1)  # [r], or [Hkv, 1, r]
        dead = dead.expand(seq.k.shape[1], seq.q.shape[1] // seq.k.shape[1], -1).flatten(0, 1)
        block = block.masked_fill(dead.T[..., None], 0)
    out[i0:i1] = block
