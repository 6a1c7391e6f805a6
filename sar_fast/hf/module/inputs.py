"""What a call of :class:`SARAttention` brings beside the hidden states: its cache, masks and keywords, checked."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.config import SARConfig
from sar_fast.hf.cache_state import CacheState, state_of
from sar_fast.hf.dense_masks import as_visible, has_values

NAMES = (
    "position_embeddings",
    "attention_mask",
    "past_key_values",
    "cache",
    "visual_mask",
    "text_mask",
    "prior",
    "position_ids",
)
# what decoder layers pass down and attention has no use for
WITHOUT_EFFECT = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "use_cache",
}
_PACKED = "packed rows need a 4D attention_mask, or sar_fast.sar_attn_varlen_func"
REFUSED = {
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), _PACKED),
    "output_attentions": "no attention matrix exists; statistics are in last_stats",
    "sliding_window": "the module attends to all positions; a 4D attention_mask can hide some",
    "is_causal": "the module's own is_causal holds; a 4D attention_mask can show other keys",
    "softcap": "it is given at construction",
    "dropout": "no kernel has dropout",
}


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache under either of its names."""
    if past_key_values is not None and cache is not None:
        raise ArgumentError("cache and past_key_values", "both", "come as one: they are two names of one argument")
    return cache if past_key_values is None else past_key_values


def check_keywords(keywords: dict[str, Any], *, causal: bool) -> None:
    """Raise for a keyword that would change the result (``ValueError``) or is not known (``TypeError``)."""
    nothing = {**dict.fromkeys(REFUSED, False), "is_causal": causal}  # the values that, as None, ask for nothing
    for name, value in keywords.items():
        if value is None or name in WITHOUT_EFFECT or value is nothing.get(name, ...):
            continue
        if name in REFUSED:
            got = value if isinstance(value, (bool, int, float, str)) else type(value).__name__
            raise ArgumentError(name, got, f"be left out: {REFUSED[name]}")
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else "pass only what attention needs"
        raise TypeError(f"forward() got an unknown keyword {name!r}; {hint}")


def check_hidden(hidden_states: Any) -> tuple[int, int]:
    """(B, S) of the hidden states (B, S, hidden_size)."""
    if not isinstance(hidden_states, Tensor):
        raise ArgumentTypeError("hidden_states", type(hidden_states).__name__, "be a tensor")
    if hidden_states.dim() != 3:
        raise ArgumentError("hidden_states", f"shape {tuple(hidden_states.shape)}", "be (batch, seqlen, hidden_size)")
    return hidden_states.shape[0], hidden_states.shape[1]


def check_position_ids(position_ids: Any, like: Tensor) -> None:
    """Raise unless positions are integers (..., B or 1, S); ``like``: hidden states."""
    B, S = like.shape[:2]
    shape = tuple(getattr(position_ids, "shape", ()))
    if not isinstance(position_ids, Tensor) or position_ids.is_floating_point() or shape[-2:] not in ((1, S), (B, S)):
        raise ArgumentError("position_ids", repr(shape or position_ids), f"be integers of shape ({B} or 1, {S})")


class Span(NamedTuple):
    """Which keys a call sees.

    ``past`` positions are cached, of ``keys`` in the key tensor; in a graph that is being traced over a static cache
    ``past`` is a 0-dim tensor and ``keys`` the cache's capacity, of which the first past + S are filled.
    """

    past: int | Tensor
    keys: int
    capacity: int | None

    @property
    def traced(self) -> bool:
        return isinstance(self.past, Tensor)

    def new_columns(self, mask: Tensor, length: int) -> Tensor:
        """The columns of the ``length`` new positions of ``mask`` (B, keys)."""
        if not self.traced:
            return mask[:, self.past :]
        return mask.index_select(1, self.past + torch.arange(length, device=mask.device))


def cache_span(cache: Any, layer: int, length: int) -> Span:
    """The span of a call with ``length`` new positions; raises where ``layer`` of the cache cannot hold them."""
    if cache is None:
        return Span(0, length, None)
    if not hasattr(cache, "get_seq_length") or not hasattr(cache, "update"):
        raise ArgumentTypeError("past_key_values", type(cache).__name__, "be a transformers cache")
    layers = getattr(cache, "layers", ())
    kept = layers[layer] if layer < len(layers) else None
    if getattr(kept, "is_sliding", False):
        raise ArgumentError("past_key_values", f"layer {layer}, a {type(kept).__name__}", "keep all positions")
    past, capacity = cache.get_seq_length(layer), getattr(kept, "max_cache_len", None)
    if isinstance(past, Tensor):  # a static cache's live counter, which update() advances
        if torch.compiler.is_compiling():
            return Span(past.clone(), capacity, capacity)
        past = int(past)
    if capacity is not None and past + length > capacity:
        raise ArgumentError(
            "past_key_values", f"room for {capacity}", f"have room for {past} cached and {length} new positions"
        )
    return Span(past, past + length, capacity)


def split_mask(
    attention_mask: Any, batch: int, length: int, span: Span, device: torch.device, *, causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(key padding (B, keys) bool or None, dense (B or 1, 1, S, keys) bool or None) of a call."""
    padding = dense = None
    if attention_mask is not None:
        _check_shape(attention_mask, batch, length, span, device)
        visible = _as_bool(attention_mask)[..., : span.keys]
        padding, dense = (visible, None) if visible.dim() == 2 else (None, visible)
    if not span.traced:
        return padding, dense
    key = torch.arange(span.keys, device=device)
    filled = key < span.past + length  # [keys]
    if dense is not None:
        return None, dense & filled
    if length > 1 and causal:
        filled = key <= span.past + torch.arange(length, device=device)[:, None]  # [S, keys]
    if filled.dim() == 1:
        return filled.expand(batch, -1) if padding is None else filled & padding, None
    return None, filled[None, None] if padding is None else filled[None, None] & padding[:, None, None]


def _check_shape(mask: Any, batch: int, length: int, span: Span, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError("attention_mask", type(mask).__name__, "be a tensor or None")
    shape = tuple(mask.shape)
    if mask.dim() not in (2, 4):
        raise ArgumentError("attention_mask", f"shape {shape}", "have 2 or 4 dimensions")
    if shape[-1] not in (span.keys, span.capacity):
        what = "the whole static cache" if span.traced else "the cached and the new positions"
        more = f" (or the static cache's {span.capacity})" if not span.traced and span.capacity is not None else ""
        raise ArgumentError("attention_mask", shape, f"cover {what}, {span.keys} positions{more}")
    rows = (batch,) if mask.dim() == 2 else (1, batch)
    if shape[0] not in rows or shape[1:-1] not in ((), (1, length)):
        raise ArgumentError(
            "attention_mask", shape, f"be ({batch}, {shape[-1]}) or ({batch} or 1, 1, {length}, {shape[-1]})"
        )
    if mask.device != device:
        raise ArgumentError("attention_mask", mask.device, f"be on hidden_states' device {device}")


def _as_bool(mask: Tensor) -> Tensor:
    """True = may be seen. Values are looked at where there are any, so that no bias is taken for a mask."""
    if mask.dim() == 4:
        return as_visible(mask)
    if mask.is_floating_point() and has_values(mask, lambda m: m < 0):
        raise ArgumentError("attention_mask", "negative values", "be non-zero at real tokens and 0 at padding")
    return mask != 0


def check_not_packed(position_ids: Tensor | None, attention_mask: Any) -> None:
    """Positions that start anew without a mask are how packed rows reach FlashAttention: here they would be one."""
    if attention_mask is not None or not isinstance(position_ids, Tensor):
        return
    if position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return
    if has_values(position_ids, lambda p: p.diff(dim=-1) < 0):
        raise ArgumentError("position_ids", "a row that does", f"not start anew inside a row: {_PACKED}")


class RolesOfCall(NamedTuple):
    """SAR's part of a call, checked: the arguments of ``attend_with_state`` that say what the tokens are."""

    visual_mask: Tensor
    text_mask: Tensor
    prior: Tensor
    past: Any
    frozen: bool
    carried_rows: Tensor | None
    given: bool

    def needs_no_grad(self, config: SARConfig, *tensors: Tensor) -> bool:
        """Whether sums would be carried, which has no backward, and one is asked for."""
        carried = self.past is not None and not self.frozen and config.decode != "step"
        return carried and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def roles_of_call(
    visual_mask: Tensor | None,
    text_mask: Tensor | None,
    prior: Tensor | None,
    *,
    like: Tensor,
    span: Span,
    padding: Tensor | None,
    cache: Any,
    layer: int,
    config: SARConfig,
) -> RolesOfCall:
    """Roles of a call's tokens, given or remembered by the cache; ``like``: hidden states (B, S, hidden_size)."""
    B, S = like.shape[:2]
    state = state_of(cache)
    if state is not None and not span.traced:
        state.leave_inference_mode()
    past = _past_of(state, layer, span)
    if visual_mask is None:
        if prior is not None:
            raise ArgumentError("visual_mask", "None", "be given together with prior")
        if past is None:
            raise ArgumentError(
                "visual_mask, text_mask and prior",
                "visual_mask=None",
                "be given for a prompt (an all-False visual_mask for text only)",
            )
        missing = (0, span.keys - state.visual_mask.shape[1])
        visual_mask, prior = (torch.nn.functional.pad(t, missing) for t in (state.visual_mask, state.norms))
        if text_mask is None and padding is not None:
            text_mask = span.new_columns(padding, S)
        elif text_mask is None:
            text_mask = torch.ones(B, S, dtype=torch.bool, device=like.device)
        given = False
    else:
        if text_mask is None or prior is None:
            raise ArgumentError("text_mask and prior", "None", "be given together with visual_mask")
        if span.traced:
            raise ArgumentError(
                "visual_mask", "a tensor", "be None in a compiled call on a static cache: run the prompt uncompiled"
            )
        given = True
    _check_masks(visual_mask, text_mask, prior, like, span.keys)
    if not given or past is None:
        return RolesOfCall(visual_mask, text_mask, prior, past, not given and config.decode == "prompt", None, given)
    _check_kept(visual_mask, state, span.past)
    pictures = span.new_columns(visual_mask, S).any(-1)  # [B]
    frozen = config.decode == "prompt" and not bool(pictures.any())
    return RolesOfCall(visual_mask, text_mask, prior, past, frozen, (~pictures).to(torch.float32), given)


def _past_of(state: CacheState | None, layer: int, span: Span) -> Any:
    """The layer's state after the cached positions, or None where there are none."""
    if not span.traced and span.past == 0:
        return None
    past = None if state is None else state.layers.get(layer)
    # a static cache's positions are not counted: compiled steps cannot. Earlier layers have counted the new ones
    seen = past is not None and (span.capacity is not None or state.length in (span.past, span.keys))
    if not seen or state.packed:
        raise ArgumentError(
            "past_key_values",
            f"{span.past} positions in layer {layer} that it did not, whose text queries were never counted",
            "hold positions that SAR saw one after the other; reset the cache and start with the whole prompt",
        )
    return past


def _check_masks(visual_mask: Any, text_mask: Any, prior: Any, like: Tensor, keys: int) -> None:
    B, S = like.shape[:2]
    for name, mask, want in (("visual_mask", visual_mask, (B, keys)), ("text_mask", text_mask, (B, S))):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != want:
            got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ArgumentError(name, got, f"be bool of shape {want}")
    if not isinstance(prior, Tensor) or not prior.is_floating_point() or tuple(prior.shape) != (B, keys):
        got = f"{prior.dtype} {tuple(prior.shape)}" if isinstance(prior, Tensor) else type(prior).__name__
        raise ArgumentError("prior", got, f"have shape {(B, keys)} and be floating point")
    for name, mask in (("visual_mask", visual_mask), ("text_mask", text_mask), ("prior", prior)):
        if mask.device != like.device:
            raise ArgumentError(name, mask.device, f"be on hidden_states' device {like.device}")


def _check_kept(visual_mask: Tensor, state: CacheState, past: int) -> None:
    """Masks over cached positions must say of them what earlier calls said."""
    known = state.visual_mask[:, :past]
    known = torch.nn.functional.pad(known, (0, past - known.shape[1]))
    differs = (visual_mask[:, :past] != known).nonzero()
    if len(differs):
        row, position = differs[0].tolist()
        raise ArgumentError(
            "visual_mask",
            f"another in row {row} at position {position}",
            "keep the cached positions' visual tokens as earlier calls gave them, beside the new ones",
        )
