"""Token roles: which positions of a prompt are visual keys (V) and which are text queries (T)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sar_fast.base.errors import ArgumentError, ArgumentTypeError, check_choice
from sar_fast.method.options import TextQueries


class TokenRoles(NamedTuple):
    """Both (B, S) bool: ``visual_mask`` is V, ``text_mask`` is T."""

    visual_mask: Tensor
    text_mask: Tensor


def token_roles(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_token_id: int | Sequence[int],
    *,
    text_queries: TextQueries = "after_last_image",
) -> TokenRoles:
    """Visual and text masks of a batch of prompts (docs/method.md, section 1).

    Args:
        input_ids: (B, S) integer token ids.
        attention_mask: (B, S), non-zero = real token, padding on either side; None = no padding.
        image_token_id: the id of image placeholders, or several ids (image and video).
        text_queries: T is the text after the sample's last visual token, or (``"after_first_image"``) all text after
            its first.

    Returns:
        :class:`TokenRoles`. A row without visual tokens has no text queries either: SAR leaves it alone.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ArgumentError("input_ids", got, "be a (batch, seqlen) integer tensor")
    several = isinstance(image_token_id, (Sequence, set, frozenset)) and not isinstance(image_token_id, str)
    ids = list(image_token_id) if several else [image_token_id]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ArgumentTypeError("image_token_id", repr(image_token_id), "be an int or a sequence of ints")
    visual = input_ids == ids[0]
    for i in ids[1:]:
        visual = visual | (input_ids == i)
    return roles_from_visual(visual, attention_mask, text_queries=text_queries)


def roles_from_visual(
    visual: Tensor, attention_mask: Tensor | None, *, text_queries: TextQueries = "after_last_image"
) -> TokenRoles:
    """Roles from a (B, S) bool mask of placeholder positions; see :func:`token_roles`."""
    check_choice("text_queries", text_queries, ("after_last_image", "after_first_image"))
    real = torch.ones_like(visual)
    if attention_mask is not None:
        if tuple(attention_mask.shape) != tuple(visual.shape):
            raise ArgumentError(
                "attention_mask", tuple(attention_mask.shape), f"have input_ids' shape {tuple(visual.shape)}"
            )
        real = attention_mask != 0
    visual = visual & real
    seen = visual.cumsum(-1)  # visual tokens up to and including each position
    needed = seen[:, -1:] if text_queries == "after_last_image" else torch.ones_like(seen[:, -1:])
    text = ~visual & real & (seen >= needed) & visual.any(-1, keepdim=True)
    return TokenRoles(visual, text)
