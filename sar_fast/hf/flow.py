"""The hooks of a forward pass: it is begun before the base model runs, and checked after.

They are functions that find the handle on the module that they are called with: a copy of the model has its own, a
replica its original's, and a copy of a part has none.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from sar_fast.base.errors import ArgumentError
from sar_fast.config import SARConfig
from sar_fast.hf.attention import ATTENTION_NAME
from sar_fast.hf.cache_argument import cache_in, check_cache
from sar_fast.hf.cache_state import CacheState, state_of
from sar_fast.hf.features import encoded_norms, handle_of, take_off_norms
from sar_fast.hf.forward_pass import Pass
from sar_fast.hf.host_facts import HostFacts
from sar_fast.hf.masks import ask_mask, padding_of, read_mask
from sar_fast.hf.norms import IncomingNorms, placeholders_of
from sar_fast.hf.packing import Packing, ask_packing, find_packing
from sar_fast.hf.refusals import (
    PIXELS,
    explain_foreign_forward,
    refuse_ignored_features,
    refuse_merged_embeddings,
    refuse_other_attention,
    refuse_output_attentions,
    refuse_unfilled,
    refuse_unreached,
    refuse_unseen_cache,
)
from sar_fast.hf.rule_module import config_for
from sar_fast.hf.running import enter, leave
from sar_fast.hf.speculation import drafting, take_drafts
from sar_fast.hf.split_queries import refuse_unnamed_splits
from sar_fast.hf.structure import Layout
from sar_fast.method.roles import TokenRoles, roles_from_visual


def before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Pre-hook of the base model: begin the pass and send it down with the other keyword arguments."""
    handle = handle_of(module)
    if handle is None:
        return None
    layout = handle.layout
    refuse_other_attention(layout.attention_config._attn_implementation, ATTENTION_NAME)
    refuse_unnamed_splits(handle.shards)
    if handle.config.record or handle.config.record_rows != "none":
        handle.stats, handle.rows = {}, {}  # of this pass alone, also if it re-weights nothing
    refuse_output_attentions(kwargs.get("output_attentions"), module.config)
    running = _begin(module, handle, {**dict(zip(layout.forward_parameters, args)), **kwargs})
    if running.brings_pictures:
        handle.roles, handle.prior = running.roles, running.prior
    if layout.family.computes_last_queries_only:
        kwargs["logits_to_keep"] = None
    enter(running, alone=True)
    return args, {**kwargs, "sar_context": running}


def _begin(module: nn.Module, handle: Any, given: dict[str, Any]) -> Pass:
    """The pass of ``module``, whose forward was given these arguments by name."""
    config, cache = config_for(handle.config, handle.layout.base_model, module), cache_in(given)
    check_cache(cache)
    past_length, past = 0 if cache is None else cache.get_seq_length(), state_of(cache)
    encoded = given.get("mm_encoder_outputs") or {}
    refuse_ignored_features(module, encoded, handle.layout.forward_parameters)
    comes = {m for m, pixels in PIXELS.items() if encoded.get(m) is not None or given.get(pixels) is not None}
    drafts = take_drafts(cache, given.get("input_ids"), past_length)
    placeholders = _find_placeholders(module, handle.layout, given, comes)
    facts = _ask(given, placeholders, comes, past_length, drafts)
    if "past_length" in facts:
        past_length = facts["past_length"][0]
    _continue(handle, config, cache, past_length, _tokens(given).shape[1])
    if config.measures:
        _check_pictures(handle.layout, given, comes, facts)
    placeholders = {modality: mask for modality, mask in placeholders.items() if modality in comes}
    roles, packing = _read_sequences(given, placeholders, past_length, past, config, facts)
    incoming = IncomingNorms(placeholders, facts)
    running = Pass(handle, config, roles, past_length, incoming, past, packing, drafts, **padding_of(facts))
    for modality in placeholders:
        if encoded.get(modality) is not None:
            running.receive_encoded(modality, encoded_norms(encoded[modality], modality, handle))
    return running


def _tokens(given: dict[str, Any]) -> Tensor:
    """(B, S) ids or (B, S, width) embeddings of the new positions."""
    return given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]


def _find_placeholders(module: nn.Module, layout: Layout, given: dict[str, Any], comes: set[str]) -> dict[str, Tensor]:
    """Modality -> (B, S) bool, its placeholders; where nothing is to be refused, of modalities that come alone."""
    asked = comes if _tokens(given).shape[1] == 1 or torch.compiler.is_compiling() else layout.placeholder_ids
    return {m: placeholder_mask(module, given, token) for m, token in layout.placeholder_ids.items() if m in asked}


def placeholder_mask(base_model: nn.Module, given: dict[str, Any], token: int) -> Tensor:
    """(B, S) bool: where the ids, or the embeddings when only they are given, are placeholder ``token``."""
    tokens = _tokens(given)
    if tokens.dim() == 2:
        return tokens == token
    row = base_model.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=tokens.device))
    return (tokens == row.to(tokens.device)).all(-1)


def _ask(
    given: dict[str, Any], placeholders: dict[str, Tensor], comes: set[str], past_length: int | Tensor, drafts: int
) -> HostFacts:
    """All that the host must know of a prompt's values, to be read together; decode steps have nothing to be read."""
    facts, shape = HostFacts(), _tokens(given).shape[:2]
    if torch.compiler.is_compiling() or shape[1] == 1:
        return facts
    if isinstance(past_length, Tensor):
        facts.ask("past_length", past_length)
    for modality, mask in placeholders.items():
        if modality in comes:
            facts.ask(placeholders_of(modality), mask.sum(-1))
        elif not (drafts and past_length) and not drafting():  # drafted tokens are none
            facts.ask(f"unfilled {modality}", mask[:, : shape[1] - drafts].sum())
    ask_mask(facts, given.get("attention_mask"))
    ask_packing(facts, given, shape, past_length)
    return facts


def _continue(handle: Any, config: SARConfig, cache: Any, past_length: int | Tensor, new: int) -> None:
    """The cache must be one that this pass can go on from."""
    past = state_of(cache)
    if past is not None and past.packed:
        raise ArgumentError(
            "past_key_values", "one that packed sequences filled, which cannot be continued", "be a new one"
        )
    if past is not None and not torch.compiler.is_compiling():
        past.leave_inference_mode()
    if config.measures:
        refuse_unseen_cache(cache, past, past_length, new, handle.layout.peft_configs)
        if past is not None:
            past.belong_to(config, handle.switch)


def _check_pictures(layout: Layout, given: dict[str, Any], comes: set[str], facts: HostFacts) -> None:
    """Placeholders and embeddings of this pass must say where pictures are. Generated tokens are none."""
    no_ids = given.get("input_ids") is None
    if no_ids and not comes:
        refuse_merged_embeddings(given, _tokens(given).shape[1], layout.peft_configs)
    filled = {layout.placeholder_ids.get(m) for m in comes}  # clips may use the pictures' placeholder
    for modality, token in layout.placeholder_ids.items():
        if token not in filled and f"unfilled {modality}" in facts:
            refuse_unfilled("inputs_embeds" if no_ids else "input_ids", modality, facts[f"unfilled {modality}"][0])


def _read_sequences(
    given: dict[str, Any],
    placeholders: dict[str, Tensor],
    past_length: int | Tensor,
    past: CacheState | None,
    config: SARConfig,
    facts: HostFacts,
) -> tuple[TokenRoles, Packing | None]:
    """Roles of the new positions, and the sequences that are packed into the rows."""
    tokens = _tokens(given)
    shape = tokens.shape[:2]
    visual = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    for mask in placeholders.values():
        visual = visual | mask
    real, packed_by_mask = read_mask(given.get("attention_mask"), shape, past_length, facts)
    real = None if real is None else real.to(visual.device)
    packing = find_packing(given, shape, past_length, facts) or packed_by_mask
    if packing is not None:
        return packing.roles(visual if real is None else visual & real, config.text_queries), packing
    return _roles(visual, real, past, config, brings_pictures=bool(placeholders)), None


def _roles(
    visual: Tensor, real: Tensor | None, past: CacheState | None, config: SARConfig, *, brings_pictures: bool
) -> TokenRoles:
    """Roles of the new positions, each row one sequence.

    Args:
        visual: (B, S) bool, placeholders that this pass's features fill.
        real: (B, S) bool, False = padding; None = no padding.
    """
    seen = None if past is None or past.visual_mask is None else past.visual_mask.to(visual.device)
    if not brings_pictures:  # all text follows what the cache holds
        return TokenRoles(
            visual, visual if seen is None else _and(seen.any(-1, keepdim=True), real).expand(visual.shape)
        )
    roles = roles_from_visual(visual, real, text_queries=config.text_queries)
    if seen is None:
        return roles
    # text that follows cached visual tokens counts, unless newer visual tokens come after it
    follows = _and(seen.any(-1, keepdim=True) & ~visual, real)
    if config.text_queries == "after_last_image":
        follows = follows & ~roles.visual_mask.any(-1, keepdim=True)
    return TokenRoles(roles.visual_mask, roles.text_mask | follows)


def _and(mask: Tensor, real: Tensor | None) -> Tensor:
    return mask if real is None else mask & real


def after_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """Hook of the base model, also after an exception: then there is no output."""
    handle, running = handle_of(module), kwargs.get("sar_context")
    if handle is None or running is None:
        return
    leave(running)
    take_off_norms(output)
    if running.brings_pictures:
        handle.prior = running.prior
    if output is None:
        explain_foreign_forward(sys.exc_info()[1], handle.layout.attention_modules)
    elif running.reweights:
        refuse_unreached(handle.sar_layers, running.reached, handle.layout.attention_modules)


def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Pre-hook of decoder layers: they see the cache that the text model made itself."""
    running, cache = kwargs.get("sar_context"), cache_in(kwargs)
    if running is not None and cache is not None and running.cache is None:
        running.meet(cache)
