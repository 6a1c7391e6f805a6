"""Inputs, oracle and tolerances of the kernel tests."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import pytest
import torch
import triton

from sar_fast import Visibility
from sar_fast.method.values import UNBOUNDED, Bounds
from sar_fast.method.visibility import as_mask, query_positions
from sar_fast.reference import sar_attention_reference
from sar_kernels.attention import AttentionOptions, Masks, WeightOptions, pack_mask, sar_backward, sar_forward

STATISTICS = ("av", "sa", "c")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # conftest.py decides before this is imported
FP64 = INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def skip_unless_supported(dtype: torch.dtype) -> None:
    """fp64 is for the interpreter, from Triton 3.6; the interpreter's bf16 is wrong."""
    if dtype == torch.float64 and not FP64:
        pytest.skip("fp64: compiled kernels and the interpreter before Triton 3.6 have no such matrix product")
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("bf16: the interpreter's arithmetic is wrong, needs a GPU")


@dataclass(frozen=True)
class Case:
    """One call, dense. images holds, per sample, the (first, end) of each run of visual keys."""

    name: str = "base"
    seqlen_q: int = 97
    seqlen_k: int = 97
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None
    images: tuple[tuple[tuple[int, int], ...], ...] = (((5, 45),), ((0, 33),))
    text_only_rows: bool = True  # text queries are those after the last image; False: after the first
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    padding: tuple[tuple[int, int], ...] | None = None  # per sample the (first, end) of the real keys
    beta: float = 0.02  # small, so that the weights differ clearly
    protect: bool = True
    normalize: str = "none"
    dtype: torch.dtype = torch.float32
    visibility: Visibility | None = None  # beside causal and window
    mask: torch.Tensor | None = None  # (B or 1, 1, Sq, Sk) bool, packed for the kernels

    @property
    def real(self) -> torch.Tensor | None:
        """(B, Sk) bool of ``padding``."""
        if self.padding is None:
            return None
        real = torch.zeros(len(self.images), self.seqlen_k, dtype=torch.bool)
        for b, (first, end) in enumerate(self.padding):
            real[b, first:end] = True
        return real

    @property
    def bounds(self) -> Bounds:
        """The runs of keys that ``visibility`` lets the queries see, with causal and window in them."""
        if self.visibility is None:
            return UNBOUNDED
        position = query_positions(self.seqlen_q, self.seqlen_k, torch.device("cpu"))
        return self.visibility.bounds(position, self.seqlen_k, causal=self.causal, window=self.window, real=self.real)

    @property
    def scores(self) -> dict:
        """``causal`` and ``window_size`` as far as the bounds do not say them."""
        if self.bounds.given:
            return {"causal": False, "window_size": (-1, -1)}
        return {"causal": self.causal, "window_size": self.window}

    @property
    def seen(self) -> torch.Tensor | None:
        """What bounds and mask let the queries see, (B, 1, Sq, Sk) bool."""
        if not self.bounds.given:
            return self.mask
        seen = as_mask(self.bounds, self.seqlen_k, (len(self.images), self.seqlen_q))
        return seen if self.mask is None else seen & self.mask

    def __str__(self) -> str:
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"

    def but(self, **changes) -> Case:
        return replace(self, **changes)


def daily(cases: list[Case], *names: str) -> list:
    """The cases as parameters, slow but those of these names; compiled, all of them are quick."""
    marks = lambda case: [pytest.mark.slow] * (INTERPRETED and case.name not in names)
    return [pytest.param(case, marks=marks(case)) for case in cases]


@dataclass
class Inputs:
    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    visual: torch.Tensor
    text: torch.Tensor
    prior: torch.Tensor
    padding: torch.Tensor | None
    options: AttentionOptions
    weights: WeightOptions
    sav: tuple = field(init=False)

    def __post_init__(self):
        self.sav = (self.visual, self.text, self.prior)

    def kwargs(self, weights: bool = True) -> dict:
        both = {"options": self.options, "masks": self.masks}
        return {**both, "weights": self.weights} if weights else both

    @property
    def masks(self) -> Masks:
        first, end = (None if x is None else x.to(self.q.device) for x in self.case.bounds)
        packed = None if self.case.mask is None else pack_mask(self.case.mask.to(self.q.device))
        return Masks(self.padding, first, end, packed)


def make(case: Case) -> Inputs:
    """Random inputs, already rounded to the case's dtype; a third of the prior's entries are zero."""
    skip_unless_supported(case.dtype)
    batch, Sq, Sk, D = len(case.images), case.seqlen_q, case.seqlen_k, case.head_dim
    normal = lambda *shape: torch.randn(*shape).to(case.dtype)
    q, k = normal(batch, Sq, case.heads, D), normal(batch, Sk, case.kv_heads, D)
    v = normal(batch, Sk, case.kv_heads, case.head_dim_v or D)
    visual, text = torch.zeros(batch, Sk, dtype=torch.bool), torch.zeros(batch, Sq, dtype=torch.bool)
    for b, runs in enumerate(case.images):
        for first, end in runs:
            visual[b, first:end] = True
        begin = 0 if not runs else runs[-1][1] if case.text_only_rows else runs[0][0]
        text[b, max(0, begin - (Sk - Sq)) :] = True
        query_is_visual = visual[b, Sk - Sq :] if Sq <= Sk else torch.cat([torch.zeros(Sq - Sk).bool(), visual[b]])
        text[b] &= ~query_is_visual
    prior = torch.rand(batch, Sk, dtype=torch.float64) * visual * (torch.arange(Sk) % 3 != 0)
    prior = (prior / prior.sum(-1, keepdim=True).clamp_min(1e-9)).to(
        torch.float64 if case.dtype == torch.float64 else torch.float32
    )
    padding = case.real
    options = AttentionOptions(case.scores["causal"], D**-0.5, case.scores["window_size"], case.softcap)
    weights = WeightOptions(case.beta, case.protect, case.normalize)
    return Inputs(case, q, k, v, visual, text, prior, padding, options, weights)


def reference(inputs: Inputs, dtype: torch.dtype = torch.float64, *, sav_grad=False, requires_grad=False):
    """(out, stats, leaves) of the eager oracle on the same rounded inputs, in a dtype."""
    case = inputs.case
    leaves = [t.to(dtype).requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v, inputs.prior)]
    out, stats = sar_attention_reference(
        *leaves[:3],
        inputs.visual,
        inputs.text,
        leaves[3],
        beta=case.beta,
        key_padding_mask=inputs.padding,
        attn_mask=case.seen,
        **case.scores,
        softcap=case.softcap,
        protect_first_head=case.protect,
        normalize=case.normalize,
        sav_grad=sav_grad,
        return_stats=True,
    )
    return out, stats, leaves


def assert_close(name: str, got, exact, eager, factor: float, atol: float) -> None:
    """max|got - exact| <= factor * max|eager - exact| + atol: no worse than eager PyTorch in the same dtype."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, allowed = (got - exact).abs().max().item(), (eager.to(exact.dtype) - exact).abs().max().item()
    assert error <= factor * allowed + atol, f"{name}: error {error:.3g}, eager in the input dtype {allowed:.3g}"


def assert_relative(name: str, got, exact, rtol: float = 1e-3) -> None:
    """Relative error per entry, where zero must be exactly zero and what got's dtype cannot hold may be."""
    exact = exact.double()
    exact = torch.where(exact.abs() < torch.finfo(got.dtype).tiny, 0.0, exact)  # a GPU's kernels flush what is less
    got = torch.where(got.abs() < torch.finfo(got.dtype).tiny, 0.0, got).double()
    error = ((got - exact).abs() - rtol * exact.abs()).max().item()
    assert error <= 0, f"{name}: {got} instead of {exact}"


def assert_same(got, expected, *, kind: str = "output") -> None:
    """Bit for bit where kernels are interpreted; for results of two calls that may be two compilations of one kernel.

    Another specialization may contract other products. Each result may then err by what `check_forward` and
    `check_gradients` allow, where eager PyTorch errs by no less than a rounding to the dtype; and the two by the sum.
    kind: "output" (and lse), "gradient" or "statistic".
    """
    if INTERPRETED:
        assert torch.equal(got, expected)
        return
    if kind == "statistic":
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=0)
        return
    finite = expected.double().abs()[expected.isfinite()]
    largest = finite.max().item() if finite.numel() else 0.0
    factor, atol = (2, 1e-5) if kind == "output" else (3, 1e-4 * max(1.0, largest))
    allowed = 2 * (factor * torch.finfo(expected.dtype).eps / 2 * largest + atol)
    torch.testing.assert_close(got, expected, rtol=0, atol=allowed)


def assert_same_forward(got, expected) -> None:
    """`assert_same` of (out, lse, and the statistics if there are any)."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_same(a, b, kind="output" if i < 2 else "statistic")


def assert_same_gradients(got, expected) -> None:
    """`assert_same` of gradients."""
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b, kind="gradient")


def counting_queries(inputs: Inputs) -> torch.Tensor:
    """Per sample, the text queries that see two or more visual keys."""
    case = inputs.case
    distance = torch.arange(case.seqlen_k) - (torch.arange(case.seqlen_q)[:, None] + case.seqlen_k - case.seqlen_q)
    (left, right), causal = case.scores["window_size"], case.scores["causal"]
    right = 0 if causal else right
    sees = inputs.visual[:, None, :].expand(-1, case.seqlen_q, -1)
    if right >= 0:
        sees = sees & (distance <= right)
    if left >= 0:
        sees = sees & (distance >= -left)
    if inputs.padding is not None:
        sees = sees & inputs.padding[:, None, :]
    if case.seen is not None:
        sees = sees & case.seen[:, 0]
    return (inputs.text & (sees.sum(-1) >= 2)).sum(-1)


def statistics_of(stats) -> tuple[torch.Tensor, ...]:
    return stats.alignment_variance, stats.semantic_alignment, stats.head_weights


def check_forward(inputs: Inputs, out, lse, av, sa, c, count) -> None:
    """SPEC's output and statistics rules against the oracle."""
    exact, stats, _ = reference(inputs)
    eager, _, _ = reference(inputs, inputs.case.dtype)
    assert out.dtype == inputs.q.dtype
    assert_close("out", out.double(), exact, eager.double(), 2, 1e-5)
    dead = stats.lse == -torch.inf
    assert torch.equal(lse == -torch.inf, dead)
    torch.testing.assert_close(lse.double()[~dead], stats.lse[~dead], rtol=1e-5, atol=1e-5)
    for name, got, want in zip(STATISTICS, (av, sa, c), statistics_of(stats)):
        assert_relative(name, got, want)
    assert torch.equal(count.long(), counting_queries(inputs))


def both_gradients(case: Case, sav_grad: bool, statistics_too: bool = False, inputs: Inputs | None = None):
    """(ours, exact, eager in the input dtype), each (dq, dk, dv[, dprior])."""
    inputs = inputs or make(case)
    out, lse, *saved = sar_forward(inputs.q, inputs.k, inputs.v, *inputs.sav, **inputs.kwargs())
    dout = torch.randn_like(out)
    incoming = [torch.randn(out.shape[0], case.heads) if statistics_too else None for _ in range(3)]
    got = sar_backward(
        dout,
        inputs.q,
        inputs.k,
        inputs.v,
        out,
        lse,
        *inputs.sav,
        *saved,
        **inputs.kwargs(),
        sav_grad=sav_grad,
        **dict(zip(("dav", "dsa", "dc"), incoming)),
    )
    references = []
    for dtype in (torch.float64, case.dtype):
        out, stats, leaves = reference(inputs, dtype, sav_grad=sav_grad, requires_grad=True)
        loss = (out * dout.to(dtype)).sum()
        if statistics_too:
            loss = loss + sum((s * g).sum() for s, g in zip(statistics_of(stats), incoming))
        references.append(torch.autograd.grad(loss, leaves[: 4 if sav_grad else 3], allow_unused=True))
    return got, *references


def check_gradients(got, exact, eager) -> None:
    """The gradients' rule against the oracle."""
    names = ("dq", "dk", "dv", "dprior")[: len(exact)]
    for name, ours, want, low in zip(names, got, exact, eager):
        want = torch.zeros_like(ours, dtype=torch.float64) if want is None else want
        low = want if low is None else low
        # Gradients of small beta are large; the absolute allowance is meant for gradients of order one.
        assert_close(name, ours.double(), want, low.double(), 3, 1e-4 * max(1.0, want.abs().max().item()))
