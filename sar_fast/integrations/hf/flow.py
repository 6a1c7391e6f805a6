"""The hooks of a forward pass: its context is made before it, and checked after it.

They are functions that find the handle on the module that they are called with: a copy of the model has its own, a
replica its original's, and a copy of a part has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.cache_state import attach, state_of
from sar_fast.integrations.hf.context import SARContext, enter_pass, leave_pass, roles_of_pass
from sar_fast.integrations.hf.features import encoded_norms, handle_of
from sar_fast.integrations.hf.masks import read_mask
from sar_fast.integrations.hf.packing import find_packing
from sar_fast.integrations.hf.refusals import (
    PIXELS,
    refuse_merged_embeddings,
    refuse_unfilled,
    refuse_unreached,
    refuse_unseen_cache,
)
from sar_fast.integrations.hf.speculation import drafting, take_drafts
from sar_fast.integrations.hf.split_queries import refuse_unnamed_splits


def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of the base model: build the pass's context and send it down with the other keyword arguments."""
    handle = handle_of(module)
    if handle is None:
        return None
    handle.check_implementation()
    refuse_unnamed_splits(handle.shards)
    if handle.config.record or handle.config.record_rows != "none":
        handle.stats, handle.rows = {}, {}  # of this pass alone, also if it re-weights nothing
    given = {**dict(zip(handle.forward_parameters, args)), **kwargs}
    context = _context(module, handle, given)
    if context.placeholders:
        handle.roles, handle.prior = context.roles, context.prior
    if handle.family.computes_last_queries_only:
        kwargs["logits_to_keep"] = None
    enter_pass(context)
    return args, {**kwargs, "sar_context": context}


def _context(module: nn.Module, handle: Any, given: dict[str, Any]) -> SARContext:
    config, cache = handle.config_of(module), given.get("past_key_values")
    past_length, past = 0 if cache is None else cache.get_seq_length(), state_of(cache)
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if ids is not None else embeds
    shape = tokens.shape[:2]
    encoded = _encoded(module, handle, given)
    comes = {m for m, pixels in PIXELS.items() if encoded.get(m) is not None or given.get(pixels) is not None}
    drafts = take_drafts(handle.model, ids, past_length)
    if past is not None and past.packed:
        raise ValueError("past_key_values: packed sequences filled this cache; it cannot be continued")
    if past is not None and not torch.compiler.is_compiling():
        past.leave_inference_mode()
    if config.measures:
        refuse_unseen_cache(cache, past, past_length, shape[1], handle.peft_configs)
        if past is not None:
            past.belong_to(config, handle.switch)
        _check_pictures(module, handle, given, comes, past_length, drafts)
    placeholders = {
        m: placeholder_mask(module, ids, embeds, token) for m, token in handle.placeholder_ids.items() if m in comes
    }
    visual = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    for mask in placeholders.values():
        visual = visual | mask
    real, dense_packing = read_mask(given.get("attention_mask"), shape, past_length)
    real = None if real is None else real.to(visual.device)
    packing = find_packing(given, shape, past_length) or dense_packing
    if packing is not None:
        roles = packing.roles(visual if real is None else visual & real, config.text_queries)
    else:
        roles = roles_of_pass(visual, real, past, config)
    context = SARContext(config, roles, past_length, placeholders, past, handle, packing, handle.shards, drafts)
    for modality in placeholders:
        if encoded.get(modality) is not None:
            context.add_encoded_norms(modality, encoded_norms(encoded[modality], modality, handle))
    return context


def _encoded(module: nn.Module, handle: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Modality -> features that were encoded before this pass."""
    encoded = given.get("mm_encoder_outputs") or {}
    if encoded and "mm_encoder_outputs" not in handle.forward_parameters:
        raise ValueError(
            f"mm_encoder_outputs: {type(module).__name__} of this transformers version would ignore it; pass pixels"
        )
    return encoded


def _check_pictures(
    module: nn.Module, handle: Any, given: dict[str, Any], comes: set[str], past_length: int | Tensor, drafts: int
) -> None:
    """Placeholders and embeddings of this pass must say where pictures are. Generated tokens are none."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    new = (ids if ids is not None else embeds).shape[1]
    if ids is None and not comes:
        refuse_merged_embeddings(given, new, handle.peft_configs)
    if new == 1 or (drafts and past_length) or drafting() or torch.compiler.is_compiling():
        return
    filled = {handle.placeholder_ids.get(m) for m in comes}  # clips may use the pictures' placeholder
    for modality, token in handle.placeholder_ids.items():
        if token not in filled:
            mask = placeholder_mask(module, ids, embeds, token)[:, : new - drafts]
            refuse_unfilled("inputs_embeds" if ids is None else "input_ids", modality, mask)


def placeholder_mask(base_model: nn.Module, ids: Tensor | None, embeds: Tensor | None, token: int) -> Tensor:
    """(B, S) bool: where the ids, or the embeddings when only they are given, are placeholder ``token``."""
    if ids is not None:
        return ids == token
    row = base_model.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
    return (embeds == row.to(embeds.device)).all(-1)


def after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook of the base model, also after an exception: then there is no output."""
    handle, context = handle_of(module), kwargs.get("sar_context")
    if handle is None or context is None:
        return
    leave_pass(context)
    if context.placeholders:
        handle.prior = context.prior
    if output is not None and context.reweights:
        refuse_unreached(handle.sar_layers, context.reached)


def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pre-hook of decoder layers: they see the cache that the text model made itself.

    Its state knows of text-only passes too.
    """
    context, cache = kwargs.get("sar_context"), kwargs.get("past_key_values")
    if context is None or cache is None or context.cache is not None:
        return
    context.cache = cache
    if context.config.measures:
        state = attach(cache, rows=not torch.compiler.is_compiling())
        state.belong_to(context.config, context.recorder.switch)
        if not cache.is_compileable:  # a number that changes each step would compile a graph again
            state.length = context.past_length + context.roles.text_mask.shape[1]
