"""Parts that time attention functions, ceilings to scaling, and the gate before them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from providers import PROVIDERS, make_inputs, unavailable

from gpu_suite.measure import Records, as_graph, peak_extra_bytes, samples
from sar_fast import sar_attn_func
from sar_fast.reference import sar_attention_reference

SAR = ("sar-triton", "sar-composed", "sar-auto")
BASELINES = ("plain-triton", "sdpa-flash", "sdpa-cudnn", "flex", "flash-attn")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every part gets: where it runs, at which sizes, and where its records go."""

    device: str
    tiny: bool
    records: Records

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def providers(self, names: Iterable[str]) -> list[str]:
        """Those that can run here; the others are named once."""
        found = []
        for name in names:
            reason = unavailable(name, self.device)
            if reason is None:
                found.append(name)
            elif (name, reason) not in _TOLD:
                _TOLD.add((name, reason))
                print(f"without {name}: {reason}", flush=True)
        return found


_TOLD: set[tuple[str, str]] = set()


def gate(bench: Bench) -> None:
    """Outputs, statistics and gradients by the rules of docs/method.md, section 5; a red gate ends the run."""
    failures = []
    for head_dim in (64, 128):
        for length in (97,) if bench.tiny else (97, 300, 1025, 8200):  # the last takes the variance's closed form
            heads = (8, 2) if length < 8192 else (2, 1)  # the reference holds N x N matrices in fp64
            inputs = make_inputs(2, length, *heads, head_dim, dtype=bench.dtype, device=bench.device)
            for name in bench.providers(SAR):
                for sav_grad in (False, True):
                    failures += [
                        f"{name} D={head_dim} N={length} sav_grad={sav_grad}: {failure}"
                        for failure in _check(inputs, name.removeprefix("sar-"), sav_grad)
                    ]
    if failures:
        raise SystemExit("wrong results, nothing is timed:\n  " + "\n  ".join(failures))
    print("gate: outputs, statistics and gradients agree with the fp64 reference", flush=True)


def _check(inputs: tuple, backend: str, sav_grad: bool) -> list[str]:
    """What is wrong with one backend on these inputs."""

    def attend(function: Callable, double: bool, **options: Any) -> list[torch.Tensor]:
        cast = lambda x: x.double() if double and x.is_floating_point() else x
        leaves = [cast(x).detach().clone().requires_grad_() for x in inputs[:3]]
        roles = [cast(x) for x in inputs[3:]]
        out, stats = function(*leaves, *roles, beta=0.02, sav_grad=sav_grad, return_stats=True, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0])
        gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
        statistics = (stats.alignment_variance, stats.semantic_alignment, stats.head_weights)
        return [x.detach().double() for x in (out, *gradients, *statistics)]

    exact = attend(sar_attention_reference, True)
    rounded = attend(sar_attention_reference, False)
    got = attend(sar_attn_func, False, backend=backend)
    failures = []
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        error, eager = ((x[index] - exact[index]).abs().max().item() for x in (got, rounded))
        allowed = 2 * eager + 1e-5 if name == "out" else 3 * eager + 1e-4
        if not error <= allowed:
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}")
    for index, name in enumerate(("AV", "SA", "c"), start=4):
        error = ((got[index] - exact[index]).abs() / exact[index].abs().clamp_min(1e-30)).max().item()
        if not error <= 1e-3:
            failures.append(f"{name}: relative error {error:.2e}, allowed 1e-3")
    return failures


def ceilings(bench: Bench) -> None:
    """What the device can do: a large copy (bytes read and written) and a large matrix product on random data."""
    elements, side = (1 << 20, 256) if bench.tiny else (1 << 31, 8192)
    if bench.records.missing("copy", "ceiling", {"bytes": 2 * elements}, ["torch"]):
        source = torch.randint(0, 100, (elements,), dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        times = samples({"torch": lambda: target.copy_(source)}, bench.device)["torch"]
        rates = [2 * elements / t * 1e-9 for t in times]
        bench.records.add("copy", "torch", "ceiling", "TB/s", {"bytes": 2 * elements}, rates)
    if bench.records.missing("matmul", "ceiling", {"side": side}, ["torch"]):
        a, b = (torch.randn(side, side, device=bench.device).to(bench.dtype) for _ in range(2))
        times = samples({"torch": lambda: a @ b}, bench.device)["torch"]
        bench.records.add("matmul", "torch", "ceiling", "TFLOP/s", {"side": side}, [2e-9 * side**3 / t for t in times])


def prefill(bench: Bench) -> None:
    """Forward, causal; V/N about 0.9 with T/N about 0.05, and the training mix V = T = N/2."""
    for shape in _shapes(bench):
        _time(bench, "forward", shape, dict.fromkeys(bench.providers((*SAR, *BASELINES)), _forward))


def training(bench: Bench) -> None:
    """Forward and backward of the same shapes; ``through`` is sav_grad=True."""
    for shape in _shapes(bench):
        makers = dict.fromkeys(bench.providers((*SAR, *BASELINES)), _forward_backward)
        makers |= {f"{n} through": _forward_backward for n in bench.providers(SAR[:2])}
        _time(bench, "forward+backward", shape, makers)


def short(bench: Bench) -> None:
    """Prefill too short to hide a launch; CUDA graphs on all sides."""
    lengths, batches = ((64,), (1,)) if bench.tiny else ((256, 512, 1024), (1, 16))
    for length in lengths:
        for batch in batches:
            shape = {"B": batch, "N": length, "H": 32, "Hkv": 8, "D": 128, "T": 0.1}
            makers = dict.fromkeys(bench.providers((*SAR, "plain-triton", "sdpa-flash", "sdpa-cudnn")), _graph)
            _time(bench, "forward, graph", shape, makers)


def scaling(bench: Bench) -> None:
    """Time and memory along each axis; looks for cliffs. ``T`` is a share of N, or with ``T tokens`` a number."""
    base = {"B": 1, "N": 4096, "H": 32, "Hkv": 8, "D": 128, "T": 0.05}
    if bench.tiny:
        axes: list[tuple[str, list[dict]]] = [("N", [{"N": 96}, {"N": 97}])]
        base |= {"N": 96, "H": 4, "Hkv": 2, "D": 32}
    else:
        tile = [{"N": n, "T tokens": 64} for n in (32 + 64 + v for v in (256, 1000, 1023, 1024, 1025, 10_000, 100_000))]
        axes = [
            ("N", [{"N": 2**e} for e in range(10, 18)]),
            ("V", tile),
            ("T", [{"T tokens": t} for t in (1, 2, 16, 63, 64, 65, 512, 2048)]),
            ("H", [{"H": h, "Hkv": min(8, h)} for h in (8, 16, 32, 64, 128)]),
            ("B", [{"B": b} for b in (1, 4, 16, 64)]),
        ]
    for axis, points in axes:
        for point in points:
            shape = {**base, **point}
            if "T tokens" in point:
                shape["T"] = point["T tokens"] / shape["N"]
            makers = dict.fromkeys(bench.providers(("sar-triton", "sar-auto", "plain-triton", "sdpa-flash")), _forward)
            _time(bench, f"scaling {axis}", shape, makers, memory=True)


PARTS = {"ceilings": ceilings, "prefill": prefill, "training": training, "short": short, "scaling": scaling}


def _shapes(bench: Bench) -> list[dict[str, Any]]:
    if bench.tiny:
        return [{"B": 1, "N": 96, "H": 4, "Hkv": 2, "D": 32, "T": text} for text in (0.05, 0.4)]
    return [
        {"B": 16384 // length, "N": length, "H": 32, "Hkv": 8, "D": head_dim, "T": text}
        for head_dim in (128, 64)
        for length in (2048, 4096, 8192, 16384)
        for text in (0.05, 0.5)
    ]


def _time(bench: Bench, mode: str, shape: dict[str, Any], makers: dict[str, Callable], *, memory: bool = False) -> None:
    """Time providers on one shape, those that have no record yet, in one interleaved run."""
    if not bench.records.missing("attention", mode, shape, makers):
        return  # ratios need one run: a shape is measured as a whole or not at all
    sizes = [shape[n] for n in ("B", "N", "H", "Hkv", "D")]
    inputs = make_inputs(*sizes, text=shape["T"], dtype=bench.dtype, device=bench.device)
    calls = {name: make(name, inputs, bench.device) for name, make in makers.items()}
    flops = 2 * shape["B"] * shape["H"] * shape["N"] ** 2 * shape["D"]  # two products, half of them masked
    flops *= 3.5 if "backward" in mode else 1
    for name, times in samples(calls, bench.device).items():
        more = {"tflops": flops / sorted(times)[len(times) // 2] * 1e-9}
        if memory:
            more["peak_extra_bytes"] = peak_extra_bytes(calls[name], bench.device)
        bench.records.add("attention", name, mode, "ms", shape, times, **more)


def _forward(name: str, inputs: tuple, device: str) -> Callable[[], object]:
    return lambda: PROVIDERS[name](*inputs)


def _graph(name: str, inputs: tuple, device: str) -> Callable[[], object]:
    return as_graph(_forward(name, inputs, device), device)


def _forward_backward(name: str, inputs: tuple, device: str) -> Callable[[], object]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    grad = torch.randn_like(inputs[0])
    run = PROVIDERS[name.removesuffix(" through")]
    if name.endswith(" through"):
        backend = name.removesuffix(" through").removeprefix("sar-")
        run = lambda *given: sar_attn_func(*given, backend=backend, sav_grad=True)
    return lambda: torch.autograd.grad(run(*leaves, *inputs[3:]), leaves, grad)
