"""Small calls on a CPU, where calls into PyTorch cost more than arithmetic: all heads and samples at once.

To a kernel a batch is one sequence that has the heads of all its samples. The statistics come from the scores of the
text queries against all keys, one block for the batch: a softmax of its own leaves nothing to be asked of the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.backends.batched import block_sums
from sar_fast.backends.sequence import Sequence, dense_last
from sar_fast.method.values import Call

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
    part = lambda b: block_sums(call, slice(b, b + step), rows[b : b + step], is_text[b : b + step], _WIDE)
    parts = [tuple(x.to(call.accumulate_dtype) for x in part(b)) for b in range(0, B, step)]
    return tuple(torch.cat(x) for x in zip(*parts))
