"""Statistics of a dense batch in PyTorch, all samples and heads at once: of small calls on a CPU, and beside another
library's attention on a GPU where Triton is not installed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast.backends.blocks import within
from sar_fast.backends.protocol import Gradients
from sar_fast.backends.weight_gradients import statistics_gradients
from sar_fast.method.tracing import recording
from sar_fast.method.values import Call, Result, Sums
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered

_BLOCK_BYTES = 256 << 20  # of scores that are held at once


def reweighted(call: Call, rule: Lowered, out: Tensor, lse: Tensor) -> Result:
    """As :func:`.kernel_calls.reweighted`, of a dense call; waits for the number of text queries."""
    acc = call.accumulate_dtype
    shapes = (call.batch_size, call.num_heads), (call.batch_size, call.num_heads), (call.batch_size,)
    total = [*call.carried[:3]] if call.carried is not None else [out.new_zeros(shape, dtype=acc) for shape in shapes]
    for rows, is_text in _text_rows(call):
        total = [a + b for a, b in zip(total, block_sums(call, slice(None), rows, is_text, acc))]
    sums = Sums(*total)
    statistics = sums.means()
    c = rule(statistics, None)
    if not isinstance(rule, Equal):
        out = out.mul_(c[:, None, :, None])
    return Result(out, lse, statistics, c, None if call.carried is None else sums)


def unscale(grad: Tensor, out: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight * grad`` and ``out / weight``; where a weight underflowed to 0 the gradient is 0."""
    plain = torch.where(weight == 0, 0, out / torch.where(weight == 0, 1, weight))
    return (grad * weight).to(grad.dtype), plain.to(out.dtype)


def unscaled(call: Call, grad: Tensor, out: Tensor, c: Tensor, *, through: bool) -> tuple[Tensor, Tensor, None]:
    """As :func:`.kernel_calls.unscaled`."""
    return *unscale(grad, out, c[:, None, :, None]), None


def statistics_backward(
    call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients, kept: None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`.kernel_calls.statistics_backward`: autograd of one block of text queries after the other."""
    acc = call.accumulate_dtype
    incoming = statistics_gradients(call, rule, grad_out, result, through)
    leaves = [x.detach().to(acc).requires_grad_() for x in (call.q, call.k, call.roles.prior)]
    call = dataclasses.replace(call, q=leaves[0], k=leaves[1], roles=call.roles._replace(prior=leaves[2]))
    total = [torch.zeros_like(x) for x in leaves]
    for rows, is_text in _text_rows(call):
        with recording():
            found = block_sums(call, slice(None), rows, is_text, acc)[:2]
        for into, grad in zip(total, torch.autograd.grad(found, leaves, incoming)):
            into += grad
    return tuple(total)


def _text_rows(call: Call) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of every sample's text queries, (B, t) indices, and which of them are text queries."""
    B, _, H, _ = call.q.shape
    count = call.roles.text.sum(-1)
    longest = int(count.max()) if count.numel() else 0
    rows = call.roles.text.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :longest]
    is_text = torch.arange(longest, device=rows.device) < count[:, None]
    step = max(16, _BLOCK_BYTES // (4 * B * H * max(1, call.k.shape[1])))
    for first in range(0, longest, step):
        yield rows[:, first : first + step], is_text[:, first : first + step]


def block_sums(
    call: Call, samples: slice, rows: Tensor, is_text: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the counted queries of ``rows`` (b, t), where they are ``is_text``, of b samples of a dense call:
    variance and alignment (b, H) in ``dtype``, and their count (b,). Differentiable in q, k and the prior."""
    Hkv, t = call.k.shape[2], rows.shape[1]
    visual, prior = call.roles.visual[samples], call.roles.prior[samples]  # [b, Sk]
    visible = _visible(call, samples, rows)  # [b, t, Sk]
    seen = visible & visual[:, None]
    number = seen.sum(-1)  # [b, t]: |V_i|
    counted = is_text & (number >= 2)

    q = call.q[samples].gather(1, rows[..., None, None].expand(-1, -1, *call.q.shape[2:])).to(dtype)
    q = q.unflatten(2, (Hkv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3) * call.scores.scale  # [b, Hkv, G * t, D]
    k = call.k[samples].transpose(1, 2).to(dtype)  # [b, Hkv, Sk, D]
    share = visual.to(dtype) / visual.sum(-1, keepdim=True).clamp_min(1)
    # scores about those of the mean key survive a common shift; nothing depends on which key it is
    centre = (share[:, None, None] @ k).detach()  # [b, Hkv, 1, D]
    s = (q @ (k - centre).mT).unflatten(2, (-1, t))  # [b, Hkv, G, t, Sk]
    if call.scores.softcap > 0:
        s = s.add_((q @ centre.mT).unflatten(2, (-1, t))).div_(call.scores.softcap).tanh_().mul_(call.scores.softcap)

    hidden = ~seen[:, None, None]  # [b, 1, 1, t, Sk]
    mean = s.masked_fill(hidden, 0).sum(-1) / number.clamp_min(1)[:, None, None]  # [b, Hkv, G, t]
    square = (s - mean[..., None]).masked_fill_(hidden, 0).square_().sum(-1)
    variance = square / (number - 1).clamp_min(1)[:, None, None]
    if s.requires_grad:  # a row that sees nothing counts nowhere, but its NaN would
        visible = visible | ~visible.any(-1, keepdim=True)
    p = s.masked_fill_(~visible[:, None, None], -torch.inf).softmax(-1)
    over_v = torch.where(visual, prior, 0).to(dtype)[:, None, None, :, None]
    alignment = (p @ over_v)[..., 0]  # [b, Hkv, G, t]
    total = lambda x: torch.where(counted[:, None, None], x, 0).sum(-1).flatten(1)  # [b, H]
    return total(variance), total(alignment), counted.sum(-1)


def _visible(call: Call, samples: slice, rows: Tensor) -> Tensor:
    """(b, t, Sk) bool: which keys the queries ``rows`` (b, t) may see."""
    (b, t), Sq, Sk = rows.shape, call.q.shape[1], call.k.shape[1]
    key = torch.arange(Sk, device=rows.device)
    parts = [
        torch.ones(b, t, Sk, dtype=torch.bool, device=rows.device),
        *within(call.scores, rows[..., None] + (Sk - Sq), key),
    ]
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
