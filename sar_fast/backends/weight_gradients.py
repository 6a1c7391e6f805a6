"""From gradients of a call's output and weights to those of its statistics, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from sar_fast.backends.protocol import Gradients
from sar_fast.backends.sequence import part_of
from sar_fast.method.values import Call, Result
from sar_fast.method.weighting.constant import Equal
from sar_fast.method.weighting.softmax import Lowered


def statistics_gradients(
    call: Call, rule: Lowered, grad_out: Tensor, result: Result, through: Gradients
) -> tuple[Tensor, Tensor]:
    """Gradients (B, H) of each counted query's variance and alignment.

    ``dL/dc_h = sum_i delta_i / c_h``; where c_h underflowed to 0 it only ever meets a factor c_h, so 0 is exact.
    """
    grad_av, grad_sa, grad_c = through
    statistics, c = result.statistics, result.c
    acc = c.dtype
    per_query = 1 / statistics.count.clamp_min(1)[:, None]
    if isinstance(rule, Equal):
        return grad_av * per_query, grad_sa * per_query
    # reduced by sum, not by a product: the softmax over heads then cancels most of it, so its rounding counts
    from_out = torch.zeros_like(grad_c)
    for b in range(call.batch_size):
        from_out[b] = (part_of(call, grad_out, b).to(acc) * part_of(call, result.out, b).to(acc)).sum(-1).sum(0)
    grad_c = grad_c + torch.where(c == 0, 0, from_out / torch.where(c == 0, 1, c))
    through_av, through_sa = rule.vjp(grad_c, statistics)
    return (grad_av + through_av) * per_query, (grad_sa + through_sa) * per_query
