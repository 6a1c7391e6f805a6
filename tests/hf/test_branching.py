"""Many settings from one prefill equal separate runs, and do the layer passes that they claim."""

from __future__ import annotations

import itertools

import pytest
import torch

from sar_fast import SARConfig, apply_sar
from sar_fast.integrations.hf.apply import find_decoder_layers
from sar_fast.integrations.hf.branching import layer_passes, run_branches
from tests.hf.tiny import MODELS

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = 6
SETTINGS = [
    SARConfig(activation_layer_k=k, beta=beta)
    for k, beta in ((0, 0.5), (2, 1e-3), (2, 0.05), (3, 1e-3), (LAYERS, 0.01))
]


def setup(name):
    build, batch = MODELS[name]
    model = build(layers=LAYERS)
    return model, batch([1, 2, 0]), apply_sar(model, SARConfig(activation_layer_k=1))


def separately(model, handle, config, call):
    handle.remove()
    with apply_sar(model, config) as alone, torch.no_grad():
        result = call()
    assert not alone._hooks
    return result


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_logits_equal_separate_runs(name):
    model, inputs, handle = setup(name)
    call = lambda: model(**inputs).logits
    branched = [result for _, result in run_branches(handle, SETTINGS, call)]
    for config, got in zip(SETTINGS, branched):
        assert torch.equal(got, separately(model, handle, config, call)), config
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(branched))  # every setting does something


@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
def test_generation_equals_separate_runs(name, decode):
    """Tokens and the logits of every step, on branched caches."""
    model, inputs, handle = setup(name)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    call = lambda: model.generate(**inputs, **options)
    configs = [c.replace(decode=decode) for c in SETTINGS]
    branched = [result for _, result in run_branches(handle, configs, call)]
    for config, got in zip(configs, branched):
        alone = separately(model, handle, config, call)
        assert torch.equal(got.sequences, alone.sequences)
        assert all(torch.equal(a, b) for a, b in zip(got.logits, alone.logits))


def test_common_layers_and_the_vision_encoder_run_once(name):
    model, inputs, handle = setup(name)
    passes, encoded = [], []
    for index, layer in enumerate(find_decoder_layers(model)):
        layer.self_attn.register_forward_hook(lambda *_, index=index: passes.append(index))
    handle.vision_blocks[0].register_forward_hook(lambda *_: encoded.append(1))
    before = handle.config
    for _, _ in run_branches(handle, SETTINGS, lambda: model(**inputs).logits):
        pass
    assert len(encoded) == 1
    assert (len(passes), LAYERS * len(SETTINGS)) == layer_passes(handle, SETTINGS)
    assert len(passes) == LAYERS + 2 + 2 + 3 + LAYERS
    assert handle.config is before
    assert "forward" not in find_decoder_layers(model)[0].__dict__


def test_published_sweeps_cost_what_they_should(name):
    """32 layers: K in {0, 5, 10, 15} passes 62 layers instead of 128, five betas at K = 10 pass 72 instead of 160."""
    model = MODELS[name][0](layers=32)
    handle = apply_sar(model)
    assert layer_passes(handle, [SARConfig(activation_layer_k=k) for k in (0, 5, 10, 15)]) == (62, 128)
    assert layer_passes(handle, [SARConfig(beta=b) for b in (0.1, 0.2, 0.5, 1, 2)]) == (72, 160)


def test_a_fan_of_betas_stops_its_trunk_at_the_branch(name):
    model, inputs, handle = setup(name)
    configs = [SARConfig(activation_layer_k=2, beta=b) for b in (1e-3, 0.1)]
    passes = []
    for layer in find_decoder_layers(model):
        layer.self_attn.register_forward_hook(lambda *_: passes.append(1))
    results = [r for _, r in run_branches(handle, configs, lambda: model(**inputs).logits)]
    assert len(passes) == 4 + 2 * 2
    assert torch.equal(results[1], separately(model, handle, configs[1], lambda: model(**inputs).logits))


def test_calls_that_cannot_branch_are_errors(name):
    model, inputs, handle = setup(name)
    config, runs = SARConfig(activation_layer_k=2), iter((inputs, MODELS[name][1]([1, 2, 0], first_image=3)))
    changed = iter(({}, {"input_ids": torch.where(inputs["input_ids"] == 5, 15, inputs["input_ids"])}))
    for call, message in (
        (lambda: model(**next(runs)), "must run the model on the same inputs every time"),
        (lambda: model.generate(**inputs, cache_implementation="static", max_new_tokens=2), "must use a dynamic cache"),
        (lambda: model(**{**inputs, **next(changed)}), "must run the model on the same inputs every time"),
        (lambda: None, "must run the model that the handle belongs to"),
    ):
        with pytest.raises(ValueError, match=message):
            list(run_branches(handle, [config], call))
    assert handle.config.activation_layer_k == 1
    with torch.no_grad():  # nothing of the failed sweeps is left
        assert torch.equal(
            model(**inputs).logits, separately(model, handle, handle.config, lambda: model(**inputs).logits)
        )


def test_settings_that_cannot_branch_are_errors(name):
    _, _, handle = setup(name)
    with pytest.raises(ValueError, match="configs must hold at least one"):
        list(run_branches(handle, [], lambda: None))
    with pytest.raises(ValueError, match="prior_source is fixed"):
        list(run_branches(handle, [SARConfig(activation_layer_k=1, prior_source="projected")], lambda: None))
    with pytest.raises(ValueError, match=f"at most the number of attention layers, {LAYERS}; got 7"):
        list(run_branches(handle, [SARConfig(activation_layer_k=7)], lambda: None))


def test_beams_branch_too(name):
    """Rows are repeated before the prefill, in the shared layers as in the branches."""
    model, inputs, handle = setup(name)
    call = lambda: model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    for config, got in zip(SETTINGS[1:4], [r for _, r in run_branches(handle, SETTINGS[1:4], call)]):
        assert torch.equal(got, separately(model, handle, config, call))
