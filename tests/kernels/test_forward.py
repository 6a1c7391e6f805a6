"""Forward kernel and head weights against the fp64 oracle."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import INTERPRETED, Case, assert_relative, assert_same_forward, check_forward, daily, make, reference

from sar_kernels.attention import (
    AttentionOptions,
    WeightOptions,
    attention_forward,
    attention_statistics,
    sar_forward,
)
from sar_kernels.call import Call
from sar_kernels.configs import KernelConfig
from sar_kernels.dense.plan import plan_sar_forward
from sar_kernels.launch import Launch, run_all

BASE = Case()
TWO = BASE.but(heads=2, kv_heads=1)
TWO_IMAGES = (((3, 20), (30, 61)), ((0, 1),))
CASES = [
    BASE,
    TWO.but(name="fp16", dtype=torch.float16),
    TWO.but(name="bf16", dtype=torch.bfloat16),
    TWO.but(name="fp64", dtype=torch.float64),
    BASE.but(name="mha-d16", kv_heads=4, head_dim=16),
    BASE.but(name="mqa-d80", kv_heads=1, head_dim=80, dtype=torch.float16),
    BASE.but(name="gqa7-d128", heads=7, kv_heads=1, head_dim=128),
    BASE.but(name="gqa7-d128-bf16", heads=7, kv_heads=1, head_dim=128, dtype=torch.bfloat16),
    TWO.but(name="d96-dv32", head_dim=96, head_dim_v=32),
    TWO.but(name="d112", head_dim=112, seqlen_q=40),
    TWO.but(name="d256", head_dim=256, seqlen_q=70, dtype=torch.float16),
    TWO.but(name="short-queries", seqlen_q=17),
    TWO.but(name="one-query", seqlen_q=1, seqlen_k=128),
    TWO.but(name="more-queries-than-keys", seqlen_q=120, seqlen_k=90),
    TWO.but(name="full", causal=False),
    TWO.but(name="padded-left-and-right", padding=((11, 97), (0, 60))),
    TWO.but(name="all-padding", padding=((0, 0), (0, 97)), causal=False),
    TWO.but(name="window", window=(40, -1)),
    TWO.but(name="window-both", window=(20, 9), causal=False, head_dim=16),
    TWO.but(name="softcap", softcap=2.0, dtype=torch.float16),
    TWO.but(name="softcap-window-bf16", softcap=2.0, window=(40, -1), dtype=torch.bfloat16),
    TWO.but(name="everything", window=(50, -1), softcap=3.0, padding=((4, 97), (0, 90)), seqlen_q=65, head_dim=16),
    TWO.but(name="two-images", images=TWO_IMAGES, head_dim=16),
    TWO.but(name="text-between-images", images=TWO_IMAGES, text_only_rows=False, head_dim=16),
    BASE.but(name="text-only-sample", images=(((5, 45),), ()), head_dim=16),
    TWO.but(name="image-only-sample", images=(((5, 45),), ((0, 97),)), head_dim=16),
    BASE.but(name="unprotected", protect=False, head_dim=16),
    BASE.but(name="standardize", normalize="standardize", beta=0.5, head_dim=16),
    BASE.but(name="one-head", heads=1, kv_heads=1, normalize="standardize", head_dim=16),
    BASE.but(name="underflowing-weights", beta=1e-6, head_dim=16),
]


# Every day: what others have beside something else, and what the gradients' tests rest on, is left out.
DAILY = (
    "fp64", "mqa-d80", "d96-dv32", "one-query", "more-queries-than-keys", "padded-left-and-right", "all-padding",
    "window-both", "everything", "text-between-images", "image-only-sample", "one-head", "underflowing-weights",
)  # fmt: skip


@pytest.mark.parametrize("case", daily(CASES, *DAILY), ids=str)
def test_matches_reference(case):
    inputs = make(case)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("seqlens", [(1, 1), (3, 64), (63, 111), (64, 64), (128, 200), (200, 200)])
def test_matches_reference_grid(dtype, head_dim, heads, seqlens):
    case = BASE.but(dtype=dtype, head_dim=head_dim, heads=heads[0], kv_heads=heads[1])
    case = case.but(seqlen_q=seqlens[0], seqlen_k=seqlens[1], images=(((0, min(40, seqlens[1])),), ()))
    inputs = make(case)
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


def test_plain_attention_matches_reference_without_weights():
    inputs = make(BASE.but(images=((), ()), dtype=torch.float16, padding=((0, 97), (20, 80))))
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    n = len(inputs.case.images)
    ones = torch.ones(n, 4)
    check_forward(inputs, out, lse, 0 * ones, 0 * ones, ones, torch.zeros(n))


def test_sample_without_counting_query_is_plain_attention_bit_for_bit():
    images = (((5, 45),), (), ((0, 97),), ((7, 8),))  # an image and text, text only, image only, one visual token
    inputs = make(BASE.but(images=images, dtype=torch.float16, head_dim=16))
    plain, plain_lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    out, lse, _, _, c, count = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert count.tolist() == [52, 0, 0, 0]
    assert torch.equal(c[1:], torch.ones_like(c[1:]))
    assert torch.equal(out[1:], plain[1:])
    assert torch.equal(lse, plain_lse)
    assert not torch.equal(out[0], plain[0])


def test_huge_unprotected_beta_is_plain_attention():
    inputs = make(BASE.but(beta=1e30, protect=False, head_dim=16))
    plain, _ = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    out = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())[0]
    torch.testing.assert_close(out, plain, rtol=1e-6, atol=1e-6)


def test_variance_survives_a_common_shift_of_all_keys():
    inputs = make(BASE)
    shift = torch.randn(BASE.head_dim)
    shift *= 100 * inputs.k.std() / shift.std()
    inputs.k = inputs.k + shift
    exact = reference(inputs)[1]
    _, lse, av, _, _, _ = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert_relative("av in the forward pass", av, exact.alignment_variance)
    av = attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())[0]
    assert_relative("av from lse", av, exact.alignment_variance)


@pytest.mark.parametrize("images", [(((5, 45),), ((0, 33),)), (((3, 20), (30, 61)),) * 2], ids=["collected", "mixed"])
def test_variance_of_nearly_equal_scores(images):
    """The keys differ by a thousandth of their size; text between two images takes the second look."""
    inputs = make(BASE.but(images=images, text_only_rows=len(images[0]) == 1, head_dim=16, beta=1e-6))
    inputs.k = 1e-3 * inputs.k + torch.randn(16)
    exact = reference(inputs)[1]
    av = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())[2]
    assert_relative("av", av, exact.alignment_variance)


@pytest.mark.everyday(softcap=[50.0])
@pytest.mark.parametrize("softcap", [50.0, 1e4])
def test_soft_cap_far_above_the_scores(softcap):
    """tanh of small numbers must keep their digits, for the output as for a variance of small scores."""
    inputs = make(BASE.but(softcap=softcap, head_dim=16, beta=1e-6))
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))
    inputs.k = 3e-3 * inputs.k
    av = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())[2]
    assert_relative("av", av, reference(inputs)[1].alignment_variance, 1e-5)


@pytest.mark.everyday(normalize=["standardize"])
@pytest.mark.parametrize("normalize", ["none", "standardize"])
def test_temperatures_that_overflow_leave_one_head(normalize):
    inputs = make(BASE.but(beta=1e-45, head_dim=16, normalize=normalize))
    out, _, _, _, c, _ = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert torch.equal(c.double(), reference(inputs)[1].head_weights)
    assert out.isfinite().all()


def test_visual_keys_of_several_chunks():
    """The mean of the visual keys is put together from pieces of 256 keys; one of them begins with an outlier."""
    case = BASE.but(seqlen_q=40, seqlen_k=600, images=(((1, 2), (250, 555)), ((300, 520),)), heads=2, head_dim=16)
    inputs = make(case)
    inputs.k[0, 1] *= 30
    check_forward(inputs, *sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()))


def test_keys_that_padding_hides_need_not_be_finite():
    inputs = make(BASE.but(padding=((11, 97), (0, 20)), head_dim=16))
    expected = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    inputs.k[~inputs.padding] = float("nan")
    inputs.v[~inputs.padding] = float("nan")
    got = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert not inputs.visual[1, 20:33].logical_not().any()  # some of them are visual
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("max_registers", [None, 168])
@pytest.mark.parametrize(
    "case",
    daily(
        [
            BASE.but(images=(((5, 45),), ((60, 90),)), seqlen_q=97),
            TWO.but(name="image-over-the-diagonal", images=TWO_IMAGES, text_only_rows=False, head_dim=16),
            BASE.but(name="full", causal=False, head_dim=16, softcap=3.0),
        ],
        "image-over-the-diagonal",
    ),
    ids=str,
)
def test_one_loop_or_two_for_the_visual_stretch(case, max_registers):
    """A tile that is limited in registers masks the whole stretch with visual keys, others only its edge."""
    inputs = make(case)
    config = KernelConfig(32, 16, 4, 1, max_registers)
    call = Call(inputs.q, inputs.k, inputs.v, inputs.options, inputs.masks, configs={"forward": config})
    outputs, launches = plan_sar_forward(call, *inputs.sav, inputs.weights)
    assert launches[1].arguments["SPLIT_COLLECT"] == (max_registers is None)
    run_all(launches)
    check_forward(inputs, *outputs)


@pytest.mark.parametrize(
    "case",
    daily(
        [
            BASE,
            BASE.but(name="softcap-window", softcap=2.0, window=(60, -1), head_dim=16),
            BASE.but(name="padding", padding=((9, 97), (0, 40)), seqlen_q=33, head_dim=80),
            BASE.but(name="text-only", images=((), ((3, 5),)), causal=False, head_dim=16),
        ],
        *("softcap-window", "padding"),
    ),
    ids=str,
)
def test_statistics_from_lse_equal_the_forward_pass(case):
    inputs = make(case)
    _, lse, *expected = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    got = attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())
    for name, a, b in zip(("av", "sa", "c", "count"), got, expected):
        torch.testing.assert_close(a, b, rtol=1e-5 if INTERPRETED else 2e-3, atol=1e-7, msg=name)


def padded_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, strided, with NaN between them."""
    wider = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    wider[..., : tensor.shape[-1]] = tensor
    return wider[..., : tensor.shape[-1]]


def test_statistics_from_a_strided_lse():
    inputs = make(BASE.but(head_dim=16))
    lse = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())[1]
    run = lambda lse: attention_statistics(inputs.q, inputs.k, lse, *inputs.sav, **inputs.kwargs())
    assert all(torch.equal(a, b) for a, b in zip(run(padded_view(lse)), run(lse)))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lse: lse[:1], r"lse: got torch\.float32 \(1, 4, 97\)"),
        (lambda lse: lse[:, :, :96], r"lse: got torch\.float32 \(2, 4, 96\)"),
        (lambda lse: lse.half(), r"lse: got torch\.float16"),
    ],
)
def test_statistics_check_lse(spoil, message):
    inputs = make(BASE.but(head_dim=16))
    with pytest.raises(ValueError, match=message):
        attention_statistics(inputs.q, inputs.k, spoil(torch.zeros(2, 4, 97)), *inputs.sav, **inputs.kwargs())


def invisible_nan(case: Case):
    """Inputs in whose key 60 is NaN beside visual keys in a tile, and text queries that all come before it."""
    inputs = make(case)
    inputs.text[:, 60:] = False
    clean = inputs.k.clone()
    inputs.k[:, 60] = float("nan")
    return inputs, clean


@pytest.mark.everyday(softcap=[0.0])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_keys_that_no_text_query_sees_need_not_be_finite(softcap):
    inputs, clean = invisible_nan(BASE.but(head_dim=16, softcap=softcap))
    expected = sar_forward(inputs.q, clean, inputs.v, *inputs.sav, **inputs.kwargs())
    got = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert all(torch.equal(a, b) for a, b in zip(got[2:], expected[2:]))
    assert torch.equal(got[0][:, :60], expected[0][:, :60])
    again = attention_statistics(inputs.q, inputs.k, got[1], *inputs.sav, **inputs.kwargs())
    for a, b in zip(again, expected[2:]):
        torch.testing.assert_close(a, b, rtol=1e-5 if INTERPRETED else 2e-3, atol=1e-7)


def test_grids_that_cuda_does_not_take_are_refused():
    launch = Launch(None, (1, 4, 70_000), {}, KernelConfig(0, 0, 4, 1))
    with pytest.raises(ValueError, match=r"batch .*got .*70000.*need at most 65535"):
        launch.check_grid()
    replace(launch, grid=(70_000, 4, 65_535)).check_grid()


def test_nan_inputs_show_in_the_output():
    inputs = make(BASE.but(head_dim=16))
    inputs.q[0, 60] = float("nan")
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.kwargs(weights=False))
    assert out[0, 60].isnan().all()
    assert not out[0, :60].isnan().any()
    assert lse[0, :, 60].isnan().all()


def test_is_deterministic():
    inputs = make(BASE)
    runs = [sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs()) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_strided_inputs_are_read_in_place():
    inputs = make(BASE.but(heads=2, head_dim=16))
    expected = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    fused = torch.randn(2, 97, 3, 2, 16)
    fused[:, :, 0], fused[:, :, 1], fused[:, :, 2] = inputs.q, inputs.k, inputs.v
    assert_same_forward(sar_forward(*fused.unbind(2), *inputs.sav, **inputs.kwargs()), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v)]
    assert_same_forward(sar_forward(*heads_first, *inputs.sav, **inputs.kwargs()), expected)


@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 1, 1), (1, 0, 0)])
def test_empty_and_single_tokens(batch, seqlen_q, seqlen_k):
    q, k = torch.randn(batch, seqlen_q, 2, 16), torch.randn(batch, seqlen_k, 2, 16)
    visual, text = torch.ones(batch, seqlen_k).bool(), torch.ones(batch, seqlen_q).bool()
    options = AttentionOptions(True, 0.25)
    out, lse, _, _, c, count = sar_forward(
        q, k, k, visual, text, visual.float(), options=options, weights=WeightOptions(0.5)
    )
    assert out.shape == q.shape
    assert lse.shape == (batch, 2, seqlen_q)
    if seqlen_k == 0:
        assert not out.any()
        assert (lse == -torch.inf).all()
    elif out.numel():
        torch.testing.assert_close(out, k)
    assert torch.equal(c, torch.ones(batch, 2))
    assert not count.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.randn(2, 9, 3, 16)}, "heads: got 4 query heads, need a multiple of the 3"),
        ({"q": torch.randn(2, 9, 4, 32)}, "head dim: got 32"),
        ({"v": torch.randn(2, 9, 2, 16).half()}, "v: got torch.float16"),
        ({"q": torch.randn(9, 4, 16)}, "q: got shape"),
        ({"visual_mask": torch.ones(2, 9)}, "visual_mask: got torch.float32"),
        ({"text_mask": torch.ones(2, 8).bool()}, "text_mask: got torch.bool (2, 8)"),
        ({"prior": torch.ones(2, 9).long()}, "prior: got torch.int64"),
    ],
)
def test_errors_name_the_argument(change, message):
    kv, ones = torch.randn(2, 9, 2, 16), torch.ones(2, 9).bool()
    arguments = {
        "q": torch.randn(2, 9, 4, 16),
        "k": kv,
        "v": kv,
        "visual_mask": ones,
        "text_mask": ones,
        "prior": ones.float(),
    }
    if "k" in change:
        change = {**change, "v": change["k"]}
    change = {name: tensor.to(kv.device) for name, tensor in change.items()}  # they were made before there was a device
    with pytest.raises(ValueError) as error:
        sar_forward(**{**arguments, **change}, options=AttentionOptions(True, 0.25), weights=WeightOptions(0.5))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "make_options",
    [
        lambda: WeightOptions(0.0),
        lambda: WeightOptions(-1.0),
        lambda: WeightOptions(1.0, True, "mean"),
        lambda: AttentionOptions(True, 0.0),
        lambda: AttentionOptions(True, 1.0, softcap=-1.0),
    ],
)
def test_options_are_checked(make_options):
    with pytest.raises(ValueError, match="need"):
        make_options()


def test_a_negative_prior_shows_in_its_sample():
    """Nobody waits for its values on a GPU: the result must not pass for a good one."""
    inputs = make(Case(head_dim=16))
    good = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert inputs.visual[0, 10]
    inputs.prior[0, 10] = -1e-3
    inputs.prior[1, 90] = -1.0  # no visual key: never read
    bad = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    assert bad[0][0].isnan().all()
    assert torch.equal(bad[0][1], good[0][1])
