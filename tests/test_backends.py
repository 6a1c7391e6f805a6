"""The PyTorch backends against the fp64 oracle, by the exactness rules of docs/method.md, section 5."""

from __future__ import annotations

import itertools

import pytest
import torch

from sar_fast import flash_attn_func, sar_attn_func
from sar_fast.attention.functional import plain_attention
from sar_fast.method.values import Call, Scores
from tests.helpers import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    assert_forward,
    assert_gradients,
    assert_output,
    assert_statistics,
    dtype_id,
    gradients,
    make_case,
    max_error,
    relative_error,
)

pytestmark = [pytest.mark.parametrize("backend", BACKENDS), pytest.mark.usefixtures("one_thread")]

SIZES = (1, 3, 17, 64, 97, 128, 200)
HEADS = ((2, 2), (4, 2), (7, 1), (14, 2))
PADDINGS = ("none", "left", "right", "holes")
# every size with every dtype; heads, head dims and paddings take turns so that each meets each dtype
GRID = [
    pytest.param(
        S, dtype, HEADS[(i + j) % 4], D, Dv, PADDINGS[(i + 3 * j) % 4], id=f"S{S}-{dtype_id(dtype)}-D{D}-Dv{Dv}"
    )
    for i, (S, (D, Dv)) in enumerate(
        zip(SIZES, ((64, 64), (96, 96), (256, 256), (80, 80), (32, 48), (128, 128), (80, 64)))
    )
    for j, dtype in enumerate(DTYPES)
]


@pytest.fixture(params=["small", "large"])
def either_way(request, monkeypatch):
    """Statistics as small calls get them, and as large ones do."""
    if request.param == "large":
        monkeypatch.setattr("sar_fast.backends.small._SAMPLE", 0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(("S", "dtype", "heads", "D", "Dv", "padding"), GRID)
def test_output_and_statistics(backend, S, dtype, heads, D, Dv, padding):
    assert_forward(make_case(S, H=heads[0], Hkv=heads[1], D=D, Dv=Dv, dtype=dtype, padding=padding), backend)


@pytest.mark.everyday(sav_grad=[True])
@pytest.mark.everyday(dtype=[torch.float32])
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize(("S", "dtype", "heads", "D", "Dv", "padding"), GRID[4:20])
def test_gradients(backend, S, dtype, heads, D, Dv, padding, sav_grad):
    case = make_case(S, H=heads[0], Hkv=heads[1], D=D, Dv=Dv, dtype=dtype, padding=padding)
    assert_gradients(case, backend, sav_grad=sav_grad)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("S", "heads", "D", "padding", "dtype"),
    itertools.product((3, 17, 97, 200), HEADS, (32, 80, 128, 256), ("left", "holes"), DTYPES),
    ids=lambda x: dtype_id(x) if isinstance(x, torch.dtype) else str(x),
)
def test_full_grid(backend, S, heads, D, padding, dtype):
    case = make_case(S, H=heads[0], Hkv=heads[1], D=D, dtype=dtype, padding=padding)
    assert_forward(case, backend)
    if dtype in (torch.float16, torch.bfloat16):
        # delta = dout . out takes the output as it was rounded, in every flash backward: a few rows under very uneven
        # weights leave no room for that error to average out
        if S < 17:
            return
        case.options["beta"] *= 4
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.everyday(S=[17], D=[80])
@pytest.mark.everyday(S=[97])
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize(
    ("S", "D", "padding"),
    [(17, 80, "left"), (17, 128, "left"), (97, 128, "left"), (17, 128, "holes"), (180, 128, "left"), (400, 64, "none")],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_alignment_does_not_inherit_the_rounding_of_the_log_sum_exp(backend, S, D, padding, seed):
    """With few text rows and very uneven weights, 1e-6 in SA from exp(s - lse) breaks the output rule in fp32."""
    case = make_case(S, H=14, D=D, padding=padding, seed=seed)
    _, stats = assert_forward(case, backend)
    _, oracle = case.to(torch.float64).reference()
    assert relative_error(stats.semantic_alignment, oracle.semantic_alignment) <= 4e-7


@pytest.mark.everyday(seed=[0])
@pytest.mark.parametrize("seed", [0, 1])
def test_alignment_of_many_rows_with_a_large_log_sum_exp(backend, seed):
    """Its rounding does not average out."""
    case = make_case(400, H=14, D=64, seed=seed, layouts=("image", "two_images"))
    case.q *= 3
    _, stats = case.run(backend)
    _, oracle = case.to(torch.float64).reference()
    assert relative_error(stats.semantic_alignment, oracle.semantic_alignment) <= 4e-7


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_variance_of_two_keys_that_a_query_hardly_tells_apart(backend, dtype):
    """``q^T C q`` with a singular C loses the square of the digits that ``q.(k_1 - k_2)`` loses."""
    case = make_case(3, H=14, D=128, dtype=torch.float64, layouts=("two_images",))
    case.q = case.q - 0.97 * _along(case.q, (case.k[:, 0] - case.k[:, 1]).repeat_interleave(7, 1)[:, None])
    case = case.to(dtype)
    _, stats = case.run(backend)
    _, oracle = case.to(torch.float64).reference()
    assert oracle.query_count.item() == 1
    assert relative_error(stats.alignment_variance, oracle.alignment_variance) <= 1e-3


def _along(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """The part of x along a direction."""
    unit = torch.nn.functional.normalize(direction, dim=-1)
    return (x * unit).sum(-1, keepdim=True) * unit


@pytest.mark.everyday(dtype=[torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("Sq", "Sk"), [(5, 33), (33, 5), (1, 40), (40, 1), (64, 65)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_queries_and_keys_of_different_length(backend, Sq, Sk, causal, dtype):
    """Causal is aligned bottom-right; queries older than every key see nothing."""
    case = make_case(Sq, Sk, dtype=dtype, causal=causal, beta=0.05)
    out, stats = assert_forward(case, backend)
    if causal and Sq > Sk:
        assert not out[:, : Sq - Sk].any()
        assert (stats.lse[..., : Sq - Sk] == -torch.inf).all()
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "standardize", "beta": 0.7},
        {"protect_first_head": False},
        {"softmax_scale": 0.4},
        {"causal": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
def test_options_of_every_backend(backend, options, dtype):
    case = make_case(45, H=6, padding="left", dtype=dtype, **options)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("Sq", [40, 12])
def test_plain_attention_of_the_backend(backend, Sq, dtype):
    """With beta infinite and no protected head every weight is 1: no error of the weights hides one of the output."""
    case = make_case(Sq, 40, dtype=dtype, padding="holes", beta=float("inf"), protect_first_head=False)
    _, stats = assert_forward(case, backend)
    assert relative_error(stats.head_weights, torch.ones_like(stats.head_weights)) < 1e-6
    assert_gradients(case, backend, sav_grad=False)


@pytest.mark.parametrize("beta", [1e30, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("H", [4, 7])
def test_huge_beta_without_protection_is_plain_attention(backend, beta, dtype, H):
    case = make_case(40, H=H, Hkv=1, dtype=dtype, beta=beta, protect_first_head=False)
    out, _stats = case.run(backend)
    plain = flash_attn_func(case.q, case.k, case.v, causal=True, backend=backend)
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.usefixtures("all_threads")
def test_text_only_rows_are_plain_attention_bit_for_bit(backend, dtype, padding):
    case = make_case(50, H=7, Hkv=1, dtype=dtype, padding=padding)
    scores = Scores(case.q.shape[-1] ** -0.5)
    padding_mask = case.options.get("key_padding_mask")
    plain, _ = plain_attention(Call(case.q, case.k, case.v, scores, key_padding_mask=padding_mask), backend=backend)
    out, stats = case.run(backend)
    text_row = LAYOUTS.index("text_only")
    assert torch.equal(out[text_row], plain[text_row])
    assert torch.equal(stats.head_weights[text_row], torch.ones(7))
    assert not torch.equal(out[0], plain[0])
    alone, _ = case.rows(slice(text_row, text_row + 1)).run(backend)
    assert torch.equal(alone[0], out[text_row])


@pytest.mark.usefixtures("all_threads")
def test_a_batch_equals_its_samples(backend):
    case = make_case(61, padding="holes", dtype=torch.bfloat16)
    out, stats = case.run(backend)
    for b in range(len(LAYOUTS)):
        single, single_stats = case.rows(slice(b, b + 1)).run(backend)
        assert torch.equal(single[0], out[b])
        assert torch.equal(single_stats.head_weights[0], stats.head_weights[b])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("window", [False, True], ids=["closed form", "masked rows"])
def test_statistics_survive_a_common_shift_of_the_keys(backend, dtype, window):
    """A shift 100 times the spread of the keys; a sum-of-squares variance loses every digit."""
    case = make_case(120, D=32, dtype=torch.float64, layouts=("image", "two_images"))
    shift = torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    case.k = case.k + 100 * case.k.std() * shift / shift.std()
    if window:  # some text queries see a part of the image only
        case.text[:, 30:] = True
    case = case.to(dtype)
    _, stats = case.run(backend)
    _, oracle = case.to(torch.float64).reference()
    assert relative_error(stats.alignment_variance, oracle.alignment_variance) <= 1e-3


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_weights_that_underflow_give_finite_gradients(backend, dtype, sav_grad):
    case = make_case(40, H=8, dtype=dtype, beta=1e-6)
    _, stats = case.run(backend)
    assert (stats.head_weights == 0).any()
    g = torch.ones(case.q.shape, dtype=dtype)
    for name, grad in gradients(case, g, lambda c: c.run(backend, sav_grad=sav_grad)).items():
        assert grad is None or grad.isfinite().all(), name


def test_constant_weights_that_underflow_give_exact_gradients(backend):
    assert_gradients(make_case(40, H=8, beta=1e-6), backend, sav_grad=False)


@pytest.mark.parametrize("padding", ["left", "all"])
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
def test_rows_that_see_nothing(backend, padding, sav_grad):
    """Output 0, log-sum-exp -inf, no gradient, and no NaN anywhere."""
    case = make_case(24, padding="left")
    if padding == "all":
        case.options["key_padding_mask"][1] = False
    out, stats = assert_forward(case, backend)
    dead = case.options["key_padding_mask"].cumsum(-1) == 0
    assert dead.any()
    assert not out[dead].any()
    assert (stats.lse.transpose(1, 2)[dead] == -torch.inf).all()
    assert stats.lse.transpose(1, 2)[~dead].isfinite().all()
    grads = assert_gradients(case, backend, sav_grad=sav_grad)
    assert not grads["q"][dead].any()
    assert not grads["k"][~case.options["key_padding_mask"]].any()


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
@pytest.mark.parametrize(("B", "Sq", "Sk"), [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (1, 0, 5)])
def test_empty_inputs(backend, B, Sq, Sk, sav_grad):
    leaf = lambda *shape: torch.randn(*shape, requires_grad=True)
    q, k, v = leaf(B, Sq, 4, 8), leaf(B, Sk, 2, 8), leaf(B, Sk, 2, 8)
    ones = lambda n: torch.ones(B, n, dtype=torch.bool)
    prior = torch.full((B, Sk), 0.25, requires_grad=True)
    out, stats = sar_attn_func(
        q, k, v, ones(Sk), ones(Sq), prior, backend=backend, sav_grad=sav_grad, return_stats=True
    )
    assert out.shape == (B, Sq, 4, 8)
    assert not out.any()
    assert stats.lse.shape == (B, 4, Sq)
    assert (stats.lse == -torch.inf).all()
    assert torch.equal(stats.head_weights, torch.ones(B, 4))
    out.sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


def test_single_token(backend):
    """One token sees itself: the output is its value, whatever its role."""
    case = make_case(1, layouts=("image", "image"))
    case.visual[0], case.text[1] = True, True
    out, stats = case.run(backend)
    assert torch.equal(out, case.v.repeat_interleave(2, dim=2))
    assert torch.equal(stats.head_weights, torch.ones(2, 4))
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize(("Sq", "Sk"), [(30, 30), (7, 30), (30, 7)])
@pytest.mark.usefixtures("poisoned")
def test_uninitialised_memory_is_never_read(backend, Sq, Sk, padding):
    assert torch.empty(2).isnan().all()
    assert torch.ones(1).new_empty(2).isnan().all()
    case = make_case(Sq, Sk, padding=padding, dtype=torch.bfloat16)
    assert_forward(case, backend)
    assert_gradients(case, backend, sav_grad=True)


@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant", "sav_grad"])
def test_stride_zero_gradients(backend, sav_grad):
    """``out.sum().backward()`` hands the backward an expanded scalar."""
    case = make_case(30)
    run = lambda c: c.run(backend, sav_grad=sav_grad)
    expected = gradients(case, torch.ones(case.q.shape), run)
    leaves = case.leaves()
    run(leaves)[0].sum().backward()
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(leaves, name).grad, expected[name])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_transposed_inputs_give_the_same_result(backend, padding):
    """The layout of Hugging Face's attention modules: (B, H, S, D) memory seen as (B, S, H, D); also expanded heads."""
    case = make_case(30, H=4, Hkv=1, dtype=torch.float64, padding=padding)
    case.k, case.v = (x.expand(-1, -1, 2, -1) for x in (case.k, case.v))
    run = lambda c: c.run(backend, sav_grad=True)
    dense = gradients(case, torch.ones(case.q.shape), run)
    expected, stats = run(case)
    for name in "qkv":
        x = getattr(case, name).detach().transpose(1, 2).contiguous().requires_grad_()
        setattr(case, name, x.transpose(1, 2))
        assert not getattr(case, name).is_contiguous()
    out, got = run(case)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(got.head_weights, stats.head_weights)
    for name, grad in zip("qkv", torch.autograd.grad(out.sum(), [getattr(case, name) for name in "qkv"])):
        torch.testing.assert_close(grad, dense[name], rtol=1e-10, atol=1e-12)


def test_gradients_of_the_statistics(backend):
    """With sav_grad the statistics that come back are differentiable too."""
    case = make_case(33, dtype=torch.float64, layouts=("image", "two_images", "text_only"))
    g = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def grads(run):
        leaves = case.leaves()
        _, stats = run(leaves)
        fields = (stats.alignment_variance, stats.semantic_alignment, stats.head_weights)
        sum((f.double() * g[i]).sum() for i, f in enumerate(fields)).backward()
        return [getattr(leaves, name).grad for name in ("q", "k", "prior")]

    got = grads(lambda c: c.run(backend, sav_grad=True))
    expected = grads(lambda c: c.reference(sav_grad=True))
    for a, b in zip(got, expected):
        assert max_error(a, b) <= 1e-5 * b.abs().max()  # the statistics themselves are handed out in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(backend, dtype):
    """As scaled_dot_product_attention: inputs are cast to the autocast dtype, gradients come back in theirs."""
    case = make_case(30)
    with torch.autocast("cpu", dtype=dtype):
        out, stats = case.run(backend)
        grads = gradients(case, torch.ones(case.q.shape), lambda c: c.run(backend, sav_grad=True))
    expected, expected_stats = case.to(dtype).run(backend)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert torch.equal(stats.head_weights, expected_stats.head_weights)
    assert all(grads[name].dtype == torch.float32 for name in ("q", "k", "v", "prior"))


def test_autocast_leaves_fp64_alone(backend):
    case = make_case(12, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.run(backend)[0], case.run(backend)[0].double())


def test_long_sequences_in_blocks(backend, monkeypatch):
    """Many blocks of rows give what one block gives."""
    from sar_fast.backends import blocks, statistics

    case = make_case(150, H=4, padding="left", dtype=torch.float64)
    whole = gradients(case, torch.ones(case.q.shape), lambda c: c.run(backend, sav_grad=True))
    out, stats = case.run(backend)
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1)
    monkeypatch.setitem(statistics._BLOCK_BYTES, "cpu", 1)
    got, got_stats = case.run(backend)
    torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-13)
    assert_statistics(got_stats, stats)
    parts = gradients(case, torch.ones(case.q.shape), lambda c: c.run(backend, sav_grad=True))
    for name in ("q", "k", "v", "prior"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-12)


def test_the_rules_reject_a_wrong_result(backend):
    """The tolerances are not so wide that a factor of 1.05 on one head passes."""
    case = make_case(64)
    out, _stats = case.run(backend)
    oracle, in_dtype = case.to(torch.float64).reference()[0], case.reference()[0]
    out[:, :, 1] *= 1.05
    with pytest.raises(AssertionError, match="output error"):
        assert_output(out, oracle, in_dtype)
