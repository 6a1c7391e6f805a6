"""Slices that time attention functions: ceilings, prefill, training, short prompts, scaling, and the other backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from providers import PROVIDERS, make_inputs, unavailable

from gpu_suite.bench import Bench
from gpu_suite.device import Call
from gpu_suite.inputs import Shape, attention_shapes, other_shapes, scaling_shapes, short_shapes, sizes
from sar_fast import sar_attn_func

PASSES = ("sar-triton", "plain-triton", "sdpa-flash", "sdpa-cudnn")


def ceilings(bench: Bench) -> None:
    """What the device can do: a large copy, a large matrix product on random data, and PyTorch's own attention."""
    elements, side = (1 << 20, 256) if bench.tiny else (1 << 31, 8192)
    on_device = {"device": bench.device.name}

    def copy() -> Call:
        source = torch.randint(0, 100, (elements,), dtype=torch.int8, **on_device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def matmul() -> Call:
        a, b = (torch.randn(side, side, dtype=bench.dtype, **on_device) for _ in range(2))
        return lambda: a @ b

    size = {"bytes": 2 * elements}
    bench.measure(
        "copy", "ceiling", size, {"torch": copy}, rates=lambda t: {"terabytes_per_second": 2e-9 * elements / t}
    )
    bench.measure(
        "matmul", "ceiling", {"side": side}, {"torch": matmul}, rates=lambda t: {"tflops": 2e-9 * side**3 / t}
    )
    for shape in attention_shapes(bench.tiny)[::2]:  # text plays no part
        shape = {k: v for k, v in shape.items() if k != "T"}
        inputs = inputs_of(bench, shape)
        names = available(bench, ("sdpa-flash", "sdpa-cudnn"))
        measure(bench, "library", shape, {n: partial(_call, n, inputs) for n in names}, seconds=0.03)
        measure(bench, "library, backward", shape, {n: partial(training, n, inputs) for n in names}, seconds=0.03)


def forward(bench: Bench) -> None:
    """Whole calls as graph replays, and every launch of a SAR call by events."""
    for shape in attention_shapes(bench.tiny):
        inputs = inputs_of(bench, shape)
        names = available(bench, PASSES)
        measure(bench, "forward", shape, {n: partial(graph_of, bench, n, inputs) for n in names}, timed="graph")
        launches(bench, "forward", shape, {"sar launches": partial(_forward_launches, inputs)})


def backward(bench: Bench) -> None:
    """Forward and backward of the same shapes, ``through`` with sav_grad=True; and every launch of the backward."""
    for shape in attention_shapes(bench.tiny):
        inputs = inputs_of(bench, shape)
        makers = {n: partial(training, n, inputs) for n in available(bench, PASSES)}
        makers["sar-triton through"] = partial(training, "sar-triton through", inputs)
        measure(bench, "forward+backward", shape, makers)
        both = {
            "sar launches": partial(_backward_launches, inputs, False),
            "sar through launches": partial(_backward_launches, inputs, True),
        }
        launches(bench, "backward", shape, both)


def short(bench: Bench) -> None:
    """Prefill too short to hide a launch; CUDA graphs on all sides."""
    for shape in short_shapes(bench.tiny):
        inputs = inputs_of(bench, shape)
        makers = {n: partial(graph_of, bench, n, inputs) for n in available(bench, PASSES)}
        measure(bench, "forward, graph", shape, makers, timed="graph")


def scaling(bench: Bench) -> None:
    """Time and memory along each axis; looks for cliffs."""
    for axis, shape in scaling_shapes(bench.tiny):
        inputs = inputs_of(bench, shape)
        makers = {n: partial(_call, n, inputs) for n in available(bench, PASSES[:3])}
        measure(bench, f"scaling {axis}", shape, makers, seconds=0.03, memory=True)


def others(bench: Bench) -> None:
    """What cannot be captured or takes long to compile: composed, auto, FlexAttention, flash-attn, by launches."""
    names = ("sar-triton", "sar-auto", "sar-composed", "flex", "flash-attn")
    for shape in other_shapes(bench.tiny):
        inputs = inputs_of(bench, shape)
        measure(bench, "forward, launched", shape, {n: partial(_call, n, inputs) for n in available(bench, names)})


def launches(bench: Bench, mode: str, shape: Shape, makers: dict[str, Callable]) -> None:
    """Milliseconds of every launch, one record a kernel; ``makers`` plan the launches and say which to time."""
    for provider, make in makers.items():
        if not bench.missing("launches", mode, shape, [provider]):
            continue
        bench.check_time()
        bench.trying("launches", mode, shape, [provider])
        reason = bench.withheld(provider, mode, shape)
        if reason is not None:
            bench.records.fail("launches", provider, mode, shape, reason, withheld=True)
            continue

        def run(make: Callable = make) -> list[tuple[str, list[float]]]:
            work = make()
            times = bench.device.launch_times([launch.run for launch in work], 0.05)
            return [(launch.kernel.__name__.removesuffix("_kernel"), t) for launch, t in zip(work, times)]

        found = bench.attempt("launches", provider, mode, shape, run)
        if found is not None:
            medians = {name: round(sorted(t)[len(t) // 2], 5) for name, t in found}
            total = [sum(parts) for parts in zip(*(t for _, t in found))]
            bench.records.add("launches", provider, mode, "ms", shape, total, by_kernel=medians)
        bench.device.release()


Inputs = Callable[[], tuple]


def inputs_of(bench: Bench, shape: Shape) -> Inputs:
    """Made once a shape, if something of it is still to be measured; drawn where it is used."""
    text = {"text": shape["T"]} if "T" in shape else {}
    return cache(lambda: make_inputs(*sizes(shape), **text, dtype=bench.dtype, device=bench.device.name))


def available(bench: Bench, names: Iterable[str]) -> list[str]:
    """Those that can run here; the others are named once."""
    found = []
    for name in names:
        reason = unavailable(name, bench.device.name)
        if reason is None:
            found.append(name)
        elif (name, reason) not in _TOLD:
            _TOLD.add((name, reason))
            print(f"without {name}: {reason}", flush=True)
    return found


_TOLD: set[tuple[str, str]] = set()


def measure(bench: Bench, mode: str, shape: Shape, makers: dict[str, Callable], **options: Any) -> None:
    """`Bench.measure` with the rate of an attention pass."""
    flops = 2 * shape["B"] * shape["H"] * shape["N"] ** 2 * shape["D"]  # two products, half of them masked
    flops *= 3.5 if "backward" in mode else 1
    bench.measure("attention", mode, shape, makers, rates=lambda t: {"tflops": flops / t * 1e-9}, **options)


def _call(name: str, inputs: Inputs) -> Call:
    given = inputs()
    return lambda: PROVIDERS[name](*given)


def graph_of(bench: Bench, name: str, inputs: Inputs) -> Call:
    return bench.device.graph(_call(name, inputs))


def training(name: str, inputs: Inputs) -> Call:
    *given, visual, text, prior = inputs()
    leaves = [x.detach().clone().requires_grad_() for x in given]
    grad = torch.randn_like(given[0])
    run = PROVIDERS[name.removesuffix(" through")]
    if name.endswith(" through"):
        run = partial(sar_attn_func, backend=name.removesuffix(" through").removeprefix("sar-"), sav_grad=True)
    return lambda: torch.autograd.grad(run(*leaves, visual, text, prior), leaves, grad)


def _kernel_call(inputs: Inputs):
    from sar_kernels.call import AttentionOptions, Call

    q, k, v, visual, text, prior = inputs()
    return Call(q, k, v, AttentionOptions(True, q.shape[-1] ** -0.5)), (visual, text, prior)


def _forward_launches(inputs: Inputs) -> list:
    """What a SAR forward launches, in order."""
    from sar_kernels.call import WeightOptions
    from sar_kernels.dense.plan import plan_sar_forward

    call, roles = _kernel_call(inputs)
    return plan_sar_forward(call, *roles, WeightOptions(0.5))[1]


def _backward_launches(inputs: Inputs, through: bool) -> list:
    """What a SAR backward launches, in order; the forward that it needs has run."""
    from sar_kernels.call import WeightOptions
    from sar_kernels.dense.plan import Through, plan_backward, plan_sar_forward
    from sar_kernels.launch import run_all

    call, roles = _kernel_call(inputs)
    weights = WeightOptions(0.5)
    (out, lse, av, sa, c, count), work = plan_sar_forward(call, *roles, weights)
    run_all(work)
    zeros = [torch.zeros_like(x) for x in (av, sa, c)]  # as autograd hands them along
    kept = Through(*roles, weights, av, sa, count, *zeros) if through else None
    return plan_backward(call, torch.randn_like(out), out, lse, c, kept)[1]


def statistics_launches(inputs: Inputs) -> list:
    """What statistics from another library's log-sum-exp launch, and the scaling of its output."""
    from sar_kernels.attention import attention_forward
    from sar_kernels.call import WeightOptions
    from sar_kernels.dense.beside import plan_scale
    from sar_kernels.dense.plan import plan_attention_statistics

    call, roles = _kernel_call(inputs)
    out, lse = attention_forward(call.q, call.k, call.v, options=call.options)
    (_, _, c, count), work = plan_attention_statistics(call, lse, *roles, WeightOptions(0.5))
    return [*work, plan_scale(call, out, c, count)]
