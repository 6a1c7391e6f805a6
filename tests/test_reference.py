"""The fp64 oracle against a second formulation: plain Python loops over samples, heads and queries."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sar_fast.reference import sar_attention_reference


def visible_keys(i, Sq, Sk, *, causal, window, real):
    """Indices of the keys that query i may see; queries are the newest positions."""
    position = i + Sk - Sq
    keys = []
    for j in range(Sk):
        if causal and j > position:
            continue
        if window[0] >= 0 and j < position - window[0]:
            continue
        if window[1] >= 0 and j > position + window[1]:
            continue
        if real is not None and not real[j]:
            continue
        keys.append(j)
    return keys


def loop_attend(q_i, keys, k, v, *, scale, softcap):
    """Scores by key, log-sum-exp, probabilities by key and the attention output of one query of one head."""
    score = {j: scale * sum(a * b for a, b in zip(q_i, k[j])) for j in keys}
    if softcap > 0:
        score = {j: softcap * math.tanh(s / softcap) for j, s in score.items()}
    if not keys:
        return score, -math.inf, {}, [0.0] * len(v[0])
    top = max(score.values())
    lse = top + math.log(sum(math.exp(s - top) for s in score.values()))
    p = {j: math.exp(s - lse) for j, s in score.items()}
    return score, lse, p, [sum(p[j] * v[j][d] for j in keys) for d in range(len(v[0]))]


def loop_weights(sav, *, beta, protect, normalize):
    """c of one sample from its heads' SAV."""
    x = list(sav)
    if normalize == "standardize":
        mean, std = statistics.fmean(sav), statistics.pstdev(sav)
        x = [(s - mean) / std for s in sav] if std > 0 else [0.0] * len(sav)
    top = max(x)
    e = [math.exp((value - top) / beta) for value in x]
    w = [value / sum(e) for value in e]
    if protect:
        w[0] = max(w)
    return [len(w) * value for value in w]


def loop_sar(
    q, k, v, visual, text, prior, *, beta=0.5, causal=True, softmax_scale=None, key_padding_mask=None,
    window_size=(-1, -1), softcap=0.0, protect_first_head=True, normalize="none", fixed_c=None,
):  # fmt: skip
    """(out, lse, AV, SA, c, count) as tensors. ``fixed_c`` (B, H) replaces the weights, as a constant would."""
    B, Sq, H, D = q.shape
    Sk, group = k.shape[1], H // k.shape[2]
    scale = 1 / math.sqrt(D) if softmax_scale is None else softmax_scale
    out = torch.zeros(B, Sq, H, v.shape[-1], dtype=torch.float64)
    lse = torch.zeros(B, H, Sq, dtype=torch.float64)
    av, sa, c = (torch.zeros(B, H, dtype=torch.float64) for _ in range(3))
    count = torch.zeros(B, dtype=torch.float64)
    visual, text, prior, q = visual.tolist(), text.tolist(), prior.tolist(), q.tolist()
    for b in range(B):
        real = None if key_padding_mask is None else key_padding_mask[b].tolist()
        counted = 0
        for h in range(H):
            k_h, v_h = k[b, :, h // group].tolist(), v[b, :, h // group].tolist()
            variances, alignments = [], []
            for i in range(Sq):
                keys = visible_keys(i, Sq, Sk, causal=causal, window=window_size, real=real)
                score, l, p, o = loop_attend(q[b][i][h], keys, k_h, v_h, scale=scale, softcap=softcap)
                out[b, i, h], lse[b, h, i] = torch.tensor(o, dtype=torch.float64), l
                V_i = [j for j in keys if visual[b][j]]
                if text[b][i] and len(V_i) >= 2:
                    variances.append(statistics.variance(score[j] for j in V_i))
                    alignments.append(sum(p[j] * prior[b][j] for j in V_i))
            counted = len(variances)
            if counted:
                av[b, h], sa[b, h] = statistics.fmean(variances), statistics.fmean(alignments)
        count[b] = counted
        sav = (av[b] * sa[b]).tolist()
        weights = loop_weights(sav, beta=beta, protect=protect_first_head, normalize=normalize)
        c[b] = torch.tensor(weights if counted else [1.0] * H, dtype=torch.float64)
    scale_by = c if fixed_c is None else fixed_c
    return out * scale_by[:, None, :, None], lse, av, sa, c, count


@st.composite
def calls(draw):
    """Arguments of a small call; every mask is arbitrary, so most samples are odd in some way."""
    B, Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    Sq, Sk, D, Dv = draw(st.integers(1, 6)), draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    mask = lambda n, density: torch.rand(B, n, generator=g) < density
    visual = mask(Sk, draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])))
    prior = torch.rand(B, Sk, generator=g, dtype=torch.float64) * visual
    tensors = (
        randn(B, Sq, Hkv * group, D) * draw(st.sampled_from([0.3, 2.0])),
        randn(B, Sk, Hkv, D),
        randn(B, Sk, Hkv, Dv),
        visual,
        mask(Sq, draw(st.sampled_from([0.0, 0.5, 1.0]))),
        prior / prior.sum(-1, keepdim=True).clamp_min(1e-9),
    )
    side = st.sampled_from([-1, 0, 2])
    options = {
        "beta": draw(st.sampled_from([0.02, 0.5, 1e30])),
        "causal": draw(st.booleans()),
        "softmax_scale": draw(st.sampled_from([None, 0.7])),
        "key_padding_mask": mask(Sk, 0.6) if draw(st.booleans()) else None,
        "window_size": (draw(side), draw(side)),
        "softcap": draw(st.sampled_from([0.0, 1.5])),
        "protect_first_head": draw(st.booleans()),
        "normalize": draw(st.sampled_from(["none", "standardize"])),
    }
    return tensors, options


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def assert_agree(tensors, options):
    out, stats = sar_attention_reference(*tensors, **options, return_stats=True)
    loop_out, lse, av, sa, c, count = loop_sar(*tensors, **options)
    close(stats.query_count, count)
    close(stats.lse, lse)
    close(stats.alignment_variance, av)
    close(stats.semantic_alignment, sa)
    close(stats.sav, av * sa)
    close(stats.head_weights, c)
    close(out, loop_out)


@settings(max_examples=100, deadline=None)
@given(calls())
def test_agrees_with_the_loops(call):
    tensors, options = call
    if options["normalize"] == "standardize":
        # heads whose SAV differ by rounding alone are standardised noise: only well separated ones are comparable
        _, _, av, sa, _, _ = loop_sar(*tensors, **options)
        sav = av * sa
        if (sav.std(-1, correction=0) < 1e-6 * sav.abs().amax(-1)).any():
            options = {**options, "normalize": "none"}
    assert_agree(tensors, options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window_size": (3, -1)},
        {"causal": False, "window_size": (2, 1)},
        {"softcap": 1.0},
        {"normalize": "standardize"},
        {"protect_first_head": False},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default",
)
@pytest.mark.parametrize(("Sq", "Sk"), [(9, 9), (4, 9), (9, 4)])
def test_agrees_on_an_image_then_text(options, Sq, Sk):
    g = torch.Generator().manual_seed(3)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    visual = (torch.arange(Sk) >= 1) & (torch.arange(Sk) < 4)
    prior = torch.rand(2, Sk, generator=g, dtype=torch.float64) * visual
    real = torch.ones(2, Sk, dtype=torch.bool)
    real[1, 0] = False
    text = (torch.arange(Sq) + Sk - Sq >= 3).expand(2, Sq)
    tensors = (randn(2, Sq, 6, 4), randn(2, Sk, 2, 4), randn(2, Sk, 2, 3), visual.expand(2, Sk), text, prior)
    assert_agree(tensors, dict(beta=0.05, key_padding_mask=real, **options))


def degenerate(name):
    """A one-sample case in which no query counts."""
    visual, text = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.bool)
    if name == "one visual token":
        visual[:, 1], text[:, 2:] = True, True
    elif name == "image only":
        visual[:, 1:] = True
    elif name == "text only":
        text[:, :] = True
    elif name == "text before the image":
        text[:, :2], visual[:, 2:] = True, True
    return visual, text


@pytest.mark.parametrize("name", ["one visual token", "image only", "text only", "text before the image", "nothing"])
def test_samples_in_which_no_query_counts_are_plain_attention(name):
    visual, text = degenerate(name)
    q, k, v = torch.randn(3, 1, 6, 4, 8, dtype=torch.float64).unbind()
    prior = visual / visual.sum().clamp_min(1)
    out, stats = sar_attention_reference(q, k, v, visual, text, prior.double(), return_stats=True)
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    assert torch.equal(stats.head_weights, torch.ones(1, 4, dtype=torch.float64))
    assert stats.query_count.item() == 0
    close(out, plain.transpose(1, 2))


def differentiable_call(softcap, normalize):
    """q, k, v, prior, and the reference as a function of them."""
    g = torch.Generator().manual_seed(5)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    visual, text = torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    visual[0, 1:4], text[0, 2:], visual[1, :3], visual[1, 4], text[1, 1:] = True, True, True, True, True
    q, k, v = randn(2, 5, 4, 3), randn(2, 7, 2, 3), randn(2, 7, 2, 2)
    prior = torch.rand(2, 7, generator=g, dtype=torch.float64) * visual
    options = {"beta": 0.1, "softcap": softcap, "normalize": normalize}
    return (q, k, v, prior), visual, text, options


VARIANTS = [(0.0, "none"), (1.5, "none"), (0.0, "standardize")]


@pytest.mark.parametrize(("softcap", "normalize"), VARIANTS)
def test_gradcheck_through_the_weights(softcap, normalize):
    inputs, visual, text, options = differentiable_call(softcap, normalize)
    f = lambda q, k, v, prior: sar_attention_reference(q, k, v, visual, text, prior, sav_grad=True, **options)
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize(("softcap", "normalize"), VARIANTS)
def test_without_sav_grad_the_weights_are_constants(softcap, normalize):
    """Directional derivative of the loops with c held fixed."""
    (q, k, v, prior), visual, text, options = differentiable_call(softcap, normalize)
    leaves = [x.requires_grad_() for x in (q, k, v, prior)]
    out, stats = sar_attention_reference(q, k, v, visual, text, prior, **options, return_stats=True)
    g = torch.randn(out.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, g, allow_unused=True)
    assert grads[3] is None
    step, c = 1e-6, stats.head_weights.detach()
    for index in range(3):
        direction = torch.randn_like(leaves[index])
        value = []
        for sign in (1, -1):
            moved = [x.detach() for x in leaves]
            moved[index] = moved[index] + sign * step * direction
            loops = loop_sar(*moved[:3], visual, text, moved[3], fixed_c=c, **options)
            value.append((loops[0] * g).sum())
        expected = (value[0] - value[1]) / (2 * step)
        torch.testing.assert_close((grads[index] * direction).sum(), expected, rtol=1e-6, atol=1e-7)
