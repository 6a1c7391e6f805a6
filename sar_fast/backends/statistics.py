"""AV and SA of one sequence from its T x V block, given the log-sum-exp (docs/method.md, section 7).

``p_ij = exp(s_ij - lse_i)`` makes the block of text queries against visual keys enough; no other score is needed.
Keys are centred on their mean in fp32 first, so the variance survives any common shift of the keys. Where every text
query sees all of V and there is no soft-cap, the variance is the closed form ``scale^2 q^T C q``. Memory is one
(rows, keys) block at a time.

In fp32 the rounding of ``lse_i`` itself would show in ``p_ij``: a softmax normalised by a sum over the very same scores
is several times more exact. There the text rows' other keys are summed too, and the block divides by the total, unless
``lse_i`` is small and there are rows enough for its rounding to average out.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from sar_fast.backends.blocks import sees
from sar_fast.backends.sequence import Sequence

_BLOCK_BYTES = {"cpu": 8 << 20}  # stays within a shared CPU cache; measured best between 4 and 16 MB
_BLOCK_BYTES_DEVICE = 256 << 20
_FEW_ROWS, _LARGE_LSE = 64, 16.0  # between them: below 5e-7 a row, 4e-8 in the mean, less than a softmax in fp32 errs


@dataclasses.dataclass
class TextVisualBlock:
    """Indices of one sequence's statistics, found once and used by forward and backward."""

    rows: Tensor  # [t] int64, text queries
    keys: Tensor  # [n] int64, visual keys that are not padding
    all_visible: bool  # every text query sees every visual key
    visible_count: Tensor  # [t] int64, |V_i|
    others: Tensor | None  # [m] int64, real keys that are not visual, where p_ij is normalised anew

    @property
    def counted(self) -> Tensor:
        """[t] bool: queries with at least two visible visual keys."""
        return self.visible_count >= 2


def text_visual_block(seq: Sequence) -> TextVisualBlock:
    """Find the text rows and visual keys of ``seq`` and whether the block needs a mask."""
    valid = seq.visual if seq.key_valid is None else seq.visual & seq.key_valid
    rows, keys = seq.text.nonzero()[:, 0], valid.nonzero()[:, 0]
    n = keys.numel()
    all_visible = seq.mask is None and not seq.scores.windowed
    if all_visible and n and rows.numel():
        if seq.scores.causal:
            all_visible = bool(keys[-1] <= rows[0] + seq.offset)
        if seq.first is not None:
            all_visible = all_visible and bool(keys[0] >= seq.first[rows].max())
        if seq.end is not None:
            all_visible = all_visible and bool(keys[-1] < seq.end[rows].min())
    if all_visible or n == 0:
        visible_count = torch.full_like(rows, n)
    else:
        visible_count = torch.cat(
            [sees(seq, part, keys).sum(-1) for part in rows.split(rows_per_block(1, n, rows.device))] or [rows]
        )
    others = None
    if seq.q.dtype == torch.float32:
        others = ~seq.visual if seq.key_valid is None else ~seq.visual & seq.key_valid
        others = others.nonzero()[:, 0]
    return TextVisualBlock(rows, keys, all_visible, visible_count, others)


def rows_per_block(heads: int, num_keys: int, device: torch.device) -> int:
    budget = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_DEVICE)
    return max(16, budget // (4 * max(1, heads) * max(1, num_keys)))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], as a view when the indices are one run."""
    if index.numel() and int(index[-1] - index[0]) == index.numel() - 1:
        return x[int(index[0]) : int(index[0]) + index.numel()]
    return x[index]


def statistics_forward(seq: Sequence, block: TextVisualBlock, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the counted text queries of variance and semantic alignment.

    Args:
        lse: (H, t) log-sum-exp of the text queries, ``block.rows`` order.

    Returns:
        (av_sum, sa_sum), each (H,) in the accumulate dtype.
    """
    H, D, Hkv = seq.q.shape[1], seq.q.shape[2], seq.k.shape[1]
    n, acc = block.keys.numel(), seq.accumulate_dtype
    if block.rows.numel() == 0 or n < 2:
        return seq.q.new_zeros(H, dtype=acc), seq.q.new_zeros(H, dtype=acc)
    if block.others is not None and not _rounding_shows(lse):
        block = dataclasses.replace(block, others=None)
    given = _centred(seq, block, lse)
    av_sum = seq.q.new_zeros(Hkv, H // Hkv, dtype=acc)
    direct = set(range(Hkv))  # kv heads whose variance is that of the scores themselves
    # with few keys the direct way is cheap
    if block.all_visible and seq.scores.softcap == 0 and n > D and seq.marks is None:
        av_sum, cancels = _closed_form(given, seq.scores.scale)
        direct = set(cancels.nonzero()[:, 0].tolist())
    sa_sum = torch.zeros_like(av_sum)
    buffers = _score_buffers(seq, block)
    for kv in range(Hkv):
        variance, sa_sum[kv] = _group_sums(seq, block, given, kv, buffers, variance=kv in direct)
        if variance is not None:
            av_sum[kv] = variance
    return av_sum.flatten(), sa_sum.flatten()


def _rounding_shows(lse: Tensor) -> bool:
    """Whether the mean over text queries of ``exp(s - lse)`` would be less exact than a softmax; lse is (H, t)."""
    size = lse.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=0.0).abs().max()
    return lse.shape[1] <= _FEW_ROWS or bool(size > _LARGE_LSE)


class _Centred(NamedTuple):
    """Text queries and visual keys of all heads: ``s_ij = scale q_i.k_j + shift_i``, in fp32 or fp64."""

    q: Tensor  # [Hkv, G, t, D]
    k: Tensor  # [Hkv, n, D + 1], centred; the last entry, 1, meets a row's constant inside the product
    centre: Tensor  # [Hkv, D]
    shift: Tensor  # [Hkv, G, t], scaled
    lse: Tensor  # [Hkv, G, t]
    prior: Tensor  # [n, 2], and 1: a product with p gives alignment and mass


def _centred(seq: Sequence, block: TextVisualBlock, lse: Tensor) -> _Centred:
    (_, H, D), Hkv, scale = seq.q.shape, seq.k.shape[1], seq.scores.scale
    q = gather_rows(seq.q, block.rows).to(seq.accumulate_dtype).transpose(0, 1)  # [H, t, D]
    k_visual = gather_rows(seq.k, block.keys).transpose(0, 1)  # [Hkv, n, D]
    centre = k_visual.mean(1, dtype=q.dtype)
    k = torch.empty(Hkv, block.keys.numel(), D + 1, dtype=q.dtype, device=q.device)
    torch.sub(k_visual, centre[:, None], out=k[..., :D])
    k[..., D] = 1
    shift = scale * (q @ centre.repeat_interleave(H // Hkv, dim=0)[..., None])  # [H, t, 1]
    heads = lambda x: x.unflatten(0, (Hkv, -1))
    prior = seq.prior[block.keys].to(q.dtype)
    prior = torch.stack([prior, torch.ones_like(prior)], -1)
    return _Centred(heads(q), k, centre, heads(shift[..., 0]), heads(lse), prior)


def _closed_form(given: _Centred, scale: float) -> tuple[Tensor, Tensor]:
    """Sums over rows of ``scale^2 q^T C q``, by ``<C, sum q q^T>``, (Hkv, G); which kv heads' cancel, (Hkv,) bool.

    They add up products of either sign, of which ``bound`` is no less than the sum of sizes. Where keys vary most in a
    direction that queries do not look in, these cancel, and the sum is far smaller: an error of at most
    eps x bound / sum stays below 1e-3 (tests/test_numerics.py looks on both sides).
    """
    q, k = given.q.flatten(0, 1), given.k[..., :-1]
    covariance = (k.mT @ k) * (scale**2 / (k.shape[1] - 1))  # [Hkv, D, D]
    gram = (q.mT @ q).unflatten(0, given.q.shape[:2])  # [Hkv, G, D, D]
    av_sum = (gram * covariance[:, None]).sum((-1, -2))
    diagonal = lambda x: x.diagonal(dim1=-2, dim2=-1)
    bound = q.shape[-1] * (diagonal(gram) * diagonal(covariance)[:, None]).sum(-1)
    limit = 2**-10 / torch.finfo(q.dtype).eps
    return av_sum, (bound > limit * av_sum).any(-1)


def _score_buffers(seq: Sequence, block: TextVisualBlock) -> tuple[Tensor, Tensor]:
    """Where blocks of scores are put, (G * r, n) and (G * r, m): fresh memory for each would cost as much as they."""
    G, t, n = seq.q.shape[1] // seq.k.shape[1], block.rows.numel(), block.keys.numel()
    m = 0 if block.others is None else block.others.numel()
    step = min(t, rows_per_block(G, n + m, seq.q.device))
    return tuple(seq.q.new_empty(G * step, size, dtype=seq.accumulate_dtype) for size in (n, m))


def _group_sums(
    seq: Sequence,
    block: TextVisualBlock,
    given: _Centred,
    kv: int,
    buffers: tuple[Tensor, Tensor],
    *,
    variance: bool,
) -> tuple[Tensor | None, Tensor]:
    """(av_sum or None, sa_sum), each (G,), of one kv head's query heads."""
    _, G, t, D = given.q.shape
    q, k, shift, lse, scale = given.q[kv], given.k[kv], given.shift[kv], given.lse[kv], seq.scores.scale
    sa_sum, av_sum = q.new_zeros(G), q.new_zeros(G) if variance else None
    k_other = None if block.others is None else gather_rows(seq.k[:, kv], block.others) - given.centre[kv]  # [m, D]
    step = buffers[0].shape[0] // G
    for r0 in range(0, t, step):
        part = slice(r0, min(t, r0 + step))
        r = part.stop - r0
        q_b, shift_b, lse_b = q[:, part] * scale, shift[:, part], lse[:, part]  # [G, r, D], [G, r]
        if variance:
            s = torch.mm(q_b.reshape(G * r, D), k[:, :D].T, out=buffers[0][: G * r]).view(G, r, -1)  # centred scores
            _spoil_(seq, s, block.rows[part], block.keys, kv)
            var, p = _masked_statistics(seq, block, part, s, shift_b, lse_b)
            av_sum += var.sum(-1)
        else:
            a = torch.cat([q_b, (shift_b - lse_b)[..., None]], -1).view(G * r, D + 1)
            p = torch.mm(a, k.T, out=buffers[0][: G * r]).exp_().view(G, r, -1)
        alignment, mass = (p @ given.prior).unbind(-1)  # [G, r]
        if k_other is not None:
            s = torch.mm(q_b.reshape(G * r, D), k_other.T, out=buffers[1][: G * r]).view(G, r, -1)
            _spoil_(seq, s, block.rows[part], block.others, kv)
            mass = mass + _other_mass(seq, block, part, s, shift_b, lse_b)
            alignment = alignment / torch.where(mass == 0, 1, mass)
        sa_sum += torch.where(block.counted[part], alignment, 0).sum(-1)
    return av_sum, sa_sum


def _spoil_(seq: Sequence, s: Tensor, rows: Tensor, keys: Tensor, kv: int) -> None:
    """NaN in one kv head's scores (G, r, n) where a query or key is not finite."""
    if seq.marks is not None:
        seq.marks.spoil_(s[None], rows, keys, slice(kv, kv + 1))


def _masked_statistics(
    seq: Sequence,
    block: TextVisualBlock,
    part: slice,
    s: Tensor,
    shift: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """Per-row variance (G, r) and probabilities (G, r, n) from centred scores ``s`` (G, r, n); overwrites ``s``."""
    s, shift, visible, counts = _visible_scores(seq, block, part, s, shift)
    mean, inverse = _row_mean(s, visible, counts)
    deviation = s - mean[..., None]
    if visible is not None:
        deviation.masked_fill_(~visible, 0)
    var = torch.where(block.counted[part], deviation.square_().sum(-1) * inverse, 0)
    p = s.add_((shift - lse)[..., None]).exp_()
    if visible is not None:
        p.masked_fill_(~visible, 0)
    return var, p


def _other_mass(
    seq: Sequence,
    block: TextVisualBlock,
    part: slice,
    s: Tensor,
    shift: Tensor,
    lse: Tensor,
) -> Tensor:
    """Per row the probability (G, r) of the keys that are not visual, from their centred scores; overwrites ``s``."""
    s, shift = _soft_capped(seq, s, shift)
    p = s.add_((shift - lse)[..., None]).exp_()
    visible = sees(seq, block.rows[part], block.others)
    return (p if visible is None else p.masked_fill_(~visible, 0)).sum(-1)


def _soft_capped(seq: Sequence, s: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Scores as ``s + shift`` after soft-capping; the cap acts on the sum, which leaves no shift."""
    if seq.scores.softcap > 0:
        s = s.add_(shift[..., None]).div_(seq.scores.softcap).tanh_().mul_(seq.scores.softcap)
        shift = torch.zeros_like(shift)
    return s, shift


def _visible_scores(
    seq: Sequence, block: TextVisualBlock, part: slice, s: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Soft-capped scores (as s + shift), visibility (r, n) or None, and |V_i| (r,)."""
    s, shift = _soft_capped(seq, s, shift)
    visible = None
    if not block.all_visible:
        visible = sees(seq, block.rows[part], block.keys)
    return s, shift, visible, block.visible_count[part]


def _row_mean(s: Tensor, visible: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over visible keys (G, r) and 1 / (|V_i| - 1) (r,)."""
    total = s.sum(-1) if visible is None else torch.where(visible, s, 0).sum(-1)
    return total / counts.clamp_min(1), 1 / (counts - 1).clamp_min(1).to(s.dtype)


def statistics_backward(
    seq: Sequence,
    block: TextVisualBlock,
    lse: Tensor,
    grad_av: Tensor,
    grad_sa: Tensor,
    dq: Tensor,
    dk: Tensor,
    dprior: Tensor,
) -> Tensor:
    """Add the statistics' gradients to ``dq`` (Sq, H, D), ``dk`` (Sk, Hkv, D) and ``dprior`` (Sk,), fp32 or fp64.

    Args:
        lse: (H, t) of the text queries.
        grad_av, grad_sa: (H,) gradients of each counted query's variance and alignment.

    Returns:
        (H, Sq): what the alignments add to every query's ``delta_i = sum_d dout_id out_id`` (0 outside T). It acts on
        all keys that the query sees, so the backend's attention backward applies it.
    """
    H, Hkv = seq.q.shape[1], seq.k.shape[1]
    G, t, n, acc = H // Hkv, block.rows.numel(), block.keys.numel(), seq.accumulate_dtype
    extra_delta = seq.q.new_zeros(H, seq.q.shape[0], dtype=acc)
    if t == 0 or n < 2:
        return extra_delta
    scale, prior = seq.scores.scale, seq.prior[block.keys].to(acc)
    q_text, k_visual = seq.q[block.rows], seq.k[block.keys]
    step = min(t, rows_per_block(4 * G, n, seq.q.device))

    for kv in range(Hkv):
        heads = slice(kv * G, (kv + 1) * G)
        k_f = k_visual[:, kv].to(acc)  # [n, D]
        centre = k_f.mean(0)
        for r0 in range(0, t, step):
            part = slice(r0, r0 + step)
            rows = block.rows[part]
            q_b = q_text[part, heads].transpose(0, 1).to(acc)  # [G, r, D]
            row_lse = lse[heads, part]
            s = scale * (q_b @ (k_f - centre).T)  # [G, r, n]
            _spoil_(seq, s, rows, block.keys, kv)
            s, shift, visible, counts = _visible_scores(seq, block, part, s, scale * (q_b @ centre))
            counted = block.counted[part].to(acc)  # [r]
            if seq.marks is not None:  # a row that does not count may be NaN: 0 times it would be too
                sees_it = block.counted[part][:, None].expand(-1, n)
                visible = sees_it if visible is None else visible & sees_it
            mean, inverse = _row_mean(s, visible, counts)
            p = torch.exp(s + (shift - row_lse)[..., None])  # [G, r, n]
            if visible is not None:
                p.masked_fill_(~visible, 0)
            g_sa, g_av = grad_sa[heads, None] * counted, grad_av[heads, None] * counted  # [G, r]
            extra_delta[heads, rows] = g_sa * (p @ prior)
            dprior[block.keys] += torch.einsum("gr,grn->n", g_sa, p)
            ds = p * (g_sa[..., None] * prior)
            deviation = s - mean[..., None]
            if visible is not None:
                deviation.masked_fill_(~visible, 0)
            ds += deviation * (2 * g_av * inverse)[..., None]
            if seq.scores.softcap > 0:
                ds *= 1 - (s / seq.scores.softcap).square()
                if seq.marks is not None:
                    ds.masked_fill_(~visible, 0)
            dq[rows, heads] += scale * (ds @ k_f).transpose(0, 1)
            dk[block.keys, kv] += scale * torch.einsum("grn,grd->nd", ds, q_b)
    return extra_delta
