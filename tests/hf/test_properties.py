"""Whatever a model is wrapped in and however its input is written: SAR's logits are the same, and not plain ones."""

from __future__ import annotations

import contextlib
import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from sar_fast import SARConfig, apply_sar
from tests.hf.test_masks import dense
from tests.hf.test_reached_layers import WRAPPERS, decoder_layers
from tests.hf.test_wrappers import assert_close
from tests.hf.tiny import CASES
from tests.hf.tiny.lacks import STATIC_CACHE, lack_of

CAUSAL = ("llava", "llava_next", "llava_onevision", "internvl", "idefics3", "mistral3", "qwen3_vl", "qwen2_5_vl")
OTHERS = (
    "gemma3",
    "paligemma",
    "cohere2_vision",
    "aya_vision",
    "qwen2_vl",
    "glm4v",
)  # windows, pictures that see ahead
ROTARY = ("qwen2_5_vl", "qwen3_vl", "qwen2_vl", "glm4v")  # find positions in three dimensions by the 2D mask
STEPS = (20, 21)


@functools.cache
def model_of(name):
    return CASES[name].make()


@contextlib.contextmanager
def wrapped(model, wrapper):
    layers = decoder_layers(model)
    bare = [layer._modules.get("self_attn") for layer in layers]
    try:
        for layer, attention in zip(layers, bare):
            if wrapper is not None and attention is not None:
                layer.self_attn = WRAPPERS[wrapper](attention)
        yield
    finally:
        for layer, attention in zip(layers, bare):
            if attention is not None:
                layer.self_attn = attention


def mask_of(model, real, way, length):
    """The (B, S) mask of real tokens, written as ``way`` says; ``length``: what the cache holds at most."""
    if way == "wide":
        return torch.nn.functional.pad(real, (0, length - real.shape[1]))
    if way in ("bool", "additive"):
        return dense(real, way)
    if way == "dict":
        types = getattr(model.config.get_text_config(), "layer_types", None)
        return {kind: dense(real) for kind in set(types)} if types else dense(real)
    return real if way == "2d" or not bool(real.all()) else None


def positions_of(model, batch):
    """Position ids of a prompt, whatever its mask is written as."""
    real = batch["attention_mask"]
    if model.config.model_type not in ROTARY:
        return (real.cumsum(-1) - 1).clamp_min(0)
    known = {k: v for k, v in batch.items() if k in ("image_grid_thw", "mm_token_type_ids")}
    return model.model.get_rope_index(batch["input_ids"], attention_mask=real, **known)[0]


def run(model, batch, way, cache):
    """Logits of a prompt's real tokens, then of some steps; a dense mask is the prompt's alone."""
    B, S = batch["input_ids"].shape
    length = S + len(STEPS) + 3
    text = model.config.get_text_config()
    made = {"none": lambda: None, "dynamic": lambda: DynamicCache(config=text),
            "static": lambda: StaticCache(text, max_cache_len=length)}[cache]()  # fmt: skip
    given = {k: v for k, v in batch.items() if k != "attention_mask"}
    real = batch["attention_mask"]
    prompt = model(**given, attention_mask=mask_of(model, real, way, length), position_ids=positions_of(model, batch),
                   past_key_values=made, use_cache=made is not None)  # fmt: skip
    outs = [prompt.logits[real.bool()]]
    for token in STEPS if made is not None and model.config.model_type not in ROTARY else ():
        real = torch.cat([real, torch.ones(B, 1, dtype=real.dtype)], 1)
        mask = mask_of(model, real, "wide" if way == "wide" else "2d", length)
        step = model(input_ids=torch.full((B, 1), token), attention_mask=mask, past_key_values=made,
                     position_ids=real.sum(-1, keepdim=True) - 1)  # fmt: skip
        outs.append(step.logits[:, 0])
    return torch.cat(outs)


@st.composite
def inputs(draw):
    name = draw(st.sampled_from((*CAUSAL, *OTHERS)))
    images = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3).filter(any))
    side = draw(st.sampled_from(("left", "right")))
    batch = CASES[name].batch(images, side)
    padded = not bool(batch["attention_mask"].all())
    ways = ["2d", *(["wide"] if name not in ROTARY else []), *(["none"] if not padded else [])]
    ways += ["bool", "additive", "dict"] if name in CAUSAL else []
    way = draw(st.sampled_from(ways))
    caches = ["none", "dynamic", "static"]
    if lack_of(STATIC_CACHE, name) or way in ("bool", "additive", "dict"):
        caches.remove("static")
    if way == "wide":  # without a cache, transformers takes no mask that is longer
        caches.remove("none")
    wrapper = draw(st.sampled_from((None, "nonreentrant", "mirror", "shell", "twice")))
    return name, batch, way, draw(st.sampled_from(caches)), wrapper


@settings(max_examples=40, deadline=None, derandomize=True)
@given(inputs(), st.sampled_from(("running", "step", "prompt")), st.integers(1, 3))
def test_the_same_input_gives_the_same_logits_however_it_is_written(drawn, mode, k):
    name, batch, way, cache, wrapper = drawn
    case, model = CASES[name], model_of(name)
    k = min(k, len(case.attending))
    sar = SARConfig(activation_layer_k=k, beta=case.beta, decode=mode)
    usual = "none" if cache == "none" else "dynamic"
    with torch.no_grad():
        plain = run(model, batch, "2d", usual)
        with apply_sar(model, sar):
            want = run(model, batch, "2d", usual)
        assert (want - plain).abs().max() > 1e-3 * plain.abs().max()  # it moves logits
        with wrapped(model, wrapper):
            with apply_sar(model, sar):
                assert_close(run(model, batch, way, cache), want)
            with apply_sar(model, sar.replace(beta=1e30, protect_first_head=False)):
                assert_close(run(model, batch, way, cache), plain)
