"""Small calls on a CPU, where calls into PyTorch cost more than arithmetic: all heads and samples at once.

To a kernel a batch is one sequence that has the heads of all its samples. The statistics come from the scores of the
text queries against all keys, one block for the batch: a softmax of its own leaves nothing to be asked of the kernel.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sar_fast.backends.blocks import within
from sar_fast.backends.sequence import Sequence, dense_last
from sar_fast.values import Call

_SAMPLE = 1 << 18  # entries of one sample, whoever is beside it; beyond them arithmetic is what costs
_BLOCK_BYTES = 8 << 20
_ROWS = 16  # text queries are padded to a multiple
_WIDE = torch.float64  # here digits cost next to nothing


def is_small(call: Call) -> bool:
    """Whether each sample of a dense call is so small that its statistics are computed here."""
    if call.q.dtype not in (torch.float32, torch.float64) or call.q.device.type != "cpu":
        return False
    _, Sq, H, _ = call.q.shape
    _, Sk, Hkv, _ = call.k.shape
    return call.q.numel() > 0 and Sk > 0 and max(H * Sq * Sk, Hkv * Sk * call.head_dim) <= _SAMPLE


def runs_at_once(call: Call) -> bool:
    """Whether one kernel call may attend for all samples, and give each the bits that it would get alone.

    In half precision the kernel's blocks depend on the batch. So does whether an element meets the vector or
    the scalar form of exp and tanh, which merged calls and soft-caps apply to whole tensors.
    """
    Sq, Sk, scores = call.q.shape[1], call.k.shape[1], call.scores
    merged = scores.causal and Sq not in (1, Sk)
    listed = call.attn_mask is not None or call.bounds.given
    return not (call.packed or listed or merged or scores.softcap) and is_small(call)


def side_by_side(call: Call) -> Sequence:
    """The samples of a dense call as one sequence of B * H heads, without roles."""
    q, k, v = (dense_last(x).transpose(0, 1).flatten(1, 2) for x in (call.q, call.k, call.v))  # [S, B * heads, D]
    valid = call.key_padding_mask
    valid = None if valid is None else valid.T.repeat_interleave(call.k.shape[2], dim=1)
    return Sequence(q, k, v, call.scores, key_valid=valid)


def statistics_sums(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the counted text queries: variance and alignment (B, H), and their count (B,), in fp32 or fp64."""
    B, Sq, H, _ = call.q.shape
    count = call.roles.text.sum(-1)
    t = min(-(-int(count.max()) // _ROWS) * _ROWS, Sq)
    if t == 0:
        return tuple(call.q.new_zeros(shape, dtype=call.accumulate_dtype) for shape in ((B, H), (B, H), (B,)))
    rows = call.roles.text.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :t]  # [B, t]
    is_text = torch.arange(t) < count[:, None]
    step = max(1, _BLOCK_BYTES // (H * t * call.k.shape[1] * _WIDE.itemsize))
    parts = [_sums_of(call, slice(b, b + step), rows[b : b + step], is_text[b : b + step]) for b in range(0, B, step)]
    return tuple(torch.cat(x) for x in zip(*parts))


def _sums_of(call: Call, samples: slice, rows: Tensor, is_text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`statistics_sums` of b samples, whose text queries are ``rows`` (b, t) where ``is_text``."""
    Hkv, t = call.k.shape[2], rows.shape[1]
    visual, prior = call.roles.visual[samples], call.roles.prior[samples]  # [b, Sk]
    visible = _visible(call, samples, rows)  # [b, t, Sk]
    seen = visible & visual[:, None]
    number = seen.sum(-1)  # [b, t]: |V_i|
    counted = is_text & (number >= 2)

    q = call.q[samples].gather(1, rows[..., None, None].expand(-1, -1, *call.q.shape[2:])).to(_WIDE)
    q = q.unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * call.scores.scale  # [b, Hkv, G * t, D]
    k = call.k[samples].transpose(1, 2).to(_WIDE)  # [b, Hkv, Sk, D]
    share = visual.to(_WIDE) / visual.sum(-1, keepdim=True).clamp_min(1)
    centre = share[:, None, None] @ k  # [b, Hkv, 1, D]: scores about those of the mean key survive a common shift
    s = (q @ (k - centre).mT).unflatten(2, (-1, t))  # [b, Hkv, G, t, Sk]
    if call.scores.softcap > 0:
        s = s.add_((q @ centre.mT).unflatten(2, (-1, t))).div_(call.scores.softcap).tanh_().mul_(call.scores.softcap)

    hidden = ~seen[:, None, None]  # [b, 1, 1, t, Sk]
    mean = s.masked_fill(hidden, 0).sum(-1) / number.clamp_min(1)[:, None, None]  # [b, Hkv, G, t]
    square = (s - mean[..., None]).masked_fill_(hidden, 0).square_().sum(-1)
    variance = square / (number - 1).clamp_min(1)[:, None, None]
    p = s.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
    over_v = torch.where(visual, prior, 0).to(_WIDE)[:, None, None, :, None]
    alignment = (p @ over_v)[..., 0]  # [b, Hkv, G, t]
    total = lambda x: torch.where(counted[:, None, None], x, 0).sum(-1).flatten(1)  # [b, H]
    return tuple(x.to(call.accumulate_dtype) for x in (total(variance), total(alignment), counted.sum(-1)))


def _visible(call: Call, samples: slice, rows: Tensor) -> Tensor:
    """(b, t, Sk) bool: which keys the queries ``rows`` (b, t) may see."""
    (b, t), Sq, Sk = rows.shape, call.q.shape[1], call.k.shape[1]
    key = torch.arange(Sk)
    parts = [torch.ones(b, t, Sk, dtype=torch.bool), *within(call.scores, rows[..., None] + (Sk - Sq), key)]
    own = lambda x: (x if x.shape[0] == 1 else x[samples]).expand(b, *x.shape[1:])
    first, end = (None if x is None else own(x).gather(1, rows)[..., None] for x in call.bounds)
    if first is not None:
        parts.append(key >= first)
    if end is not None:
        parts.append(key < end)
    if call.key_padding_mask is not None:
        parts.append(call.key_padding_mask[samples, None])
    if call.attn_mask is not None:
        parts.append(own(call.attn_mask[:, 0]).gather(1, rows[..., None].expand(-1, -1, Sk)))
    return functools.reduce(torch.logical_and, parts)
