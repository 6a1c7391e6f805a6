"""Row statistics against eager attention in fp64: values, gradients, every layout; what users may get wrong."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from sar_fast.backends import statistics as statistics_module
from sar_fast.row_statistics import row_means, row_statistics
from sar_fast.values import Call, Roles, Scores
from sar_fast.weighting.rows import Entropy, Mass, Rows, RowStatistic, ScoreSum, check_row_statistics

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 0.3


class Peak(RowStatistic):
    """A user's: how much the favourite visual key gets, and nothing of the log-sum-exp's where it is asked first."""

    name = "peak"

    def __call__(self, rows: Rows) -> Tensor:
        return rows.p.amax(-1) * rows.q.square().mean(-1)


def call_of(
    layouts: str = "image two_images text_only one_token",
    Sq: int = 13,
    Sk: int = 13,
    *,
    H: int = 4,
    Hkv: int = 2,
    dtype: torch.dtype = torch.float64,
    padding: bool = False,
    dense_mask: bool = False,
    seed: int = 0,
    **scores,
) -> Call:
    """One sample per layout: keys 0 and 6 are text before and between pictures."""
    g = torch.Generator().manual_seed(seed)
    layouts = layouts.split()
    B, D = len(layouts), 5
    q, k = (
        torch.randn(B, S, heads, D, generator=g, dtype=torch.float64).to(dtype) for S, heads in ((Sq, H), (Sk, Hkv))
    )
    visual, text = torch.zeros(B, Sk, dtype=torch.bool), torch.zeros(B, Sq, dtype=torch.bool)
    for b, layout in enumerate(layouts):
        spans = {"image": [(1, 8)], "two_images": [(1, 6), (7, 9)], "text_only": [], "one_token": [(3, 4)]}[layout]
        for first, end in spans:
            visual[b, first:end] = True
        if spans:  # also the queries between pictures, which see only the first
            text[b] = torch.arange(Sq) + Sk - Sq >= 6
            text[b, : max(0, Sq - Sk)] = True  # older than every key
            text[b, max(0, Sq - Sk) :] &= ~visual[b, max(0, Sk - Sq) :]
    masks = {}
    if padding:
        masks["key_padding_mask"] = torch.rand(B, Sk, generator=g) > 0.25
    if dense_mask:
        masks["attn_mask"] = torch.rand(B, 1, Sq, Sk, generator=g) > 0.4
    prior = visual / visual.sum(-1, keepdim=True).clamp_min(1)
    return Call(q, k, k, Scores(SCALE, **scores), Roles(visual, text, prior), **masks)


def box_of(call: Call) -> Tensor:
    """Some of the keys, visual or not."""
    return torch.rand(call.k.shape[:-2], generator=torch.Generator().manual_seed(5)) < 0.5


def eager_attention(call: Call, b: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (H, Sq, Sk) of sample ``b`` with -inf at hidden keys, and lse (H, Sq), in fp64 with every entry there."""
    q, k = q[b].double(), k[b].double().repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    i, j = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0], torch.arange(k.shape[0])
    left, right = call.scores.window
    sees = (j <= i) if call.scores.causal else torch.ones(q.shape[0], k.shape[0], dtype=torch.bool)
    sees = sees & (j >= i - left) if left >= 0 else sees
    sees = sees & (j <= i + right) if right >= 0 else sees
    if call.key_padding_mask is not None:
        sees = sees & call.key_padding_mask[b]
    if call.attn_mask is not None:
        sees = sees & call.attn_mask[b, 0]
    s = call.scores.scale * torch.einsum("ihd,jhd->hij", q, k)
    if call.scores.softcap:
        s = call.scores.softcap * torch.tanh(s / call.scores.softcap)
    s = s.masked_fill(~sees, -torch.inf)
    dead = ~sees.any(-1)
    lse = torch.logsumexp(s.masked_fill(dead[:, None], 0), -1).masked_fill(dead, -torch.inf)
    return s, lse


def eager(call: Call, q: Tensor, k: Tensor, box: Tensor) -> Tensor:
    """(B, R, H) of ``asked``: written from the definitions, a row at a time."""
    found = []
    for b in range(q.shape[0]):
        s, lse = eager_attention(call, b, q, k)
        sums = []
        for i in range(q.shape[1]):
            seen = call.roles.visual[b] & ~s[0, i].isneginf()
            if not call.roles.text[b, i] or seen.sum() < 2:
                continue
            s_i = s[:, i, seen]
            p = torch.exp(s_i - lse[:, i, None])
            r = p / p.sum(-1, keepdim=True)
            peak = p.amax(-1) * q[b, i].double().square().mean(-1)
            values = [p.sum(-1), p[:, box[b, seen]].sum(-1), -(r * r.log()).sum(-1), s_i.sum(-1), s_i.sum(-1), peak]
            sums.append(torch.stack(values))  # [R, H]
        if not sums:
            found.append(q.new_zeros(len(asked(box)), q.shape[2], dtype=torch.float64))
            continue
        total = torch.stack(sums).sum(0)
        total[3] = sums[-1][3]  # of the last counted query alone
        found.append(total)
    return torch.stack(found)


def asked(box: Tensor) -> tuple[RowStatistic, ...]:
    return Mass(), Mass(box, name="box"), Entropy(), ScoreSum(), ScoreSum(name="all", queries="text"), Peak()


def lse_of(call: Call) -> Tensor:
    """As a backend gives it: (B, H, Sq), in the accumulate dtype."""
    lse = torch.stack([eager_attention(call, b, call.q, call.k)[1] for b in range(call.batch_size)])
    return lse.detach().to(call.accumulate_dtype)


def gradient_of(sums: Tensor) -> Tensor:
    return torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def differentiated(call: Call, statistics, grad: Tensor | None = None, backend: str = "torch"):
    """(sums, dq, dk) for the gradient ``grad`` of the sums."""
    call = dataclasses.replace(call, q=call.q.detach().requires_grad_(), k=call.k.detach().requires_grad_())
    sums = row_statistics(call, lse_of(call), statistics, backend, differentiable=True)
    grad = (
        torch.randn(sums.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if grad is None
        else grad
    )
    sums.backward(grad.to(sums.dtype))
    return sums.detach(), call.q.grad, call.k.grad


def eagerly_differentiated(call: Call, box: Tensor):
    q, k = (x.detach().double().requires_grad_() for x in (call.q, call.k))
    sums = eager(call, q, k, box)
    dq, dk = torch.autograd.grad(sums, (q, k), gradient_of(sums))
    return sums.detach(), dq, dk


def packed(call: Call, lse: Tensor) -> tuple[Call, Tensor]:
    """The same samples one after another."""
    B, Sq, Sk = call.batch_size, call.q.shape[1], call.k.shape[1]
    ends = [torch.arange(B + 1, dtype=torch.int32) * S for S in (Sq, Sk)]
    q, k, *roles = (x.flatten(0, 1) for x in (call.q, call.k, *call.roles))
    flat = Call(q, k, k, call.scores, Roles(*roles), None, None, *ends, (Sq, Sk))
    return flat, lse.transpose(0, 1).flatten(1)


PATTERNS = {
    "causal": {},
    "all see all": {"causal": False},
    "one head each": {"H": 3, "Hkv": 3},
    "one kv head": {"H": 6, "Hkv": 1},
    "padded": {"padding": True},
    "dense mask": {"dense_mask": True, "causal": False},
    "window": {"window": (6, -1)},
    "window to both sides": {"window": (7, 2), "causal": False},
    "softcap": {"softcap": 0.7},
    "softcap, padded, window": {"softcap": 0.7, "padding": True, "window": (8, -1)},
    "fewer queries": {"Sq": 5},
    "one query": {"Sq": 1},
    "more queries": {"Sq": 17},
}
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
    means = row_means(sums, count, statistics)
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


# compiled


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operator_arguments(pattern: str) -> list:
    call = call_of("image two_images", dtype=torch.float32, padding=pattern == "padded", dense_mask=pattern == "masked")
    lse, statistics = lse_of(call), asked(box_of(call))
    operator_arguments.held = statistics
    if pattern == "packed":
        call, lse = packed(call, lse)
        operator_arguments.held = statistics = asked(box_of(call).flatten())
    masks = (call.key_padding_mask, call.attn_mask, call.cu_seqlens_q, call.cu_seqlens_k)
    tensors = [[t for s in statistics for t in s.tensors], [len(s.tensors) for s in statistics]]
    scores = (SCALE, True, -1, -1, 0.0, *call.max_seqlens)
    return [call.q, call.k, lse, *call.roles[:2], *masks, *tensors, [s._id for s in statistics], *scores]


@pytest.mark.parametrize("pattern", ["dense", "padded", "masked", "packed"])
def test_opcheck(pattern):
    arguments = operator_arguments(pattern)
    torch.library.opcheck(torch.ops.sar_fast.row_statistics, (*arguments, "torch", True))
    sums = torch.ops.sar_fast.row_statistics(*arguments, "torch", True)
    torch.library.opcheck(torch.ops.sar_fast.row_statistics_backward, (torch.randn_like(sums), *arguments))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph(dynamic):
    """Forward and backward; the same mask twice, and a statistic that holds none."""
    call = call_of("image two_images", dtype=torch.float32)
    box = box_of(call)
    statistics = (Mass(box, name="a"), Mass(box, name="b", queries="last"), Entropy(), Peak())

    def f(q, k, lse, visual, text):
        moved = Call(q * 1.0, k, k, Scores(SCALE), Roles(visual, text, visual))
        return row_statistics(moved, lse, statistics, "torch", differentiable=True).sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for run in (f, compiled):
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k)]
        out = run(*leaves, lse_of(call), *call.roles[:2])
        out.sum().backward()
        results.append((out.detach(), *(x.grad for x in leaves)))
    for eager_result, got in zip(*results):
        torch.testing.assert_close(got, eager_result)


@pytest.mark.usefixtures("fresh_compiler")
def test_new_keys_are_no_new_graph():
    call = call_of("image two_images", dtype=torch.float32)
    mass, lse = Mass(box_of(call)), lse_of(call)
    counter = CompileCounterWithBackend("eager")

    def f(q, k, lse):
        return row_statistics(dataclasses.replace(call, q=q, k=k), lse, (mass,), "torch", differentiable=False)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    first = compiled(call.q, call.k, lse)
    mass.keys = ~mass.keys
    second = compiled(call.q, call.k, lse)
    assert torch.equal(second, f(call.q, call.k, lse))
    assert not torch.equal(first, second)
    assert counter.frame_count == 1


class Quiet(TorchDispatchMode):
    """Sees every operator, as modes that count or checkpoint do, and runs it below autograd."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("below", [Quiet, torch._C._AutoDispatchBelowAutograd])
def test_gradients_where_operators_run_below_autograd(below):
    arguments = operator_arguments("dense")
    grad = torch.ones(2, 6, 4)
    expected = torch.ops.sar_fast.row_statistics_backward(grad, *arguments)
    with below():
        got = torch.ops.sar_fast.row_statistics_backward(grad, *arguments)
    assert expected[0].any()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_inference_mode():
    call = call_of("image")
    lse, box = lse_of(call), box_of(call)
    expected = row_statistics(call, lse, asked(box), "torch", differentiable=False)
    with torch.inference_mode():
        assert torch.equal(row_statistics(call, lse, asked(box), "torch", differentiable=True), expected)
        with pytest.raises(RuntimeError, match="where autograd does not record"):
            torch.ops.sar_fast.row_statistics_backward(torch.ones(2, 6, 4), *operator_arguments("dense"))


# in the kernels


@pytest.fixture
def kernel_calls(monkeypatch):
    """The priors that the kernels were given, a call each."""
    from sar_kernels import attention

    given, statistics = [], attention.attention_statistics

    def counted(q, k, lse, visual, text, prior, **options):
        given.append(prior)
        return statistics(q, k, lse, visual, text, prior, **options)

    monkeypatch.setattr(attention, "attention_statistics", counted)
    return given


def small(**options) -> Call:
    """For the interpreter: D must be padded, T and V cross a tile's edge."""
    return call_of("image two_images text_only one_token", **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("pattern", ["causal", "padded", "window", "softcap", "fewer queries", "packed"])
def test_mass_in_the_kernels(pattern, kernel_calls):
    call = small(**PATTERNS.get(pattern, {}))
    lse, box = lse_of(call), box_of(call)
    if pattern == "packed":
        (call, lse), box = packed(call, lse), box.flatten()
    statistics = (Mass(), Mass(box, name="box"), Mass(box, name="last", queries="last"), Entropy())
    expected = row_statistics(call, lse, statistics, "torch", differentiable=False)
    assert not kernel_calls
    got = row_statistics(call, lse, statistics, "triton", differentiable=False)
    assert len(kernel_calls) == 2
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got[2:], torch.zeros_like(got[2:]))


def test_mass_in_the_kernels_has_its_gradients(kernel_calls):
    call = small()
    statistics = (Mass(box_of(call)), Entropy())
    for a, b in zip(differentiated(call, statistics, backend="triton"), differentiated(call, statistics)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(kernel_calls) == 1


def test_only_the_library_s_own_mass_runs_in_the_kernels(kernel_calls):
    class Squared(Mass):
        def __call__(self, rows, *tensors):
            return super().__call__(rows, *tensors) ** 2

    class Named(Mass):
        pass

    call = small()
    row_statistics(call, lse_of(call), (Squared(),), "triton", differentiable=False)
    assert not kernel_calls
    row_statistics(call, lse_of(call), (Named(),), "triton", differentiable=False)
    assert len(kernel_calls) == 1
    masked = small(dense_mask=True)
    row_statistics(masked, lse_of(masked), (Mass(),), "triton", differentiable=False)
    assert len(kernel_calls) == 1


def test_keys_of_the_prompt_in_the_kernels(kernel_calls):
    call = small(Sq=2)
    box = box_of(call)[:, :7]
    run = lambda backend: row_statistics(call, lse_of(call), (Mass(box),), backend, differentiable=False)
    torch.testing.assert_close(run("triton"), run("torch"), rtol=1e-5, atol=1e-6)
    assert kernel_calls[0].shape == (4, 13)


# errors


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        (Mass(), TypeError, "row_statistics must be a tuple of RowStatistic; got Mass"),
        ((Mass,), TypeError, "row_statistics must be instances of RowStatistic; got Mass"),
        ((len,), TypeError, "got builtin_function_or_method"),
        ((Mass(), Mass()), ValueError, "names that differ; got 'mass' twice"),
        ((Mass(name=""),), TypeError, "Mass.name must be a text; got ''"),
        ((RowStatistic(),), TypeError, "RowStatistic.name must be a text; got None"),
        ((Mass(queries="first"),), ValueError, "queries of 'mass' must be 'text' or 'last'; got 'first'"),
    ],
)
def test_statistics_that_are_none(statistics, error, message):
    with pytest.raises(error, match=message):
        check_row_statistics(statistics)
    call = call_of("image")
    with pytest.raises(error, match=message):
        row_statistics(call, lse_of(call), statistics, "torch", differentiable=False)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ([True], TypeError, "keys must be a bool tensor or None; got list"),
        (torch.ones(1, 13), TypeError, "keys must be bool; got torch.float32"),
        (torch.ones(1, 1, 13, dtype=torch.bool), ValueError, r"keys must have shape .*; got \(1, 1, 13\)"),
    ],
)
def test_keys_that_are_no_mask(keys, error, message):
    with pytest.raises(error, match=message):
        Mass(keys)
    mass = Mass()
    with pytest.raises(error, match=message):
        mass.keys = keys


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(1, 13), (2, 14), (13,), (26,)], ids=str)
def test_keys_that_do_not_fit(shape, backend):
    call = call_of("image two_images", dtype=torch.float32)
    lse, mass = lse_of(call), Mass(torch.ones(shape, dtype=torch.bool), name="box")
    with pytest.raises(ValueError, match=r"keys of 'box' must have shape \(2, at most 13\); got"):
        row_statistics(call, lse, (mass,), backend, differentiable=False)
    if shape != (26,):
        with pytest.raises(ValueError, match=r"keys of 'box' must have shape \(26,\); got"):
            row_statistics(*packed(call, lse), (mass,), backend, differentiable=False)


def returning(value) -> RowStatistic:
    class Given(RowStatistic):
        name = "given"

        def __call__(self, rows):
            return value(rows)

    return Given()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (lambda rows: 1.0, TypeError, "row statistic 'given' must return a floating point tensor; got float"),
        (lambda rows: rows.keys, TypeError, "must return a floating point tensor; got torch.int64"),
        (lambda rows: rows.p, ValueError, r"must return shape \(2, 5\), \(heads, queries\); got \(2, 5, 7\)"),
        (lambda rows: rows.p.sum((-1, -2)), ValueError, r"must return shape \(2, 5\)"),
    ],
)
def test_results_that_are_none(value, error, message):
    call, statistic = call_of("image"), returning(value)
    with pytest.raises(error, match=message):
        row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=False)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_parameters_of_a_statistic_would_get_no_gradient(differentiable):
    gain = torch.nn.Parameter(torch.ones(()).double())
    call, statistic = call_of("image"), returning(lambda rows: rows.p.sum(-1) * gain)
    call.q.requires_grad_()
    with pytest.raises(TypeError, match="'given' must have no parameters of its own"):
        row_statistics(call, lse_of(call), (statistic,), "torch", differentiable=differentiable)
    lse = lse_of(call)
    f = lambda q: row_statistics(
        dataclasses.replace(call, q=q), lse, (statistic,), "torch", differentiable=differentiable
    )
    with pytest.raises(TypeError, match="'given' must have no parameters of its own"):
        torch.compile(f, backend="aot_eager")(call.q)
    with torch.no_grad():
        sums = row_statistics(call, lse, (statistic,), "torch", differentiable=differentiable)
    assert torch.equal(sums, row_statistics(call, lse_of(call), (Mass(),), "torch", differentiable=False))


def test_calls_that_have_no_rows():
    call = call_of("image")
    lse = lse_of(call)
    with pytest.raises(ValueError, match="row_statistics must be asked of a call with roles"):
        row_statistics(dataclasses.replace(call, roles=None), lse, (Mass(),), "torch", differentiable=False)
    for wrong in (lse[..., :-1], lse.transpose(1, 2), lse.float()):
        with pytest.raises(ValueError, match=r"lse must be torch.float64 of shape \(1, 4, 13\); got"):
            row_statistics(call, wrong, (Mass(),), "torch", differentiable=False)
    with pytest.raises(NotImplementedError, match="Nothing must define __call__"):
        row_statistics(call, lse, (type("Nothing", (RowStatistic,), {"name": "x"})(),), "torch", differentiable=False)


def test_a_statistic_that_is_gone_is_named():
    arguments = operator_arguments("dense")
    operator_arguments.held = None
    gc.collect()
    with pytest.raises(RuntimeError, match=r"row statistic 'Mass \d+' is gone"):
        torch.ops.sar_fast.row_statistics(*arguments, "torch", False)
