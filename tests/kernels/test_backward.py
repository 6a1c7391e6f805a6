"""Backward kernels against autograd of the fp64 oracle."""

import functools

import pytest
import torch
from kernel_cases import FP64, Case, assert_same_gradients, both_gradients, check_gradients, daily, make

from sar_kernels.attention import (
    AttentionOptions,
    WeightOptions,
    attention_backward,
    attention_forward,
    sar_backward,
    sar_forward,
)

BASE = Case(heads=2, kv_heads=1, head_dim=16)
FOUR = BASE.but(heads=4, kv_heads=2)
TWO_IMAGES = (((3, 20), (30, 61)), ((0, 1),))
CASES = [
    FOUR.but(head_dim=64),
    BASE.but(name="fp16", dtype=torch.float16, head_dim=64),
    BASE.but(name="bf16", dtype=torch.bfloat16, head_dim=64),
    BASE.but(name="d128-bf16", dtype=torch.bfloat16, head_dim=128),
    BASE.but(name="mqa-d80-fp16", dtype=torch.float16, head_dim=80),
    BASE.but(name="gqa7-d128", heads=7, head_dim=128, images=(((5, 45),),)),
    BASE.but(name="mha-dv32", kv_heads=2, head_dim_v=32),
    BASE.but(name="short-queries", seqlen_q=17),
    BASE.but(name="more-queries-than-keys", seqlen_q=120, seqlen_k=90),
    BASE.but(name="full", causal=False),
    BASE.but(name="padded", padding=((11, 97), (0, 60))),
    BASE.but(name="all-padding", padding=((0, 0), (0, 97)), causal=False),
    BASE.but(name="window", window=(40, -1)),
    BASE.but(name="window-both-softcap", window=(20, 9), causal=False, softcap=3.0),
    BASE.but(name="softcap", softcap=2.0),
    BASE.but(name="text-between-images", images=TWO_IMAGES, text_only_rows=False),
    FOUR.but(name="text-only-sample", images=(((5, 45),), ())),
    FOUR.but(name="unprotected", protect=False),
    FOUR.but(name="standardize", normalize="standardize", beta=0.5),
    FOUR.but(name="underflowing-weights", beta=1e-4),
]


# Constant weights read nothing of most; the others every day together with something, or in a test below.
CONSTANT = ("gqa7-d128", "window-both-softcap")
THROUGH = (
    "base", "mqa-d80-fp16", "mha-dv32", "more-queries-than-keys", "padded", "window-both-softcap",
    "text-between-images", "text-only-sample",
)  # fmt: skip
BOTH = [
    pytest.param(*case.values, sav_grad, marks=case.marks)
    for sav_grad, names in ((False, CONSTANT), (True, THROUGH))
    for case in daily(CASES, *names)
]


@pytest.mark.parametrize(("case", "sav_grad"), BOTH, ids=str)
def test_matches_autograd_of_the_reference(case, sav_grad):
    got, exact, eager = both_gradients(case, sav_grad)
    assert (got[3] is None) == (not sav_grad)
    check_gradients(got, exact, eager)


@pytest.mark.slow
@pytest.mark.parametrize("sav_grad", [False, True], ids=["constant-c", "sav-grad"])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("seqlens", [(1, 1), (3, 64), (63, 111), (64, 64), (128, 200)])
def test_matches_autograd_grid(head_dim, heads, seqlens, sav_grad):
    case = BASE.but(head_dim=head_dim, heads=heads[0], kv_heads=heads[1], seqlen_q=seqlens[0], seqlen_k=seqlens[1])
    case = case.but(images=(((0, min(40, seqlens[1])),), ()), dtype=torch.float16)
    check_gradients(*both_gradients(case, sav_grad))


@pytest.mark.everyday(normalize=["standardize"])
@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_gradients_of_the_statistics_themselves(normalize):
    dtype = torch.float64 if FP64 else torch.float32
    check_gradients(*both_gradients(FOUR.but(dtype=dtype, normalize=normalize, beta=0.5), True, statistics_too=True))


def test_standardised_heads_that_nearly_agree():
    """SAV differs by a ten-thousandth: what the gradient divides by must not magnify the rounding of a mean."""
    case = BASE.but(normalize="standardize", beta=0.5)
    torch.manual_seed(0)
    inputs = make(case)
    inputs.q[:, :, 1] = inputs.q[:, :, 0] + 1e-4 * torch.randn_like(inputs.q[:, :, 0])
    got, exact, eager = both_gradients(case, True, inputs=inputs)
    check_gradients(got, exact, eager)


def test_gradient_of_statistics_needs_sav_grad():
    inputs = make(BASE.but(seqlen_q=5, seqlen_k=5, images=((),)))
    out, lse, *saved = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    args = (out, inputs.q, inputs.k, inputs.v, out, lse, *inputs.sav, *saved)
    with pytest.raises(ValueError, match="sav_grad=True"):
        sar_backward(*args, **inputs.kwargs(), sav_grad=False, dc=saved[2])


@pytest.mark.parametrize("sav_grad", [pytest.param(False, marks=pytest.mark.slow, id="constant-c"), True])
def test_keys_that_padding_hides_need_not_be_finite(sav_grad):
    inputs = make(BASE.but(padding=((11, 97), (0, 20))))
    out, lse, *saved = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    dout = torch.randn_like(out)

    def run() -> list[torch.Tensor]:
        qkv = inputs.q, inputs.k, inputs.v
        got = sar_backward(dout, *qkv, out, lse, *inputs.sav, *saved, **inputs.kwargs(), sav_grad=sav_grad)
        return [g for g in got if g is not None]

    expected = run()
    for tensor in (inputs.k, inputs.v):
        tensor[~inputs.padding] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(run(), expected))


@functools.cache
def _backward_arguments() -> dict[str, torch.Tensor]:
    inputs = make(BASE.but(seqlen_q=23, seqlen_k=23, images=(((2, 11),), ((0, 7),))))
    out, lse, *saved = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    names = ("dout", "q", "k", "v", "out_scaled", "lse", "visual_mask", "text_mask", "prior", "av", "sa", "c", "count")
    tensors = torch.randn_like(out), inputs.q, inputs.k, inputs.v, out, lse, *inputs.sav, *saved
    return dict(zip((*names, "dav", "dsa", "dc"), (*tensors, *torch.randn(3, 2, 2)), strict=True)) | inputs.kwargs()


def backward_arguments() -> dict[str, torch.Tensor]:
    """Every tensor that `sar_backward` takes, by name."""
    return dict(_backward_arguments())


def padded_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, strided, with NaN between them."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    wider[..., : tensor.shape[-1]] = tensor
    return wider[..., : tensor.shape[-1]]


GIVEN = ("lse", "out_scaled", "av", "sa", "c", "count", "dav", "dsa", "dc")


@pytest.mark.everyday(names=["all"])
@pytest.mark.parametrize("names", ["all", *(n for n in GIVEN if n != "count")])
def test_strided_arguments(names):
    arguments = backward_arguments()
    expected = sar_backward(**arguments, sav_grad=True)
    for name in GIVEN if names == "all" else [names]:
        arguments[name] = padded_view(arguments[name]) if name != "count" else arguments[name]
    assert_same_gradients(sar_backward(**arguments, sav_grad=True), expected)


@pytest.mark.parametrize("name", ["dout", *GIVEN])
def test_wrong_shapes_name_the_argument(name):
    arguments = backward_arguments()
    arguments[name] = arguments[name][:1]
    with pytest.raises(ValueError, match=rf"^{name}: got torch\.float32 \(1.*need torch\.float32 \(2"):
        sar_backward(**arguments, sav_grad=True)


def test_plain_backward_checks_out_and_lse():
    inputs = make(BASE)
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    run = lambda out, lse: attention_backward(
        out, inputs.q, inputs.k, inputs.v, out, lse, **inputs.kwargs(weights=False)
    )
    assert all(torch.equal(a, b) for a, b in zip(run(out, padded_view(lse)), run(out, lse)))
    with pytest.raises(ValueError, match=r"lse: got torch\.float64"):
        run(out, lse.double())
    with pytest.raises(ValueError, match=r"dout: got .*\(2, 96, 2, 16\)"):
        run(out[:, :96], lse)


class _Attention(torch.autograd.Function):
    """The kernels under autograd, for gradcheck."""

    @staticmethod
    def forward(ctx, q, k, v, prior, visual, text, options, weights):
        out, lse, av, sa, c, count = sar_forward(q, k, v, visual, text, prior, options=options, weights=weights)
        ctx.save_for_backward(q, k, v, out, lse, visual, text, prior, av, sa, c, count)
        ctx.options, ctx.weights = options, weights
        ctx.mark_non_differentiable(lse, count)
        return out, av, sa, c

    @staticmethod
    def backward(ctx, dout, dav, dsa, dc):
        options = {"options": ctx.options, "weights": ctx.weights}
        grads = sar_backward(dout, *ctx.saved_tensors, **options, sav_grad=True, dav=dav, dsa=dsa, dc=dc)
        return *grads, None, None, None, None


@pytest.mark.slow  # every day against autograd of the oracle, in fp64 too
@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_gradcheck(normalize):
    case = BASE.but(heads=3, seqlen_q=11, seqlen_k=13, images=(((1, 7),),), dtype=torch.float64, normalize=normalize)
    inputs = make(case)
    inputs.prior += 0.1  # finite differences would step below zero, where the output is NaN
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.prior)]
    # Numbers that fp32 holds exactly: the kernels take them as fp32 arguments.
    rest = inputs.visual, inputs.text, AttentionOptions(True, 0.25), WeightOptions(0.125, True, normalize)
    assert torch.autograd.gradcheck(lambda *x: _Attention.apply(*x, *rest), leaves, fast_mode=True)


def test_constant_c_runs_the_kernels_of_plain_attention():
    """No launch more, and dK/dV and dQ are told the same to the last constant; delta alone knows of c."""
    from sar_kernels.call import Call
    from sar_kernels.dense.plan import plan_backward

    kind = lambda x: (x.dtype, x.shape) if isinstance(x, torch.Tensor) else x
    empty = lambda *shape: torch.zeros(*shape, device="meta")
    q = empty(2, 64, 4, 64)
    call = Call(q, q, q, AttentionOptions(True, 0.125), arch="sm_90")
    plain = plan_backward(call, q, q, empty(2, 4, 64))[1]
    scaled = plan_backward(call, q, q, empty(2, 4, 64), empty(2, 4))[1]
    assert [x.kernel for x in plain] == [x.kernel for x in scaled]
    for without, with_c in zip(plain[1:], scaled[1:]):
        assert {n: kind(x) for n, x in without.arguments.items()} == {n: kind(x) for n, x in with_c.arguments.items()}


def test_statistics_gradients_of_a_head_whose_weight_underflows():
    """c is exactly 0 and its head's output too, but AV and SA have gradients of their own."""
    case = FOUR.but(beta=1e-5, images=(((5, 45),),))
    torch.manual_seed(0)
    inputs = make(case)
    assert (sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())[4] == 0).any()
    torch.manual_seed(0)
    check_gradients(*both_gradients(case, True, statistics_too=True))


def test_expanded_and_strided_output_gradients():
    inputs = make(BASE)
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    run = lambda dout: attention_backward(dout, inputs.q, inputs.k, inputs.v, out, lse, **inputs.kwargs(weights=False))
    expected = run(torch.ones_like(out))
    for dout in (torch.ones(()).expand_as(out), torch.ones(16).expand_as(out)):
        assert_same_gradients(run(dout), expected)


def test_is_deterministic():
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(both_gradients(BASE.but(heads=1), True)[0])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 5), (5, 0), (1, 1)])
def test_empty_and_single_tokens(seqlen_q, seqlen_k):
    q, k = torch.randn(2, seqlen_q, 2, 16), torch.randn(2, seqlen_k, 2, 16)
    visual, text = torch.ones(2, seqlen_k).bool(), torch.ones(2, seqlen_q).bool()
    sav = visual, text, visual.float()
    both = {"options": AttentionOptions(True, 0.25), "weights": WeightOptions(0.5)}
    out, lse, *saved = sar_forward(q, k, k, *sav, **both)
    dq, dk, dv, dprior = sar_backward(torch.ones_like(out), q, k, k, out, lse, *sav, *saved, **both, sav_grad=True)
    for gradient in (dq, dk, dprior):  # one key: nothing to choose between
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)
    torch.testing.assert_close(dv, torch.ones_like(dv) if seqlen_q else torch.zeros_like(dv))
