"""A model spread over two devices: what a pass knows goes where its layers are. Devices are pretended."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from tests.hf.pretend_devices import FIRST, SECOND, Devices
from tests.hf.test_wrappers import assert_close
from tests.hf.tiny import MODELS, llava, llava_batch


@pytest.fixture(params=list(MODELS))
def family(request):
    make, batch = MODELS[request.param]
    return make(), batch([1, 2, 0])


def spread(devices, model, split=2):
    """The first ``split`` layers on one device with all before them; the rest, norm and head on the other.

    ``"vision"``: only the vision encoder on the other.
    """
    text = model.get_decoder()
    if split == "vision":
        devices.spread(model, [getattr(model.model, "visual", None) or model.model.vision_tower])
    else:
        devices.spread(model, [*text.layers[split:], text.norm, model.lm_head])


def test_the_pretence_sees_mixed_devices():
    with Devices() as devices:
        x, y = devices.put(torch.ones(3), FIRST), devices.put(torch.ones(3), SECOND)
        assert (x.device, y.device) == (FIRST, SECOND)
        with pytest.raises(RuntimeError, match="same device"):
            x + y
        assert (x.to(SECOND) + y).device == SECOND
        assert x.device == FIRST
        assert torch.arange(3, device=SECOND).device == SECOND
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.parametrize("split", [1, 2, "vision"])
def test_layers_on_another_device_than_the_vision_tower(family, split):
    model, batch = family
    config = SARConfig(activation_layer_k=3, beta=0.02, backend="torch", record=True, record_rows="last_text")
    with torch.no_grad():
        with apply_sar(model, config):
            want = model(**batch, use_cache=False).logits
        with Devices() as devices:
            spread(devices, model, split)
            batch = devices.inputs(batch)
            plain = model(**batch, use_cache=False).logits
            with apply_sar(model, config) as handle:
                got = model(**batch, use_cache=False).logits
                assert got.device == handle.stats[3].sav.device == (FIRST if split == "vision" else SECOND)
    assert_close(got, want)
    assert (got - plain).abs().max() > 1e-2 * plain.abs().max()


@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_over_two_devices(family, mode, beams):
    model, batch = family
    config = SARConfig(activation_layer_k=3, beta=0.02, backend="torch", decode=mode)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with apply_sar(model, config):
        want = model.generate(**batch, **options)
    with Devices() as devices:
        spread(devices, model)
        with apply_sar(model, config):
            got = model.generate(**devices.inputs(batch), **options)
    assert torch.equal(got, want)


def test_gradients_over_two_devices():
    model, batch = llava(), llava_batch([1, 2])
    config = SARConfig(activation_layer_k=3, beta=0.02, backend="torch", sav_grad=True)

    def gradients(batch):
        model.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).logits.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with apply_sar(model, config):
        want = gradients(batch)
    with Devices() as devices:
        spread(devices, model)
        with apply_sar(model, config):
            got = gradients(devices.inputs(batch))
    largest = max(g.abs().max() for g in want)  # a key's bias has no gradient but rounding
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6 * largest


def test_packed_rows_over_two_devices():
    model = llava()
    rows = [llava_batch([n], first_image=i) for i, n in enumerate([1, 2])]
    lengths = [row["input_ids"].shape[1] for row in rows]
    batch = {
        "input_ids": torch.cat([row["input_ids"] for row in rows], 1),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    config = SARConfig(activation_layer_k=3, beta=0.02, backend="torch")
    with torch.no_grad():
        with apply_sar(model, config):
            want = model(**batch, use_cache=False).logits
        with Devices() as devices:
            spread(devices, model)
            with apply_sar(model, config):
                got = model(**devices.inputs(batch), use_cache=False).logits
    assert_close(got, want)
