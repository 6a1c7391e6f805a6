"""Decode steps under rules with row statistics: caches of every layout, in graphs, against the whole sequence."""

from __future__ import annotations

import pytest
import torch

from sar_fast import SARState, sar_attn_func, sar_attn_with_kvcache
from tests.helpers import combinations, max_error
from tests.weighting.test_rules_on_rows import ALL, Rows, case_of

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE, PAGES, START, END = 8, 4, 28, 30


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def caches_of(case, paged):
    """(k, v) that hold the first ``START`` keys, NaN behind them, and the table of their pages, or None."""
    filled = lambda x: torch.nn.functional.pad(x[:, :START], (0, 0, 0, 0, 0, PAGE * PAGES - START), value=torch.nan)
    k, v = filled(case.k), filled(case.v)
    if not paged:
        return k, v, None
    order = torch.randperm(3 * PAGES, generator=torch.Generator().manual_seed(1))
    table = order.view(3, PAGES).to(torch.int32)
    pages = lambda x: x.unflatten(1, (PAGES, PAGE)).flatten(0, 1)[order.argsort()].contiguous()
    return pages(k), pages(v), table


def steps(step, case, rule, backend, mode, *, lengths, paged, new, **options):
    """Outputs of the positions behind ``START``, ``new`` at a time, and the state after them."""
    prompt = [x[:, :START] for x in case.tensors]
    _, stats = sar_attn_func(*prompt, weighting=rule, backend="torch", return_stats=True, **options)
    state = SARState.from_stats(stats, rule)
    k_cache, v_cache, table = caches_of(case, paged)
    visual, prior = (torch.nn.functional.pad(x, (0, PAGE * PAGES - x.shape[1])) for x in (case.visual, case.prior))
    outs = []
    for n in range(START, END, new):
        q, k, v = (x[:, n : n + new] for x in case.tensors[:3])
        given = {"cache_seqlens": lengths(n), "visual_mask": visual, "prior": prior, "state": state, "decode": mode}
        more = {"weighting": rule, "backend": backend, "block_table": table, **options}
        outs.append(step(q, k_cache, v_cache, k, v, **given, **more))
    return torch.cat(outs, 1), state


def whole(case, rule, mode, new, **options):
    """The same from one call for each step, over all its keys."""
    outs = []
    for n in range(START, END, new):
        text = case.text[:, : n + new].clone()
        text[:, START:] = True
        if mode == "step":
            text[:, :n] = False
        q, k, v, visual, _, prior = (x[:, : n + new] for x in case.tensors)
        outs.append(sar_attn_func(q, k, v, visual, text, prior, weighting=rule, backend="torch", **options)[:, n:])
    return torch.cat(outs, 1)


LENGTHS = {"int": lambda n: n, "tensor": lambda n: torch.full((3,), n, dtype=torch.int32)}


SCORES = {"causal": {}, "window": {"window_size": (20, 0)}, "full": {"causal": False}}
# Every day: each of the scores on each layout, with lengths of each kind; in the interpreter each of them once.
PAIRS = {
    ("causal", "int", "paged"), ("causal", "tensor", "dense"), ("window", "int", "dense"),
    ("window", "tensor", "paged"), ("full", "int", "paged"), ("full", "tensor", "dense"),
}  # fmt: skip
IN_INTERPRETER = {("causal", "tensor", "dense"), ("window", "tensor", "paged"), ("full", "int", "paged")}
ROWS = combinations(
    SCORES,
    LENGTHS,
    ("dense", "paged"),
    ALL,
    daily=lambda *case: case[:-1] in (IN_INTERPRETER if case[-1] == "triton" else PAIRS),
)


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.everyday(layout=["paged"])
@pytest.mark.parametrize(("scores", "kind", "layout", "backend"), ROWS)
def test_rows_over_a_cache(scores, kind, layout, backend):
    case, rule, options = case_of(END), Rows(), SCORES[scores]
    for mode, new in (("running", 1), ("step", 2)):
        if mode == "running" and not options.get("causal", True):
            continue  # the prompt's queries have not seen what came later
        how = {"lengths": LENGTHS[kind], "paged": layout == "paged", "new": new, **options}
        out, _ = steps(sar_attn_with_kvcache, case, rule, backend, mode, **how)
        assert max_error(out, whole(case, rule, mode, new, **options)) <= 2e-5


def test_samples_of_different_lengths():
    """A shorter sample's keys end sooner, whatever lies behind them in the cache."""
    case, rule, lengths = case_of(30), Rows(), torch.tensor([29, 24, 27])
    roles = {"visual_mask": case.visual, "state": None, "decode": "step", "weighting": rule, "return_stats": True}
    out, stats = sar_attn_with_kvcache(
        case.q[:, -1:], case.k, case.v, cache_seqlens=lengths, prior=case.prior, backend="torch", **roles
    )
    for b, n in enumerate(lengths.tolist()):
        k, v, visual, prior = (x[b : b + 1, :n] for x in (case.k, case.v, case.visual, case.prior))
        tensors = (case.q[b : b + 1, -1:], k, v, visual, torch.ones(1, 1, dtype=torch.bool), prior)
        want, found = sar_attn_func(*tensors, weighting=rule, backend="torch", return_stats=True)
        assert max_error(out[b], want[0]) <= 1e-5
        for name, x in found.rows.items():
            assert max_error(stats.rows[name][b], x[0]) <= 1e-5


# What is traced does not know the backend: every day each mode once, and each backend and kind of lengths.
DAILY = {("running", "triton", "tensor"), ("step", "composed", "tensor"), ("prompt", "torch", "int")}
GRAPHS = combinations(("running", "step", "prompt"), ALL, LENGTHS, daily=lambda *case: case in DAILY)


@pytest.mark.everyday(backend=["torch", "composed"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("mode", "backend", "kind"), GRAPHS)
def test_a_step_compiles_in_one_graph(mode, backend, kind):
    case, rule, paged = case_of(END), Rows(), mode == "step"
    compiled = torch.compile(sar_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        (want, eager), (got, state) = (
            steps(step, case, rule, backend, mode, lengths=LENGTHS[kind], paged=paged, new=1)
            for step in (sar_attn_with_kvcache, compiled)
        )
    torch.testing.assert_close(got, want)
    for x, y in zip(state.tensors(), eager.tensors()):
        torch.testing.assert_close(x, y)
