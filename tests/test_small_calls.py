"""Small dense calls on a CPU run all samples at once: with what results, and when."""

from __future__ import annotations

import pytest
import torch

from sar_fast import flash_attn_func, sar_attn_func
from sar_fast.backends import composed, small, torch_backend
from tests.helpers import BACKENDS, STATISTICS, assert_forward, dtype_id, make_case, relative_error

MODULES = {"composed": composed, "torch": torch_backend}
pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.usefixtures("one_thread")]
WIDE = [torch.float32, torch.float64]
OPTIONS = {
    "causal": {},
    "left": {"padding": "left"},
    "holes": {"padding": "holes"},
    "full": {"causal": False, "padding": "right"},
    "window": {"window_size": (6, -1), "padding": "left"},
    "standardized": {"normalize": "standardize"},
}


@pytest.fixture
def one_by_one(monkeypatch):
    """A size that no call is below."""
    return lambda: monkeypatch.setattr(small, "_SAMPLE", 0)


@pytest.fixture
def kernel_calls(monkeypatch, backend):
    """How often a backend is asked for attention."""
    calls, attention = [], MODULES[backend].attention
    count = lambda seq, **options: calls.append(seq.q.shape) or attention(seq, **options)
    monkeypatch.setattr(MODULES[backend], "attention", count)
    return calls


def test_the_heads_of_all_samples_are_one_call(backend, kernel_calls):
    make_case(20, H=4, padding="left").run(backend)
    assert kernel_calls == [(20, 3 * 4, 32)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(make_case(20, dtype=torch.bfloat16), id="half precision"),
        pytest.param(make_case(300), id="large"),
        pytest.param(make_case(20, attn_mask=torch.ones(1, 1, 20, 20, dtype=torch.bool)), id="dense mask"),
    ],
)
def test_other_calls_run_one_sample_after_the_other(backend, case, kernel_calls):
    if backend == "composed" and "attn_mask" in case.options:
        pytest.skip("has no dense mask")
    case.run(backend)
    assert len(kernel_calls) == 3


def test_calls_that_are_merged_run_one_sample_after_the_other(backend, kernel_calls):
    """Whether exp is a vector's or a scalar's there depends on where in a tensor its argument lies."""
    make_case(9, 20).run(backend)
    assert len(kernel_calls) == 3
    make_case(9, 20, causal=False).run(backend)
    assert len(kernel_calls) == 4


@pytest.mark.parametrize("dtype", WIDE, ids=dtype_id)
@pytest.mark.parametrize(("Sq", "Sk"), [(61, 61), (9, 40), (40, 9), (1, 30)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_after_the_other_gives_the_same(backend, options, Sq, Sk, dtype, one_by_one):
    """The output before weighting bit for bit; statistics come another way."""
    case = make_case(Sq, Sk, H=6, dtype=dtype, **options)
    plain = lambda: flash_attn_func(case.q, case.k, case.v, causal=True, backend=backend)
    (_, stats), together = case.run(backend), plain()
    one_by_one()
    _, expected = assert_forward(case, backend)
    assert torch.equal(together, plain())
    assert torch.equal(stats.query_count, expected.query_count)
    assert torch.equal(stats.lse, expected.lse)
    for name in ("alignment_variance", "semantic_alignment"):
        assert relative_error(getattr(stats, name), getattr(expected, name)) <= 1e-5, name


@pytest.mark.parametrize("dtype", WIDE, ids=dtype_id)
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_a_sample_does_not_depend_on_the_others(backend, padding, dtype, monkeypatch):
    """Nor on how many share a block of scores."""
    case = make_case(61, padding=padding, dtype=dtype)
    out, stats = case.run(backend)
    monkeypatch.setattr(small, "_BLOCK_BYTES", 1)
    for samples in [slice(0, 3), *(slice(b, b + 1) for b in range(3))]:
        alone, own = case.rows(samples).run(backend)
        assert torch.equal(alone, out[samples])
        for name in STATISTICS:
            assert torch.equal(getattr(own, name), getattr(stats, name)[samples]), name


def test_a_batch_without_text_is_plain_attention(backend):
    case = make_case(20)
    out, stats = sar_attn_func(
        *case.tensors[:4], torch.zeros_like(case.text), case.prior, backend=backend, return_stats=True
    )
    assert torch.equal(out, flash_attn_func(case.q, case.k, case.v, causal=True, backend=backend))
    assert torch.equal(stats.head_weights, torch.ones(3, 4))


def test_what_padding_hides_sends_the_samples_one_after_the_other(backend, kernel_calls):
    """A NaN there may have shown in the results, which are then told apart sample by sample."""
    case = make_case(20, padding="left")
    clean, _ = case.run(backend)
    case.v[~case.options["key_padding_mask"]] = torch.nan
    out, _ = case.run(backend)
    torch.testing.assert_close(out, clean)
    assert len(kernel_calls) > 2
