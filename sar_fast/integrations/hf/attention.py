"""The attention and mask functions that transformers calls under the name ``"sar"``.

Mask protocol between the two: None = causal, no padding; 2D bool (B, keys) = causal, aligned to the last of these keys,
True = real key; 4D bool = everything else. Plain causal patterns never become a dense mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from sar_fast.cache_state import attach
from sar_fast.decoding import attend_with_state
from sar_fast.functional import plain_attention
from sar_fast.integrations.hf.context import SARContext
from sar_fast.rows import visual_attention_rows
from sar_fast.types import AttentionOptions

ATTENTION_NAME = "sar"
LAYER_MARK = "_sar_layer"  # attribute of the attention modules that are re-weighted: their layer index


def register() -> None:
    """Make ``attn_implementation="sar"`` known to transformers, with its mask function; idempotent."""
    AttentionInterface.register(ATTENTION_NAME, sar_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sar_mask)


def sar_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of transformers' interface; see the module's mask protocol."""
    dense = lambda: sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )
    tracing = torch.compiler.is_compiling()
    if mask_function is not causal_mask_function or kwargs.get("use_vmap") or kv_offset != 0:
        return dense()
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, :kv_length].to(torch.bool)
    if tracing and isinstance(q_offset, Tensor):
        if q_length > 1:
            return dense()
        filled = (torch.arange(kv_length, device=q_offset.device) <= q_offset)[None].expand(batch_size, -1)
        return filled if padding is None else filled & padding
    end = int(q_offset) + q_length  # keys beyond are a static cache's unfilled slots
    if padding is not None:
        padding = padding[:, :end]
        if not tracing and bool(padding.all()):
            padding = None
    if padding is None and end < kv_length:
        padding = torch.ones(batch_size, end, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    return padding


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
    sar_context: SARContext | None = None,
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
    reweighted = layer is not None and sar_context.active and sar_context.config.activation_layer_k > 0
    # transformers' SDPA reads "no mask, fewer queries than keys" as an empty static cache; here it is a second turn
    square = query.shape[2] in (1, key.shape[2])
    for_sdpa = attention_mask.dim() == 4 if attention_mask is not None else square
    if not reweighted and softcap is None and for_sdpa:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    if dropout:
        raise ValueError(f"attention_dropout must be 0 with attn_implementation='sar': no dropout; got {dropout}")
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] < key.shape[2]:
        key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [B, S, heads, D]
    key_padding, dense = None, None
    if attention_mask is not None and attention_mask.dim() == 4:
        dense = attention_mask[..., : k.shape[1]]
        dense = dense if dense.dtype == torch.bool else dense == 0
    else:
        key_padding = attention_mask
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    options = AttentionOptions(
        softmax_scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=bool(causal) and dense is None,
        softcap=softcap or 0.0,
    )
    if not reweighted:
        out, _ = plain_attention(q, k, v, options=options, key_padding_mask=key_padding, attn_mask=dense)
        return out, None
    return _reweighted(layer, q, k, v, key_padding, dense, options, sar_context), None


def _reweighted(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    dense: Tensor | None,
    options: AttentionOptions,
    context: SARContext,
) -> Tensor:
    """SAR attention of one marked layer, with the cache's state read and written."""
    config = context.config
    if context.prior is None:
        raise RuntimeError("SAR: the vision features of this pass never came; was the vision encoder bypassed?")
    visual, prior = context.over_keys(k.shape[1])
    text = context.roles.text_mask[:, -q.shape[1] :]  # a model may keep only its last queries
    past = context.past.layers.get(layer) if context.past is not None else None
    frozen = past is not None and not context.placeholders and config.decode == "prompt"
    out, stats, state = attend_with_state(
        q,
        k,
        v,
        visual,
        text,
        prior,
        config=config,
        options=options,
        past=past,
        frozen=frozen,
        carried_rows=context.carried_rows(),
        key_padding_mask=key_padding,
        attn_mask=dense,
    )
    if context.cache is not None and not frozen:
        on_cache = attach(context.cache)
        if context.placeholders:
            on_cache.visual_mask, on_cache.norms = context.visual_mask, context.norms
        length = context.past_length + context.roles.text_mask.shape[1]
        snapshots = config.decode == "running" and not context.cache.is_compileable  # static caches cannot crop
        on_cache.store(layer, state, length, keep_snapshots=snapshots)
    if config.record:
        context.recorder.record(layer, stats)
    if config.record_rows == "last_text":
        rows = visual_attention_rows(q.detach(), k.detach(), text, visual, key_padding, dense, options)
        context.recorder.record_rows(layer, rows)
    return out
