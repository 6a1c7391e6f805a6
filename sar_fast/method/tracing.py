"""What the operators share: how tensors are given to them in traced code, and what they find out on real tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sar_fast.method.validation import UNKNOWN_LENGTH


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, each once: ``torch.compile`` refuses an autograd function that is given one twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor | None] = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def no_autocast(q: Tensor) -> contextlib.AbstractContextManager:
    """Inputs are cast before the operator; inside, autocast would round the fp32 statistics to its dtype."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what runs now runs again later, on other values."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def longest(known: int, cu_seqlens: Tensor | None, tokens: int) -> int:
    """The longest sequence, where a traced graph could not read what the caller gave for it.

    Not simply the packed length, which is an upper bound too: what kernels allocate per sequence grows with it (second
    moments by 64 KiB per head and 2,048 tokens). Only a captured graph, which cannot look, takes it.
    """
    if known != UNKNOWN_LENGTH:
        return known
    if capturing():
        return tokens
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


_AUTOGRAD_KEYS = ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView")


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd inside an operator.

    Compiled graphs and dispatch modes run operators below autograd, where nothing is recorded in any grad mode.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in _AUTOGRAD_KEYS:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        if not (torch.ones((), requires_grad=True) + 0).requires_grad:
            raise RuntimeError("a gradient is needed where autograd does not record, as under torch.inference_mode()")
        yield
