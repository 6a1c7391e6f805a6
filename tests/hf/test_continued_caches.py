"""Caches that are continued: under the same options, in another autograd mode, with other rows, without SAR."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from sar_fast import SARConfig, apply_sar
from tests.hf.test_caches import MODES, assert_same, config_of, generate, row_of
from tests.hf.test_foreign_caches import filled, step
from tests.hf.test_wrappers import assert_close
from tests.hf.tiny import IMAGE, TAKES_ENCODED, llava, llava_batch, qwen2_5_vl, qwen_batch

OTHERS = {
    "activation_layer_k": 2,
    "beta": 0.03,
    "protect_first_head": False,
    "normalize": "standardize",
    "text_queries": "after_first_image",
    "decode": "step",
}
BATCH = [1, 2, 0]


@pytest.fixture
def model():
    return llava()


# options


@pytest.mark.everyday(static=[False])
@pytest.mark.everyday(how=["applied again"])
@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("how", ["reconfigured", "applied again"])
def test_a_cache_filled_under_other_options_is_an_error(model, name, static, how):
    before, row = config_of("running"), row_of(llava_batch, [1], 0)
    after = before.replace(**{name: OTHERS[name]})
    handle = apply_sar(model, before)
    cache = filled(model, row, static)
    want = step(model, copy.deepcopy(cache))
    if how == "reconfigured":
        handle.reconfigure(after)
    else:
        handle.remove()
        apply_sar(model, after)
    message = rf"SARConfig\({name}={getattr(before, name)!r}\).*SARConfig\({name}={OTHERS[name]!r}\)"
    length = int(cache.get_seq_length())
    with pytest.raises(ValueError, match=message):
        step(model, cache)
    assert int(cache.get_seq_length()) == length
    model.model.__dict__["_sar_handle"].reconfigure(before)
    assert torch.equal(step(model, cache), want)


@pytest.mark.parametrize("options", [{"record": True}, {"sav_grad": True}, {"backend": "torch"}])
def test_options_that_a_cache_does_not_depend_on_may_change(model, options):
    row = row_of(llava_batch, [1], 0)
    handle = apply_sar(model, config_of("running"))
    cache = filled(model, row)
    want = step(model, copy.deepcopy(cache))
    handle.reconfigure(config_of("running").replace(**options))
    assert_close(step(model, cache), want)


def test_text_alone_may_be_continued_under_other_options(model):
    row, after = row_of(llava_batch, [1], 0), config_of("prompt", k=2)
    got = []
    for before in (config_of("running"), after):
        handle = apply_sar(model, before)
        cache = filled(model, row_of(llava_batch, [0], 0))
        handle.reconfigure(after)
        with torch.no_grad():
            got.append(model(**row, past_key_values=cache).logits)
        handle.remove()
    assert_close(*got)


@pytest.mark.skipif(not TAKES_ENCODED, reason="before transformers 5.18 no model takes mm_encoder_outputs")
def test_features_encoded_for_another_prior_are_an_error():
    model, batch = llava(), llava_batch([1])
    config = SARConfig(activation_layer_k=3, beta=0.02)
    handle = apply_sar(model, config)
    encoded = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    given = {k: v for k, v in batch.items() if k != "pixel_values"}
    with torch.no_grad():
        assert_close(model(**given, mm_encoder_outputs={"image": encoded}).logits, model(**batch).logits)
    handle.remove()
    apply_sar(model, config.replace(prior_source="projected"))
    with pytest.raises(
        ValueError, match=r"prior_source='projected'.*got one encoded under prior_source='vision_layer'"
    ):
        model(**given, mm_encoder_outputs={"image": encoded})


# autograd modes


@pytest.mark.everyday(mode=["running"])
@pytest.mark.everyday(after=["grad"], images=[[1]])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("after", ["no_grad", "grad"])
@pytest.mark.parametrize("images", [BATCH, [1]])
def test_a_cache_made_under_inference_mode_goes_on_outside(model, mode, after, images):
    batch = llava_batch(images)
    model.requires_grad_(False)  # running sums have no backward

    def run(first, second):
        cache = DynamicCache(config=model.config.get_text_config())
        outs = []
        with first():
            outs.append(model(**batch, past_key_values=cache).logits[:, -1:])
        for token in (20, 21):
            mask = torch.ones(len(images), 1, dtype=torch.long)
            real = torch.cat([batch["attention_mask"], mask.expand(-1, len(outs))], 1)
            with second():
                ids = torch.full((len(images), 1), token)
                outs.append(model(input_ids=ids, attention_mask=real, past_key_values=cache).logits)
        return torch.cat([x.detach().clone() for x in outs], 1)

    with apply_sar(model, config_of(mode)):
        want = run(torch.no_grad, torch.no_grad)
        assert_close(run(torch.inference_mode, {"no_grad": torch.no_grad, "grad": torch.enable_grad}[after]), want)
        assert_close(run(torch.no_grad, torch.inference_mode), want)


@pytest.mark.parametrize("mode", ["step", "prompt"])
def test_gradients_of_a_step_on_a_cache_made_under_inference_mode(model, mode):
    row = row_of(llava_batch, [1], 0)

    def gradient(first):
        cache = DynamicCache(config=model.config.get_text_config())
        with first():
            model(**row, past_key_values=cache)
        model.zero_grad(set_to_none=True)
        model(input_ids=torch.tensor([[20]]), past_key_values=cache).logits.square().mean().backward()
        return model.lm_head.weight.grad.clone()

    with apply_sar(model, config_of(mode).replace(sav_grad=True)):
        assert_close(gradient(torch.inference_mode), gradient(torch.no_grad))


def test_cropping_outside_inference_mode_finds_the_sums(model):
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of("running")):
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.inference_mode():
            model(**row, past_key_values=cache)
            want = step_in(model, copy.deepcopy(cache), 20)
            step_in(model, cache, 30)
        step(model, cache, [[31]])
        cache.crop(-2)
        assert_close(step(model, cache), want)


def step_in(model, cache, token):
    return model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits.clone()


def test_a_step_does_not_look_at_the_snapshots_of_all_steps_before(model, monkeypatch):
    with apply_sar(model, config_of("running")):
        cache = filled(model, row_of(llava_batch, [1], 0))
        for _ in range(8):
            step(model, cache)
        asked, original = [], torch.Tensor.is_inference
        monkeypatch.setattr(torch.Tensor, "is_inference", lambda x: asked.append(1) or original(x))
        step(model, cache)
    assert len(asked) <= 8  # the visual mask and three layers, once


# rows


SELECTIONS = {
    "tensor": torch.tensor([2, 0]),
    "negative": torch.tensor([-1, -3]),
    "bool": torch.tensor([True, False, True]),
    "list": [2, 0],
    "list of bool": [False, True, True],
    "int32": torch.tensor([0, 0, 1], dtype=torch.int32),
    "slice": slice(1, None),
}


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", list(SELECTIONS))
def test_rows_selected_in_every_way_that_indexes(model, mode, rows):
    indices = SELECTIONS[rows]
    batch = llava_batch(BATCH)
    with apply_sar(model, config_of(mode)), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, past_key_values=cache)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
        whole = copy.deepcopy(cache)
        want = model(input_ids=torch.full((3, 1), 20), attention_mask=mask, past_key_values=whole).logits[indices]
        cache.batch_select_indices(indices)
        ids = torch.full((want.shape[0], 1), 20)
        assert_close(model(input_ids=ids, attention_mask=mask[indices], past_key_values=cache).logits, want)


@pytest.mark.parametrize("indices", [torch.tensor([3]), torch.tensor([True, False]), [0, -4], torch.tensor([0.0])])
def test_rows_that_are_not_there_cut_nothing(model, indices):
    batch = llava_batch(BATCH)
    with apply_sar(model, config_of("running")), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(IndexError):
            cache.batch_select_indices(indices)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
        assert cache.sar_state.visual_mask.shape[0] == 3


def test_a_crop_that_is_refused_cuts_nothing(model):
    with apply_sar(model, config_of("running")):
        cache = filled(model, row_of(llava_batch, [1], 0))
        length = cache.get_seq_length()
        for _ in range(2):
            with pytest.raises(ValueError, match="running sums are known"):
                cache.crop(-2)
            assert cache.get_seq_length() == length
        assert step(model, cache).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_second_picture_that_is_cropped_away_is_forgotten(model, mode):
    first, second = row_of(llava_batch, [1, 1], 0), row_of(llava_batch, [1, 1], 1)
    with apply_sar(model, config_of(mode)), torch.no_grad():
        cache = filled(model, first)
        step(model, cache)
        length = cache.get_seq_length()
        want = step(model, copy.deepcopy(cache), [[21]])
        added = model(**second, past_key_values=cache).logits.shape[1]
        assert (step(model, cache, [[21]]) - want).abs().max() > 1e-2 * want.abs().max()
        cache.crop(-1)
        cache.crop(-added)
        assert cache.get_seq_length() == length
        assert_close(step(model, cache, [[21]]), want)


def test_frozen_weights_stay_with_their_pictures(model):
    row = row_of(llava_batch, [2], 0)
    with apply_sar(model, config_of("prompt")), torch.no_grad():
        cache = filled(model, row)
        want = step(model, copy.deepcopy(cache))
        step(model, cache)
        cache.crop(-1)
        assert_close(step(model, cache), want)
        length, last = cache.get_seq_length(), int((row["input_ids"][0] == IMAGE).nonzero()[-1])
        with pytest.raises(ValueError, match="or keep all pictures of a call"):
            cache.crop(last - length)
        assert cache.get_seq_length() == length


# after SAR


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompt_lookup_after_removal_on_a_cache_of_sar(mode, family):
    make, batch_of = {"llava": (llava, llava_batch), "qwen2_5_vl": (qwen2_5_vl, qwen_batch)}[family]
    model, row = make(), row_of(batch_of, [1], 0)
    handle = apply_sar(model, config_of(mode))
    cache = filled(model, row)
    handle.remove()
    twin = make()
    bare = DynamicCache(config=twin.config.get_text_config())
    for index, layer in enumerate(cache.layers):
        bare.update(layer.keys, layer.values, index)
    if hasattr(model.model, "rope_deltas"):
        twin.model.rope_deltas = model.model.rope_deltas
    ids = {"input_ids": torch.cat([row["input_ids"], torch.tensor([[20, 21, 20, 21, 20]])], 1)}
    lookup = {"prompt_lookup_num_tokens": 3, "new": 8}
    assert_same(generate(model, ids, past_key_values=cache, **lookup),
                generate(twin, ids, past_key_values=bare, **lookup))  # fmt: skip


def test_a_cache_cropped_after_removal_is_not_continued_under_sar(model):
    handle = apply_sar(model, config_of("running"))
    cache = filled(model, row_of(llava_batch, [1], 0))
    handle.remove()
    cache.crop(-2)
    apply_sar(model, config_of("running"))
    with pytest.raises(ValueError, match=r"past_key_values must be new, .*; got \d+ positions"):
        step(model, cache)


def test_k_of_zero_crops_as_without_sar(model):
    handle = apply_sar(model, config_of("running"))
    cache = filled(model, row_of(llava_batch, [1], 0))
    handle.reconfigure(config_of("running", k=0))
    copy.deepcopy(cache).crop(-2)
