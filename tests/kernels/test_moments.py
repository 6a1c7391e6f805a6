"""The variance in closed form, from second moments, against the fp64 oracle; at lengths that would not choose it."""

import itertools

import pytest
import torch
from kernel_cases import INTERPRETED, Case, assert_relative, assert_same, check_forward, daily, make, reference

from sar_kernels.attention import sar_forward
from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.configs import CLOSED_FORM, KernelConfig
from sar_kernels.dense import plan
from sar_kernels.dense.plan import plan_sar_forward
from sar_kernels.launch import run_all
from sar_kernels.masks import NO_MASKS

BASE = Case(head_dim=16)
TWO = BASE.but(heads=2, kv_heads=1)
TWO_IMAGES = (((3, 20), (30, 61)), ((0, 20),))
CASES = [
    BASE,
    TWO.but(name="fp16", dtype=torch.float16),
    TWO.but(name="bf16", dtype=torch.bfloat16),
    TWO.but(name="fp64", dtype=torch.float64),
    BASE.but(name="d12-mqa", head_dim=12, kv_heads=1),
    TWO.but(name="d24-dv32", head_dim=24, head_dim_v=32, images=(((5, 45),), ((0, 24),))),
    BASE.but(name="d64-gqa7", heads=7, kv_heads=1, head_dim=64, seqlen_q=60, images=(((2, 70),), ((0, 96),))),
    TWO.but(name="few-visual-keys", images=(((5, 7),), ((0, 17),))),
    TWO.but(name="two-visual-keys-one-query", seqlen_q=1, images=(((5, 7),), ((0, 2),))),
    TWO.but(name="short-queries", seqlen_q=17),
    TWO.but(name="one-query", seqlen_q=1, seqlen_k=128),
    TWO.but(name="more-queries-than-keys", seqlen_q=120, seqlen_k=90),
    TWO.but(name="full", causal=False),
    TWO.but(name="padded-left-and-right", padding=((11, 97), (0, 60))),
    TWO.but(name="padding-leaves-few", padding=((35, 97), (0, 90))),
    TWO.but(name="window", window=(80, -1)),
    TWO.but(name="two-images", images=TWO_IMAGES),
    TWO.but(name="text-between-images", images=TWO_IMAGES, text_only_rows=False),
    BASE.but(name="without", images=(((5, 45),), (), ((0, 97),), ((7, 8),))),  # text only, image only, one visual token
]


def forward(inputs, *, closed_form=True, **configs):
    """Outputs of the plan with the closed form, and the sums that it made."""
    call = Call(inputs.q, inputs.k, inputs.v, inputs.options, inputs.masks, closed_form=closed_form, configs=configs)
    outputs, launches = plan_sar_forward(call, *inputs.sav, inputs.weights)
    run_all(launches)
    return outputs, launches[-2].arguments["closed_ptr"]


# Every day sums of several chunks put together, and once one chunk.
CHUNKS = ("fp16", "d24-dv32", "two-visual-keys-one-query", "padded-left-and-right", "text-between-images", "without")
ROWS = [
    pytest.param(*case.values, rows, id=f"{case.values[0]}-{name}", marks=case.marks)
    for rows, name, days in ((plan.MOMENT_ROWS, "one-chunk", ("d12-mqa",)), (64, "chunks", CHUNKS))
    for case in daily(CASES, *days)
]


@pytest.mark.parametrize(("case", "rows"), ROWS)
def test_matches_reference(case, rows, monkeypatch):
    monkeypatch.setattr(plan, "MOMENT_ROWS", rows)
    inputs = make(case)
    outputs, _ = forward(inputs, forward=KernelConfig(32, 32, 4, 1))
    check_forward(inputs, *outputs)


def test_takes_what_it_can_and_leaves_the_rest():
    """Row blocks that see all of V, and no others."""
    images = (((5, 45),), ((0, 1),), (), ((5, 20), (60, 80)))
    inputs = make(BASE.but(images=images, text_only_rows=False))
    (_, _, av, _, _, _), closed = forward(inputs, forward=KernelConfig(32, 32, 4, 1))
    counts = inputs.text.sum(-1).double()[:, None]
    torch.testing.assert_close(closed[0].double() / counts[0], av[0].double(), rtol=1e-5, atol=0)
    assert not closed[1:3].any()
    assert (closed[3] > 0).all()
    assert (closed[3] < 0.9 * counts[3] * av[3]).all()  # text between the images looks for itself


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_equals_the_in_pass_form(dtype):
    inputs = make(BASE.but(dtype=dtype))
    closed, in_pass = forward(inputs)[0], forward(inputs, closed_form=False)[0]
    assert_same(closed[1], in_pass[1])
    for name, a, b in zip(("av", "sa", "c", "count"), closed[2:], in_pass[2:]):
        torch.testing.assert_close(a, b, rtol=1e-5 if INTERPRETED else 2e-3, atol=0, msg=name)


def test_survives_a_common_shift_of_all_keys():
    inputs = make(BASE)
    shift = torch.randn(16)
    inputs.k = inputs.k + shift * (100 * inputs.k.std() / shift.std())
    (_, _, av, *_), closed = forward(inputs)
    assert closed.all()
    assert_relative("av", av, reference(inputs)[1].alignment_variance)


def test_variance_of_nearly_equal_scores():
    inputs = make(BASE)
    inputs.k = 1e-3 * inputs.k + torch.randn(16)
    (_, _, av, *_), closed = forward(inputs)
    assert closed.all()
    assert_relative("av", av, reference(inputs)[1].alignment_variance)


def test_outlier_channels():
    """Channels a hundred times larger than the rest, as models have them, in queries and keys."""
    inputs = make(BASE.but(head_dim=32, images=(((5, 60),), ((0, 50),))))
    inputs.q[..., 3] *= 100
    inputs.k[..., 7] *= 100
    (_, _, av, *_), closed = forward(inputs)
    assert closed.all()
    assert_relative("av", av, reference(inputs)[1].alignment_variance)


def test_products_that_cancel_are_not_trusted():
    """Keys that vary a thousand times more in a direction to which some heads' queries are orthogonal."""
    inputs = make(BASE)
    direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
    inputs.k += 1000 * torch.randn(*inputs.k.shape[:3], 1) * direction
    inputs.q[:, :, :3] -= (inputs.q[:, :, :3] @ direction)[..., None] * direction
    (_, _, av, *_), closed = forward(inputs)
    assert (closed[:, :3] == -1).all()
    assert (closed[:, 3] > 0).all()
    assert_relative("av", av, reference(inputs)[1].alignment_variance)


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_keys_that_no_text_query_sees_need_not_be_finite(value):
    """Text between two images; in the second of them a key that is not finite: its covariance says nothing."""
    inputs = make(BASE.but(images=(((3, 20), (50, 80)), ((0, 33),)), text_only_rows=False))
    inputs.text[0, 50:] = False
    config = {"forward": KernelConfig(32, 32, 4, 1)}
    expected, _ = forward(inputs, **config)
    inputs.k[0, 75] = value
    got, closed = forward(inputs, **config)
    assert (closed[0] == -1).all()
    for a, b in zip(got[2:], expected[2:]):
        torch.testing.assert_close(a, b, rtol=1e-5 if INTERPRETED else 2e-3, atol=1e-7)


def test_halves_in_bfloat16_are_exact_enough():
    """What the compiled kernel multiplies for 16-bit inputs, in PyTorch: the interpreter has no bfloat16.

    The dominant direction is orthogonal to the queries, as far as the limit of cancellation lets it dominate.
    """
    torch.manual_seed(0)
    cancelled = []
    for head_dim, num_keys, num_queries, dominance in itertools.product(
        (64, 128, 256), (300, 4096), (1, 100), (0, 10, 30, 60)
    ):
        normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)
        direction = torch.nn.functional.normalize(normal(head_dim), dim=0)
        keys = normal(num_keys, head_dim) + 100 * normal(head_dim) + dominance * normal(num_keys, 1) * direction
        keys = keys.bfloat16().double()
        exact = keys - keys.mean(0)
        queries = normal(num_queries, head_dim)
        queries = queries - (queries @ direction)[:, None] * direction
        queries = queries.bfloat16().double()
        deviation = exact.float()
        high = deviation.bfloat16().float()
        low = (deviation - high).bfloat16().float()
        covariance = (high.T @ high + high.T @ low + low.T @ high).double()
        second = queries.T @ queries
        want = (queries @ exact.T).square().sum()
        cancelled.append(float((covariance.diag() * second.diag()).sqrt().sum() ** 2 / want))
        if cancelled[-1] <= plan.CANCELLATION:
            assert abs((covariance * second).sum() - want) <= 1e-3 * want, (head_dim, num_keys, num_queries, dominance)
    assert min(cancelled) < plan.CANCELLATION / 8
    assert max(cancelled) > plan.CANCELLATION  # the limit is among them


def test_packed_equals_one_by_one(monkeypatch):
    """Empty sequences, one without an image, one with few visual keys among them; chunks shorter than they are."""
    monkeypatch.setattr(plan, "MOMENT_ROWS", 64)
    lengths, images = (90, 0, 1, 140, 37, 60), ((3, 40), (0, 0), (0, 1), (20, 110), (0, 0), (5, 15))
    total = sum(lengths)
    q, k, v = torch.randn(total, 4, 16), torch.randn(total, 2, 16), torch.randn(total, 2, 16)
    visual, text = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.bool)
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    for (start, end), (first, past) in zip(itertools.pairwise(starts), images):
        visual[start + first : start + past] = True
        text[start + past : end] = True
    prior = torch.rand(total) * visual
    options, weights = AttentionOptions(True, 0.25), WeightOptions(0.02)
    cu = torch.tensor(starts, dtype=torch.int32)
    call = Call(q, k, v, options, NO_MASKS, cu, cu, max(lengths), max(lengths), closed_form=True)
    outputs, launches = plan_sar_forward(call, visual, text, prior, weights)
    run_all(launches)
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        one = [t[None, start:end] for t in (q, k, v, visual, text, prior)]
        expected = sar_forward(*one, options=options, weights=weights)
        torch.testing.assert_close(outputs[0][start:end], expected[0][0], rtol=1e-4, atol=1e-5)
        for got, want in zip(outputs[2:], expected[2:]):
            torch.testing.assert_close(got[i], want[0], rtol=1e-4, atol=1e-6)


def test_is_chosen_by_the_keys_and_never_with_a_soft_cap():
    launches = []
    for length, softcap in ((CLOSED_FORM - 1, 0.0), (CLOSED_FORM, 0.0), (CLOSED_FORM, 30.0)):
        q = torch.empty(1, length, 2, 64, device="meta", dtype=torch.bfloat16)
        mask = torch.empty(1, length, device="meta", dtype=torch.bool)
        call = Call(q, q, q, AttentionOptions(True, 0.125, softcap=softcap), arch="sm_90")
        prior = torch.empty(1, length, device="meta")
        launches.append(plan_sar_forward(call, mask, mask, prior, make(BASE).weights)[1])
    assert [len(x) for x in launches] == [4, 6, 4]
    assert [x[-3].arguments["CLOSED_FORM"] for x in launches] == [False, True, False]


def test_long_sequences_choose_it():
    """The public function at a length that takes the closed form, with few queries to stay small."""
    case = BASE.but(heads=2, kv_heads=1, seqlen_q=9, seqlen_k=CLOSED_FORM, images=(((30, 300),),))
    inputs = make(case)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))
