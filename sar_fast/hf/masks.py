"""What an attention mask, in each form that transformers takes, says of the new positions: padding, and sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.hf.compact_mask import is_compact, real_queries
from sar_fast.hf.dense_masks import as_visible
from sar_fast.hf.host_facts import HostFacts
from sar_fast.hf.mask_patterns import padding_between
from sar_fast.hf.packing import Packing

KINDS = ("full_attention", "sliding_attention")  # of a dict's masks, the first to be read


def ask_mask(facts: HostFacts, attention_mask: Any) -> None:
    """Ask of a (B, positions) mask whether it hides any, has other values, and hides some between others."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        real = attention_mask != 0
        others = real & (attention_mask != 1)
        facts.ask("padding", torch.stack([(~real).any(), others.any(), padding_between(real)]))


def padding_of(facts: HostFacts) -> dict[str, bool]:
    """What a pass keeps of the mask that :func:`ask_mask` asked about; nothing where it did not."""
    if "padding" not in facts:
        return {}
    padded, _, scattered = map(bool, facts["padding"])
    return {"padded": padded, "scattered": scattered}


def read_mask(
    attention_mask: Any, shape: torch.Size, past_length: int | Tensor, facts: HostFacts
) -> tuple[Tensor | None, Packing | None]:
    """(real, packing) of a pass.

    Args:
        attention_mask: None; (B, positions) non-zero = real token; (B or 1, 1, S, keys) bool or additive; a compact
            mask; or a dict of these by layer type, as ``generate`` makes them in advance for static caches.
        shape: (B, S) of the new positions.
        past_length: number of cached positions; a static cache gives a 0-dim tensor.
        facts: what :func:`ask_mask` asked of a pass of several positions; nothing in a graph.

    Returns:
        real: (B, S) bool, False = padding; None = all are real.
        packing: the sequences that a dense mask keeps apart, or None.

    Raises:
        ValueError, TypeError: the mask is of no such form, or does not tell the sequences apart.
    """
    mask, everywhere = attention_mask, True
    if isinstance(mask, Mapping):
        kinds = [*(k for k in KINDS if k in mask), *(k for k in mask if k not in KINDS)]
        mask, everywhere = (mask[kinds[0]] if kinds else None), len(set(map(id, mask.values()))) == 1
        for other in attention_mask.values():  # layers of other types get theirs
            if isinstance(other, Tensor) and other.dim() == 4 and not is_compact(other):
                as_visible(other)
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise ArgumentTypeError("attention_mask", type(mask).__name__, "be a tensor, a dict of tensors or None")
    if mask.dim() == 2:
        return _columns(mask, shape, past_length, facts), None
    if is_compact(mask) and mask.shape[:3] in ((1, 1, shape[1]), (shape[0], 1, shape[1])):
        return real_queries(mask).expand(shape), None
    if mask.dim() == 4:
        return _read_dense(mask, shape, past_length, everywhere)
    raise ArgumentError(
        "attention_mask",
        (f"shape {tuple(mask.shape)}. Where packed sequences begin and end is said by cu_seq_lens_q and cu_seq_lens_k"),
        "be (batch, positions) or (batch, 1, queries, keys)",
    )


def _columns(mask: Tensor, shape: torch.Size, past_length: int | Tensor, facts: HostFacts) -> Tensor:
    """The new positions' columns of a (B, positions) mask, which may run on over a static cache's unfilled slots."""
    B, S = shape
    if mask.shape[0] != B:
        raise ArgumentError("attention_mask", f"shape {tuple(mask.shape)}", f"have the batch's {B} rows")
    if "padding" in facts and facts["padding"][1]:
        raise ArgumentError(
            "attention_mask of 2 dimensions",
            (
                "other values, which would all count as real. If they number packed sequences: a (batch, "
                "1, queries, keys) mask, or cu_seq_lens_q and cu_seq_lens_k"
            ),
            "be 1 at real tokens and 0 at padding",
        )
    if isinstance(past_length, Tensor):
        columns = past_length.to(mask.device) + torch.arange(S, device=mask.device)
        return mask.index_select(1, columns.clamp_max(mask.shape[1] - 1)) != 0
    if mask.shape[1] < past_length + S:
        raise ArgumentError(
            "attention_mask", f"shape {tuple(mask.shape)}", f"cover the {past_length} cached and the {S} new positions"
        )
    return mask[:, past_length : past_length + S] != 0


def _read_dense(
    mask: Tensor, shape: torch.Size, past_length: int | Tensor, everywhere: bool
) -> tuple[Tensor, Packing | None]:
    """Padding and sequences of a (B or 1, 1, S, keys) mask; ``everywhere``: all layers get this one."""
    B, S = shape
    keys = mask.shape[-1]
    if mask.shape[0] not in (1, B) or mask.shape[1] != 1 or mask.shape[2] != S or keys < S:
        raise ArgumentError(
            "attention_mask of 4 dimensions",
            f"shape {tuple(mask.shape)}: SAR tells padding and sequences by it, which must be the same for all heads",
            f"be ({B} or 1, 1, {S}, keys)",
        )
    visible = as_visible(mask)[:, 0].expand(B, -1, -1)  # [B, S, keys]
    if isinstance(past_length, Tensor):
        first = past_length.to(mask.device).clamp_max(keys - S)
    else:
        first = min(past_length, keys - S)  # a sliding layer's mask covers the newest keys alone
    column = (first + torch.arange(S, device=mask.device)).expand(B, S)  # of each new position's own key
    real = visible.gather(2, column[..., None])[..., 0]
    everything = visible.all(-1)  # so some callers write rows of padding, which would see nothing
    real = real & ~(everything & ~everything[:, -1:])
    if torch.compiler.is_compiling() or S == 1 or isinstance(past_length, Tensor) or past_length:
        return real, None
    return real, _sequences(visible[..., :S], real, everywhere)


def _sequences(visible: Tensor, real: Tensor, everywhere: bool) -> Packing | None:
    """The packing that ``visible`` (B, S, S) says, if a row holds more than one sequence.

    A sequence begins at a real token that does not see the real token before it; each run of padding between sequences
    is one more, of which nothing is read.
    """
    S = real.shape[1]
    position = torch.arange(S, device=real.device)
    last = torch.where(real, position, -1).cummax(-1).values  # [B, S] the last real position up to each
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
    sees_before = visible.gather(2, before.clamp_min(0)[..., None])[..., 0] & (before >= 0)
    begins = real & ~sees_before
    if not bool((begins.sum(-1) > 1).any()):
        return None
    pads_begin = ~real & torch.nn.functional.pad(real[:, :-1], (1, 0), value=True)
    starts = begins | pads_begin
    starts[:, 0] = True
    segment = starts.cumsum(-1)
    together = segment[:, :, None] == segment[:, None, :]
    told = visible & real[:, :, None]
    if bool((told & ~together).any()):
        raise ArgumentError(
            "attention_mask",
            "one that keeps some tokens from the ones before them, as packed sequences do, while others see across",
            (
                "tell packed sequences apart: in a row one after the other, each seeing itself alone, with padding "
                "only between them; or cu_seq_lens_q and cu_seq_lens_k"
            ),
        )
    causal = together & (position <= position[:, None])
    plain = everywhere and not bool(((told != causal) & real[:, :, None] & real[:, None, :]).any())
    begin = starts.flatten().nonzero()[:, 0]
    cu_seqlens = torch.cat([begin, begin.new_tensor([starts.numel()])])
    return Packing(cu_seqlens.to(torch.int32), int(cu_seqlens.diff().max()), causal=plain)
