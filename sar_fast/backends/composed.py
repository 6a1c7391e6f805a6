"""Backend ``"composed"``: the fastest attention kernel that PyTorch ships for the device, plus the T x V block.

Output, log-sum-exp and their gradients come from PyTorch's fused kernels (CPU flash, CUDA FlashAttention-2); the
statistics need only the text-by-visual block (docs/method.md, section 7). Causal attention with more keys than queries
is a full call on the older keys and a square call on the newest, merged by their log-sum-exps, so nothing depends on
how a kernel aligns its causal mask. Where queries see a run of keys (windows, chunks, blocks), a call takes a block of
queries and the keys that any of them sees, under a mask of that block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends.blocks import row_blocks, scores, sees
from sar_fast.backends.protocol import Request
from sar_fast.backends.sequence import Sequence
from sar_fast.validation import MAX_HEAD_DIM

_aten = torch.ops.aten
_ROWS = 128  # of a call under a mask: more see keys in vain, fewer leave the kernel too little to do
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
    if request.scores.windowed and request.device.type == "cuda":
        return f"window_size={request.scores.window}: only the CPU kernel takes the mask that a window needs here"
    if request.bounded and request.device.type == "cuda":
        return "visibility: only the CPU kernel takes the mask that it needs here"
    if request.masked:
        return "attn_mask: a dense mask would be converted to a float tensor of the same shape"
    if request.padded and request.device.type == "cuda":
        return "key_padding_mask or cache_leftpad: PyTorch's CUDA flash kernels take none (packed sequences need none)"
    return None


def attention(seq: Sequence, *, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Plain attention of one sequence: out (Sq, H, Dv) in the input dtype and lse (H, Sq), -inf for dead rows."""
    Sq, H, _ = seq.q.shape
    Sk, Dv = seq.k.shape[0], seq.v.shape[-1]
    if Sq == 0 or Sk == 0:
        return seq.q.new_zeros(Sq, H, Dv), seq.q.new_full((H, Sq), -torch.inf, dtype=seq.accumulate_dtype)
    if _limited(seq):
        out = seq.q.new_zeros(Sq, H, Dv)
        lse = seq.q.new_full((H, Sq), -torch.inf, dtype=seq.accumulate_dtype)
        for piece in _row_pieces(seq):
            out[piece.rows], lse[:, piece.rows] = _kernel_forward(seq, piece)
        return out, lse
    out, lse = None, None
    for piece in _pieces(seq):
        o, l = _kernel_forward(seq, piece)
        if piece.rows.start > 0:  # queries older than every key see nothing
            o = F.pad(o, (0, 0, 0, 0, piece.rows.start, 0))
            l = F.pad(l, (piece.rows.start, 0), value=-torch.inf)
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
    for piece in _row_pieces(seq) if _limited(seq) else _pieces(seq):
        gq, gk, gv = _kernel_backward(seq, piece, grad, plain, lse)
        dq[piece.rows] += gq
        dk[piece.keys] += gk
        dv[piece.keys] += gv
    if extra_delta is not None:
        _delta_backward(seq, lse, extra_delta, dq, dk)


class _Piece(NamedTuple):
    """One kernel call of a sequence; causal ones are square."""

    rows: slice
    keys: slice
    causal: bool = False
    visible: Tensor | None = None  # [r or 1, n] bool, or [Hkv, 1, r or 1, n]


def _limited(seq: Sequence) -> bool:
    """Whether queries see less than the causal mask and padding leave."""
    return seq.scores.windowed or seq.first is not None or seq.end is not None


def _pieces(seq: Sequence) -> list[_Piece]:
    """The calls that make up a sequence whose queries see all keys, or all up to their own."""
    Sq, Sk = seq.q.shape[0], seq.k.shape[0]
    if not seq.scores.causal or (Sq == 1 and Sk >= 1):
        parts = [(slice(0, Sq), slice(0, Sk), False)]
    else:
        past = Sk - Sq
        parts = [(slice(max(0, -past), Sq), slice(max(0, past), Sk), True)]
        if past > 0:
            parts.append((slice(0, Sq), slice(0, past), False))
    return [_Piece(*part, _padding(seq, part[1])) for part in parts]


def _padding(seq: Sequence, keys: slice) -> Tensor | None:
    """Which keys are real, as a piece has it."""
    if seq.key_valid is None:
        return None
    valid = seq.key_valid[keys]
    return valid[None] if valid.dim() == 1 else valid.T[:, None, None]


def _row_pieces(seq: Sequence) -> Iterator[_Piece]:
    """The calls that make up a sequence whose queries see runs of keys; every query is in one, or sees nothing."""
    for rows, (k0, k1) in row_blocks(seq, largest=_ROWS):
        if k1 <= k0:
            continue
        visible = sees(seq, rows, torch.arange(k0, k1, device=rows.device))
        yield _Piece(slice(int(rows[0]), int(rows[-1]) + 1), slice(k0, k1), visible=visible)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over the union of two disjoint key sets."""
    lse = torch.logaddexp(lse_a, lse_b)
    dead = torch.isneginf(lse)
    part = lambda o, l: o * torch.where(dead, 0, (l - lse).exp()).T[..., None]
    return (part(out_a, lse_a) + part(out_b, lse_b)).to(out_a.dtype), lse


def _bias(seq: Sequence, visible: Tensor | None) -> Tensor | None:
    """(1 or Hkv, 1, r or 1, n) additive mask of what a piece shows: 0 or -inf."""
    if visible is None:
        return None
    bias = torch.zeros(visible.shape, dtype=seq.q.dtype, device=seq.q.device).masked_fill_(~visible, -torch.inf)
    return bias if bias.dim() == 4 else bias[None, None]


def _kernel_inputs(seq: Sequence, rows: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as (Hkv, G, S, D): kv heads are the batch, so that a group shares its keys without a copy."""
    Hkv = seq.k.shape[1]
    G = seq.q.shape[1] // Hkv
    width = max(seq.q.shape[-1], seq.v.shape[-1])  # the kernel has one: zeros change neither scores nor kept columns
    q = _widened(seq.q[rows], width).unflatten(1, (Hkv, G)).permute(1, 2, 0, 3)
    spread = lambda x: _widened(x[keys], width).transpose(0, 1)[:, None].expand(-1, G, -1, -1)
    return q, spread(seq.k), spread(seq.v)


def _widened(x: Tensor, width: int) -> Tensor:
    """With zeros at the end of the last dimension; F.pad would copy what is wide enough."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _kernel_forward(seq: Sequence, piece: _Piece) -> tuple[Tensor, Tensor]:
    """One fused call: out (r, H, Dv), lse (H, r)."""
    if seq.q.device.type == "cuda":
        return _cuda_forward(seq, piece)
    q, k, v = _kernel_inputs(seq, piece.rows, piece.keys)
    bias = _bias(seq, piece.visible)
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, piece.causal, attn_mask=bias, scale=seq.scores.scale
    )
    o = o.permute(2, 0, 1, 3)[..., : seq.v.shape[-1]]  # [r, Hkv, G, Dv]
    lse = lse.to(seq.accumulate_dtype)
    if piece.visible is not None:  # of a row that sees nothing the kernel reports 0
        lse = lse.masked_fill(_dead_rows(piece), -torch.inf)
    return o.flatten(1, 2), lse.flatten(0, 1)


def _dead_rows(piece: _Piece) -> Tensor:
    """(r or 1,) or (Hkv, 1, r or 1) bool: queries of this call that see no key."""
    if piece.causal:
        return (piece.visible.cumsum(-1) == 0).squeeze(-2)
    return ~piece.visible.any(-1)


def _kernel_backward(
    seq: Sequence, piece: _Piece, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (r, H, D), (n, Hkv, D), (n, Hkv, Dv) of one fused call, given the merged out and lse."""
    if seq.q.device.type == "cuda":
        return _cuda_backward(seq, piece, grad, out, lse)
    q, k, v = _kernel_inputs(seq, piece.rows, piece.keys)
    Hkv, G, _, width = q.shape
    D, Dv = seq.q.shape[-1], seq.v.shape[-1]
    group = lambda x: _widened(x[piece.rows], width).unflatten(1, (Hkv, G)).permute(1, 2, 0, 3)
    l = lse[:, piece.rows].unflatten(0, (Hkv, G))
    l = torch.where(l.isinf(), 0, l).contiguous()
    bias = _bias(seq, piece.visible)
    gq, gk, gv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        group(grad), q, k, v, group(out), l, 0.0, piece.causal, attn_mask=bias, scale=seq.scores.scale
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


def _cuda_forward(seq: Sequence, piece: _Piece) -> tuple[Tensor, Tensor]:
    """PyTorch's FlashAttention-2 on one sequence: out (r, H, Dv), lse (H, r)."""
    parts, bounds = _cuda_inputs(seq, piece.rows, piece.keys)
    out, lse, *_ = _aten._flash_attention_forward(*parts, *bounds, 0.0, piece.causal, False, scale=seq.scores.scale)
    return out[..., : seq.v.shape[-1]], lse.view(seq.q.shape[1], -1)


def _cuda_backward(
    seq: Sequence, piece: _Piece, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward: gradients (r, H, D), (n, Hkv, D), (n, Hkv, Dv)."""
    rows = piece.rows
    parts, bounds = _cuda_inputs(seq, rows, piece.keys)
    D, Dv, width = seq.q.shape[-1], seq.v.shape[-1], parts[0].shape[-1]
    grad, out = (F.pad(x[rows], (0, width - Dv)).contiguous() for x in (grad, out))
    rng = torch.zeros(2, dtype=torch.uint64, device=seq.q.device)  # read only under dropout
    unused = torch.empty(0, device=seq.q.device)
    l = lse[:, rows].contiguous()
    gq, gk, gv = _aten._flash_attention_backward(
        grad, *parts, out, l, *bounds, 0.0, piece.causal, rng, unused, scale=seq.scores.scale
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
