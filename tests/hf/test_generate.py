"""Generation with SAR on: batch equals singles, caches of every kind, decode modes, state that lives on the cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.cache_state import state_of
from tests.hf.tiny import IMAGE, MODELS, VOCAB, llava, llava_batch

BETA = 0.02
NEW = 8
MODES = ["running", "step", "prompt"]


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def answers(model, batch, **options):
    return generate(model, batch, **options)[:, -NEW:]


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_singles(family, mode):
    model, batch_of = family
    images = [1, 2, 0]
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, decode=mode)):
        together = answers(model, batch_of(images))
        for b, n in enumerate(images):
            alone = answers(model, batch_of([n], first_image=sum(images[:b])))
            assert torch.equal(alone[0], together[b])


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", MODES)
def test_static_cache_equals_dynamic(family, mode):
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA, decode=mode)):
        dynamic = answers(model, batch)
        assert torch.equal(answers(model, batch, cache_implementation="static"), dynamic)


def test_modes_differ_and_differ_from_plain(family):
    model, batch_of = family
    batch = batch_of([1, 2])
    logits = {}
    for mode in MODES:
        with apply_sar(model, SARConfig(activation_layer_k=4, beta=BETA, decode=mode)):
            out = generate(model, batch, output_logits=True, return_dict_in_generate=True)
            logits[mode] = out.logits[1]
    plain = generate(model, batch, output_logits=True, return_dict_in_generate=True).logits[1]
    every = [*logits.values(), plain]
    for i, a in enumerate(every):
        for b in every[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


def test_beams_and_return_sequences(family):
    model, batch_of = family
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        together = answers(model, batch_of([1, 2]), num_beams=3, num_return_sequences=2)
        for b, n in enumerate([1, 2]):
            alone = answers(model, batch_of([n], first_image=b), num_beams=3, num_return_sequences=2)
            assert torch.equal(alone, together[2 * b : 2 * b + 2])


def test_running_weights_are_means_over_prompt_and_generated_tokens():
    """Weights of each decode step of the only SAR layer, against the whole sequence's statistics in one pass."""
    model, batch = llava(), llava_batch([1])
    config = SARConfig(activation_layer_k=1, beta=BETA, record=True)
    with apply_sar(model, config) as handle, torch.no_grad():
        out = model(**batch, use_cache=True)
        cache, ids = out.past_key_values, batch["input_ids"]
        for _ in range(5):
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], dim=1)
            out = model(input_ids=token, past_key_values=cache, use_cache=True)
            step = handle.stats[3]
            whole = model(input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False)
            torch.testing.assert_close(step.query_count, handle.stats[3].query_count)
            torch.testing.assert_close(step.head_weights, handle.stats[3].head_weights, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.logits[:, -1], whole.logits[:, -1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("second_image", [False, True], ids=["text", "second-image"])
def test_second_turn_on_a_cache_equals_the_whole_conversation(second_image):
    """With one SAR layer, the last, earlier positions do not depend on the weights, so both ways must agree."""
    model = llava()
    first, second = [5, 6] + [IMAGE] * 16 + [7, 8, 9], [10, 11] + [IMAGE] * 16 * second_image + [12, 13, 14]
    pixels = torch.randn(2, 3, 16, 16)
    with apply_sar(model, SARConfig(activation_layer_k=1, beta=BETA, record=True)) as handle, torch.no_grad():
        whole = model(input_ids=torch.tensor([first + second]), pixel_values=pixels[: 1 + second_image])
        want = handle.stats[3].head_weights
        cache = model(input_ids=torch.tensor([first]), pixel_values=pixels[:1], use_cache=True).past_key_values
        turn = {"pixel_values": pixels[1:]} if second_image else {}
        got = model(input_ids=torch.tensor([second]), past_key_values=cache, use_cache=True, **turn)
    torch.testing.assert_close(handle.stats[3].head_weights, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits, whole.logits[:, len(first) :], rtol=1e-3, atol=1e-4)


def prefill(model, batch):
    with torch.no_grad():
        return model(**batch, use_cache=True).past_key_values


def step(model, cache, token):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits


def test_two_generations_on_one_model_do_not_meet():
    model = llava()
    a, b = ({k: v for k, v in llava_batch([n], first_image=n).items() if k != "attention_mask"} for n in (1, 2))
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        want = [[step(model, c, t) for t in (20, 21, 22)] for c in (prefill(model, a), prefill(model, b))]
        first, second = prefill(model, a), prefill(model, b)
        got = [[], []]
        for t in (20, 21, 22):
            got[0].append(step(model, first, t))
            got[1].append(step(model, second, t))
    for g, w in zip(got, want):
        for x, y in zip(g, w):
            assert torch.equal(x, y)


def test_deepcopied_cache_continues_on_its_own():
    model, batch = llava(), llava_batch([2])
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        cache = prefill(model, batch)
        fork = copy.deepcopy(cache)
        want = [step(model, cache, t) for t in (20, 21)]
        assert torch.equal(step(model, fork, 20), want[0])
        assert torch.equal(step(model, fork, 21), want[1])


def test_cropped_cache_forgets_the_cropped_tokens():
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        cache = prefill(model, batch)
        before = cache.get_seq_length()
        want = step(model, cache, 20)
        step(model, cache, 21)
        cache.crop(-2)
        assert cache.get_seq_length() == before
        torch.testing.assert_close(step(model, cache, 20), want)


def test_crop_into_the_middle_of_a_call_is_an_error_with_running_sums():
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=BETA)):
        cache = prefill(model, batch)
        with pytest.raises(ValueError, match=r"be the end of a call, .*decode=\"prompt\".*; got"):
            cache.crop(-1)
    with apply_sar(model, SARConfig(activation_layer_k=2, beta=BETA, decode="prompt")):
        cache = prefill(model, batch)
        cache.crop(-1)
        step(model, cache, 20)


def test_reset_cache_starts_a_new_prompt():
    model, batch = llava(), llava_batch([1])
    cache = StaticCache(model.config.get_text_config(), max_cache_len=64)
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)), torch.no_grad():
        want = model(**batch, past_key_values=cache, use_cache=True).logits
        step_want = step(model, cache, 20)
        cache.reset()
        assert state_of(cache).layers == {}
        assert torch.equal(model(**batch, past_key_values=cache, use_cache=True).logits, want)
        assert torch.equal(step(model, cache, 20), step_want)


def test_reordered_repeated_and_selected_rows():
    model, batch = llava(), llava_batch([1, 2], "left")
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):

        def after(change):
            cache = prefill(model, batch)
            mask = batch["attention_mask"]
            rows = change(cache)
            mask = torch.cat([mask[rows], torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
            ids = torch.full((len(rows), 1), 20)
            with torch.no_grad():
                return rows, model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits

        _, want = after(lambda cache: [0, 1])
        changes = [
            lambda cache: cache.reorder_cache(torch.tensor([1, 0])) or [1, 0],
            lambda cache: cache.batch_repeat_interleave(2) or [0, 0, 1, 1],
            lambda cache: cache.batch_select_indices(torch.tensor([1])) or [1],
        ]
        for change in changes:
            rows, got = after(change)
            torch.testing.assert_close(got, want[rows], rtol=1e-4, atol=1e-4)


def test_cache_keeps_its_type_and_the_model_keeps_no_state():
    model, batch = llava(), llava_batch([1])
    with apply_sar(model, SARConfig(activation_layer_k=3, beta=BETA)):
        cache = prefill(model, batch)
        assert isinstance(cache, DynamicCache)
        assert set(state_of(cache).layers) == {1, 2, 3}
        state = state_of(cache).layers[3]
        assert state.av_sum.shape == (1, 4)


def test_generated_placeholder_token_is_not_a_picture():
    """The image token's id may be sampled; it must not become a visual key."""
    model, batch = llava(), llava_batch([1])
    batch.pop("attention_mask")
    with apply_sar(model, SARConfig(activation_layer_k=1, beta=BETA, record=True)) as handle:
        cache = prefill(model, batch)
        count = handle.stats[3].query_count.clone()
        step(model, cache, IMAGE)
        assert state_of(cache).visual_mask.sum() == 16
        assert handle.stats[3].query_count == count + 1


def test_wrong_number_of_placeholders_is_an_error():
    model, batch = llava(), llava_batch([1])
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 5] = VOCAB - 1  # one placeholder less than the picture has patches
    with apply_sar(model, SARConfig(activation_layer_k=1)), pytest.raises((ValueError, RuntimeError)):
        prefill(model, batch)
