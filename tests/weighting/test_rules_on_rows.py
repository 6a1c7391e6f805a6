"""Rules that ask for row statistics, through the public functions, models and decode, against eager attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sar_fast import (
    SARConfig,
    SARState,
    apply_sar,
    flash_attn_func,
    sar_attn_func,
    sar_attn_varlen_func,
    sar_attn_with_kvcache,
)
from sar_fast.method.values import StatisticsWithRows
from sar_fast.weighting import Entropy, Mass, RowStatistic, ScoreSum, SuppressHeads, TopHeads
from tests.helpers import BACKENDS, make_case, max_error
from tests.hf.tiny import CASES

pytestmark = pytest.mark.usefixtures("one_thread")
H = 4
ALL = (*BACKENDS, "triton")


class Rows:
    """A smooth rule of AV, SA and three row statistics."""

    row_statistics = (Mass(), Entropy(), ScoreSum())

    def __call__(self, statistics: StatisticsWithRows, layer: int | None) -> Tensor:
        rows = statistics.rows
        return 1 + rows["mass"] - torch.tanh(rows["entropy"]) / 3 + torch.sin(rows["score_sum"]) / 2 + statistics.sa


def eager_rows(q, k, visual, text, *, scale=None, padding=None) -> dict[str, Tensor]:
    """(B, H) of the three, from full causal attention matrices, differentiable."""
    Sq, Sk, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(G, 2)) * (scale or q.shape[-1] ** -0.5)
    sees = (torch.arange(Sk) <= torch.arange(Sq)[:, None] + Sk - Sq).expand(q.shape[0], 1, Sq, Sk)
    if padding is not None:
        sees = sees & padding[:, None, None]
    p = torch.softmax(s.masked_fill(~sees, -1e30), -1) * sees
    V = sees & visual[:, None, None]
    counts = text[:, None] & (V.sum(-1) >= 2)  # [B, 1, Sq]
    T = counts.sum(-1).clamp_min(1)
    mass = (p * V).sum(-1)
    r = torch.where(V, p / mass.clamp_min(1e-300)[..., None], 1.0)
    entropy = -(torch.where(V, r * r.log(), 0.0)).sum(-1)
    mean = lambda x: torch.where(counts, x, 0.0).sum(-1) / T
    last = torch.where(counts, torch.arange(Sq), -1).amax(-1)  # [B, 1]
    score_sum = torch.where(V, s, 0.0).sum(-1).gather(2, last.clamp_min(0)[..., None].expand(-1, q.shape[2], 1))[..., 0]
    return {"mass": mean(mass), "entropy": mean(entropy), "score_sum": torch.where(last >= 0, score_sum, 0.0)}


def case_of(*lengths, **options):
    case = make_case(*lengths, H=H, D=16, **options)
    return dataclasses.replace(case, options={n: x for n, x in case.options.items() if n != "beta"})


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(padding=["left"])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_outputs_and_gradients(backend, padding):
    case, rule = case_of(21, padding=padding), Rows()
    mask = case.options.get("key_padding_mask")
    found, expected = case.leaves(), case.to(torch.float64).leaves()
    out, stats = sar_attn_func(
        *found.tensors, **case.options, weighting=rule, sav_grad=True, backend=backend, return_stats=True
    )
    rows = eager_rows(expected.q, expected.k, case.visual, case.text, padding=mask)
    given = lambda s, layer: rule(StatisticsWithRows(*s, rows), layer)
    want, _ = expected.reference(weighting=given, sav_grad=True)
    assert max_error(out, want) <= 5e-5
    for name, value in rows.items():
        assert max_error(stats.rows[name], value) <= 1e-4, name
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward()
    (want * weight.double()).sum().backward()
    for name in ("q", "k", "v", "prior"):
        got, exact = (getattr(x, name).grad for x in (found, expected))
        assert max_error(got, exact) <= 2e-4 * max(1, exact.abs().max()), name


@pytest.mark.parametrize("backend", ALL)
def test_recorded_beside_the_papers_rule_which_they_do_not_change(backend):
    case = case_of(24)
    asked = (Mass(), Entropy(), Mass(case.visual & (torch.arange(24) < 9), name="box"))
    plain, _ = case.run(backend)
    out, stats = case.run(backend, row_statistics=asked)
    assert torch.equal(out, plain)
    assert list(stats.rows) == ["mass", "entropy", "box"]
    rows = eager_rows(case.q.double(), case.k.double(), case.visual, case.text)
    assert max_error(stats.rows["mass"], rows["mass"]) <= 1e-5
    assert (stats.rows["box"] < stats.rows["mass"])[:2].all()
    with pytest.raises(ValueError, match="row_statistics must come with return_stats=True"):
        sar_attn_func(*case.tensors, row_statistics=asked)


@pytest.mark.parametrize("backend", ALL)
def test_packed(backend):
    case, rule = case_of(17), Rows()
    ends = torch.tensor([0, 17, 34, 51], dtype=torch.int32)
    q, k, v, visual, text, prior = (x.flatten(0, 1) for x in case.tensors)
    tensors = (q, k, v, ends, ends, 17, 17, visual, text, prior)
    out, stats = sar_attn_varlen_func(*tensors, weighting=rule, backend=backend, return_stats=True)
    want, dense = case.run("torch", weighting=rule)
    assert max_error(out.unflatten(0, (3, 17)), want) <= 1e-5
    assert max_error(stats.rows["score_sum"], dense.rows["score_sum"]) <= 1e-4


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(mode=["running"])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mode", ["running", "step"])
def test_decode_goes_on_from_the_rows_of_the_prompt(backend, mode):
    case, rule, start = case_of(30), Rows(), 27
    part = lambda n: tuple(x[:, :n] for x in case.tensors)
    _, stats = sar_attn_func(*part(start), weighting=rule, backend="torch", return_stats=True)
    count = stats.query_count
    sums = [stats.rows[n] * (count[:, None] if n != "score_sum" else 1) for n in ("mass", "entropy", "score_sum")]
    forgetful, state = SARState.from_stats(stats), SARState.from_stats(stats, rule)
    assert state.row_sums.shape == (3, 3, H)
    torch.testing.assert_close(state.row_sums, torch.stack(sums, 1))
    k_cache, v_cache = (torch.zeros(3, 32, *x.shape[2:]) for x in (case.k, case.v))
    k_cache[:, :start], v_cache[:, :start] = case.k[:, :start], case.v[:, :start]
    visual, prior = (torch.nn.functional.pad(x, (0, 2)) for x in (case.visual, case.prior))
    if mode == "running":
        with pytest.raises(ValueError, match=r"state must hold the sums of 3 row statistics, .* got 0"):
            sar_attn_with_kvcache(
                *(case.q[:, :1], k_cache, v_cache), cache_seqlens=start, visual_mask=visual, prior=prior,
                state=forgetful, weighting=rule, backend=backend,
            )  # fmt: skip
    for n in range(start, 30):
        out = sar_attn_with_kvcache(
            *(case.q[:, n : n + 1], k_cache, v_cache, case.k[:, n : n + 1], case.v[:, n : n + 1]),
            cache_seqlens=n,
            visual_mask=visual,
            prior=prior,
            state=state,
            decode=mode,
            weighting=rule,
            backend=backend,
        )
        text = case.text[:, : n + 1].clone()
        text[:, start : n + 1] = True
        if mode == "step":
            text[:, :n] = False
        tensors = (*part(n + 1)[:4], text, case.prior[:, : n + 1])
        want = sar_attn_func(*tensors, weighting=rule, backend="torch")
        assert max_error(out, want[:, -1:]) <= 2e-5


def test_a_statistic_of_a_users_own_and_heads_chosen_by_it():
    class Sharpest(RowStatistic):
        name = "sharpest"

        def __call__(self, rows):
            return rows.p.amax(-1)

    class Rule:
        row_statistics = (Sharpest(),)

        def __call__(self, statistics, layer):
            x = statistics.rows["sharpest"]
            return (x == x.amax(-1, keepdim=True)).to(x.dtype)

    case = case_of(20)
    _, stats = case.run("composed", weighting=Rule())
    assert (stats.head_weights[:2].sum(-1) == 1).all()
    assert torch.equal(stats.head_weights[2], torch.ones(H))


@pytest.mark.parametrize(
    "rule", [SuppressHeads(keep=2), TopHeads(keep=1, by="mass"), Rows()], ids=lambda rule: type(rule).__name__
)
def test_compiles_in_one_graph(rule):
    case = case_of(18)
    f = lambda *t: sar_attn_func(*t, weighting=rule, sav_grad=True, backend="torch")
    torch._dynamo.reset()
    found = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        out = function(*leaves.tensors)
        out.square().sum().backward()
        found.append((out, leaves.q.grad, leaves.k.grad))
    torch._dynamo.reset()
    for eager, compiled in zip(*found):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


def test_spin_keeps_the_heads_that_score_the_picture_highest():
    case = case_of(22)
    out, stats = case.run("torch", weighting=SuppressHeads(keep=2, damp=0.05))
    rows = eager_rows(case.q.double(), case.k.double(), case.visual, case.text)
    best = rows["score_sum"].argsort(-1, descending=True)[:, :2]
    c = torch.full((3, H), 0.05).scatter(1, best, 1.0)
    c[2] = 1
    plain = flash_attn_func(case.q, case.k, case.v, causal=True, backend="torch")
    assert torch.equal(stats.head_weights, c)
    assert max_error(out, plain * c[:, None, :, None]) <= 1e-6


@pytest.mark.parametrize("decode", ["running", "step", "prompt"])
def test_recorded_and_used_in_a_model_that_generates(decode):
    model, inputs = CASES["llava"].make(), CASES["llava"].batch([1, 1], "left", 0)
    config = SARConfig(
        activation_layer_k=2,
        record=True,
        row_statistics=("mass", "entropy"),
        decode=decode,
        weighting=SuppressHeads(keep=2),
    )
    with apply_sar(model, config) as handle, torch.no_grad():
        model(**inputs)
        for stats in handle.stats.values():
            assert list(stats.rows) == ["score_sum", "mass", "entropy"]
            assert (stats.rows["mass"] > 0).all()
            assert (stats.rows["mass"] < 1).all()
            assert set(stats.head_weights.unique().tolist()) == {torch.tensor(0.05).item(), 1.0}
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 4
