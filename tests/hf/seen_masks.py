"""What the layers of a model under SAR are given as masks, and which backend would run their calls on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from unittest import mock

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from sar_fast.backends.protocol import Request
from sar_fast.backends.select import choose_backend
from sar_fast.hf import decoding
from sar_fast.hf.attention import ATTENTION_NAME

WORDS = {"sliding_window_overlay": "window", "chunked_overlay": "chunks", "blockwise_overlay": "blocks"}


@dataclasses.dataclass(frozen=True)
class Seen:
    """One attention call of a re-weighted layer.

    Attributes:
        kind: the layer's type, "full" where layers have none.
        queries: how many.
        pattern: "causal", "dense", or what the mask's runs of keys come from.
        request: what the call asks of a backend.
    """

    kind: str
    queries: int
    pattern: str
    request: Request

    @property
    def on_a_gpu(self) -> str:
        """The backend that "auto" takes for the same call in bf16."""
        on_gpu = dataclasses.replace(self.request, device=torch.device("cuda"), dtype=torch.bfloat16)
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)  # the tests' interpreter has no bf16
            return choose_backend("auto", on_gpu).name


@contextlib.contextmanager
def seen_masks(monkeypatch) -> Iterator[list[Seen]]:
    """Inside ``apply_sar``: a list that every call of a re-weighted layer is added to."""
    seen, requests, patterns, kept = [], [], {}, []
    make_mask = AttentionMaskInterface._global_mapping[ATTENTION_NAME]
    attend = AttentionInterface._global_mapping[ATTENTION_NAME]

    def mask_function(*args, **kwargs):
        mask = make_mask(*args, **kwargs)
        if mask is not None:
            kept.append(mask)  # so that no other mask gets its id
            patterns[id(mask)] = pattern_of(kwargs["mask_function"])
        return mask

    def attention(module, query, key, value, attention_mask, **kwargs):
        requests.clear()
        result = attend(module, query, key, value, attention_mask, **kwargs)
        for request in requests:
            types = getattr(module.config, "layer_types", None)
            kind = types[module.layer_idx].removesuffix("_attention") if types else "full"
            pattern = "causal"
            if request.masked:
                pattern = "dense"
            elif request.bounded:
                pattern = patterns[id(attention_mask)]
            seen.append(Seen(kind, query.shape[2], pattern, request))
        return result

    def choose(name, request):
        requests.append(request)
        return choose_backend(name, request)

    with monkeypatch.context() as patched:
        patched.setitem(AttentionMaskInterface._global_mapping, ATTENTION_NAME, mask_function)
        patched.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, attention)
        patched.setattr(decoding, "choose_backend", choose)
        yield seen


def pattern_of(function) -> str:
    """The parts of a mask function beside causal, in words."""
    name = function.__qualname__.split(".")[0]
    if name in WORDS:
        return WORDS[name]
    parts = [part for cell in function.__closure__ or () for part in _functions(cell.cell_contents)]
    return " and ".join(sorted({words for words in map(pattern_of, parts) if words}))


def _functions(captured) -> list:
    return [x for x in (captured if isinstance(captured, tuple) else (captured,)) if callable(x)]


def by_kind(values: dict[str, str]) -> str:
    """Layer type -> word, as a cell of a table: the word alone where it is the same for all."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{kind}: {word}" for kind, word in sorted(values.items()))
