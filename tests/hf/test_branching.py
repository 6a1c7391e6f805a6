"""Many settings from one prefill equal separate runs, and do the layer passes that they claim."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import BatchFeature

from sar_fast import SARConfig, apply_sar
from sar_fast.hf import UnsupportedModelError
from sar_fast.hf.branching import layer_passes, run_branches
from sar_fast.hf.families import Family
from sar_fast.hf.features import HANDLE_MARK
from sar_fast.hf.shared_prefix import PER_TOKEN, PromptGroups, SharedPrefix, sharing_of
from sar_fast.hf.structure import find_decoder_layers
from tests.hf.tiny import CASES, EVERY_CASE, MODELS, TAKES_ENCODED, VERSION

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
    assert HANDLE_MARK not in alone.layout.base_model.__dict__
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


@pytest.mark.everyday(name=["llava"])
@pytest.mark.everyday(decode=["running"])
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
    handle.layout.vision_blocks[0].register_forward_hook(lambda *_: encoded.append(1))
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
    static = lambda: model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    filled = {"past_key_values": cache, "attention_mask": inputs["attention_mask"].repeat(1, 2)}
    changed = iter(({}, {"input_ids": torch.where(inputs["input_ids"] == 5, 15, inputs["input_ids"])}))
    for call, message in (
        (lambda: model(**next(runs)), "must run the model on the same inputs every time"),
        *(
            [] if VERSION < (5, 9) else [(static, "must use a dynamic cache")]
        ),  # which fail on what a stopped run leaves
        (lambda: model(**{**inputs, **next(changed)}), "must run the model on the same inputs every time"),
        (lambda: None, "must run the model that the handle belongs to"),
        (lambda: model(**{**inputs, **filled}), "call must start on an empty cache: .*; got cached positions"),
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
    with pytest.raises(ValueError, match="prior_source must stay"):
        list(run_branches(handle, [SARConfig(activation_layer_k=1, prior_source="projected")], lambda: None))
    with pytest.raises(ValueError, match=f"at most the number of attention layers, {LAYERS}; got 7"):
        list(run_branches(handle, [SARConfig(activation_layer_k=7)], lambda: None))


def test_beams_branch_too(name):
    """Rows are repeated before the prefill, in the shared layers as in the branches."""
    model, inputs, handle = setup(name)
    call = lambda: model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False)
    for config, got in zip(SETTINGS[1:4], [r for _, r in run_branches(handle, SETTINGS[1:4], call)]):
        assert torch.equal(got, separately(model, handle, config, call))


# --- several prompts about one picture

TAILS = ([[21, 22], [23], [21, 25, 26, 27]], [[30, 31]], [[32, 33], [32, 34, 35]])  # how each picture's prompts end
OWN_TOKENS = {  # models whose prompts share what they begin with, and why the others do not
    "paligemma": "the picture's tokens attend to the question",
    "paligemma2": "the picture's tokens attend to the question",
    "llama4": "does not take pictures that are encoded already",
    "qwen3_5": "linear-attention layers",
    "qwen3_5_moe": "linear-attention layers",
    "lfm2_vl": "convolution layers",
    "gemma4": "builds the masks of its layers for whole prompts",
    "gemma4-shared-kv": "builds the masks of its layers for whole prompts",
}


takes_encoded = pytest.mark.skipif(not TAKES_ENCODED, reason="before 5.18 no model takes pictures that are encoded")


def asked(case, images=(1, 1, 1), tails=TAILS, dtype=torch.float32):
    """Prompts about lists of pictures, as the processor and the tokenizer would give them."""
    inputs, ids = case.batch(list(images)), []
    extras = {name: [] for name in PER_TOKEN if name in inputs}
    for b, ends in enumerate(tails):
        real = inputs["attention_mask"][b].bool()
        ids.append([inputs["input_ids"][b][real].tolist() + end for end in ends])
        for name, values in extras.items():
            values.append([inputs[name][b][real].tolist() + [0] * len(end) for end in ends])
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return PromptGroups(BatchFeature(inputs), ids, extras, 0)


def shared_and_whole(name, images=(1, 1, 1), dtype=torch.float32):
    """(model, prefix, call on it, logits of the whole prompts by settings, logits with the prefix shared)."""
    case = CASES[name]
    model = case.make().to(dtype)
    handle = apply_sar(model, SARConfig(activation_layer_k=0))
    prefix = SharedPrefix(handle, asked(case, images, dtype=dtype))
    total = len(handle.layout.attention_modules)
    configs = [SARConfig(activation_layer_k=k, beta=case.beta) for k in sorted({0, 1, total // 2, total})]
    call = lambda: model(**prefix.inputs(), use_cache=False, logits_to_keep=1).logits[:, -1]
    whole = []
    with torch.no_grad():
        for config in configs:
            handle.reconfigure(config)
            whole.append(call())
    return handle, prefix, call, configs, whole


SHARING = [name for name in CASES if name not in OWN_TOKENS]
IN_FP64 = [name for name in SHARING if name not in ("qwen3_vl_moe", "glm4v_moe", "kimi_k25")]  # grouped_mm has no fp64


@pytest.mark.everyday(name=("llava", "llava_next", "qwen2_5_vl", "gemma3"))
@takes_encoded
@pytest.mark.parametrize("name", SHARING)
def test_a_shared_prefix_gives_the_logits_of_whole_prompts(name):
    """Ragged prompts, a picture with one prompt, and every K.

    In fp64: rotary angles stay fp32 in transformers, and both sides count positions from another origin where a row is
    padded, so angles of up to 41 rad differ by 2^-24 x 41 = 2.4e-6. What SAR's softmax makes of that is bounded by
    1 / beta = 50 times SAV's own change, of the same order.
    """
    handle, prefix, call, configs, whole = shared_and_whole(
        name, dtype=torch.float64 if name in IN_FP64 else torch.float32
    )
    assert prefix.shares
    found = [logits for _, logits in run_branches(handle, configs, call, prefix)]
    for config, a, b in zip(configs, found, whole):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item(), msg=f"{name}, {config}")
    assert all((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in itertools.pairwise(whole))  # settings differ


@takes_encoded
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "gemma3"])
def test_a_shared_prefix_with_several_pictures_and_with_none(name):
    handle, prefix, call, configs, whole = shared_and_whole(name, images=(2, 0, 1), dtype=torch.float64)
    assert prefix.shares
    for (config, a), b in zip(run_branches(handle, configs, call, prefix), whole):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item(), msg=f"{config}")
    assert torch.equal(whole[0][3], whole[-1][3])  # the row without a picture: SAR leaves it alone


@pytest.mark.everyday(name=("llava", "qwen2_5_vl", "gemma3"))
@takes_encoded
@pytest.mark.parametrize(
    ("name", "decode"),
    [("llava", "running"), ("llava", "step"), ("qwen2_5_vl", "prompt"), ("qwen3_vl", "running"), ("gemma3", "running")],
)
def test_generation_continues_from_a_shared_prefix(name, decode):
    """Tokens and every step's logits; gemma3 has layers that see a window."""
    handle, prefix, _, configs, _ = shared_and_whole(name, dtype=torch.float64)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    call = lambda: handle.model.generate(**prefix.inputs(), **options)
    configs = [config.replace(decode=decode) for config in configs]
    for config, shared in run_branches(handle, configs, call, prefix):
        handle.reconfigure(config)
        whole = call()
        assert torch.equal(shared.sequences, whole.sequences)
        for a, b in zip(shared.logits, whole.logits):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item(), msg=f"{config}")


@takes_encoded
def test_a_shared_prefix_costs_what_it_should(name):
    """Tokens per layer: below SAR the prefixes and the remainders, above whole prompts, in the last T's columns."""
    handle, prefix, call, _, _ = shared_and_whole(name)
    config, layers, seen, encoded = SARConfig(activation_layer_k=2), find_decoder_layers(handle.model), {}, []
    for index, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda m, a, out, i=index: seen.setdefault(i, []).append(tuple(out.shape[:2])))
    handle.layout.vision_blocks[0].register_forward_hook(lambda *_: encoded.append(1))
    prefix = SharedPrefix(handle, prefix.groups)
    call = lambda: handle.model(**prefix.inputs(), use_cache=False, logits_to_keep=1)
    list(run_branches(handle, [config], call, prefix))
    longest = max(len(ids) for rows in prefix.groups.ids for ids in rows)
    beginnings, remainder = (3, max(prefix.cuts)), (6, 4)
    assert seen[0] == seen[1] == [beginnings, remainder]
    assert seen[2] == [(6, longest)]
    ((rows, columns),) = seen[3]
    assert rows == 6
    assert columns < longest / 2
    assert len(encoded) == 1
    assert "forward" not in layers[0].__dict__
    assert "forward" not in layers[-1].__dict__


@takes_encoded
def test_without_sar_the_last_layer_runs_prefixes_for_their_keys_alone(name):
    handle, prefix, call, _, whole = shared_and_whole(name, dtype=torch.float64 if name in IN_FP64 else torch.float32)
    layers, seen = find_decoder_layers(handle.model), []
    layers[-1].mlp.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[:2])))
    ((_, logits),) = run_branches(handle, [SARConfig(activation_layer_k=0)], call, prefix)
    torch.testing.assert_close(logits, whole[0], rtol=0, atol=1e-4 * whole[0].abs().max().item())
    assert seen == [(6, 4)]  # the remainders
    assert "forward" not in layers[-1].__dict__


@pytest.mark.everyday(name=("paligemma", "qwen3_5", "gemma4"))
@takes_encoded
@pytest.mark.parametrize("name", [n for n in OWN_TOKENS if n != "llama4"])
def test_families_that_need_whole_prompts_say_why_and_run_them(name):
    handle, prefix, call, configs, whole = shared_and_whole(name)
    assert OWN_TOKENS[name] in prefix.why_whole
    assert not prefix.shares
    assert "once per prompt" in sharing_of(handle.model).describe()["common prefix"]
    if name != "gemma4-shared-kv":  # its settings cannot branch either, which is an error of its own
        for (_, a), b in zip(run_branches(handle, configs, call, prefix), whole):
            assert torch.equal(a, b)


@pytest.mark.skipif(TAKES_ENCODED, reason="this transformers' models take pictures that are encoded")
@pytest.mark.parametrize("name", CASES)
def test_before_5_18_every_prompt_is_run_whole_and_it_is_said(name):
    model = CASES[name].make()
    sharing = sharing_of(model)
    assert "does not take pictures that are encoded already" in sharing.pictures
    assert sharing.prefix == sharing.pictures
    assert "once per prompt" in sharing.describe()["vision encoder"]
    with pytest.raises(UnsupportedModelError, match="so several prompts cannot share one"):
        SharedPrefix(apply_sar(model, SARConfig(activation_layer_k=0)), asked(CASES["llava"]))


def test_sharing_is_refused_where_it_is_not_known_to_be_right():
    model = next(case for case in EVERY_CASE if case.name == "llama4").make()
    assert OWN_TOKENS["llama4"] in sharing_of(model).pictures
    with pytest.raises(UnsupportedModelError, match="so several prompts cannot share one"):
        SharedPrefix(apply_sar(model, SARConfig(activation_layer_k=0)), asked(CASES["llava"]))
    assert Family("mine", ("mine",), ("blocks",), lambda *_: None).whole_prompts  # an entry must say so itself
    llava = CASES["llava"].make()
    llava.config.model_type = "unheard_of"
    assert "'unheard_of' has no family entry" in sharing_of(llava).prefix


@takes_encoded
def test_prompts_that_differ_before_their_picture_run_whole():
    """A chat template that puts the question first."""
    case = CASES["llava"]
    handle = apply_sar(case.make(), SARConfig(activation_layer_k=1))
    groups = asked(case)
    groups.ids[0] = [[40 + i, *ids] for i, ids in enumerate(groups.ids[0])]
    prefix = SharedPrefix(handle, groups)
    assert "the chat template puts the question first" in prefix.why_whole
    alone = SharedPrefix(handle, asked(case, tails=[[[21]], [[22, 23]], [[24]]]))
    assert alone.why_whole == "no picture has several prompts"
    call = lambda: handle.model(**prefix.inputs(), logits_to_keep=1).logits[:, -1]
    ((_, found),) = run_branches(handle, [handle.config], call, prefix)
    with torch.no_grad():
        assert torch.equal(found, call())


@takes_encoded
def test_a_call_on_other_prompts_than_the_prefixes_is_an_error():
    case = CASES["llava"]
    handle = apply_sar(case.make(), SARConfig(activation_layer_k=1))
    groups = asked(case)
    prefix = SharedPrefix(handle, groups)
    others = asked(case)
    others.ids[0][0][-1] = 45
    call = lambda: handle.model(**SharedPrefix(handle, others).inputs(), logits_to_keep=1)
    with pytest.raises(ValueError, match="must run the model on the same inputs every time"):
        list(run_branches(handle, [handle.config], call, prefix))


@takes_encoded
def test_what_nobody_may_read_is_nan():
    """The last layer computes T's columns alone; a call that reads another position must not get a number."""
    handle, prefix, _, _, _ = shared_and_whole("llava")
    call = lambda: handle.model(**prefix.inputs(), use_cache=False).logits
    ((_, logits),) = run_branches(handle, [SARConfig(activation_layer_k=1)], call, prefix)
    assert logits[:, 0].isnan().all()
    assert not logits[:, -1].isnan().any()
