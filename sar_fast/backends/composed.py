"""Backend ``"composed"``: the fastest attention kernel that PyTorch ships for the device, plus the T x V block.

Output, log-sum-exp and their gradients come from PyTorch's fused kernels (CPU flash; CUDA FlashAttention-2 where Triton
is not installed, else :mod:`.whole_batch` runs there); the statistics need only the text-by-visual block
(docs/method.md, section 7). Causal attention with more keys than queries is a full call on the older keys and a square
call on the newest, merged by their log-sum-exps, so nothing depends on how a kernel aligns its causal mask. Where
queries see a run of keys (windows, chunks, blocks), a call takes a block of queries and the keys that any of them sees,
under a mask of that block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.backends import kernel_calls
from sar_fast.backends.batched import unscale
from sar_fast.backends.blocks import row_blocks, scores, sees
from sar_fast.backends.protocol import Request
from sar_fast.backends.providers.choice import PROVIDERS, refusal
from sar_fast.backends.providers.cpu import CPU_FLASH
from sar_fast.backends.providers.protocol import Provider
from sar_fast.backends.sequence import Sequence
from sar_fast.method.values import Call, Scores

_ROWS = 128  # of a call under a mask: more see keys in vain, fewer leave the kernel too little to do


def _provider(device: torch.device) -> Provider:
    return CPU_FLASH if device.type == "cpu" else PROVIDERS["torch-fa2"]


def unsupported(request: Request) -> str | None:
    """Why such a call cannot run here, or None. Only what the fused kernels lack is refused."""
    device = request.device.type
    if device not in ("cpu", "cuda"):
        return f"PyTorch's fused kernels with a log-sum-exp are for cpu and cuda, not {device}"
    if request.masked:
        return "attn_mask: a dense mask would be converted to a float tensor of the same shape"
    if device == "cpu":
        return CPU_FLASH.unsupported(request)
    if kernel_calls.missing() is None:
        return "a GPU by one sequence after the other, where the Triton kernels are installed"
    if request.scores.windowed or request.bounded or request.padded:
        return "windows, visibility and padding on cuda: only the CPU kernel takes the mask that they need here"
    # pieces of a call are square, or see all of their keys
    return refusal(PROVIDERS["torch-fa2"], dataclasses.replace(request, square=True, packed=False))


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
            out[piece.rows], lse[:, piece.rows] = _piece_forward(seq, piece)
        return out, lse
    out, lse = None, None
    for piece in _pieces(seq):
        o, l = _piece_forward(seq, piece)
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

    The kernel's backward forms ``delta`` from its own inputs, so it gets ``c * grad_out`` and the unscaled output.
    """
    if seq.q.shape[0] == 0 or seq.k.shape[0] == 0:
        return
    grad, plain = unscale(grad_out, out, c[:, None])
    for piece in _row_pieces(seq) if _limited(seq) else _pieces(seq):
        gq, gk, gv = _piece_backward(seq, piece, grad, plain, lse)
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


def _piece_call(seq: Sequence, piece: _Piece) -> Call:
    """A piece as a dense call of one sample."""
    q, k, v = seq.q[piece.rows][None], seq.k[piece.keys][None], seq.v[piece.keys][None]
    seen = piece.visible
    seen = None if seen is None else seen[None, None] if seen.dim() == 2 else seen.transpose(0, 1)
    return Call(q, k, v, Scores(seq.scores.scale, piece.causal), attn_mask=seen)


def _piece_forward(seq: Sequence, piece: _Piece) -> tuple[Tensor, Tensor]:
    """out (r, H, Dv) and lse (H, r) of one fused call."""
    out, lse = _provider(seq.q.device).forward(_piece_call(seq, piece))
    return out[0], lse[0]


def _piece_backward(
    seq: Sequence, piece: _Piece, grad: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (r, H, D), (n, Hkv, D), (n, Hkv, Dv) of one fused call, given the merged out and lse."""
    rows, call = piece.rows, _piece_call(seq, piece)
    given = (grad[rows][None], out[rows][None], lse[:, rows][None].contiguous())
    return tuple(g[0] for g in _provider(seq.q.device).backward(call, *given))


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
