"""Caches that hold tokens SAR never saw: an error in every decode mode, never plain attention."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sar_fast import SARConfig, apply_sar, remove_sar
from sar_fast.hf.cache_state import state_of
from tests.hf.oracle import lacking_without_sar
from tests.hf.test_caches import MODES, assert_same, config_of, generate, row_of
from tests.hf.test_wrappers import tuned
from tests.hf.tiny import IMAGE, VERSION, llava, llava_batch

KEEPS_LENGTH = "a dynamic cache that was reset keeps its length"
UNSEEN = r"past_key_values must be new, .*reset.*; got \d+ positions"


@pytest.fixture
def model():
    return llava()


def filled(model, row, static=False):
    """A cache that holds ``row``."""
    text = model.config.get_text_config()
    cache = StaticCache(text, max_cache_len=80) if static else DynamicCache(config=text)
    with torch.no_grad():
        model(**row, past_key_values=cache, use_cache=True)
    return cache


def step(model, cache, ids=((20,),)):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True).logits


def rebuilt(model, cache):
    """The same keys and values in a new cache."""
    new = DynamicCache(config=model.config.get_text_config())
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys, layer.values, index)
    return new


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("pictures", [0, 1])
def test_a_cache_filled_before_sar_is_an_error(model, mode, static, pictures):
    """Also one without pictures: its keys and values do not say that it has none."""
    cache = filled(model, row_of(llava_batch, [pictures], 0), static)
    with apply_sar(model, config_of(mode)):
        for ids in ([[20]], [[20, 21, 22]]):
            with pytest.raises(ValueError, match=UNSEEN):
                step(model, copy.deepcopy(cache), ids)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_rebuilt_from_its_keys_and_values_is_an_error(model, mode):
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of(mode)):
        cache = filled(model, row)
        with pytest.raises(ValueError, match=UNSEEN):
            step(model, rebuilt(model, cache))
        with pytest.raises(ValueError, match=UNSEEN):
            generate(model, {"input_ids": torch.cat([row["input_ids"], torch.tensor([[20, 21]])], 1)},
                     past_key_values=rebuilt(model, cache))  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_second_picture_on_an_unseen_cache_is_an_error(model, mode):
    cache = filled(model, row_of(llava_batch, [1], 0))
    second = row_of(llava_batch, [1, 1], 1)
    with apply_sar(model, config_of(mode)), torch.no_grad(), pytest.raises(ValueError, match=UNSEEN):
        model(**second, past_key_values=cache)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_turn_without_sar_in_between_is_an_error(model, mode, static):
    """The cache has a state, but not of the tokens that came while SAR was off."""
    with apply_sar(model, config_of(mode)):
        cache = filled(model, row_of(llava_batch, [1], 0), static)
    with apply_sar(model, config_of(mode)):  # nothing came in between
        step(model, cache)
    step(model, cache)
    with apply_sar(model, config_of(mode)):
        with pytest.raises(ValueError, match=UNSEEN):
            step(model, cache)
        cache.reset()
        if VERSION < (5, 18) and not static:
            assert cache.get_seq_length() > 0
            with pytest.raises(ValueError, match=UNSEEN), torch.no_grad():
                model(**row_of(llava_batch, [1], 0), past_key_values=cache)
            lacking_without_sar(KEEPS_LENGTH)
        with torch.no_grad():
            model(**row_of(llava_batch, [1], 0), past_key_values=cache)
        step(model, cache)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_turn_under_k_0_in_between_is_an_error(model, static):
    with apply_sar(model, config_of("running")) as handle:
        cache = filled(model, row_of(llava_batch, [1], 0), static)
        handle.reconfigure(config_of("running").replace(activation_layer_k=0))
        step(model, cache)
        handle.reconfigure(config_of("running"))
        with pytest.raises(ValueError, match=UNSEEN):
            step(model, cache)


@pytest.mark.parametrize("mode", MODES)
def test_a_pickled_cache_keeps_its_state(model, mode):
    with apply_sar(model, config_of(mode)):
        for pictures in (0, 1):
            cache = filled(model, row_of(llava_batch, [pictures], 0))
            loaded = pickle.loads(pickle.dumps(cache))
            assert type(loaded) is type(cache)
            assert torch.equal(step(model, loaded), step(model, cache))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_picture_after_a_turn_of_text_equals_both_in_one_prompt(model, mode, static):
    """A text-only turn under SAR is plain, and says on its cache that it had no picture.

    What enters the last layer does not depend on its weights, so both ways must agree.
    """
    first = {"input_ids": torch.tensor([[5, 6, 7, 30, 31]])}
    second = row_of(llava_batch, [1], 0)
    plain = step(model, filled(model, first, static))
    with apply_sar(model, config_of(mode, k=1)):
        cache = filled(model, first, static)
        torch.testing.assert_close(step(model, copy.deepcopy(cache)), plain, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            got = model(**second, past_key_values=cache).logits
            whole = second | {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1)}
            want = model(**whole, use_cache=False).logits[:, -got.shape[1] :]
            assert (got - want).abs().max() <= 1e-4 * want.abs().max()
            assert torch.equal(state_of(cache).visual_mask, whole["input_ids"] == IMAGE)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_resetting_makes_an_unseen_cache_good(model, static):
    row = row_of(llava_batch, [1], 0)
    cache = filled(model, row, static)
    with apply_sar(model, config_of("running")), torch.no_grad():
        want = step(model, filled(model, row, static))
        cache.reset()
        if VERSION < (5, 18) and not static:
            assert cache.get_seq_length() > 0
            with pytest.raises(ValueError, match=UNSEEN):
                model(**row, past_key_values=cache)
            lacking_without_sar(KEEPS_LENGTH)
        model(**row, past_key_values=cache)
        assert torch.equal(step(model, cache), want)


def test_cropping_and_going_on_needs_no_reset(model):
    row = row_of(llava_batch, [0], 0)
    with apply_sar(model, config_of("running")):
        cache = filled(model, row)
        want = step(model, copy.deepcopy(cache))
        step(model, cache)
        cache.crop(-1)
        assert torch.equal(step(model, cache), want)


def test_without_layers_any_cache_is_plain(model):
    cache = filled(model, row_of(llava_batch, [1], 0))
    plain = step(model, copy.deepcopy(cache))
    with apply_sar(model, SARConfig(activation_layer_k=0)) as handle:
        assert torch.equal(step(model, cache), plain)
        assert state_of(cache) is None
        handle.reconfigure(config_of("running"))
        with pytest.raises(ValueError, match=UNSEEN):
            step(model, cache)


def test_generation_continues_a_conversation(model):
    """Two turns by generate() on one cache: every token ran under SAR."""
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of("running")):
        cache = DynamicCache(config=model.config.get_text_config())
        tokens, _ = generate(model, row, past_key_values=cache)
        turn = {"input_ids": torch.cat([row["input_ids"], tokens, torch.tensor([[40, 41]])], 1)}
        again = copy.deepcopy(cache)
        assert_same(generate(model, turn, past_key_values=cache), generate(model, turn, past_key_values=again))


def test_a_learned_prefix_is_no_unseen_cache():
    """PEFT's prefix holds no picture, whatever the batch has."""
    wrapped, row = tuned(llava(), "prefix"), row_of(llava_batch, [0], 0)
    with torch.no_grad():
        plain = wrapped(**row).logits
        with apply_sar(wrapped, config_of("running")):
            torch.testing.assert_close(wrapped(**row).logits, plain, rtol=1e-4, atol=1e-4)
            assert generate(wrapped, row)[0].shape == (1, 6)


def test_sar_below_a_learned_prefix_says_where_to_apply_it():
    model = llava()
    apply_sar(model, config_of("running"))
    wrapped = tuned(model, "prefix")
    with pytest.raises(ValueError, match=r"PEFT model"), torch.no_grad():
        wrapped(**row_of(llava_batch, [1], 0))
    remove_sar(model)
