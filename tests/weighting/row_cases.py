"""Cases of row statistics, and what they are by eager attention in fp64."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sar_fast.attention.row_statistics import row_statistics
from sar_fast.method.values import Call, Roles, Scores
from sar_fast.method.weighting.rows import Entropy, Mass, Rows, RowStatistic, ScoreSum

SCALE = 0.3


class Peak(RowStatistic):
    """A user's: how much the favourite visual key gets, and nothing of the log-sum-exp's where it is asked first."""

    name = "peak"

    def __call__(self, rows: Rows) -> Tensor:
        return rows.p.amax(-1) * rows.q.square().mean(-1)


def call_of(
    layouts: str = "image two_images text_only one_token",
    Sq: int = 13,
    Sk: int = 13,
    *,
    H: int = 4,
    Hkv: int = 2,
    dtype: torch.dtype = torch.float64,
    padding: bool = False,
    dense_mask: bool = False,
    seed: int = 0,
    **scores,
) -> Call:
    """One sample per layout: keys 0 and 6 are text before and between pictures."""
    g = torch.Generator().manual_seed(seed)
    layouts = layouts.split()
    B, D = len(layouts), 5
    q, k = (
        torch.randn(B, S, heads, D, generator=g, dtype=torch.float64).to(dtype) for S, heads in ((Sq, H), (Sk, Hkv))
    )
    visual, text = torch.zeros(B, Sk, dtype=torch.bool), torch.zeros(B, Sq, dtype=torch.bool)
    for b, layout in enumerate(layouts):
        spans = {"image": [(1, 8)], "two_images": [(1, 6), (7, 9)], "text_only": [], "one_token": [(3, 4)]}[layout]
        for first, end in spans:
            visual[b, first:end] = True
        if spans:  # also the queries between pictures, which see only the first
            text[b] = torch.arange(Sq) + Sk - Sq >= 6
            text[b, : max(0, Sq - Sk)] = True  # older than every key
            text[b, max(0, Sq - Sk) :] &= ~visual[b, max(0, Sk - Sq) :]
    masks = {}
    if padding:
        masks["key_padding_mask"] = torch.rand(B, Sk, generator=g) > 0.25
    if dense_mask:
        masks["attn_mask"] = torch.rand(B, 1, Sq, Sk, generator=g) > 0.4
    prior = visual / visual.sum(-1, keepdim=True).clamp_min(1)
    return Call(q, k, k, Scores(SCALE, **scores), Roles(visual, text, prior), **masks)


def box_of(call: Call) -> Tensor:
    """Some of the keys, visual or not."""
    return torch.rand(call.k.shape[:-2], generator=torch.Generator().manual_seed(5)) < 0.5


def eager_attention(call: Call, b: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (H, Sq, Sk) of sample ``b`` with -inf at hidden keys, and lse (H, Sq), in fp64 with every entry there."""
    q, k = q[b].double(), k[b].double().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    i, j = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], torch.arange(k.shape[0])
    left, right = call.scores.window
    sees = (j <= i) if call.scores.causal else torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    sees = sees & (j >= i - left) if left >= 0 else sees
    sees = sees & (j <= i + right) if right >= 0 else sees
    if call.key_padding_mask is not None:
        sees = sees & call.key_padding_mask[b]
    if call.attn_mask is not None:
        sees = sees & call.attn_mask[b, 0]
    s = call.scores.scale * torch.einsum("ihd,jhd->hij", q, k)
    if call.scores.softcap:
        s = call.scores.softcap * torch.tanh(s / call.scores.softcap)
    s = s.masked_fill(~sees, -torch.inf)
    dead = ~sees.any(-1)
    lse = torch.logsumexp(s.masked_fill(dead[:, None], 0), -1).masked_fill(dead, -torch.inf)
    return s, lse


def eager(call: Call, q: Tensor, k: Tensor, box: Tensor) -> Tensor:
    """(B, R, H) of ``asked``: written from the definitions, a row at a time."""
    found = []
    for b in range(q.shape[0]):
        s, lse = eager_attention(call, b, q, k)
        sums = []
        for i in range(q.shape[1]):
            seen = call.roles.visual[b] & ~s[0, i].isneginf()
            if not call.roles.text[b, i] or seen.sum() < 2:
                continue
            s_i = s[:, i, seen]
            p = torch.exp(s_i - lse[:, i, None])
            r = p / p.sum(-1, keepdim=True)
            peak = p.amax(-1) * q[b, i].double().square().mean(-1)
            values = [p.sum(-1), p[:, box[b, seen]].sum(-1), -(r * r.log()).sum(-1), s_i.sum(-1), s_i.sum(-1), peak]
            sums.append(torch.stack(values))  # [R, H]
        if not sums:
            found.append(q.new_zeros(len(asked(box)), q.shape[2], dtype=torch.float64))
            continue
        total = torch.stack(sums).sum(0)
        total[3] = sums[-1][3]  # of the last counted query alone
        found.append(total)
    return torch.stack(found)


def asked(box: Tensor) -> tuple[RowStatistic, ...]:
    return Mass(), Mass(box, name="box"), Entropy(), ScoreSum(), ScoreSum(name="all", queries="text"), Peak()


def lse_of(call: Call) -> Tensor:
    """As a backend gives it: (B, H, Sq), in the accumulate dtype."""
    lse = torch.stack([eager_attention(call, b, call.q, call.k)[1] for b in range(call.batch_size)])
    return lse.detach().to(call.accumulate_dtype)


def gradient_of(sums: Tensor) -> Tensor:
    return torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def differentiated(call: Call, statistics, grad: Tensor | None = None, backend: str = "torch"):
    """(sums, dq, dk) for the gradient ``grad`` of the sums."""
    call = dataclasses.replace(call, q=call.q.detach().requires_grad_(), k=call.k.detach().requires_grad_())
    sums = row_statistics(call, lse_of(call), statistics, backend, differentiable=True)
    grad = (
        torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if grad is None
        else grad
    )
    sums.backward(grad.to(sums.dtype))
    return sums.detach(), call.q.grad, call.k.grad


def eagerly_differentiated(call: Call, box: Tensor):
    q, k = (x.detach().double().requires_grad_() for x in (call.q, call.k))
    sums = eager(call, q, k, box)
    dq, dk = torch.autograd.grad(sums, (q, k), gradient_of(sums))
    return sums.detach(), dq, dk


def packed(call: Call, lse: Tensor) -> tuple[Call, Tensor]:
    """The same samples one after another."""
    B, Sq, Sk = call.batch_size, call.q.shape[1], call.k.shape[1]
    ends = [torch.arange(B + 1, dtype=torch.int32) * S for S in (Sq, Sk)]
    q, k, *roles = (x.flatten(0, 1) for x in (call.q, call.k, *call.roles))
    flat = Call(q, k, k, call.scores, Roles(*roles), None, None, *ends, (Sq, Sk))
    return flat, lse.transpose(0, 1).flatten(1)


PATTERNS = {
    "causal": {},
    "all see all": {"causal": False},
    "one head each": {"H": 3, "Hkv": 3},
    "one kv head": {"H": 6, "Hkv": 1},
    "padded": {"padding": True},
    "dense mask": {"dense_mask": True, "causal": False},
    "window": {"window": (6, -1)},
    "window to both sides": {"window": (7, 2), "causal": False},
    "softcap": {"softcap": 0.7},
    "softcap, padded, window": {"softcap": 0.7, "padding": True, "window": (8, -1)},
    "fewer queries": {"Sq": 5},
    "one query": {"Sq": 1},
    "more queries": {"Sq": 17},
}
