"""No state survives a pass, however it ended: what comes after an interruption is what it would be without."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.running import innermost
from tests.hf.test_wrappers import answers, assert_close, logits
from tests.hf.tiny import llava, llava_batch, qwen2_5_vl, qwen_batch, tower

SAR = SARConfig(activation_layer_k=3, beta=0.02)
ENDS = [KeyboardInterrupt, SystemExit, RuntimeError]
PLACES = {
    "vision": lambda model: model.get_submodule(tower("model.vision_tower.encoder.layers"))[5],
    "projector": lambda model: model.model.multi_modal_projector,
    "first layer": lambda model: model.get_decoder().layers[0],
    "last layer": lambda model: model.get_decoder().layers[-1],
    "head": lambda model: model.lm_head,
}


def interrupt(module, error, after=0):
    """Raise at the call of ``module`` number ``after``, once."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == after + 1:
            handle.remove()
            raise error

    handle = module.register_forward_pre_hook(hook)


@pytest.mark.everyday(error=[KeyboardInterrupt])
@pytest.mark.parametrize("error", ENDS)
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("after", [0, 2], ids=["prompt", "decode"])
def test_generation_after_an_interrupted_one(error, place, after):
    if after and place in ("vision", "projector"):
        pytest.skip("pictures are encoded once")
    model, batch = llava(), llava_batch([1, 2, 0])
    other, other_batch = qwen2_5_vl(), qwen_batch([1, 2])
    with apply_sar(model, SAR), apply_sar(other, SAR):
        want = {cache: model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False,
                                      cache_implementation=cache) for cache in ("dynamic", "static")}  # fmt: skip
        want_other = answers(other, other_batch)
        for cache in want:
            interrupt(PLACES[place](model), error, after)
            with pytest.raises(error):
                model.generate(**batch, max_new_tokens=4, min_new_tokens=4, cache_implementation=cache)
            assert torch.equal(answers(other, other_batch), want_other)
            got = model.generate(
                **batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache
            )
            assert torch.equal(got, want[cache])


@pytest.mark.parametrize("place", list(PLACES))
def test_features_encoded_after_an_interrupted_pass_go_to_no_pass(place):
    """Encoding pictures by themselves, other ones than those of the pass that never ended."""
    model, batch = llava(), llava_batch([1, 2])
    with apply_sar(model, SAR) as handle:
        interrupt(PLACES[place](model), KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, batch)
        assert innermost(object) is None
        model.model.get_image_features(llava_batch([1])["pixel_values"], return_dict=True)
        handle.remove()
        apply_sar(model, SAR)
        want = logits(llava_with(SAR), batch)
        assert_close(logits(model, batch), want)


def llava_with(config):
    model = llava()
    apply_sar(model, config)
    return model


def test_packing_of_an_interrupted_pass_is_forgotten():
    model = llava()
    rows = [llava_batch([n], first_image=i) for i, n in enumerate([1, 2])]
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "position_ids": torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None],
    }
    batch = llava_batch([1, 2])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    with apply_sar(model, SAR):
        want = model.generate(**batch, **options)
        interrupt(PLACES["last layer"](model), KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, packed)
        assert torch.equal(model.generate(**batch, **options), want)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("where", ["model", "decoder"])
def test_a_draft_of_an_interrupted_generation_is_forgotten(after, where):
    model, batch = llava(), llava_batch([2])
    row = {name: x for name, x in batch.items() if name != "attention_mask"}
    with apply_sar(model, SAR):
        want = logits(model, row)
        interrupt(model if where == "model" else model.get_decoder(), KeyboardInterrupt, after)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**row, max_new_tokens=8, min_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        assert torch.equal(logits(model, row), want)
        assert innermost(object) is None


def test_a_pass_inside_another_one():
    """A teacher that runs in the middle of its student's pass."""
    model, batch = llava(), llava_batch([1, 2])
    teacher, teacher_batch = qwen2_5_vl(), qwen_batch([1])
    with apply_sar(model, SAR), apply_sar(teacher, SAR):
        want, want_teacher, seen = logits(model, batch), logits(teacher, teacher_batch), []
        PLACES["projector"](model).register_forward_hook(lambda *_: seen.append(logits(teacher, teacher_batch)) or None)
        assert_close(logits(model, batch), want)
        assert_close(seen[0], want_teacher)
        assert innermost(object) is None
