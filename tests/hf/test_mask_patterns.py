"""transformers' mask functions as runs of keys: what ``sar_mask`` gives says what ``sdpa_mask`` builds dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma3TextConfig, StaticCache
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from sar_fast.hf.compact_mask import bounds_of, compact, is_compact
from sar_fast.hf.host_facts import HostFacts
from sar_fast.hf.mask_function import sar_mask
from sar_fast.hf.masks import read_mask
from sar_fast.method.values import Bounds
from sar_fast.method.visibility import as_mask
from tests.hf.tiny import VERSION

if VERSION >= (5, 9):
    from transformers.masking_utils import blockwise_overlay
else:  # of models' own files
    from transformers.models.gemma3.modeling_gemma3 import token_type_ids_mask_function

    def blockwise_overlay(blocks):
        types = [(blocks >= 0).int()] if VERSION < (5, 5) else []
        return token_type_ids_mask_function(*types, blocks)


WINDOW = 6
TURNS = {"prefill": (0, 14), "step": (14, 1), "second turn": (14, 5)}  # cached positions, new ones


def said(mask, shape, num_keys):
    """(B, 1, S, keys) bool: what the mask function's answer says, as its module words it."""
    B, S = shape
    if mask is None or mask.dim() == 2:
        end = num_keys if mask is None else mask.shape[1]
        key, query = torch.arange(num_keys), torch.arange(end - S, end)[:, None]
        seen = (key <= query).expand(B, 1, S, num_keys)
        return seen if mask is None else seen & torch.nn.functional.pad(mask, (0, num_keys - end))[:, None, None]
    if is_compact(mask):
        return as_mask(bounds_of(mask), num_keys, shape).expand(B, 1, S, num_keys)
    return mask


def assert_says_the_same(got, want, real):
    """In the rows of real queries, (B, S) bool; nobody reads those of padding."""
    B, _, S, num_keys = want.shape
    asks = real[:, None, :, None]
    assert torch.equal(said(got, (B, S), num_keys) & asks, want & asks)


def padding_of(side, length):
    """(3, length) bool, or None."""
    if side == "none":
        return None
    pads = torch.tensor([0, 3, 5])[:, None]
    column = torch.arange(length)
    return column >= pads if side == "left" else column < length - pads


def blocks_of(real, num_positions, length):
    """(3, positions): two pictures in each row of ``length`` tokens, beside its padding."""
    first = torch.zeros(3, 1, dtype=torch.long) if real is None else real.long().argmax(1, keepdim=True)
    column = torch.arange(num_positions) - first
    numbers = torch.where((column >= 2) & (column < 5), 0, -1)
    return torch.where((column >= 5) & (column < 8) & (torch.arange(num_positions) < length), 1, numbers)


def function_of(pattern, real, num_positions, length):
    """The mask function that the models of these patterns compose."""
    pads = torch.zeros(3, dtype=torch.long) if real is None else (real.cumsum(1) == 0).sum(1)
    blocks = blockwise_overlay(blocks_of(real, num_positions, length))
    return {
        "causal": causal_mask_function,
        "window": and_masks(sliding_window_overlay(WINDOW), causal_mask_function),
        "chunks": and_masks(chunked_overlay(WINDOW, pads), causal_mask_function),
        "pictures": or_masks(causal_mask_function, blocks),
        "pictures in a window": and_masks(or_masks(causal_mask_function, blocks), sliding_window_overlay(WINDOW)),
        "window or pictures": or_masks(and_masks(sliding_window_overlay(WINDOW), causal_mask_function), blocks),
        "both ways": bidirectional_mask_function,
        "window both ways": and_masks(sliding_window_bidirectional_overlay(WINDOW), bidirectional_mask_function),
    }[pattern]


def cache_of(kind, sliding, past):
    """A cache of one layer that ``past`` positions have filled, or None."""
    if kind == "none":
        return None
    layer = "sliding_attention" if sliding else "full_attention"
    config = Gemma3TextConfig(num_hidden_layers=1, layer_types=[layer], sliding_window=WINDOW)
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=24)
    if past:
        cache.update(torch.zeros(3, 1, past, 4), torch.zeros(3, 1, past, 4), 0)
    return cache


PATTERNS = ("causal", "window", "chunks", "pictures", "pictures in a window", "window or pictures")
LOCAL = ("window", "chunks", "pictures in a window")  # those for which a cache keeps the newest keys alone


@pytest.mark.parametrize("pattern", [*PATTERNS, "both ways", "window both ways"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("kind", "turn"), [("none", "prefill"), *((kind, turn) for kind in ("dynamic", "static") for turn in TURNS)]
)
def test_patterns_of_models(pattern, side, kind, turn):
    past, new = TURNS[turn]
    cache = cache_of(kind, pattern in LOCAL, past)
    offset, (kv_length, kv_offset) = 0, (new, 0)
    if cache is not None:
        offset, (kv_length, kv_offset) = cache.get_seq_length(), cache.get_mask_sizes(new, 0)
    real = padding_of(side, 14)
    if real is not None and past:
        real = torch.cat([real, torch.ones(3, new, dtype=torch.bool)], 1)
    how = {
        "batch_size": 3,
        "q_length": new,
        "kv_length": kv_length,
        "q_offset": offset,
        "kv_offset": kv_offset,
        "mask_function": function_of(pattern, real, max(kv_length + kv_offset, past + new), 14),
        "attention_mask": real,
        "allow_is_causal_skip": not (kind == "static" and new == 1),
    }
    got, want = sar_mask(**how), sdpa_mask(**{**how, "allow_is_causal_skip": False})
    asks = torch.ones(3, new, dtype=torch.bool) if real is None else real[:, past:]
    assert_says_the_same(got, want, asks)
    if got is not None and is_compact(got):
        real_queries, packing = read_mask(got, asks.shape, offset, HostFacts())
        assert torch.equal(real_queries, asks)
        assert packing is None
    holes = side == "right" and turn == "second turn"  # between the first turn's tokens and the second's
    if new > 1 and not (holes and pattern != "causal"):
        assert got is None or got.dim() == 2 or is_compact(got)
    if pattern == "causal":
        assert got is None or got.dim() == 2


@pytest.mark.parametrize("window", [14, 15])
@pytest.mark.parametrize("pattern", ["window", "chunks"])
def test_a_window_over_everything_is_plain_causal(window, pattern):
    local = sliding_window_overlay(window) if pattern == "window" else chunked_overlay(window, torch.zeros(3).long())
    function = and_masks(local, causal_mask_function)
    real = padding_of("left", 14)
    sizes = {"batch_size": 3, "q_length": 14, "kv_length": 14, "mask_function": function}
    assert sar_mask(**sizes) is None
    assert torch.equal(sar_mask(**sizes, attention_mask=real), real)


def test_a_step_in_a_full_sliding_cache_needs_no_mask():
    cache = cache_of("dynamic", True, 14)
    kv_length, kv_offset = cache.get_mask_sizes(1, 0)
    function = and_masks(sliding_window_overlay(WINDOW), causal_mask_function)
    assert sar_mask(3, 1, kv_length, 14, kv_offset, function) is None


@pytest.mark.parametrize("filled", [3, 5, 6, 14])
def test_a_compiled_step_keeps_the_form_of_its_mask(filled):
    cache = cache_of("static", True, filled)
    kv_length, kv_offset = cache.get_mask_sizes(1, 0)
    function = and_masks(sliding_window_overlay(WINDOW), causal_mask_function)
    mask = sar_mask(3, 1, kv_length, filled, kv_offset, function, allow_is_causal_skip=False)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 1, 1, WINDOW)


# what is not recognised


def every_other(batch, head, query, key):
    return (query - key) % 2 == 0


@pytest.mark.parametrize(
    "function",
    [
        or_masks(causal_mask_function, every_other),
        and_masks(every_other, causal_mask_function),
        or_masks(causal_mask_function, lambda *index: torch.tensor(True)),
        or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[0, 0, 1, 1, 0, 0, -1, -1]]).expand(3, -1))),
        and_masks(sliding_window_overlay(0), causal_mask_function),
    ],
)
def test_other_patterns_are_dense(function):
    """Functions of users, and pictures in pieces."""
    how = {"batch_size": 3, "q_length": 8, "kv_length": 8, "mask_function": function}
    mask = sar_mask(**how)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(**how, allow_is_causal_skip=False))


def test_padding_between_real_tokens_is_dense():
    real = torch.ones(3, 8, dtype=torch.bool)
    real[1, 3:5] = False
    function = and_masks(sliding_window_overlay(4), causal_mask_function)
    how = {"batch_size": 3, "q_length": 8, "kv_length": 8, "mask_function": function, "attention_mask": real}
    mask = sar_mask(**how)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, sdpa_mask(**how, allow_is_causal_skip=False))


# compositions


def block_numbers(draw, length):
    numbers, block = [], 0
    while len(numbers) < length:
        inside, count = draw(st.booleans()), draw(st.integers(1, 4))
        numbers += [block if inside else -1] * count
        block += 1
    return torch.tensor(numbers[:length])


@st.composite
def leaves(draw, length, pads):
    kind = draw(st.sampled_from(["causal", "causal", "both ways", "window", "window both ways", "chunk", "blocks"]))
    if kind == "blocks":
        return blockwise_overlay(torch.stack([block_numbers(draw, length) for _ in pads]))
    return {
        "causal": lambda: causal_mask_function,
        "both ways": lambda: bidirectional_mask_function,
        "window": lambda: sliding_window_overlay(draw(st.integers(1, 9))),
        "window both ways": lambda: sliding_window_bidirectional_overlay(draw(st.integers(0, 9))),
        "chunk": lambda: chunked_overlay(draw(st.integers(1, 9)), pads),
    }[kind]()


@st.composite
def calls(draw):
    """Arguments of a mask function, over keys that hold every query's own."""
    past, new, kv_offset = draw(st.integers(0, 8)), draw(st.integers(2, 10)), 0
    if past:
        kv_offset = draw(st.integers(0, past))
    length = past + new
    pads = torch.tensor([draw(st.integers(0, length - 1)) for _ in range(2)])
    column, side = torch.arange(length), draw(st.sampled_from(["none", "left", "right"]))
    real = None if side == "none" else column >= pads[:, None] if side == "left" else column < length - pads[:, None]
    trees = st.recursive(
        leaves(length, pads if side == "left" else torch.zeros(2, dtype=torch.long)),
        lambda parts: st.builds(
            lambda compose, functions: compose(*functions),
            st.sampled_from([and_masks, or_masks]),
            st.lists(parts, min_size=2, max_size=3),
        ),
        max_leaves=6,
    )
    return {
        "batch_size": 2,
        "q_length": new,
        "kv_length": length - kv_offset,
        "q_offset": draw(st.sampled_from([past, torch.tensor(past)])),
        "kv_offset": kv_offset,
        "mask_function": draw(trees),
        "attention_mask": real,
    }


@settings(deadline=None, max_examples=400)
@given(calls())
def test_compositions(call):
    got, want = sar_mask(**call), sdpa_mask(**call, allow_is_causal_skip=False)
    past, real = int(call["q_offset"]), call["attention_mask"]
    asks = torch.ones(2, call["q_length"], dtype=torch.bool) if real is None else real[:, past:]
    assert got is None or got.dim() == 2 or is_compact(got)
    assert_says_the_same(got, want, asks)
    if got is not None and is_compact(got):  # what models do that compute their last positions alone
        assert_says_the_same(got[:, :, -2:, :], want[:, :, -2:], asks[:, -2:])


def test_layers_take_a_compact_mask_apart_without_a_copy():
    mask = compact(Bounds(torch.tensor([[0, 1, 2]]), None), 3, 3, "cpu")
    assert mask.shape == (1, 1, 3, 2)
    assert all(side.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr() for side in bounds_of(mask))
