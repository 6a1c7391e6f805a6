"""The mask function that transformers calls under the name ``"sar"``, and what it gives to the attention function.

None = causal, no padding; 2D bool (B, keys) = causal, aligned to the last of these keys, True = real key; 4D bool =
everything else. Plain causal patterns never become a dense mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from sar_fast.integrations.hf.forward_pass import running_pass
from sar_fast.value_checks import check_holds


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
    context = None if tracing else running_pass()  # closures cannot be traced
    if context is not None and context.packing is not None and _packs_causal(mask_function):
        return None  # every layer gets the context's packing
    if mask_function is not causal_mask_function or kwargs.get("use_vmap") or kv_offset != 0:
        return dense()
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, :kv_length].to(torch.bool)
    if isinstance(q_offset, Tensor) and q_length == 1:
        # a static cache's decode step: generate() makes its mask outside the compiled forward pass, which a mask that
        # grows with the cache would compile again each step
        filled = (torch.arange(kv_length, device=q_offset.device) <= q_offset)[None].expand(batch_size, -1)
        return filled if padding is None else filled & padding
    if tracing and isinstance(q_offset, Tensor):
        return dense()
    end = int(q_offset) + q_length  # keys beyond are a static cache's unfilled slots
    if padding is not None:
        padding = padding[:, :end]
        if not tracing and _hides_nothing(padding, q_length):
            padding = None
    if padding is None and end < kv_length:
        padding = torch.ones(batch_size, end, dtype=torch.bool, device=kwargs.get("device", "cpu"))
    return padding


def _hides_nothing(padding: Tensor, queries: int) -> bool:
    """Whether a mask (B, keys) is known to be True all over. A GPU is asked once a prompt, by the pass, not here."""
    if padding.device.type == "cpu":
        return bool(padding.all())
    running = running_pass()
    if queries == 1 or running is None or running.padded is not False:
        return False
    check_holds(padding.all(), "attention_mask: the model hides positions that the mask it was given does not")
    return True


def _packs_causal(mask_function: Any) -> bool:
    """Whether a mask function is transformers' "causal, inside each packed sequence" and nothing more."""
    if mask_function is causal_mask_function:
        return True
    name = getattr(mask_function, "__qualname__", "")
    closure = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__ or ()))
    if name == "and_masks.<locals>.and_mask":
        return all(_packs_causal(part) for part in closure["mask_functions"].cell_contents)
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _packs_causal(closure["mask_function"].cell_contents)
    return name == "packed_sequence_mask_function.<locals>.inner_mask"
