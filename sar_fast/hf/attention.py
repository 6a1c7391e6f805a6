"""The attention function that transformers calls under the name ``"sar"``; ``mask_function`` makes its masks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sar_fast.attention.functional import plain_attention
from sar_fast.attention.rows import visual_attention_rows
from sar_fast.base.errors import ArgumentError
from sar_fast.hf.cache_state import attach
from sar_fast.hf.compact_mask import bounds_of, is_compact
from sar_fast.hf.decoding import attend_with_state
from sar_fast.hf.forward_pass import Pass
from sar_fast.hf.mask_function import sar_mask
from sar_fast.hf.packing import packed_attention
from sar_fast.hf.refusals import refuse_slices
from sar_fast.hf.split_queries import keys_of_all_ranks
from sar_fast.method.distributed import Shards
from sar_fast.method.values import Bounds, Call, Roles, Scores
from sar_fast.method.weighting.split import split_over

ATTENTION_NAME = "sar"
LAYER_MARK = "_sar_layer"  # attribute of re-weighted attention modules and all inside them: their layer index


def register() -> None:
    """Make ``attn_implementation="sar"`` known to transformers, with its mask function; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, sar_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sar_mask)


def sar_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sar_context: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface: re-weighted on marked modules, plain on all others.

    query (B, H, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv) -> (B, Sq, H, Dv).
    """
    layer = getattr(module, LAYER_MARK, None)
    if layer is not None and sar_context is None:
        raise RuntimeError(
            f"{type(module).__name__} {layer} re-weights heads but got no SAR context: call the multimodal model that "
            "apply_sar was given (or a wrapper of it), not its language model alone"
        )
    if sar_context is not None and sar_context.shards is not None and sar_context.shards.queries is not None:
        key, value, sar_context = keys_of_all_ranks(query, key, value, attention_mask, sar_context)
    reweighted = layer is not None and sar_context.reweights
    packing = sar_context.packing if sar_context is not None else None
    if packing is not None and packing.causal:
        attention_mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
        if not reweighted and query.shape[2] == 1 and query.device.type == "cpu":  # where SDPA is faster than our loop
            attention_mask = attention_mask[:, None, None]
    # transformers' SDPA reads "no mask, fewer queries than keys" as an empty static cache; here it is a second turn
    square = query.shape[2] in (1, key.shape[2])
    for_sdpa = square if attention_mask is None else attention_mask.dim() == 4 and not is_compact(attention_mask)
    if not reweighted and softcap is None and for_sdpa and packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout:
        raise ArgumentError("attention_dropout", dropout, "be 0 with attn_implementation='sar': no dropout")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, heads, D]
    if is_causal is None:  # as transformers' SDPA: a module's own word counts where no mask was needed
        unmasked = attention_mask is None and square and packing is None
        is_causal = getattr(module, "is_causal", True) if unmasked else True
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    call = Call(q, k, v, Scores(scale, causal=bool(is_causal), softcap=softcap or 0.0))
    if attention_mask is not None:
        call = _masked(call, attention_mask)
    if reweighted:
        _check_heads(module, q.shape[2], sar_context.shards)
        rows, positions = sar_context.roles.text_mask.shape
        refuse_slices(module, layer, q.shape[:2], (rows, sar_context.queries or positions))
        sar_context.reached.add(layer)
    if packing is not None:
        return _packed(layer if reweighted else None, call, sar_context), None
    if not reweighted:
        return plain_attention(call)[0], None
    return _reweighted(layer, call, sar_context), None


def _masked(call: Call, mask: Tensor) -> Call:
    """A call without a mask, under what the mask function gave."""
    if mask.dim() == 2:
        return dataclasses.replace(call, key_padding_mask=mask)
    scores = dataclasses.replace(call.scores, causal=False)
    if is_compact(mask):
        return dataclasses.replace(call, scores=scores, bounds=bounds_of(mask))
    if mask.shape[-1] > call.k.shape[1]:  # not else: what is known of a tensor is not known of its views
        mask = mask[..., : call.k.shape[1]]
    mask = mask if mask.dtype == torch.bool else mask == 0
    if call.q.shape[1] == 1:  # one query's mask says which keys are there
        return dataclasses.replace(call, scores=scores, key_padding_mask=mask[:, 0, 0].expand(call.q.shape[0], -1))
    return dataclasses.replace(call, scores=scores, attn_mask=mask)


def _reweighted(layer: int, call: Call, running: Pass) -> Tensor:
    """SAR attention of one marked layer, with the cache's state read and written."""
    config, shards = running.config, running.shards
    if not running.needs_roles:
        return attend_with_state(call, config=config, past=None, layer=layer, shards=shards, keep_stats=False)[0]
    running.check_prior()
    here, Sq = running.on(call.q.device), call.q.shape[1]
    visual, prior = here.over_keys(call.k.shape[1])
    call.roles = Roles(visual, here.roles.text_mask[:, -Sq:], prior)
    state, outs, lses = running.state_before(layer), [], []
    for start, stop in running.pieces(Sq):
        frozen = config.decode == "prompt" and state is not None and (start > 0 or not running.brings_pictures)
        out, stats, state = attend_with_state(
            _piece(call, start, stop),
            config=config,
            past=state,
            layer=layer,
            frozen=frozen,
            carried_rows=here.carried_rows() if start == 0 else None,
            keep_stats=config.record,
            shards=shards,
            check_prior=_unchecked(),
        )
        outs.append(out)
        if config.record:
            lses.append(stats.lse)
        if not frozen:
            running.keep_state(layer, state, queries_left=Sq - stop)
    if config.record:  # the last piece's, but of all queries
        running.record(layer, dataclasses.replace(stats, lse=torch.cat(lses, -1)) if len(lses) > 1 else stats)
    if config.record_rows == "last_text":
        rows = dataclasses.replace(call, q=call.q.detach(), k=call.k.detach())
        running.record_rows(layer, visual_attention_rows(rows))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _piece(call: Call, start: int, stop: int) -> Call:
    """The queries ``start`` to ``stop`` of a dense call, and the keys up to the last of them."""
    keys = call.k.shape[1] - (call.q.shape[1] - stop)
    padding, dense, roles = call.key_padding_mask, call.attn_mask, call.roles
    bounds = Bounds(*(None if side is None else side[:, start:stop].contiguous() for side in call.bounds))
    return dataclasses.replace(
        call,
        q=call.q[:, start:stop],
        k=call.k[:, :keys],
        v=call.v[:, :keys],
        roles=Roles(roles.visual[:, :keys], roles.text[:, start:stop], roles.prior[:, :keys]),
        key_padding_mask=None if padding is None else padding[:, :keys],
        attn_mask=None if dense is None else dense[..., start:stop, :keys],
        bounds=bounds,
    )


def _packed(layer: int | None, call: Call, running: Pass) -> Tensor:
    """Attention of one layer over packed sequences; ``layer`` None = plain. A cache of them cannot be continued."""
    config, sar, here = running.config, {}, running.on(call.q.device)
    if layer is not None:
        if config.record_rows != "none":
            raise ArgumentError(
                "record_rows", repr(config.record_rows), "be 'none' with packed sequences, whose rows are not kept"
            )
        if running.needs_roles:
            running.check_prior()
            call.roles = Roles(*here.roles, here.prior)
        sar = {
            "weighting": split_over(config.rule, running.shards),
            "layer": layer,
            "backend": config.backend,
            "sav_grad": config.sav_grad,
            "keep_stats": config.record and running.needs_roles,
            "recorded": config.row_statistics,
            "check_prior": _unchecked(),
        }
    out, stats = packed_attention(here.packing, call, **sar)
    if running.cache is not None:
        attach(running.cache).packed = True
    if stats is not None:
        running.record(layer, stats)
    return out


def _unchecked() -> bool:
    """Whether the prior's values are still to be read: its features were, once per prompt, unless a graph was traced.

    To read them again in every layer and step would let a GPU wait each time.
    """
    return torch.compiler.is_compiling()


def _check_heads(module: nn.Module, heads: int, shards: Shards | None) -> None:
    """A softmax over some of a layer's heads would be silently wrong."""
    total = getattr(module.config, "num_attention_heads", heads)
    ranks = dist.get_world_size(shards.heads) if shards is not None and shards.heads is not None else 1
    if heads * ranks != total:
        cure = (
            "every rank must hold the same number; heads and key/value heads must be multiples of the ranks"
            if ranks > 1 and heads != total
            else "name the ranks that share a layer, apply_sar(model, config, shards=Shards(heads=group))"
        )
        raise RuntimeError(
            f"{type(module).__name__} attends with {heads} of {total} heads on this rank, and SAR weighs heads over "
            f"{ranks} rank(s): {cure}"
        )
