"""Row statistics against eager attention in fp64: values and gradients in every layout."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch

from sar_fast.attention.row_statistics import join_rows, row_statistics, row_sums
from sar_fast.backends import statistics as statistics_module
from sar_fast.method.values import Call, Roles, Statistics
from sar_fast.method.weighting.rows import Entropy, Mass, ScoreSum
from tests.weighting.row_cases import (
    PATTERNS,
    SCALE,
    asked,
    box_of,
    call_of,
    differentiated,
    eager,
    eagerly_differentiated,
    gradient_of,
    lse_of,
    packed,
)

pytestmark = pytest.mark.usefixtures("one_thread")
every_pattern = pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)


@every_pattern
def test_values_and_gradients(options):
    call = call_of(**options)
    box = box_of(call)
    expected = eagerly_differentiated(call, box)
    got = differentiated(call, asked(box))
    assert expected[0].abs().sum((1, 2))[:2].all(), "the samples with pictures must count"
    for name, a, b in zip(("sums", "dq", "dk"), got, expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    without_count = expected[0][2:]
    assert torch.equal(got[0][2:], torch.zeros_like(without_count))


@pytest.mark.parametrize("options", [{}, {"dense_mask": True}, {"softcap": 0.7, "window": (50, -1)}], ids=str)
def test_many_blocks_are_one(options, monkeypatch):
    call = call_of("image", Sq=60, Sk=60, **options)
    box = box_of(call)
    whole = differentiated(call, asked(box))
    monkeypatch.setitem(statistics_module._BLOCK_BYTES, "cpu", 1)
    seen = []

    class Watching(Mass):
        def __call__(self, rows, *tensors):
            seen.append(tuple(rows.scores.shape))
            return super().__call__(rows, *tensors)

    blocks = differentiated(call, (Watching(), *asked(box)[1:]))
    for a, b in zip(blocks, whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(seen) > 2
    assert max(shape[1] for shape in seen) <= 16


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}, {"dense_mask": True}, {"padding": True, "Sq": 9}], ids=str)
def test_gradcheck(options):
    """Finite differences move the log-sum-exp too."""
    call = call_of("image two_images", H=2, Hkv=1, **options)
    box = box_of(call)
    statistics = asked(box)

    def f(q, k):
        moved = dataclasses.replace(call, q=q, k=k)
        return row_statistics(moved, lse_of(moved), statistics, "torch", differentiable=True)

    leaves = [x.clone().requires_grad_() for x in (call.q, call.k)]
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_summed_in_fp32(dtype):
    call = call_of(dtype=dtype, padding=True)
    box = box_of(call)
    sums, dq, dk = differentiated(call, asked(box))
    expected = eagerly_differentiated(call, box)
    assert (sums.dtype, dq.dtype, dk.dtype) == (torch.float32, dtype, dtype)
    torch.testing.assert_close(sums.double(), expected[0], rtol=2e-6, atol=2e-6)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(dq.double(), expected[1], rtol=rounding, atol=1e-5)
    torch.testing.assert_close(dk.double(), expected[2], rtol=rounding, atol=1e-5)


def test_packed_sequences_equal_samples():
    """Sequences of a packed call, whose keys are aligned to all of them."""
    call = call_of(Sq=9)
    box, lse = box_of(call), lse_of(call)
    flat, flat_lse = packed(call, lse)
    statistics = asked(box.flatten())
    leaves = [x.requires_grad_() for x in (flat.q.clone(), flat.k.clone())]
    flat = dataclasses.replace(flat, q=leaves[0], k=leaves[1])
    got = row_statistics(flat, flat_lse, statistics, "torch", differentiable=True)
    sums, dq, dk = differentiated(call, asked(box))
    assert torch.equal(got, sums)
    got.backward(gradient_of(sums))
    torch.testing.assert_close(leaves[0].grad, dq.flatten(0, 1))
    torch.testing.assert_close(leaves[1].grad, dk.flatten(0, 1))


def test_no_sequences_and_no_queries():
    for call in (call_of("image"), call_of("image", Sq=0)):
        rows = slice(0, 0 if call.q.shape[1] else 1)
        roles = Roles(*(x[rows] for x in call.roles))
        call = dataclasses.replace(call, q=call.q[rows], k=call.k[rows], v=call.v[rows], roles=roles)
        lse = call.q.new_zeros(call.lse_shape)
        sums = row_statistics(call, lse, (Mass(), ScoreSum()), "torch", differentiable=False)
        assert torch.equal(sums, sums.new_zeros(call.batch_size, 2, 4))


def text_that_draws_all(call: Call) -> Call:
    """A text key so close to every query that what is left for pictures underflows in fp32."""
    q, k = call.q.clone(), call.k.clone()
    q[..., 0], k[..., 0], k[:, 0, :, 0] = 30.0, 0.0, 30.0
    return dataclasses.replace(call, q=q, k=k)


def test_entropy_where_the_mass_underflows():
    call = text_that_draws_all(call_of("image", dtype=torch.float32))
    got = row_statistics(call, lse_of(call), (Mass(), Entropy()), "torch", differentiable=False)
    expected = eager(call, call.q, call.k, box_of(call))
    assert (got[:, 0] == 0).all()
    assert (expected[:, 0] > 0).all(), "fp64 must tell it from 0"
    torch.testing.assert_close(got[:, 1].double(), expected[:, 2], rtol=1e-5, atol=1e-6)
    _, dq, dk = differentiated(call, (Entropy(),), torch.ones(1, 1, 4))
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_entropy_when_all_keys_are_shifted(shift):
    """In fp32 a common vector must cost no digits, as with AV."""
    call = call_of("image two_images", dtype=torch.float32)
    call.k += shift * torch.randn(5, generator=torch.Generator().manual_seed(1))
    got = row_statistics(call, lse_of(call), (Entropy(),), "torch", differentiable=False)
    expected = eager(call, call.q, call.k, box_of(call))[:, 2:3]
    torch.testing.assert_close(got.double(), expected, rtol=5e-7, atol=0)


def test_entropy_of_equal_scores_is_the_logarithm_of_their_number():
    call = call_of("image")
    call.k[:] = call.k[:, :1]
    got = row_statistics(call, lse_of(call), (Entropy(),), "torch", differentiable=False)
    count = call.roles.text.sum()
    torch.testing.assert_close(got, (torch.tensor(7.0).double().log() * count).expand(1, 1, 4))


class Recorded(ScoreSum):
    """Keeps the rows that it was given."""

    def __call__(self, rows):
        object.__setattr__(self, "rows", rows)
        return super().__call__(rows)


@pytest.mark.parametrize(("options", "closed"), [({}, True), ({"softcap": 0.7}, False), ({"dense_mask": True}, False)])
def test_score_sum_in_closed_form_makes_no_scores(options, closed):
    call = call_of("two_images", H=2, Hkv=1, **options)
    statistic = Recorded()
    row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=False)
    assert ("scores" not in vars(statistic.rows)) == closed
    assert statistic.rows.q.shape[1] == 1, "the last query alone, though earlier ones see less"


def test_what_a_statistic_is_told_of_its_rows():
    call = call_of("text_only image", Sq=5, H=4, Hkv=2)
    statistic = Recorded(queries="text")
    row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=False)
    rows = statistic.rows
    assert (rows.sample, list(rows.heads), rows.first_key) == (1, [2, 3], 0)
    assert torch.equal(rows.keys, call.roles.visual[1].nonzero()[:, 0])
    assert torch.equal(rows.queries, call.roles.text[1].nonzero()[:, 0])
    flat, lse = packed(call, lse_of(call))
    row_statistics(flat, lse, (statistic,), "torch", differentiable=False)
    assert (statistic.rows.sample, statistic.rows.first_key) == (1, 13)
    torch.testing.assert_close(statistic.rows.p, rows.p)
    torch.testing.assert_close(statistic.rows.scores, SCALE * rows.q @ rows.k.T)


def test_keys_of_the_prompt_serve_decode():
    """A mask that ends before the keys do leaves out what was added."""
    call = call_of("image two_images", Sq=2)
    box = box_of(call)
    box[:, 7:] = False
    whole = row_statistics(call, lse_of(call), (Mass(box),), "torch", differentiable=False)
    prompt = row_statistics(call, lse_of(call), (Mass(box[:, :7]),), "torch", differentiable=False)
    none = row_statistics(call, lse_of(call), (Mass(box[:, :0]),), "torch", differentiable=False)
    assert torch.equal(prompt, whole)
    assert whole.all()
    assert not none.any()


def test_gradients_are_of_the_keys_that_the_forward_had():
    """Keys may be replaced for the next batch before this one's backward."""
    call = call_of("image two_images")
    box, other = box_of(call), ~box_of(call)
    grad = torch.ones(2, 1, 4, dtype=torch.float64)
    _, dq, _ = differentiated(call, (Mass(box),), grad)
    mass = Mass(box)
    call = dataclasses.replace(call, q=call.q.requires_grad_())
    sums = row_statistics(call, lse_of(call), (mass,), "torch", differentiable=True)
    mass.keys = other
    sums.backward(grad)
    assert torch.equal(call.q.grad, dq)


def test_a_statistic_lives_until_its_backward():
    call = call_of("image")
    call.q.requires_grad_()
    sums = row_statistics(call, lse_of(call), (Mass(box_of(call)), Entropy()), "torch", differentiable=True)
    gc.collect()
    sums.sum().backward()
    assert call.q.grad.any()


def test_gradients_flow_only_where_they_are_asked_for():
    call = call_of("image")
    call.q.requires_grad_()
    assert not row_statistics(call, lse_of(call), (Mass(),), "torch", differentiable=False).requires_grad
    with torch.no_grad():
        assert not row_statistics(call, lse_of(call), (Mass(),), "torch", differentiable=True).requires_grad


def test_a_second_derivative_is_an_error():
    call = call_of("image")
    call.q.requires_grad_()
    sums = row_statistics(call, lse_of(call), (Mass(),), "torch", differentiable=True)
    (grad,) = torch.autograd.grad(sums.square().sum(), call.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("statistic", [Mass(torch.ones(1, 13, dtype=torch.bool)), Entropy(), ScoreSum()], ids=repr)
def test_copies_are_statistics_of_their_own(again, statistic):
    other = again(statistic)
    assert other._id != statistic._id
    assert (other.name, other.queries) == (statistic.name, statistic.queries)
    call = call_of("image")
    run = lambda x: row_statistics(call, lse_of(call), (x,), "torch", differentiable=False)
    assert torch.equal(run(other), run(statistic))


def test_autocast_does_not_round():
    call = call_of("image", dtype=torch.float32)
    box, lse = box_of(call), lse_of(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = row_statistics(call, lse, asked(box), "torch", differentiable=False)
    assert torch.equal(got, row_statistics(call, lse, asked(box), "torch", differentiable=False))


def test_means():
    call = call_of()
    statistics = asked(box_of(call))
    sums = row_statistics(call, lse_of(call), statistics, "torch", differentiable=False)
    count = torch.tensor([5.0, 4.0, 0.0, 0.0]).double()
    found = join_rows(Statistics(sums[:, 0], sums[:, 0], count), sums, statistics, None)
    means = found.rows
    torch.testing.assert_close(row_sums(found, statistics), sums)
    assert list(means) == ["mass", "box", "entropy", "score_sum", "all", "peak"]
    assert torch.equal(means["mass"][:2], sums[:2, 0] / count[:2, None])
    assert torch.equal(means["score_sum"], sums[:, 3])
    assert not any(mean[2:].any() for mean in means.values())


# what a mask hides need not be finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_hidden_numbers_that_are_not_finite_show_nowhere(bad):
    """A padded visual key; a visual key and a query that no counted query sees."""
    call = call_of("two_images two_images", causal=True)
    call.roles.text[1, 9:] = False  # sample 1: only query 6 counts, and sees the first picture alone
    call.key_padding_mask = torch.ones(2, 13, dtype=torch.bool)
    call.key_padding_mask[0, 2] = False
    clean = differentiated(call, asked(box_of(call)))
    call.k[0, 2, 0], call.k[1, 8, 0], call.q[1, 12, 3] = bad, bad, bad
    got = differentiated(call, asked(box_of(call)))
    for a, b in zip(got, clean):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["q", "k"])
def test_numbers_that_are_not_finite_show_where_they_are_seen(where):
    call = call_of("image image")
    box = box_of(call)
    clean = differentiated(call, asked(box))
    getattr(call, where)[0, 9 if where == "q" else 3, 0] = torch.nan
    sums, dq, dk = differentiated(call, asked(box))
    text_only = [0, 1, 2, 4, 5]  # the last query sees a NaN key, not the NaN query
    assert sums[0, text_only, 0].isnan().all()
    assert torch.equal(sums[0, 3, 0].isnan(), torch.tensor(where == "k"))
    assert dq[0, 9, 0].isnan().any()
    assert torch.equal(sums[1], clean[0][1])
    assert torch.equal(dq[1], clean[1][1])
    assert torch.equal(dk[1], clean[2][1])


@pytest.mark.parametrize("options", [{}, {"softcap": 0.7}], ids=str)
def test_a_query_that_is_not_finite_reaches_no_key_that_it_does_not_see(options):
    """A counted query between two pictures, in the gradients of the keys behind it."""
    call = call_of("two_images", **options)
    call.q[0, 6, :, 0] = torch.nan
    for statistic in asked(box_of(call)):
        _, _, dk = differentiated(call, (statistic,), torch.ones(1, 1, 4))
        assert dk[0, 7:].isfinite().all(), statistic
        assert statistic.queries == "last" or statistic.name == "all" or dk[0, 1:6].isnan().any(), statistic
    recorded = Recorded(queries="text")
    row_statistics(call, lse_of(call), (recorded,), "torch", differentiable=False)
    assert recorded.rows.p[:, 0, :5].isnan().all()
    assert not recorded.rows.p[:, 0, 5:].any(), "0 where it sees none"
