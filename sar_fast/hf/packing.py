"""Several sequences packed into one row: where they end, and roles, prior and attention of each by itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast.attention import ops
from sar_fast.attention.functional import autocast_inputs
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.hf.host_facts import HostFacts
from sar_fast.method.options import TextQueries
from sar_fast.method.roles import TokenRoles
from sar_fast.method.state import SARStats
from sar_fast.method.values import Bounds, Call, Result, Roles, Statistics, StatisticsWithRows
from sar_fast.method.weighting.protocol import Weighting
from sar_fast.method.weighting.rows import RowStatistic


@dataclasses.dataclass(frozen=True)
class Packing:
    """The sequences of a packed pass, rows one after the other.

    Attributes:
        cu_seqlens: (sequences + 1,) int32, where each starts among all B * S positions; the last is B * S.
        max_seqlen: at least the longest length.
        causal: the layers' dense mask, if they get one, says no more than causal inside each sequence.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool = False

    def sequence_of(self, total: int) -> Tensor:
        """(total,) int64: which sequence each position belongs to."""
        positions = torch.arange(total, dtype=torch.int32, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), positions, right=True)

    def samples(self, shape: torch.Size) -> Tensor:
        """(B, S) int64: :meth:`sequence_of` every position."""
        return self.sequence_of(shape.numel()).view(shape)

    def totals(self, values: Tensor) -> Tensor:
        """(B, S) -> (B, S): at each position, the sum of ``values`` over its sequence."""
        sequence = self.sequence_of(values.numel())
        sums = values.new_zeros(self.cu_seqlens.shape[0] - 1).index_add(0, sequence, values.flatten())
        return sums[sequence].view(values.shape)

    def roles(self, visual: Tensor, text_queries: TextQueries) -> TokenRoles:
        """V and T of every sequence by itself, from the (B, S) bool mask of placeholders."""
        count = visual.flatten().long()
        sequence = self.sequence_of(count.numel())
        per_sequence = count.new_zeros(self.cu_seqlens.shape[0] - 1).index_add(0, sequence, count)
        before = per_sequence.cumsum(0) - per_sequence
        seen = (count.cumsum(0) - before[sequence]).view(visual.shape)  # visual tokens of the sequence so far
        total = per_sequence[sequence].view(visual.shape)
        needed = total if text_queries == "after_last_image" else 1
        return TokenRoles(visual, ~visual & (seen >= needed) & (total > 0))


def ask_packing(facts: HostFacts, given: Mapping[str, Any], shape: torch.Size, past_length: int | Tensor) -> None:
    """Ask for what :func:`find_packing` reads, of the same arguments."""
    cu_q, cu_k, mask, positions = (
        given.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "attention_mask", "position_ids")
    )
    if isinstance(cu_q, Tensor) and isinstance(cu_k, Tensor):
        facts.ask("cu_seq_lens_q", cu_q)
        facts.ask("cu_seq_lens_k", cu_k)
        if mask is not None:
            facts.ask("packed padding", (mask == 0).any())
    elif positions is not None and mask is None and shape[1] > 1 and not (isinstance(past_length, int) and past_length):
        facts.ask("restarts", _restarts(positions, shape))


def find_packing(
    given: Mapping[str, Any], shape: torch.Size, past_length: int | Tensor, facts: HostFacts
) -> Packing | None:
    """The packing of a forward pass, or None.

    Args:
        given: the pass's arguments. ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (int32, FlashAttention's) describe the
            packing; without them ``position_ids`` that restart do, where no padding mask and no cached token is.
            Reading them breaks a graph that is being traced, which ``fullgraph=True`` refuses.
        shape: (B, S).
        past_length: how many tokens are cached.
        facts: what :func:`ask_packing` asked; nothing in a graph.

    Raises:
        ValueError, TypeError: the arguments describe no packing that SAR supports; the message names the argument.
    """
    cu_q, cu_k = given.get("cu_seq_lens_q"), given.get("cu_seq_lens_k")
    if cu_q is not None or cu_k is not None:
        return _from_lengths(given, cu_q, cu_k, shape, past_length, facts)
    positions = given.get("position_ids")
    if positions is None or given.get("attention_mask") is not None or shape[1] == 1:
        return None
    if isinstance(past_length, Tensor) and torch.compiler.is_compiling():
        return None
    return None if past_length else _from_positions(positions, shape, facts)


def _from_lengths(
    given: Mapping[str, Any],
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    shape: torch.Size,
    past_length: int | Tensor,
    facts: HostFacts,
) -> Packing:
    if cu_q is None or cu_k is None:
        missing = "cu_seq_lens_q" if cu_q is None else "cu_seq_lens_k"
        raise ArgumentError(missing, "None", "be given together with the other")
    for name, lengths in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        if not isinstance(lengths, Tensor):
            raise ArgumentTypeError(name, type(lengths).__name__, "be a tensor")
    if shape[0] != 1:
        raise ArgumentError("cu_seq_lens_q", f"a batch of {shape[0]}", "describe one packed row")
    if not torch.compiler.is_compiling():
        if past_length:
            raise ArgumentError(
                "cu_seq_lens_q", f"{past_length} cached positions", "come without a cache: SAR packs whole sequences"
            )
        ends, same = facts["cu_seq_lens_q"], facts["cu_seq_lens_k"]
        if ends[0] != 0 or ends[-1] != shape[1] or any(b < a for a, b in itertools.pairwise(ends)):
            raise ArgumentError("cu_seq_lens_q", ends, f"rise from 0 to the packed length {shape[1]}")
        if ends != same:
            raise ArgumentError("cu_seq_lens_k", same, "equal cu_seq_lens_q without a cache")
        if "packed padding" in facts and facts["packed padding"] != [0]:
            raise ArgumentError(
                "attention_mask", "padding", "be None or all ones with cu_seq_lens_q: packed rows have none"
            )
    longest = given.get("max_length_q")
    return Packing(cu_q.to(torch.int32), shape[1] if longest is None else int(longest))


@torch.compiler.disable(
    reason="SAR reads position_ids to see whether the row is packed. With fullgraph=True pass cu_seq_lens_q and "
    "cu_seq_lens_k for packed rows, attention_mask for all others"
)
def _from_positions(positions: Tensor, shape: torch.Size, facts: HostFacts) -> Packing | None:
    """Packing by restarts of ``position_ids``: (B or 1, S), or (rows, B, S) whose row 0 is the text's of four."""
    if "restarts" not in facts:  # a graph asked nothing
        facts.ask("restarts", _restarts(positions, shape))
    count, longest, falls = facts["restarts"]
    if positions.dim() == 3 and positions.shape[0] == 3:
        if falls:  # positions of one sequence stand still inside a picture, but never fall
            raise ArgumentError(
                "position_ids of packed sequences",
                "three, from which the model cannot tell the sequences apart",
                "have four rows, the text positions and the three of the rotary embedding",
            )
        return None
    if count == shape[0]:  # every row begins, and none again
        return None
    seen = _starts(positions, shape)[0].flatten().cumsum(0)  # [B * S] sequences that have begun
    begins = torch.searchsorted(seen, torch.arange(1, count + 1, device=seen.device))
    return Packing(F.pad(begins, (0, 1), value=shape.numel()).to(torch.int32), longest)


def _restarts(positions: Tensor, shape: torch.Size) -> Tensor:
    """(3,) int64: how many sequences ``position_ids`` tell, the longest one's length, and whether positions fall."""
    starts, steps = _starts(positions, shape)
    index = torch.arange(shape.numel(), device=starts.device)
    begin = torch.where(starts.flatten(), index, 0).cummax(0).values  # [B * S] where each one's sequence began
    return torch.stack([starts.sum(), (index - begin).max() + 1, (steps < 0).any().long()])


def _starts(positions: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Where sequences begin, (B, S) bool, and the positions' steps, (B, S - 1)."""
    if positions.dim() == 3:
        positions = positions[0]
    steps = torch.diff(positions.expand(shape), dim=-1)
    return F.pad(steps != 1, (1, 0), value=True), steps


def packed_attention(
    packing: Packing,
    call: Call,
    *,
    weighting: Weighting | None = None,
    layer: int | None = None,
    backend: str = "auto",
    sav_grad: bool = False,
    keep_stats: bool = False,
    recorded: tuple[RowStatistic, ...] = (),
    check_prior: bool = True,
) -> tuple[Tensor, SARStats | None]:
    """Attention in which every sequence sees only itself, re-weighted by ``weighting``, plain without.

    Args:
        call: dense, q (B, S, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv), roles (B, S), bounds (B, S) counted from the
            first key of each query's sequence. With an attn_mask (B or 1, 1, S, S), patterns inside the sequences that
            neither ``scores`` nor ``bounds`` say, they are attended to one by one.
        layer, recorded, check_prior: as in ``ops.attention``.

    Returns:
        (out (B, S, H, Dv), statistics with one row per sequence and lse (H, B * S), or None unless ``keep_stats``).
    """
    B, S = call.q.shape[:2]
    q, k, v = autocast_inputs(call.q, call.k, call.v)
    call = dataclasses.replace(call, q=q, k=k, v=v)
    chosen = choose_backend(backend, Request.of(call))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    roles = None if call.roles is None else Roles(*(x.flatten() for x in call.roles))
    how = {"layer": layer, "sav_grad": sav_grad, "need_lse": keep_stats, "need_stats": keep_stats}
    how |= {"check_prior": check_prior, "recorded": recorded if keep_stats else ()}
    if call.attn_mask is None:
        ends, longest = packing.cu_seqlens, (packing.max_seqlen, packing.max_seqlen)
        bounds = Bounds(*(None if side is None else side.flatten() for side in call.bounds))
        packed = Call(
            q, k, v, call.scores, roles, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlens=longest, bounds=bounds
        )
        result = ops.attention(packed, weighting, chosen, **how)
    else:
        results = []
        for start, stop in itertools.pairwise(packing.cu_seqlens.tolist()):
            row, inside = start // S, slice(start % S, start % S + stop - start)
            mask = call.attn_mask[row if call.attn_mask.shape[0] > 1 else 0, None, :, inside, inside]
            one = lambda x, a=start, b=stop: x[None, a:b]
            own = None if roles is None else Roles(*map(one, roles))
            alone = Call(one(q), one(k), one(v), call.scores, own, attn_mask=mask)
            results.append(ops.attention(alone, weighting, chosen, **how))
        result = _one_after_the_other(results, keep_stats)
    out = result.out.view(B, S, *result.out.shape[1:])
    return out, SARStats.of(result, chosen.name).detach() if keep_stats else None


def _one_after_the_other(results: list[Result], keep_stats: bool) -> Result:
    """The results of dense calls of one sequence each, as of a packed call."""
    out = torch.cat([r.out[0] for r in results])
    if not keep_stats:
        return results[0]._replace(out=out)
    statistics = _one_batch([r.statistics for r in results])
    return Result(out, torch.cat([r.lse[0] for r in results], -1), statistics, torch.cat([r.c for r in results]))


def _one_batch(parts: list[Statistics | StatisticsWithRows]) -> Statistics | StatisticsWithRows:
    """The statistics of single sequences as those of a batch."""
    av, sa, count = (torch.cat([getattr(p, name) for p in parts]) for name in ("av", "sa", "count"))
    if isinstance(parts[0], Statistics):
        return Statistics(av, sa, count)
    rows = {name: torch.cat([p.rows[name] for p in parts]) for name in parts[0].rows}
    return StatisticsWithRows(av, sa, count, rows)
