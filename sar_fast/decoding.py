"""One SAR layer's attention with the state of the tokens before it (docs/method.md, section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sar_fast import ops
from sar_fast.backends.select import choose_backend
from sar_fast.config import SARConfig
from sar_fast.distributed import Shards
from sar_fast.functional import autocast_inputs
from sar_fast.types import AttentionOptions, SARState, SARStats


def with_config(options: AttentionOptions, config: SARConfig) -> AttentionOptions:
    """A call's mask pattern and scale, with the method's options."""
    return dataclasses.replace(
        options, beta=float(config.beta), protect_first_head=config.protect_first_head, normalize=config.normalize
    )


def recorded(lse: Tensor, av: Tensor, sa: Tensor, c: Tensor, count: Tensor, backend: str) -> SARStats:
    """Statistics as users read them: detached, fp32."""
    return SARStats(*(t.detach().to(torch.float32) for t in (lse, av, sa, av * sa, c, count)), backend)


def attend_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    text_mask: Tensor,
    prior: Tensor,
    *,
    config: SARConfig,
    options: AttentionOptions,
    past: SARState | None,
    frozen: bool = False,
    carried_rows: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    shards: Shards | None = None,
    keep_stats: bool = True,
    check_prior: bool = True,
) -> tuple[Tensor, SARStats | None, SARState]:
    """Re-weighted attention of new queries over all keys, continuing from ``past``.

    Args:
        q: (B, Sq, H, D). k, v: (B, Sk, Hkv, D), the cached keys included. Masks and prior as in ``sar_attn_func``.
        options: mask pattern and scale of the call; beta, protection and normalisation come from ``config``.
        past: the layer's state, or None for a prompt.
        frozen: use ``past.head_weights`` as they are (``decode="prompt"`` and no new visual tokens).
        carried_rows: (B,) fp32, 0 for rows whose sums start afresh; None = all go on.
        shards: this rank holds some of the heads; state and statistics are those of its heads.
        keep_stats: whether anybody reads the statistics.
        check_prior: as in ``ops.attention``.

    Returns:
        (out, statistics or None, the state after this call).
    """
    options = with_config(options, config)
    q, k, v = autocast_inputs(q, k, v)
    backend = choose_backend(
        config.backend,
        q.device,
        q.dtype,
        options,
        padded=key_padding_mask is not None,
        masked=attn_mask is not None,
        head_dim=max(q.shape[-1], v.shape[-1]),
    )
    call: dict[str, Any] = {
        "key_padding_mask": key_padding_mask,
        "attn_mask": attn_mask,
        "options": options,
        "backend": backend,
        "shards": shards,
        "need_lse": keep_stats,
    }
    if frozen:
        out, lse, *_ = ops.attention(q, k, v, None, None, None, **call)
        out = (out * past.head_weights[:, None, :, None]).to(out.dtype)
        total = past.count.clamp_min(1)[:, None]
        av, sa, c, count = past.av_sum / total, past.sa_sum / total, past.head_weights, past.count
        state = past
    else:
        carried = None
        if past is not None and config.decode != "step":
            keep = torch.ones_like(past.count) if carried_rows is None else carried_rows
            carried = (past.av_sum * keep[:, None], past.sa_sum * keep[:, None], past.count * keep)
        out, lse, av, sa, c, count = ops.attention(
            q,
            k,
            v,
            visual_mask,
            text_mask,
            prior,
            carried=carried,
            sav_grad=config.sav_grad,
            check_prior=check_prior,
            **call,
        )
        state = SARState.from_means(av, sa, c, count)
    return out, recorded(lse, av, sa, c, count, backend) if keep_stats else None, state
