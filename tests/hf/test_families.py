"""Every family: patches to tokens, padded batches, generation, gradients and removal, against a dense oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CompileConfig

from sar_fast import SARConfig, apply_sar
from sar_fast.hf.families import find_family
from tests.hf.oracle import (
    TEXT_INPUTS,
    eager_oracle,
    lacking_without_sar,
    supports,
    visual_features,
    visual_norms,
    visual_prior,
)
from tests.hf.seen_masks import by_kind, seen_masks
from tests.hf.tiny import CASES, IMAGE, VERSION, VIDEO
from tests.hf.tiny.lacks import STATIC_CACHE, lack_of

K = 2
NEW = 4
BOUND = 1e-4  # of the largest logit: fp32 rounding through a few layers, as exp(SAV / beta) amplifies it
DECODING_BOUND = {"qwen3_5_moe": 3e-4}  # plain transformers 5.5 is off by 1e-4: one token's experts round otherwise
ROWS = [1, 2]  # pictures per row
# Every day each family's prompt and decoding, against the oracle; all else on four that differ in kind.
KINDS = ("llava", "llava_next", "qwen2_5_vl", "gemma3")


@functools.cache
def model_of(name):
    return CASES[name].make()


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[name for name, case in CASES.items() if case.video])
def video_case(request):
    return CASES[request.param]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def alone(case, b, rows=ROWS):
    """Row b of the batch as a batch of its own, without padding."""
    row = case.batch([rows[b]], first_image=sum(rows[:b]))
    return {name: x for name, x in row.items() if name != "attention_mask"}


def longer(case, row, answer):
    """A row with generated tokens after it."""
    row = dict(row)
    for name in row:
        if name == "input_ids":
            row[name] = torch.cat([row[name], answer[None]], 1)
        elif name in TEXT_INPUTS:
            row[name] = torch.nn.functional.pad(row[name], (0, len(answer)), value=case.generated[name])
    return row


def oracle_logits(model, case, row, prior=None, **options):
    if prior is None:
        prior = visual_prior(model, row, case.blocks, case.output)
    options = {"k": K, "beta": case.beta, "attending": case.attending} | options
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior, **options) as oracle:
        return logits(model, row)[0], oracle.weights


def assert_close(got, want, bound=BOUND):
    assert (got - want).abs().max() <= bound * want.abs().max()


def plain_logits(model, case, batch):
    """Without SAR. The oldest transformers' SDPA drops Gemma 2's soft-cap, its eager attention does not."""
    if not (VERSION < (5, 18) and case.name == "paligemma2"):
        return logits(model, batch)
    wrong = logits(model, batch)
    model.set_attn_implementation({"text_config": "eager"})
    right = logits(model, batch)
    model.set_attn_implementation({"text_config": "sdpa"})
    assert (wrong - right).abs().max() > 0.1 * right.abs().max()
    return right


def config_of(case, **changes):
    return SARConfig(**{"activation_layer_k": K, "beta": case.beta} | changes)


# which patches feed which token


def token_weights(model, case, row):
    """(tokens, positions): how much of each position's norm the family's map puts into each token."""
    family = find_family(model.config)
    modality = "video" if "pixel_values_videos" in row else "image"
    arguments = {name: x for name, x in row.items() if name not in TEXT_INPUTS}
    base = getattr(model, "model", model)
    blocks = model.get_submodule(case.blocks)
    shape = []
    hook = blocks[0].register_forward_hook(
        lambda m, a, o: shape.append((o[0] if isinstance(o, tuple) else o).shape[:-1])
    )
    with torch.no_grad():
        tokens = len(visual_features(model, row, case.output))
    hook.remove()
    of_tokens = lambda norms: family.norms_of_tokens(base, norms, arguments, modality, tokens)
    return torch.autograd.functional.jacobian(of_tokens, torch.ones(shape[0])).flatten(1)


def assert_maps_alike(model, case, row):
    weights = token_weights(model, case, row)
    want = torch.zeros_like(weights)
    for token, support in enumerate(supports(model, row, case.blocks, case.output)):
        want[token, support] = 1 / max(1, len(support))
    torch.testing.assert_close(weights, want)


@pytest.mark.everyday(case=KINDS)
def test_a_token_gets_the_mean_norm_of_the_patches_it_depends_on(case):
    assert_maps_alike(model_of(case.name), case, case.batch(ROWS))


@pytest.mark.everyday(video_case=("llava_onevision", "qwen2_5_vl"))
def test_a_clips_tokens_get_the_mean_norm_of_the_patches_they_depend_on(video_case):
    assert_maps_alike(model_of(video_case.name), video_case, video_case.video())


# forward


@pytest.mark.everyday(side=["left"])
@pytest.mark.everyday(case=KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_dense_oracle_of_each_row(case, side):
    model = model_of(case.name)
    batch = case.batch(ROWS, side)
    plain = logits(model, batch)
    with apply_sar(model, config_of(case, record=True)) as handle:
        got = logits(model, batch)
        assert sorted(handle.stats) == handle.sar_layers == list(range(len(case.attending)))[-K:]
        weights = [handle.stats[layer].head_weights for layer in handle.sar_layers]
    for b in range(len(ROWS)):
        want, expected = oracle_logits(model, case, alone(case, b))
        real = batch["attention_mask"][b].bool()
        assert_close(got[b][real], want)
        assert (plain[b][real] - want).abs().max() > 100 * BOUND * want.abs().max()  # SAR does something here
        for c, layer in zip(weights, case.attending[-K:]):
            torch.testing.assert_close(c[b], expected[layer], rtol=1e-3, atol=1e-4)


@pytest.mark.everyday(video_case=("llava_onevision", "qwen2_5_vl"))
def test_clip_equals_dense_oracle(video_case):
    case, model = video_case, model_of(video_case.name)
    row = case.video()
    placeholder = VIDEO if (row["input_ids"] == VIDEO).any() else IMAGE
    plain = logits(model, row)
    want, _ = oracle_logits(model, case, row, placeholders=(placeholder,))
    with apply_sar(model, config_of(case)):
        assert_close(logits(model, row)[0], want)
    assert (plain[0] - want).abs().max() > 100 * BOUND * want.abs().max()


@pytest.mark.everyday(video_case=("llava_onevision", "qwen2_5_vl"))
def test_picture_and_clip_in_one_row_equal_dense_oracle(video_case):
    """V and the prior run over both, in the order of the row."""
    case, model = video_case, model_of(video_case.name)
    picture, clip = alone(case, 0), case.video()
    if not (clip["input_ids"] == VIDEO).any():
        pytest.skip("GLM gives both the same placeholder: transformers cannot tell them apart in one call")
    row = picture | clip
    for name in TEXT_INPUTS:
        if name in clip:
            row[name] = torch.cat([picture[name], clip[name]], 1)
    ids = row["input_ids"][0]
    norms = torch.zeros(len(ids))
    for token, part in ((IMAGE, picture), (VIDEO, clip)):
        norms[ids == token] = visual_norms(model, part, case.blocks, case.output)
    norms = norms[(ids == IMAGE) | (ids == VIDEO)]
    want, _ = oracle_logits(model, case, row, norms / norms.sum(), placeholders=(IMAGE, VIDEO))
    plain = logits(model, row)[0]
    with apply_sar(model, config_of(case)):
        assert_close(logits(model, row)[0], want)
    assert (plain - want).abs().max() > 100 * BOUND * want.abs().max()


@pytest.mark.everyday(case=KINDS)
def test_huge_beta_unprotected_equals_sdpa(case):
    model, batch = model_of(case.name), case.batch(ROWS)
    real = batch["attention_mask"].bool()
    plain = plain_logits(model, case, batch)[real]
    with apply_sar(model, config_of(case, beta=1e30, protect_first_head=False)):
        assert_close(logits(model, batch)[real], plain)


# transformers' kernel is another than ours, or sees the keys beyond windows and padding that ours leaves out
OTHER_ROUNDING = ("kimi_k25", "paligemma2", "gemma3", "gemma4", "gemma4-shared-kv", "exaone4_5")


@pytest.mark.everyday(case=KINDS)
def test_text_only_row_is_left_alone(case):
    model, batch = model_of(case.name), case.batch([2, 0])
    real = batch["attention_mask"][1].bool()
    plain = plain_logits(model, case, batch)[1][real]
    with apply_sar(model, config_of(case)):
        got = logits(model, batch)[1][real]
    with apply_sar(model, config_of(case, activation_layer_k=0)):
        assert torch.equal(got, logits(model, batch)[1][real])
    if case.name in OTHER_ROUNDING:
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, plain)


@pytest.mark.everyday(side=["left"], case=(*KINDS, "paligemma", "llama4"))
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_layer_gets_a_dense_mask(case, side, monkeypatch, record_property):
    """Neither the prompts of a padded batch nor their answers' tokens; docs/families.md shows what they get."""
    model = model_of(case.name)
    with apply_sar(model, config_of(case, activation_layer_k=len(case.attending))), seen_masks(monkeypatch) as seen:
        generate(model, case.batch(ROWS, side))
    prompts, steps = [s for s in seen if s.queries > 1], [s for s in seen if s.queries == 1]
    assert (len(prompts), len(steps)) == (len(case.attending), len(case.attending) * (NEW - 1))
    assert "dense" not in {s.pattern for s in seen}
    record_property("mask", by_kind({s.kind: s.pattern for s in prompts}))
    record_property("prompt on a GPU", by_kind({s.kind: s.on_a_gpu for s in prompts}))
    record_property("step on a GPU", by_kind({s.kind: s.on_a_gpu for s in steps}))


# generation


def generate(model, batch, **options):
    out = model.generate(
        **batch,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        suppress_tokens=[IMAGE, VIDEO],  # the dense pass would take them for pictures
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences[:, -NEW:], torch.stack(out.logits, 1)


@pytest.mark.everyday(mode=["running"])
@pytest.mark.everyday(case=KINDS)
@pytest.mark.parametrize("mode", ["running", "prompt"])
def test_greedy_decoding_equals_one_dense_pass_over_prompt_and_answer(case, mode):
    model = model_of(case.name)
    with apply_sar(model, config_of(case, decode=mode)):
        answers, got = generate(model, case.batch(ROWS))
    for b in range(len(ROWS)):
        row = alone(case, b)
        n = row["input_ids"].shape[1]
        want, _ = oracle_logits(model, case, longer(case, row, answers[b]), prompt=n, mode=mode)
        assert_close(got[b], want[n - 1 : -1], DECODING_BOUND.get(case.name, BOUND))


def refuse_static(case, static, dynamic):
    """Ends the test of a model that plain transformers does not run right on a static cache."""
    lack = lack_of(STATIC_CACHE, case.name)
    if lack is None:
        return
    if lack.errors:
        with pytest.raises(lack.errors):
            static()
    else:
        assert not torch.equal(static()[0], dynamic()[0])
    lacking_without_sar("a static cache")


@pytest.mark.everyday(side=["left"], case=KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_static_cache_equals_dynamic(case, side):
    model, batch = model_of(case.name), case.batch(ROWS, side)
    options = {"cache_implementation": "static", "disable_compile": True}
    refuse_static(case, lambda: generate(model, batch, **options), lambda: generate(model, batch))
    with apply_sar(model, config_of(case)):
        answers, want = generate(model, batch)
        again, got = generate(model, batch, **options)
    assert torch.equal(again, answers)
    assert_close(got, want)


@pytest.mark.slow
def test_compiled_decoding_on_a_static_cache_has_no_graph_break(case):
    model, batch = case.make(), case.batch(ROWS)
    options = {"cache_implementation": "static", "disable_compile": True}
    refuse_static(case, lambda: generate(model, batch, **options), lambda: generate(model, batch))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # generate() compiles on accelerators only unless told
    with apply_sar(model, config_of(case)):
        _, want = generate(model, batch, **options)
        torch._dynamo.reset()
        _, got = generate(model, batch, cache_implementation="static", compile_config=compiled)
    assert_close(got, want)
    assert bool(graphs) == (case.name != "llama4")  # which transformers never compiles by itself


# training and removal


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    model(**batch, labels=batch["input_ids"].masked_fill(real == 0, -100), use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert any("vision" in n or "visual" in n for n in found)
    return found


def assert_gradients_close(got, want, bound):
    """Within ``bound`` of each parameter's largest gradient; some are 0 but for rounding (key biases)."""
    assert got.keys() == want.keys()
    largest = max(g.abs().max() for g in want.values())
    for name in want:
        assert (got[name] - want[name]).abs().max() <= bound * (want[name].abs().max() + 1e-2 * largest), name


@pytest.mark.everyday(case=KINDS, reentrant=[False])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointed_gradients_equal_plain_ones(case, reentrant):
    model, batch = case.make(), case.batch(ROWS)
    model.train()

    def both():
        model.gradient_checkpointing_disable()
        want = gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_gradients_close(gradients(model, batch), want, 1e-5)

    if reentrant and case.name in ("llama4", "gemma4-shared-kv"):
        with pytest.raises(AssertionError):
            both()
        lacking_without_sar("shared keys, and a vision encoder whose input needs no gradient")
    with apply_sar(model, config_of(case, sav_grad=True)):
        both()


@pytest.mark.everyday(case=KINDS)
def test_gradients_through_the_weights_equal_the_dense_oracles(case):
    model, row = case.make(), alone(case, 0)
    prior = visual_prior(model, row, case.blocks, case.output)
    model.train()
    beta = min(5 * case.beta, 0.3)  # where one head takes all weight, nothing depends on the statistics
    options = {"k": K, "beta": beta, "attending": case.attending}
    with eager_oracle(model, ids=row["input_ids"][0], prior=prior, **options):
        want = gradients(model, row)
    with apply_sar(model, config_of(case, beta=beta, sav_grad=True)):
        assert_gradients_close(gradients(model, row), want, 1e-3)
    with apply_sar(model, config_of(case, beta=beta, sav_grad=False)):
        constant = gradients(model, row)
    query = [
        n for n in want if n.endswith(("q_proj.weight", "q_b_proj.weight")) and "vision" not in n and "visual" not in n
    ]
    last = max(query, key=lambda n: [int(part) for part in n.split(".") if part.isdigit()])
    assert (constant[last] - want[last]).abs().max() > 1e-2 * want[last].abs().max()


@pytest.mark.everyday(case=KINDS)
def test_remove_restores_bit_for_bit(case):
    model, batch = case.make(), case.batch(ROWS)
    state = lambda: [
        (name, dict(m.__dict__).keys(), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]
    logits(model, batch)  # some models note rope deltas in their first pass
    before, modules = logits(model, batch), state()
    implementation = model.config.get_text_config()._attn_implementation
    handle = apply_sar(model, config_of(case))
    changed = logits(model, batch)
    handle.remove()
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model, batch), before)
    assert state() == modules
    assert model.config.get_text_config()._attn_implementation == implementation
