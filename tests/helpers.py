"""Shared by the tests: random cases in every layout, and the exactness rules of docs/method.md, section 5."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sar_fast import SARStats, sar_attn_func
from sar_fast.reference import sar_attention_reference

BACKENDS = ("torch", "composed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("image", "two_images", "text_only")
STATISTICS = ("alignment_variance", "semantic_alignment", "sav", "head_weights")
dtype_id = lambda dtype: str(dtype).removeprefix("torch.")


@dataclasses.dataclass
class Case:
    """Arguments of one call: ``options`` holds the keyword arguments that reference and backends share."""

    q: Tensor
    k: Tensor
    v: Tensor
    visual: Tensor
    text: Tensor
    prior: Tensor
    options: dict

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.visual, self.text, self.prior

    def to(self, dtype: torch.dtype) -> Case:
        """q, k, v (and the prior, to fp64) cast; gradients start here."""
        prior = self.prior.double() if dtype == torch.float64 else self.prior
        return dataclasses.replace(self, **{n: getattr(self, n).to(dtype) for n in "qkv"}, prior=prior)

    def leaves(self) -> Case:
        """q, k, v and the prior as fresh leaves that want gradients."""
        fresh = {n: getattr(self, n).detach().clone().requires_grad_() for n in ("q", "k", "v", "prior")}
        return dataclasses.replace(self, **fresh)

    def rows(self, index: slice) -> Case:
        """Some samples of the batch."""
        options = dict(self.options)
        for name in ("key_padding_mask", "attn_mask"):
            if name in options:
                options[name] = options[name][index]
        tensors = dict(zip(("q", "k", "v", "visual", "text", "prior"), (t[index] for t in self.tensors)))
        return Case(**tensors, options=options)

    def run(self, backend: str, **changes) -> tuple[Tensor, SARStats]:
        return sar_attn_func(*self.tensors, **{**self.options, **changes}, backend=backend, return_stats=True)

    def reference(self, **changes) -> tuple[Tensor, SARStats]:
        return sar_attention_reference(*self.tensors, **{**self.options, **changes}, return_stats=True)


def _roles(real: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Visual and text positions of one sample whose non-padding positions are ``real``."""
    position = real.nonzero()[:, 0]
    n = position.numel()
    visual, text = torch.zeros_like(real), torch.zeros_like(real)
    if layout == "text_only" or n == 0:
        return visual, text
    spans = {"image": [(1 / 8, 5 / 8)], "two_images": [(1 / 8, 3 / 8), (1 / 2, 6 / 8)]}[layout]
    for start, stop in spans:
        visual[position[int(start * n) : int(stop * n)]] = True
    text[position[int(spans[-1][1] * n) :]] = True
    return visual, text


def padding_mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """(batch, length) bool, True = real; samples are padded by different amounts."""
    real = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        amount = (b + 1) * length // 8
        if kind == "left":
            real[b, :amount] = False
        elif kind == "right":
            real[b, length - amount :] = False
        elif kind == "holes":
            real[b] = torch.rand(length, generator=generator) > 0.25
    return real


def make_case(
    Sq: int,
    Sk: int | None = None,
    *,
    H: int = 4,
    Hkv: int = 2,
    D: int = 32,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    layouts: tuple[str, ...] = LAYOUTS,
    padding: str = "none",
    seed: int = 0,
    **options,
) -> Case:
    """One sample per layout. Heads differ in sharpness and beta in size, so that the weights are far from equal."""
    g = torch.Generator().manual_seed(seed)
    B, Sk, Dv = len(layouts), Sq if Sk is None else Sk, D if Dv is None else Dv
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    real = padding_mask(padding, B, Sk, g)
    roles = [_roles(real[b], layout) for b, layout in enumerate(layouts)]
    visual = torch.stack([r[0] for r in roles])
    at_keys = torch.stack([r[1] for r in roles])
    # queries are the last Sq positions; where there are more queries than keys the oldest count as text too
    text = torch.cat([at_keys.new_ones(B, max(0, Sq - Sk)), at_keys[:, max(0, Sk - Sq) :]], 1)
    prior = torch.rand(B, Sk, generator=g).masked_fill(~visual, 0)
    prior = prior / prior.sum(-1, keepdim=True).clamp_min(1e-6)
    if padding != "none":
        options["key_padding_mask"] = real
    sharpness = torch.linspace(0.5, 2.0, H, dtype=torch.float64)[:, None]
    case = Case(
        (randn(B, Sq, H, D) * sharpness).to(dtype),
        randn(B, Sk, Hkv, D).to(dtype),
        randn(B, Sk, Hkv, Dv).to(dtype),
        visual,
        text,
        prior,
        {"beta": 2.0 / max(1, Sk), **options},
    )
    return case.to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, sees: Tensor | None = None, scale: float | None = None) -> Tensor:
    """SDPA of (B, S, H, D) tensors in fp64; rows that see nothing give 0."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=sees, scale=scale)
    return out.nan_to_num().transpose(1, 2)


def visible(Sq: int, Sk: int, causal: bool = False, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """(Sq, Sk) bool, which keys a query sees; aligned bottom-right."""
    position, key = torch.arange(Sq)[:, None] + Sk - Sq, torch.arange(Sk)
    sees = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        sees &= key <= position
    if window[0] >= 0:
        sees &= key >= position - window[0]
    if window[1] >= 0:
        sees &= key <= position + window[1]
    return sees


def combinations(*axes: Iterable, daily: Callable[..., bool]) -> list:
    """Every combination of the axes' values, as pytest's parameters; ``slow`` are those that are not ``daily``."""
    marks = lambda values: [] if daily(*values) else [pytest.mark.slow]
    return [pytest.param(*values, marks=marks(values)) for values in itertools.product(*axes)]


def max_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite. Infinities must agree."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    difference = torch.where(got == expected, 0.0, (got - expected).abs()).nan_to_num(nan=torch.inf)
    return difference.max().item() if difference.numel() else 0.0


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error relative to the expected entry; 0 must be 0 exactly."""
    got, expected = got.detach().double(), expected.detach().double()
    assert got.shape == expected.shape, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    ratio = torch.where(got == expected, 0.0, ((got - expected) / expected).abs()).nan_to_num(nan=torch.inf)
    return ratio.max().item() if ratio.numel() else 0.0


def assert_output(got: Tensor, oracle: Tensor, in_dtype: Tensor) -> None:
    """Error <= 2 x the error of the reference in the input dtype + 1e-5."""
    error, bound = max_error(got, oracle), 2 * max_error(in_dtype, oracle) + 1e-5
    assert error <= bound, f"output error {error:.3e} > {bound:.3e}"


def assert_gradient(name: str, got: Tensor, oracle: Tensor, in_dtype: Tensor) -> None:
    """Error <= 3 x the error of the reference's gradient in the input dtype + 1e-4; for gradients below 1, the 1e-4 is
    taken relative to the largest."""
    error = max_error(got, oracle)
    bound = 3 * max_error(in_dtype, oracle) + 1e-4 * min(1.0, max(1e-2, _finite_max(oracle)))
    assert error <= bound, f"gradient of {name}: error {error:.3e} > {bound:.3e}"


def assert_statistics(got: SARStats, oracle: SARStats) -> None:
    """AV, SA and c: relative error <= 1e-3 (SAV, their product, twice that); counts are exact."""
    assert torch.equal(got.query_count.double(), oracle.query_count.double())
    for name in STATISTICS:
        error = relative_error(getattr(got, name), getattr(oracle, name))
        bound = 2e-3 if name == "sav" else 1e-3
        assert error <= bound, f"{name}: relative error {error:.3e} > {bound}"


def assert_forward(case: Case, backend: str) -> tuple[Tensor, SARStats]:
    """Output, log-sum-exp and statistics of a backend by the rules; returns them."""
    oracle, oracle_stats = case.to(torch.float64).reference()
    in_dtype, _ = case.reference()
    out, stats = case.run(backend)
    assert out.dtype == case.q.dtype
    assert stats.backend == backend
    assert_output(out, oracle, in_dtype)
    assert_statistics(stats, oracle_stats)
    assert stats.lse.dtype == torch.float32
    assert max_error(stats.lse, oracle_stats.lse) <= 1e-4 * max(1.0, _finite_max(oracle_stats.lse))
    return out, stats


def _finite_max(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def gradients(case: Case, grad_out: Tensor, run) -> dict[str, Tensor | None]:
    """Gradients of q, k, v and the prior, where ``run(case)`` gives (out, stats)."""
    case = case.leaves()
    out, _ = run(case)
    out.backward(grad_out.to(out.dtype))
    return {name: getattr(case, name).grad for name in ("q", "k", "v", "prior")}


def assert_gradients(case: Case, backend: str, *, sav_grad: bool, seed: int = 1) -> dict[str, Tensor | None]:
    """Gradients of a backend by the rules; the prior's exactly where they flow through the weights.

    The loss is of order 1: a random projection of the output, normalised by its size.
    """
    shape = (*case.q.shape[:-1], case.v.shape[-1])
    grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (shape[1] * shape[3]) ** 0.5
    grad_out = grad_out.to(case.q)
    oracle = gradients(case.to(torch.float64), grad_out, lambda c: c.reference(sav_grad=sav_grad))
    in_dtype = gradients(case, grad_out, lambda c: c.reference(sav_grad=sav_grad))
    got = gradients(case, grad_out, lambda c: c.run(backend, sav_grad=sav_grad))
    for name in ("q", "k", "v", *(("prior",) if sav_grad else ())):
        assert_gradient(name, got[name], oracle[name], in_dtype[name])
    if not sav_grad:
        assert got["prior"] is None or not got["prior"].any()
    return got
