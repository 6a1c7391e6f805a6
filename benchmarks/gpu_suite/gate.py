"""The gate: our kernels against the fp64 reference by the rules of docs/method.md, section 5. One record a row.

A red row does not end the run: it withholds the speed that rests on it (`Bench.withheld`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from providers import make_inputs
from torch import Tensor

from gpu_suite.bench import Bench
from gpu_suite.inputs import Shape, decode_inputs, gate_decode_shapes, gate_shapes, sizes
from sar_fast import SARState, flash_attn_func, flash_attn_with_kvcache, sar_attn_func, sar_attn_with_kvcache
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import Equal

Row = tuple[list[str], float]  # what is wrong, and the largest error as a share of what is allowed
PLAIN = {"weighting": Equal()}  # the reference as plain attention
MODES = ("running", "step", "prompt", "plain")


def gate(bench: Bench) -> None:
    """Forward, gradients both ways, and a decode step in every mode."""
    for shape in gate_shapes(bench.tiny):
        inputs = make_inputs(*sizes(shape), dtype=bench.dtype, device=bench.device.name)
        for provider, backend in (("sar-triton", sar_attn_func), ("plain-triton", _plain)):
            for mode in ("constant", "through") if provider == "sar-triton" else ("constant",):
                prefill_rows(bench, provider, mode, shape, inputs, backend)
        bench.device.release()
    for shape in gate_decode_shapes(bench.tiny):
        for mode in MODES:
            if bench.missing("gate", "decode", shape, [mode]):
                bench.check_time()
                _note(bench, mode, "decode", shape, lambda mode=mode, shape=shape: _check_decode(bench, shape, mode))
        bench.device.release()


def _plain(q, k, v, visual, text, prior, *, backend: str, **_: Any):
    """Plain attention with the signature of SAR's; its statistics are nobody's."""
    return flash_attn_func(q, k, v, causal=True, backend=backend), None


def prefill_rows(
    bench: Bench, provider: str, mode: str, shape: Shape, inputs: tuple, function: Callable, backend: str = "triton"
) -> None:
    """The forward's row and the gradients' row, from one run."""
    modes = ("forward", mode) if mode == "constant" else (mode,)
    if not any(bench.missing("gate", m, shape, [provider]) for m in modes):
        return
    bench.check_time()
    bench.trying("gate", mode, shape, [provider])
    found: dict[str, Row] = {}

    def check() -> bool:
        plain = provider == "plain-triton"
        found.update(check_prefill(function, inputs, mode == "through", plain=plain, backend=backend))
        return True

    if bench.attempt("gate", provider, mode, shape, check) is None:
        error = bench.records.find("gate", mode, shape, provider)["error"]
        for other in set(modes) - {mode}:  # the forward's row has the same run
            bench.records.fail("gate", provider, other, shape, error)
        return
    for row_mode in modes:
        failures, worst = found["forward" if row_mode == "forward" else "gradients"]
        _write(bench, provider, row_mode, shape, failures, worst)


def _note(bench: Bench, provider: str, mode: str, shape: Shape, check: Callable[[], Row]) -> None:
    bench.trying("gate", mode, shape, [provider])
    row = bench.attempt("gate", provider, mode, shape, check)
    if row is not None:
        _write(bench, provider, mode, shape, *row)


def _write(bench: Bench, provider: str, mode: str, shape: Shape, failures: list[str], worst: float) -> None:
    bench.records.note(
        "gate", provider, mode, shape, green=not failures, failures=failures, error_of_allowed=round(worst, 3)
    )
    for failure in failures:
        print(f"  RED {provider} {mode} {shape}: {failure}", flush=True)


def check_prefill(
    function: Callable,
    inputs: tuple,
    through: bool,
    *,
    plain: bool = False,
    reference: dict[str, Any] | None = None,
    backend: str = "triton",
) -> dict[str, Row]:
    """{"forward": row, "gradients": row} of a function's backend on these inputs.

    ``reference``: further options of the reference alone, where it says with a matrix what the function sees.
    """

    def attend(run: Callable, double: bool, **options: Any) -> list[Tensor]:
        cast = lambda x: x.double() if double and x.is_floating_point() else x
        leaves = [cast(x).detach().clone().requires_grad_() for x in inputs[:3]]
        out, stats = run(*leaves, *(cast(x) for x in inputs[3:]), return_stats=True, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0]).to(out.dtype)
        gradients = torch.autograd.grad(out, leaves, grad)
        kept = () if plain else (stats.alignment_variance, stats.semantic_alignment, stats.head_weights)
        return [x.detach().double() for x in (out, *gradients, *kept)]

    options = PLAIN if plain else {"beta": 0.02, "sav_grad": through}
    exact, rounded = (
        attend(sar_attention_reference, double, **options, **(reference or {})) for double in (True, False)
    )
    got = attend(function, False, backend=backend, **options)
    rows: dict[str, tuple[list[str], list[float]]] = {"forward": ([], []), "gradients": ([], [])}
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        error, eager = ((x[index] - exact[index]).abs().max().item() for x in (got, rounded))
        _judge(rows["forward" if name == "out" else "gradients"], name, error, _allowed(name, eager, exact[index]))
    for index, name in enumerate(() if plain else ("AV", "SA", "c"), start=4):
        error = ((got[index] - exact[index]).abs() / exact[index].abs().clamp_min(1e-30)).max().item()
        _judge(rows["forward"], name, error, 1e-3)
    return {name: (failures, max(shares)) for name, (failures, shares) in rows.items()}


def _allowed(name: str, eager: float, exact: Tensor) -> float:
    """FlashAttention's rule: twice the error of the reference in the input dtype, three times for gradients."""
    if name == "out":
        return 2 * eager + 1e-5
    return 3 * eager + 1e-4 * max(1.0, exact.abs().max().item())


def _judge(row: tuple[list[str], list[float]], name: str, error: float, allowed: float) -> None:
    row[1].append(error / allowed)
    if not error <= allowed:  # NaN is wrong
        row[0].append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")


def _check_decode(bench: Bench, shape: Shape, mode: str) -> Row:
    """One step in a mode against the torch backend in fp64 and in the input dtype."""
    q, k, v, visual, prior = decode_inputs(shape, bench.dtype, bench.device.name)
    generator = torch.Generator(q.device).manual_seed(3)
    start = [torch.rand(shape["B"], shape["H"], generator=generator, device=q.device) for _ in range(3)]

    def step(dtype: torch.dtype, backend: str) -> list[Tensor]:
        cast = [x.to(dtype) for x in (q, k, v)]
        if mode == "plain":
            at = {"cache_seqlens": shape["KV"], "causal": True, "backend": backend}
            return [flash_attn_with_kvcache(*cast, **at).double()]
        count = torch.full((shape["B"],), 3.0, device=q.device)
        state = SARState(start[0].clone(), start[1].clone(), count, 0.5 + start[2])
        call = {"visual_mask": visual, "prior": prior, "state": state, "decode": mode, "beta": 0.02}
        out, stats = sar_attn_with_kvcache(*cast, cache_seqlens=shape["KV"], backend=backend, return_stats=True, **call)
        kept = (stats.alignment_variance, stats.semantic_alignment, stats.head_weights)
        return [x.double() for x in (out, *kept)]

    exact, rounded, got = step(torch.float64, "torch"), step(bench.dtype, "torch"), step(bench.dtype, "triton")
    row: tuple[list[str], list[float]] = ([], [])
    error, eager = ((x[0] - exact[0]).abs().max().item() for x in (got, rounded))
    _judge(row, "out", error, _allowed("out", eager, exact[0]))
    for name, ours, want in zip(("AV", "SA", "c"), got[1:], exact[1:]):
        _judge(row, name, ((ours - want).abs() / want.abs().clamp_min(1e-30)).max().item(), 1e-3)
    return row[0], max(row[1])
