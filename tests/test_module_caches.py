"""SARAttention on caches: live counters of static caches, masks given again, a second picture, what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from sar_fast import SARAttention, SARConfig
from sar_fast.hf.cache_state import state_of
from sar_fast.hf.module.positions import rotate
from sar_fast.reference import sar_attention_reference

B, PROMPT, TOTAL, CAPACITY = 3, 11, 15, 24
MODES = ("running", "step", "prompt", "off")
PLAIN = SARConfig(activation_layer_k=0)


def make(mode, **more):
    torch.manual_seed(0)
    config = PLAIN if mode == "off" else SARConfig(beta=0.3, decode=mode)
    module = SARAttention(64, 4, 2, layer_idx=0, config=config, **more).eval()
    with torch.no_grad():
        module.q_proj.weight.mul_(3)
        module.k_proj.weight.mul_(3)
    return module


def static():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    return StaticCache(config=config, max_cache_len=CAPACITY)


def real_tokens(side):
    """(B, TOTAL) 1 = real; rows are padded by 0, 1 and 2 prompt positions."""
    real = torch.ones(B, TOTAL, dtype=torch.long)
    for b in range(B):
        if side == "left":
            real[b, :b] = 0
        elif side == "right":
            real[b, PROMPT - b : PROMPT] = 0
    return real


def shares(mask):
    prior = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return prior / prior.sum(-1, keepdim=True).clamp_min(1e-6)


def prompt_roles(real):
    """Row 2 is text only."""
    visual = torch.zeros(B, PROMPT, dtype=torch.bool)
    visual[:2, 3:7] = True
    text = torch.zeros(B, PROMPT, dtype=torch.bool)
    text[:2, 7:] = real[:2, 7:PROMPT] != 0
    return {"visual_mask": visual, "text_mask": text, "prior": shares(visual)}


def mask_of(form, real, end, width):
    """(B, end) and wider masks, or (B, 1, new, end) and wider ones: ``real`` in the first ``end`` columns."""
    if form == "none":
        return None
    new = end if end == PROMPT else 1
    wide = torch.ones(B, width, dtype=torch.long)  # ones also beyond the filled columns, which must not matter
    wide[:, :end] = real[:, :end]
    if form == "2d":
        return wide
    column = torch.arange(width)
    causal = (column <= torch.arange(end - new, end)[:, None]) | (column >= end)
    dense = causal & wide[:, None, None].bool()
    return dense if form == "bool" else torch.where(dense, 0.0, torch.finfo(torch.float32).min)


def decode(module, cache, real, form="none", width=lambda end: end, step=None):
    """Outputs of a prompt and of single steps after it."""
    x = torch.randn(B, TOTAL, 64, generator=torch.Generator().manual_seed(2))
    outs = []
    with torch.no_grad():
        for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, TOTAL))]:
            roles = prompt_roles(real) if start == 0 else {}
            call = module if start == 0 or step is None else step
            outs.append(call(x[:, start:end], None, mask_of(form, real, end, width(end)), cache, **roles)[0])
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("side", "form"), [("none", "none"), ("left", "2d"), ("right", "2d"), ("left", "additive")])
def test_static_cache_equals_dynamic_cache(mode, side, form):
    module, real = make(mode), real_tokens(side)
    want = decode(module, DynamicCache(), real, form)
    for width in (lambda end: end, lambda end: CAPACITY):
        torch.testing.assert_close(decode(module, static(), real, form, width), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["running", "off"])
def test_decoding_on_a_static_cache_ends_as_the_whole_sequence(mode):
    """The last token's running means are those of one call over all positions."""
    module, real = make(mode), real_tokens("none")
    x = torch.randn(B, TOTAL, 64, generator=torch.Generator().manual_seed(2))
    roles = prompt_roles(real)
    longer = {n: torch.nn.functional.pad(t, (0, TOTAL - PROMPT)) for n, t in roles.items()}
    longer["text_mask"][:, PROMPT:] = True
    with torch.no_grad():
        whole = module(x, **longer)[0]
    torch.testing.assert_close(decode(module, static(), real)[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.everyday(side=["none"], mode=["running"])
@pytest.mark.everyday(form=["bool"])
@pytest.mark.parametrize(
    ("mode", "side", "form"),
    [*((mode, "none", "none") for mode in MODES), ("running", "left", "2d"), ("prompt", "right", "bool")],
)
def test_compiled_decode_step_on_a_static_cache(mode, side, form):
    torch._dynamo.reset()
    module, real = make(mode), real_tokens(side)
    want = decode(module, DynamicCache(), real, form)
    step = torch.compile(module, backend="aot_eager", fullgraph=True)
    got = decode(module, static(), real, form, lambda end: CAPACITY, step=step)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_compiled_step_takes_masks_over_the_whole_static_cache_only():
    torch._dynamo.reset()
    step = torch.compile(make("running"), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=f"attention_mask.*cover the whole static cache, {CAPACITY} positions"):
        decode(make("running"), static(), real_tokens("left"), "2d", step=step)


# a second picture


def project(module, x):
    q, k, v = (p(x).view(*x.shape[:2], -1, module.head_dim) for p in (module.q_proj, module.k_proj, module.v_proj))
    cos, sin = module._rotary(None, 0, x)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def means_of(module, x, visual, text, prior, queries, end):
    """The reference's (av, sa, c, count) of the queries ``text`` (B, end) marks, among the positions ``queries``."""
    q, k, v = project(module, x[:, :end])
    text = text & torch.zeros_like(text).index_fill(1, torch.arange(*queries), True)
    _, stats = sar_attention_reference(q, k, v, visual, text, prior, beta=0.3, return_stats=True)
    return stats


SECOND = 5  # positions of the second turn; its picture takes the first two


def second_turn(rows):
    """Roles of the second turn: rows in ``rows`` bring a picture, the others text only."""
    end = PROMPT + SECOND
    visual = torch.zeros(B, end, dtype=torch.bool)
    visual[:2, 3:7] = True
    text = torch.ones(B, SECOND, dtype=torch.bool)
    for row in rows:
        visual[row, PROMPT : PROMPT + 3] = True
        text[row, :3] = False
    return {"visual_mask": visual, "text_mask": text, "prior": shares(visual)}


def dense_output(module, x, stats_c, end, start):
    """Plain attention of positions start..end, its heads scaled by ``stats_c`` (B, H)."""
    q, k, v = project(module, x[:, :end])
    blank = torch.zeros(B, end, dtype=torch.bool)
    out = sar_attention_reference(q, k, v, blank, blank, torch.zeros(B, end))
    return module.o_proj((out * stats_c[:, None, :, None]).flatten(2))[:, start:]


@pytest.mark.parametrize("make_cache", [DynamicCache, static], ids=["dynamic", "static"])
@pytest.mark.parametrize("mode", ["running", "step", "prompt"])
@pytest.mark.parametrize("rows", [(0,), (0, 2), ()], ids=["one_row", "two_rows", "no_row"])
def test_masks_given_again_on_a_cache(mode, rows, make_cache):
    """T starts afresh in the rows with a new picture and goes on in the others; V covers all pictures."""
    module = make(mode)
    end = PROMPT + SECOND
    x = torch.randn(B, end + 1, 64, generator=torch.Generator().manual_seed(3))
    first, second = prompt_roles(torch.ones(B, PROMPT)), second_turn(rows)
    cache = make_cache()
    with torch.no_grad():
        module(x[:, :PROMPT], None, None, cache, **first)
        got = module(x[:, PROMPT:end], None, None, cache, **second)[0]
        last = module(x[:, end:], None, None, cache)[0]

        # the weights by hand: sums of each turn's queries, each under the V and the prior of its own turn
        a = means_of(module, x, first["visual_mask"], first["text_mask"], first["prior"], (0, PROMPT), PROMPT)
        text = torch.nn.functional.pad(second["text_mask"], (PROMPT, 0))
        b = means_of(module, x, second["visual_mask"], text, second["prior"], (PROMPT, end), end)
        step_roles = [torch.nn.functional.pad(second[n], (0, 1)) for n in ("visual_mask", "prior")]
        text = torch.ones(B, end + 1, dtype=torch.bool)
        s = means_of(module, x, step_roles[0], text, step_roles[1], (end, end + 1), end + 1)

    sums = lambda stats: (stats.alignment_variance * n(stats), stats.semantic_alignment * n(stats), n(stats))
    n = lambda stats: stats.query_count[:, None]
    kept = torch.tensor([0.0 if row in rows else 1.0 for row in range(B)])[:, None]
    afresh = [old * kept + new for old, new in zip(sums(a), sums(b))]
    c_second = {
        "running": weights(*afresh),
        "step": b.head_weights,
        "prompt": weights(*afresh) if rows else a.head_weights,
    }[mode]
    c_last = {
        "running": weights(*(old + new for old, new in zip(afresh, sums(s)))),
        "step": s.head_weights,
        "prompt": c_second,
    }[mode]
    torch.testing.assert_close(got, dense_output(module, x, c_second, end, PROMPT), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, dense_output(module, x, c_last, end + 1, end), rtol=1e-4, atol=1e-5)


def weights(av_sum, sa_sum, count, beta=0.3):
    """docs/method.md, section 2, from sums: c (B, H), 1 where nothing counted."""
    total = count.clamp_min(1)
    w = torch.softmax(av_sum / total * (sa_sum / total) / beta, dim=-1)
    w[:, 0] = w.max(-1).values
    return torch.where(count > 0, w.shape[-1] * w, 1.0)


def test_running_sums_with_gradients_are_refused_before_anything_is_written():
    module, cache, roles = make("running"), DynamicCache(), prompt_roles(torch.ones(B, PROMPT))
    x = torch.randn(B, PROMPT + 1, 64)
    module(x[:, :PROMPT], None, None, cache, **roles)
    with pytest.raises(ValueError, match=r"past_key_values must come under torch.no_grad.*no backward; got"):
        module(x[:, PROMPT:], None, None, cache)
    assert cache.get_seq_length() == PROMPT


def test_masks_must_keep_the_pictures_of_earlier_calls():
    module, cache = make("running"), DynamicCache()
    x, roles = torch.randn(B, PROMPT + SECOND, 64), prompt_roles(torch.ones(B, PROMPT))
    module(x[:, :PROMPT], None, None, cache, **roles)
    second = second_turn((0,))
    second["visual_mask"][1, 3:7] = False
    with pytest.raises(ValueError, match=r"visual_mask must keep .* row 1 .* position 3"):
        module(x[:, PROMPT:], None, None, cache, **second)
    assert cache.get_seq_length() == PROMPT  # refused before anything was written


def test_a_padded_new_token_is_no_text_query():
    """Several steps in one call, right padded: what padding hides does not count."""
    module, x = make("running"), torch.randn(B, PROMPT + 2, 64, generator=torch.Generator().manual_seed(4))
    roles = prompt_roles(torch.ones(B, PROMPT))
    real = torch.ones(B, PROMPT + 2, dtype=torch.long)
    real[1, -1] = 0
    states = []
    for rows, mask, stop in ((slice(None), real, PROMPT + 2), (slice(1, 2), None, PROMPT + 1)):
        cache = DynamicCache()
        with torch.no_grad():
            module(x[rows, :PROMPT], None, None, cache, **{n: t[rows] for n, t in roles.items()})
            module(x[rows, PROMPT:stop], None, mask, cache)
        states.append(state_of(cache).layers[0])
    assert states[0].count[1] == states[1].count[0]
    torch.testing.assert_close(states[0].av_sum[1], states[1].av_sum[0])


def test_a_cache_that_sar_did_not_fill_is_an_error():
    """Its text queries were never counted; also where SAR was off for some of its positions only."""
    module, x, roles = make("running"), torch.randn(B, PROMPT + 1, 64), prompt_roles(torch.ones(B, PROMPT))
    visual = torch.nn.functional.pad(roles["visual_mask"], (0, 1))
    again = {"visual_mask": visual, "text_mask": torch.ones(B, 1, dtype=torch.bool), "prior": shares(visual)}
    cache = DynamicCache()
    module.sar_config = PLAIN
    module(x[:, :PROMPT], None, None, cache)
    module.sar_config = SARConfig()
    for named in (again, {}):
        with pytest.raises(ValueError, match=r"past_key_values must hold positions that SAR saw .*; got 11 positions"):
            module(x[:, PROMPT:], None, None, cache, **named)

    cache = DynamicCache()
    module(x[:, :PROMPT], None, None, cache, **roles)
    module.sar_config = PLAIN
    module(x[:, PROMPT:], None, None, cache)
    module.sar_config = SARConfig()
    with pytest.raises(ValueError, match=r"past_key_values must hold positions that SAR saw .*; got 12 positions"):
        module(x[:, PROMPT:], None, None, cache)


@torch.no_grad()
def test_a_full_or_sliding_cache_is_an_error_before_anything_is_written():
    module, x, roles = make("running"), torch.randn(B, PROMPT, 64), prompt_roles(torch.ones(B, PROMPT))
    cache = static()
    module(x, None, None, cache, **roles)
    module(x, None, None, cache)
    with pytest.raises(
        ValueError, match="past_key_values must have room for 22 cached and 11 new positions; got room for 24"
    ):
        module(x, None, None, cache)
    assert int(cache.get_seq_length()) == 2 * PROMPT
    sliding = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    sliding.sliding_window, sliding.layer_types = 8, ["sliding_attention"]
    with pytest.raises(ValueError, match="past_key_values must keep all positions; got layer 0"):
        module(x, None, None, DynamicCache(config=sliding), **roles)
    with pytest.raises(TypeError, match="past_key_values must be a transformers cache; got tuple"):
        module(x, None, None, ((x, x),), **roles)
