"""The mask function that transformers calls under the name ``"sar"``, and what it gives to the attention function.

None = causal, no padding; 2D bool (B, keys) = causal, aligned to the last of these keys, True = real key; 4D int32 =
the run of keys that each query sees, padding in it (``compact_mask``); 4D bool = everything else, and single queries.
Patterns that transformers composes itself become a dense mask of many queries only in a graph that is traced, which
cannot look into them, and where padding lies between real tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from sar_fast.hf.compact_mask import compact
from sar_fast.hf.forward_pass import Pass, running_pass
from sar_fast.hf.mask_patterns import Queries, padding_between, run_of
from sar_fast.method.value_checks import check_holds


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
    device, tracing = kwargs.get("device", "cpu"), torch.compiler.is_compiling()
    running = None if tracing else running_pass()  # closures cannot be traced
    if running is not None and running.packing is not None:
        queries = Queries.of_packing(running.packing, (batch_size, q_length), device)
        run = run_of(mask_function, queries)
        if run is None:
            return dense()
        return None if queries.see_all_before(run) else compact(run, queries.num_keys, q_length, device)
    keys = range(kv_offset, kv_offset + kv_length)
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = None if padding is None else padding[:, : keys.stop].to(torch.bool)
    plain = mask_function is causal_mask_function and kv_offset == 0
    # generate() makes the masks of a static cache's decode steps outside the compiled forward pass, which masks that
    # grow with the cache, or change their form, would compile again
    if plain and isinstance(q_offset, Tensor) and q_length == 1:
        filled = (torch.arange(kv_length, device=q_offset.device) <= q_offset)[None].expand(batch_size, -1)
        return filled if padding is None else filled & padding
    if tracing and (not plain or isinstance(q_offset, Tensor)):
        return dense()
    if not plain:
        queries = Queries.of_rows(q_length, q_offset, keys, padding, device)
        run = run_of(mask_function, queries) if q_length > 1 or allow_is_causal_skip else None
        if run is None:
            return dense()
        if not queries.see_all_before(run):
            if q_length == 1 or _lies_between(queries.real, running):  # dense, one query's mask is as small
                return dense()
            return compact(queries.hide_padding(run), kv_length, q_length, device)
    filled = range(kv_offset, int(q_offset) + q_length)  # keys beyond are a static cache's free slots
    if padding is not None:
        padding = padding[:, filled.start : filled.stop]
        if not tracing and _hides_nothing(padding, q_length, running):
            padding = None
    if padding is None and filled.stop < keys.stop:
        padding = torch.ones(batch_size, len(filled), dtype=torch.bool, device=device)
    return padding


def _lies_between(real: Tensor | None, running: Pass | None) -> bool:
    """Whether a mask (B, positions) hides some between real ones, which no run leaves out. Asked as below."""
    if real is None:
        return False
    if real.device.type == "cpu" or running is None or running.scattered is None:
        return bool(padding_between(real))
    if not running.scattered:
        check_holds(~padding_between(real), "attention_mask: the model hides positions that lie between others")
    return running.scattered


def _hides_nothing(padding: Tensor, queries: int, running: Pass | None) -> bool:
    """Whether a mask (B, keys) is known to be True all over. A GPU is asked once a prompt, by the pass, not here."""
    if padding.device.type == "cpu":
        return bool(padding.all())
    if queries == 1 or running is None or running.padded is not False:
        return False
    check_holds(padding.all(), "attention_mask: the model hides positions that the mask it was given does not")
    return True
