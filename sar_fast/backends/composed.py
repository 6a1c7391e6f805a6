"""Backend ``"composed"``: the fastest attention kernel that PyTorch ships for the device, plus the T x V block.

Output, log-sum-exp and their gradients come from PyTorch's fused kernels (CPU flash, CUDA FlashAttention-2); the
statistics need only the text-by-visual block (docs/method.md, section 7). Causal attention with more keys than queries
is a full call on the older keys and a square call on the newest, merged by their log-sum-exps, so nothing depends on
how a kernel aligns its causal mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends.blocks import row_blocks, scores
from sar_fast.backends.protocol import Request
from sar_fast.backends.sequence import Sequence
from sar_fast.validation import MAX_HEAD_DIM

_aten = torch.ops.aten
_DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}


def unsupported(request: Request) -> str | None:
    """Why such a call cannot run here, or None. Only what the fused kernels lack is refused."""
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim={request.head_dim}: fused kernels go to {MAX_HEAD_DIM}"
    if request.device.type not in ("cpu", "cuda"):
        return f"PyTorch's fused kernels with a log-sum-exp are for cpu and cuda, not {request.device.type}"
    if request.dtype not in _DTYPES[request.device.type]:
        return f"{request.dtype}: PyTorch's flash kernel for {request.device.type} does not take it"
    if request.scores.softcap > 0:
        return f"softcap={request.scores.softcap}: PyTorch's fused kernels have no soft-capping"
    if request.scores.windowed:
        return f"window_size={request.scores.window}: PyTorch's fused kernels have no sliding window"
    if request.bounded:
        return "visibility: PyTorch's fused kernels know the causal mask alone"
    if request.masked:
        return "attn_mask: a dense mask would be converted to a float tensor of the same shape"
    if request.padded and request.device.type == "cuda":
        return "key_padding_mask: PyTorch's CUDA flash kernels take none (pack the batch and use sar_attn_varlen_func)"
    return None


def attention(seq: Sequence, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Plain attention of one sequence: out (Sq, H, Dv) in the input dtype and lse (H, Sq), -inf for dead rows."""
    Sq, H, _ = seq.q.shape
    Sk, Dv = seq.k.shape[0], seq.v.shape[-1]
    if Sq == 0 or Sk == 0:
        return seq.q.new_zeros(Sq, H, Dv), seq.q.new_full((H, Sq), -torch.inf, dtype=seq.accumulate_dtype)
    out, lse = None, None
    for rows, keys, causal in _calls(seq):
        o, l = _kernel_forward(seq, rows, keys, causal)
        if rows.start > 0:  # queries older than every key see nothing
            o = F.pad(o, (0, 0, 0, 0, rows.start, 0))
            l = F.pad(l, (rows.start, 0), value=-torch.inf)
        out, lse = (o, l) if out is None else _merge(out, lse, o, l)
    return out, lse


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
    """Add the gradients of scaled attention to dq, dk, dv; arguments as in the torch backend.

    The kernel's backward forms ``delta`` from its own inputs, so it gets ``c * grad_out`` and the unscaled output; a
    head whose weight underflowed to 0 contributes 0 whatever its output was.
    """
    if seq.q.shape[0] == 0 or seq.k.shape[0] == 0:
        return
    weight = c[:, None]
    grad = (grad_out * weight).to(grad_out.dtype)
    plain = torch.where(weight == 0, 0, out / torch.where(weight == 0, 1, weight)).to(out.dtype)
    for rows, keys, causal in _calls(seq):
        gq, gk, gv = _kernel_backward(seq, rows, keys, causal, grad, plain, lse)
        dq[rows] += gq
        dk[keys] += gk
        dv[keys] += gv
    if extra_delta is not None:
        _delta_backward(seq, lse, extra_delta, dq, dk)


def _calls(seq: Sequence) -> list[tuple[slice, slice, bool]]:
    """(query rows, keys, causal) of the kernel calls that make up one sequence; causal calls are square."""
    Sq, Sk = seq.q.shape[0], seq.k.shape[0]
    if not seq.scores.causal or (Sq == 1 and Sk >= 1):
        return [(slice(0, Sq), slice(0, Sk), False)]
    past = Sk - Sq
    square = (slice(max(0, -past), Sq), slice(max(0, past), Sk), True)
    return [square] if past <= 0 else [square, (slice(0, Sq), slice(0, past), False)]


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of two disjoint key sets."""
    lse = torch.logaddexp(lse_a, lse_b)
    dead = torch.isneginf(lse)
    part = lambda o, l: o * torch.where(dead, 0, (l - lse).exp()).T[..., None]
    return (part(out_a, lse_a) + part(out_b, lse_b)).to(out_a.dtype), lse


def _padding_bias(seq: Sequence, keys: slice) -> Tensor | None:
    """(1, 1, 1, n) additive mask, broadcast over queries: 0 for real keys, -inf for padding."""
    if seq.key_valid is None:
        return None
    valid = seq.key_valid[keys]
    bias = torch.zeros(valid.shape, dtype=seq.q.dtype, device=seq.q.device)
    return bias.masked_fill_(~valid, -torch.inf)[None, None, None]


def _kernel_inputs(seq: Sequence, rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (Hkv, G, S, D): kv heads are the batch, so that a group shares its keys without a copy."""
    Hkv = seq.k.shape[1]
    G, D, Dv = seq.q.shape[1] // Hkv, seq.q.shape[-1], seq.v.shape[-1]
    width = max(D, Dv)  # the kernel wants one head dim: zeros change neither scores nor kept columns
    q = F.pad(seq.q[rows], (0, width - D)).unflatten(1, (Hkv, G)).permute(1, 2, 0, 3)
    spread = lambda x: x[keys].transpose(0, 1)[:, None].expand(-1, G, -1, -1)
    return q, spread(F.pad(seq.k, (0, width - D))), spread(F.pad(seq.v, (0, width - Dv)))


def _kernel_forward(seq: Sequence, rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
    """One fused call: out (r, H, Dv), lse (H, r)."""
    if seq.q.device.type == "cuda":
        return _cuda_forward(seq, rows, keys, causal)
    q, k, v = _kernel_inputs(seq, rows, keys)
    bias = _padding_bias(seq, keys)
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=seq.scores.scale
    )
    o = o.permute(2, 0, 1, 3).flatten(1, 2)[..., : seq.v.shape[-1]]
    lse = lse.flatten(0, 1).to(seq.accumulate_dtype)
    if seq.key_valid is not None:  # the kernel reports 0 for a row that sees nothing
        lse = lse.masked_fill(_dead_rows(seq, rows, keys, causal), -torch.inf)
    return o, lse


def _dead_rows(seq: Sequence, rows: slice, keys: slice, causal: bool) -> Tensor:
    """(r,) bool: queries of this call that see no real key."""
    seen = seq.key_valid[keys].cumsum(0) if causal else seq.key_valid[keys].sum()[None]
    return (seen == 0).expand(rows.stop - rows.start)


def _kernel_backward(
    seq: Sequence,
    rows: slice,
    keys: slice,
    causal: bool,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (r, H, D), (n, Hkv, D), (n, Hkv, Dv) of one fused call, given the merged out and lse."""
    if seq.q.device.type == "cuda":
        return _cuda_backward(seq, rows, keys, causal, grad, out, lse)
    q, k, v = _kernel_inputs(seq, rows, keys)
    Hkv, G, _, width = q.shape
    D, Dv = seq.q.shape[-1], seq.v.shape[-1]
    group = lambda x: F.pad(x[rows], (0, width - Dv)).unflatten(1, (Hkv, G)).permute(1, 2, 0, 3)
    l = lse[:, rows].unflatten(0, (Hkv, G))
    l = torch.where(l.isinf(), 0, l).contiguous()
    bias = _padding_bias(seq, keys)
    gq, gk, gv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        group(grad), q, k, v, group(out), l, 0.0, causal, attn_mask=bias, scale=seq.scores.scale
    )
    gq = gq.permute(2, 0, 1, 3).flatten(1, 2)[..., :D]
    gk, gv = (x.sum(1, dtype=seq.accumulate_dtype).transpose(0, 1) for x in (gk, gv))
    return gq, gk[..., :D], gv[..., :Dv]


def _cuda_inputs(seq: Sequence, rows: slice, keys: slice) -> tuple[list[Tensor], list]:
    """q, k, v (S, heads, width) of one packed sequence, and the sequence bounds; groups are the kernel's own."""
    width = -(-max(seq.q.shape[-1], seq.v.shape[-1]) // 8) * 8  # one head dim for all, a multiple of 8
    parts = [F.pad(x, (0, width - x.shape[-1])).contiguous() for x in (seq.q[rows], seq.k[keys], seq.v[keys])]
    lengths = [x.shape[0] for x in parts[:2]]
    bounds = [torch.tensor([0, n], dtype=torch.int32, device=seq.q.device) for n in lengths]
    return parts, [*bounds, *lengths]


def _cuda_forward(seq: Sequence, rows: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention-2 on one sequence: out (r, H, Dv), lse (H, r)."""
    parts, bounds = _cuda_inputs(seq, rows, keys)
    out, lse, *_ = _aten._flash_attention_forward(*parts, *bounds, 0.0, causal, False, scale=seq.scores.scale)
    return out[..., : seq.v.shape[-1]], lse.view(seq.q.shape[1], -1)


def _cuda_backward(
    seq: Sequence,
    rows: slice,
    keys: slice,
    causal: bool,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward: gradients (r, H, D), (n, Hkv, D), (n, Hkv, Dv)."""
    parts, bounds = _cuda_inputs(seq, rows, keys)
    D, Dv, width = seq.q.shape[-1], seq.v.shape[-1], parts[0].shape[-1]
    grad, out = (F.pad(x[rows], (0, width - Dv)).contiguous() for x in (grad, out))
    rng = torch.zeros(2, dtype=torch.uint64, device=seq.q.device)  # read only under dropout
    unused = torch.empty(0, device=seq.q.device)
    l = lse[:, rows].contiguous()
    gq, gk, gv = _aten._flash_attention_backward(
        grad, *parts, out, l, *bounds, 0.0, causal, rng, unused, scale=seq.scores.scale
    )
    return gq[..., :D], gk[..., :D], gv[..., :Dv]


def _delta_backward(seq: Sequence, lse: Tensor, extra_delta: Tensor, dq: Tensor, dk: Tensor) -> None:
    """``dS_ij -= p_ij * extra_delta_i`` on the rows where it is not 0: the text queries, against all their keys."""
    acc, (H, Hkv) = seq.accumulate_dtype, (seq.q.shape[1], seq.k.shape[1])
    rows = (extra_delta != 0).any(0).nonzero()[:, 0]
    for block, (k0, k1) in row_blocks(seq, rows, copies=2):
        s = scores(seq, block, (k0, k1))  # [Hkv, G, r, n]
        delta = extra_delta[:, block].view(Hkv, H // Hkv, -1, 1)
        row_lse = lse[:, block].view(Hkv, H // Hkv, -1, 1)
        ds = -seq.scores.scale * delta * torch.exp(s - row_lse)
        q = seq.q[block].to(acc).view(block.numel(), Hkv, H // Hkv, -1)
        dq[block] += torch.einsum("kgrn,nkd->rkgd", ds, seq.k[k0:k1].to(acc)).reshape(block.numel(), H, -1)
        dk[k0:k1] += torch.einsum("kgrn,rkgd->nkd", ds, q)
