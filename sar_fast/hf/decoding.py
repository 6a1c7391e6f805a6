"""One SAR layer's attention with the state of the tokens before it (docs/method.md, section 3)."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from sar_fast.attention import ops
from sar_fast.attention.functional import autocast_inputs
from sar_fast.attention.row_statistics import row_sums
from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.config import SARConfig
from sar_fast.method.distributed import Shards
from sar_fast.method.state import SARState, SARStats
from sar_fast.method.values import Call, Result, Statistics, Sums
from sar_fast.method.weighting.constant import Fixed
from sar_fast.method.weighting.protocol import needs_statistics
from sar_fast.method.weighting.rows import RowStatistic, all_row_statistics
from sar_fast.method.weighting.split import split_over


def attend_with_state(
    call: Call,
    *,
    config: SARConfig,
    past: SARState | None,
    layer: int | None = None,
    frozen: bool = False,
    carried_rows: Tensor | None = None,
    shards: Shards | None = None,
    keep_stats: bool = True,
    check_prior: bool = True,
) -> tuple[Tensor, SARStats | None, SARState | None]:
    """Re-weighted attention of new queries over all keys, continuing from ``past``.

    Args:
        call: q (B, Sq, H, D), k and v (B, Sk, ...) with the cached keys, and roles.
        past: the layer's state, or None for a prompt.
        layer: what the rule is told of where it is.
        frozen: use ``past.head_weights`` as they are (``decode="prompt"`` and no new visual tokens).
        carried_rows: (B,) fp32, 0 for rows whose sums start afresh; None = all go on.
        shards: this rank holds some of the heads; state and statistics are those of its heads.
        keep_stats: whether anybody reads the statistics.
        check_prior: as in ``ops.attention``.

    Returns:
        (out, statistics or None, the state after this call: ``past`` where nothing is counted).
    """
    q, k, v = autocast_inputs(call.q, call.k, call.v)
    call = dataclasses.replace(call, q=q, k=k, v=v)
    backend = choose_backend(config.backend, Request.of(call))
    rule = split_over(config.rule, shards)
    counted, recorded = needs_statistics(rule), config.row_statistics if keep_stats else ()
    attend = functools.partial(ops.attention, backend=backend, layer=layer, need_lse=keep_stats)
    if frozen and counted:
        result = attend(call, Fixed.of(past.head_weights))
        if keep_stats:
            result = result._replace(statistics=past.sums.means())
    else:
        if past is not None and counted and config.decode != "step":
            call = dataclasses.replace(call, carried=_carried(past.sums, carried_rows))
        how = {"sav_grad": config.sav_grad, "need_stats": keep_stats, "check_prior": check_prior}
        result = attend(call, rule, recorded=recorded, **how)
        if counted:
            shared = not keep_stats and config.decode != "prompt"
            past = _state_after(result, all_row_statistics(rule, recorded), shared=shared)
    stats = SARStats.of(result, backend.name).detach() if keep_stats else None
    return result.out, stats, past


def _carried(sums: Sums, rows: Tensor | None) -> Sums:
    """``sums`` of the rows that are 1 in ``rows`` (B,), 0 of the others; None = of all."""
    if rows is None:
        return sums
    each = lambda x: x * rows.view(-1, *[1] * (x.dim() - 1))
    return Sums(*(None if x is None else each(x) for x in sums))


def _state_after(result: Result, asked: tuple[RowStatistic, ...], *, shared: bool) -> SARState:
    """The state that a call leaves; ``shared``: it may be made of the call's own tensors, which saves operators."""
    found = result.statistics
    sums = result.sums or Statistics(found.av, found.sa, found.count).sums()
    rows = row_sums(found, asked) if asked else None
    av, sa, n, c = (t.detach().to(torch.float32) for t in (*sums[:3], result.c))
    c, n = (c, n) if shared else (c.clone(), n.clone())
    return SARState(av, sa, n, c, None if rows is None else rows.detach().to(torch.float32))
