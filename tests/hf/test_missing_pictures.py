"""Placeholders, embeddings and pixels that do not say where the pictures are: errors, never plain attention."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from sar_fast.method import value_checks
from tests.hf.test_caches import config_of, generate, moved_copy, row_of
from tests.hf.test_wrappers import tuned
from tests.hf.tiny import CASES, IMAGE, MODELS, TAKES_ENCODED, VIDEO, llava, llava_batch, qwen2_5_vl

SAR = config_of("running")
TEXT = (5, 6, 7, 30, 31)


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch


@pytest.fixture
def model():
    return llava()


def embedded(model, ids):
    return model.get_input_embeddings()(ids).detach()


# ids without pixels


def test_placeholders_without_pixels_are_an_error(family):
    model, batch_of = family
    ids = batch_of([1, 0])["input_ids"]
    with apply_sar(model, config_of("running")):
        for call in (model, lambda **row: model.generate(**row, max_new_tokens=2)):
            with (
                torch.no_grad(),
                pytest.raises(ValueError, match=r"must come with pixel_values or .*; got \d+ placeholders"),
            ):
                call(input_ids=ids)


def test_placeholders_of_a_clip_without_frames_are_an_error():
    model = qwen2_5_vl()
    row = {"input_ids": torch.tensor([[*TEXT, VIDEO, VIDEO, 8]])}
    error = pytest.raises(ValueError, match=r"input_ids must come with pixel_values_videos or .*; got 2 placeholders")
    with apply_sar(model, config_of("running")), torch.no_grad(), error:
        model(**row)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.video is not None])
def test_a_clip_alone_is_no_missing_picture(name):
    """Also where clips use the pictures' placeholder."""
    case = CASES[name]
    with apply_sar(case.make(), SARConfig(activation_layer_k=1)) as handle, torch.no_grad():
        assert handle.model(**case.video()).logits.isfinite().all()


def test_placeholders_without_pixels_are_plain_without_layers(model):
    row = {"input_ids": torch.tensor([[*TEXT, IMAGE, IMAGE, 8]])}
    with torch.no_grad():
        plain = model(**row).logits
        with apply_sar(model, SARConfig(activation_layer_k=0)):
            assert torch.equal(model(**row).logits, plain)


def test_a_second_turn_without_its_pixels_is_an_error(model):
    with apply_sar(model, config_of("running")), torch.no_grad():
        cache = model(**row_of(llava_batch, [1], 0), use_cache=True).past_key_values
        turn = row_of(llava_batch, [1, 1], 1)["input_ids"]
        with pytest.raises(ValueError, match=r"input_ids must come with .*; got 16 placeholders"):
            model(input_ids=turn, past_key_values=cache)


def test_an_assistant_may_draft_without_pictures(model):
    """Its drafts are poor, but the answer is the model's own."""
    row = row_of(llava_batch, [1], 0)
    assistant = moved_copy(model, 0.02)
    with apply_sar(model, config_of("running")), apply_sar(assistant, config_of("running")):
        want = generate(model, row)
        assert torch.equal(generate(model, row, assistant_model=assistant)[0], want[0])


def test_placeholders_that_the_model_made_up_are_no_pictures(model):
    """One by one, and in drafts."""
    row, bias = {"input_ids": torch.tensor([TEXT])}, {"sequence_bias": [[[IMAGE], 100.0]]}
    plain, _ = generate(model, row, **bias)
    assert (plain == IMAGE).all()
    with apply_sar(model, config_of("running")):
        assert torch.equal(generate(model, row, **bias)[0], plain)
        assert torch.equal(generate(model, row, **bias, prompt_lookup_num_tokens=3)[0], plain)


# embeddings without ids


def test_embeddings_that_hold_the_pictures_already_are_an_error(family):
    """Neither ids nor pixels say where: one row of features looks like any other embedding."""
    model, batch_of = family
    row = row_of(batch_of, [1], 0)
    merged = []
    with torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**row)
        hook.remove()
        with apply_sar(model, config_of("running")):
            for call in (model, lambda **row: model.generate(**row, max_new_tokens=2)):
                with pytest.raises(
                    ValueError, match=r"inputs_embeds must come with input_ids and pixel_values.*; got neither"
                ):
                    call(inputs_embeds=merged[0])
        with apply_sar(model, SARConfig(activation_layer_k=0)):
            assert model(inputs_embeds=merged[0]).logits.isfinite().all()


def test_merged_embeddings_with_pixels_say_that_no_placeholder_is_left(model):
    row = row_of(llava_batch, [1], 0)
    embeds = torch.randn(1, row["input_ids"].shape[1], 64)
    error = pytest.raises(ValueError, match=r"got 0 tokens .* for 16 features|tokens: 0, features")
    with apply_sar(model, config_of("running")), torch.no_grad(), error:
        model(inputs_embeds=embeds, pixel_values=row["pixel_values"])


def test_token_types_prove_that_embeddings_are_text():
    model = qwen2_5_vl()
    row = {"inputs_embeds": embedded(model, torch.tensor([TEXT]))}
    types = torch.zeros(1, len(TEXT), dtype=torch.long)
    with torch.no_grad():
        plain = model(**row).logits
        with apply_sar(model, config_of("running")):
            assert torch.equal(model(**row, mm_token_type_ids=types).logits, plain)
            with pytest.raises(ValueError, match="inputs_embeds"):
                model(**row)


def test_decode_steps_from_embeddings_go_on(model):
    row = row_of(llava_batch, [1], 0)
    with apply_sar(model, config_of("running")), torch.no_grad():
        cache = model(**row, use_cache=True).past_key_values
        want = model(input_ids=torch.tensor([[20]]), past_key_values=copy.deepcopy(cache)).logits
        got = model(inputs_embeds=embedded(model, torch.tensor([[20]])), past_key_values=cache).logits
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_learned_prompts_before_text_are_plain(kind):
    """PEFT embeds the ids itself; what it puts before them is no picture."""
    wrapped, row = tuned(llava(), kind), {"input_ids": torch.tensor([TEXT])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    with torch.no_grad():
        plain = wrapped(**row).logits
        with apply_sar(wrapped, config_of("running")):
            torch.testing.assert_close(wrapped(**row).logits, plain, rtol=1e-4, atol=1e-4)


# pixels that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_name_their_sample(family, value):
    model, batch_of = family
    batch = batch_of([1, 2, 0])
    row = -1 if "image_grid_thw" in batch else 2  # the last picture, of sample 1
    batch["pixel_values"][row] = value
    error = pytest.raises(ValueError, match=r"pixel_values: .*not finite.*sample\(s\) 1 of the batch")
    with apply_sar(model, config_of("running")), torch.no_grad(), error:
        model(**batch)
    with apply_sar(model, SARConfig(activation_layer_k=0)), torch.no_grad():
        assert model(**batch).logits[2].isfinite().all()


def test_no_layer_and_no_step_reads_the_prior_again(family, monkeypatch):
    """Its features were looked at once; a GPU would have to be waited for in every layer."""
    model, batch_of = family
    read = []
    monkeypatch.setattr(value_checks, "check_prior_values", lambda prior, **_: read.append(prior))
    with apply_sar(model, config_of("running")), torch.no_grad():
        model(**batch_of([1, 0]))
        generate(model, batch_of([1, 2]), 3)
    assert not read


# features picture by picture


def one_by_one(model, times=1):
    """Give an instance a feature method of its own, which runs the class's once per picture."""
    base = model.base_model
    encode = functools.partial(type(base).get_image_features, base, return_dict=True)

    def loop(pixel_values, return_dict=None, **kwargs):
        for _ in range(times):
            outputs = [encode(picture[None], **kwargs) for picture in pixel_values]
        whole = copy.copy(outputs[0])
        whole.pooler_output = [x for output in outputs for x in output.pooler_output]
        return whole

    base.get_image_features = loop


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("images", [[1, 1], [2], [1, 2, 0], [1]])
def test_features_that_come_picture_by_picture(model, images, times):
    batch = llava_batch(images)
    with apply_sar(model, SAR), torch.no_grad():
        want = model(**batch, use_cache=False).logits
        one_by_one(model, times)
        got = model(**batch, use_cache=False).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.skipif(not TAKES_ENCODED, reason="before transformers 5.18 no model takes mm_encoder_outputs")
def test_encoded_features_put_together_are_an_error(model):
    """Norms ride on one call's output, and the first one's would pass for all."""
    batch = llava_batch([1, 1])
    with apply_sar(model, SAR):
        want = generate(model, llava_batch([1]))
        one_by_one(model)
        with pytest.raises(ValueError, match="other features than those"):
            generate(model, batch)
        got = generate(model, llava_batch([1]))
    assert torch.equal(got[0], want[0])


@pytest.mark.skipif(not TAKES_ENCODED, reason="before transformers 5.18 no model takes mm_encoder_outputs")
def test_encoded_features_in_another_order_are_an_error(model):
    batch = llava_batch([1, 1])
    with apply_sar(model, SAR):
        encoded = model.model.get_image_features(batch["pixel_values"], return_dict=True)
        given = {k: v for k, v in batch.items() if k != "pixel_values"}
        model(**given, mm_encoder_outputs={"image": encoded})
        encoded.pooler_output = encoded.pooler_output[::-1]
        with pytest.raises(ValueError, match="other features than those"):
            model(**given, mm_encoder_outputs={"image": encoded})


def test_features_of_some_pictures_only_are_an_error(model):
    """A method that takes the other pictures' features from elsewhere."""
    batch = llava_batch([1, 1])
    known = model.model.get_image_features(batch["pixel_values"], return_dict=True)
    base = model.base_model

    def half(pixel_values, **kwargs):
        type(base).get_image_features(base, pixel_values[:1], **{**kwargs, "return_dict": True})
        return known

    base.get_image_features = half
    with apply_sar(model, SAR), pytest.raises(RuntimeError, match="16 of 32 image tokens"):
        model(**batch, use_cache=False)


def test_a_generated_placeholder_without_a_cache_fails_in_transformers_too():
    """Every step is a prompt with the pictures again, and there are more placeholders than pictures by then."""
    model, row = llava(), llava_batch([1])
    row["input_ids"] = torch.cat([row["input_ids"], torch.tensor([[IMAGE]])], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for config in (None, SARConfig(activation_layer_k=2)):
        handle = None if config is None else apply_sar(model, config)
        with torch.no_grad(), pytest.raises(ValueError, match=r"[Ii]mage features and image tokens do not match"):
            model(**row, use_cache=False)
        if handle is not None:
            handle.remove()
