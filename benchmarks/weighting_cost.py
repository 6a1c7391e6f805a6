"""What a rule costs: plain attention, the paper's rule inside the backend, and rules that run in Python, side by side.

Prints times and the peak memory that a call adds, of a forward pass and of forward and backward, and their ratios to
plain attention and to the paper's rule inside the backend. Rounds are interleaved, a ratio is the median over rounds. A
CPU's times are those of one thread's processor; a GPU is waited for after each call, so launches count.

    python benchmarks/weighting_cost.py                     # prints the table
    python benchmarks/weighting_cost.py --json out.json     # also writes it, with versions and load
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_attention import metadata
from providers import make_inputs
from resident_memory import Call, extra_resident_bytes
from torch import Tensor, nn

from sar_fast import flash_attn_func, sar_attn_func
from sar_fast.lab.measure.timing import interleaved_times
from sar_fast.reference import sar_attention_reference
from sar_fast.weighting import Fixed, HeadScales, SoftmaxOverHeads, Statistics, SuppressHeads, TopHeads, Weighting

HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-VL-7B's attention
LENGTHS = {"cpu": [512, 2048], "cuda": [2048, 4096, 8192, 16384]}
BACKENDS = {"cpu": "composed", "cuda": "triton"}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
BETA = 0.02  # weights that differ: SA is of the order 1 / |V|
PLAIN, INSIDE = "plain attention", "SoftmaxOverHeads, inside"
FORWARD, TRAINING, THROUGH = "forward", "forward + backward", "forward + backward, sav_grad"


def _in_python(statistics: Statistics, layer: int | None) -> Tensor:
    return SoftmaxOverHeads(BETA)(statistics)


RULES: dict[str, Callable[[str], Weighting]] = {
    INSIDE: lambda device: SoftmaxOverHeads(BETA),
    "SoftmaxOverHeads, in Python": lambda device: _in_python,
    "Fixed": lambda device: Fixed(torch.linspace(0, 2, HEADS, device=device)),
    "HeadScales, learned": lambda device: HeadScales(1, HEADS).to(device),
    "SuppressHeads": lambda device: SuppressHeads(),
    "TopHeads by entropy": lambda device: TopHeads(0.5, 0.1, by="entropy"),
}
MODES = {FORWARD: (PLAIN, *RULES), TRAINING: (PLAIN, *RULES), THROUGH: (PLAIN, *list(RULES)[:2])}


def make_call(name: str, mode: str, length: int, device: str, backend: str) -> Call:
    """A provider's call on a prompt of a picture and a question, 5 % of ``length`` tokens: out, and gradients."""
    inputs = make_inputs(1, length, HEADS, KV_HEADS, HEAD_DIM, dtype=DTYPES[device], device=device)
    rule = None if name == PLAIN else RULES[name](device)
    parameters = list(rule.parameters()) if isinstance(rule, nn.Module) else []

    def forward() -> Tensor:
        if rule is None:
            return flash_attn_func(*inputs[:3], causal=True, backend=backend)
        return sar_attn_func(*inputs, weighting=rule, sav_grad=mode == THROUGH, backend=backend)

    def run() -> list[Tensor]:
        if mode == FORWARD:
            with torch.no_grad():
                return [forward()]
        out = forward()
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    leaves = [] if mode == FORWARD else [x.requires_grad_() for x in inputs[:3]] + parameters
    upstream = torch.randn_like(inputs[0])
    return run


def _calls(name: str, mode: str, length: int, backend: str) -> tuple[Call, Call]:
    return tuple(make_call(name, mode, n, "cpu", backend) for n in (64, length))


def peak_extra_bytes(name: str, mode: str, length: int, device: str, backend: str) -> int:
    """Peak memory that one call adds, beyond its inputs and what it returns."""
    if device == "cpu":
        return extra_resident_bytes(_calls, name, mode, length, backend)
    call = make_call(name, mode, length, device, backend)
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)


def check(device: str, backend: str) -> None:
    """Refuse to time a wrong answer: outputs against fp64 attention times the weights, weights against the reference's,
    which computes all but row statistics."""
    inputs = make_inputs(1, 192, HEADS, KV_HEADS, HEAD_DIM, dtype=DTYPES[device], device=device)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    attention, rounded = (sar_attention_reference(*x, weighting=Fixed(torch.ones(HEADS))) for x in (wide, inputs))
    allowed = 2 * (rounded.double() - attention).abs().max() + 1e-5
    for name, make in RULES.items():
        rule = make(device)
        with torch.no_grad():
            out, stats = sar_attn_func(*inputs, weighting=rule, backend=backend, return_stats=True)
        c = stats.head_weights.double()
        error = (out.double() - c[:, None, :, None] * attention).abs().max() / max(1, c.max())
        wrong = 0.0
        if not hasattr(rule, "row_statistics"):
            _, exact = sar_attention_reference(*wide, weighting=rule, return_stats=True)
            wrong = ((c - exact.head_weights).abs() / exact.head_weights.abs().clamp_min(1e-3)).max()
        if not (error <= allowed and wrong <= 1e-3):
            raise SystemExit(f"{name}: output off by {error:.1e}, weights by {wrong:.1e}; no timing of a wrong answer")


def measure(mode: str, length: int, repeats: int, device: str, backend: str) -> list[dict[str, object]]:
    """One record per provider."""
    calls = {name: make_call(name, mode, length, device, backend) for name in MODES[mode]}
    clock = time.process_time if device == "cpu" else time.perf_counter
    rounds = interleaved_times(calls, repeats, clock)
    del calls
    ratio = lambda name, base: statistics.median(a / b for a, b in zip(rounds[name], rounds[base]))
    records = []
    for name in MODES[mode]:
        records.append(
            {
                "benchmark": "weighting_cost",
                "provider": name,
                "mode": mode,
                "shape": {"N": length, "H": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM, "text": 0.05},
                "dtype": str(DTYPES[device]).removeprefix("torch."),
                "backend": backend,
                "milliseconds_p50": statistics.median(rounds[name]) * 1e3,
                "times_plain": ratio(name, PLAIN),
                "times_inside": ratio(name, INSIDE),
                "peak_extra_bytes": peak_extra_bytes(name, mode, length, device, backend),
            }
        )
    return records


def main(arguments: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS[device], help="tokens of a prompt")
    parser.add_argument("--backend", default=BACKENDS[device], help=f"here {BACKENDS[device]} by default")
    parser.add_argument("--json", type=Path, help="also write the records here")
    args = parser.parse_args(arguments)

    if device == "cpu":
        torch.set_num_threads(1)
    check(device, args.backend)
    load, records = os.getloadavg()[0], []
    print(f"torch {torch.__version__}, {device}, {args.backend}, load {load:.1f} on {os.cpu_count()} cores")
    print(f"H {HEADS}, Hkv {KV_HEADS}, D {HEAD_DIM}, {DTYPES[device]}, causal; median of {args.repeats} rounds\n")
    print(f"{'N':>6} {'mode':>28} {'rule':>28} {'ms':>9} {'x plain':>8} {'x inside':>9} {'extra MB':>9}")
    for length, mode in ((length, mode) for length in args.lengths for mode in MODES):
        for r in measure(mode, length, args.repeats, device, args.backend):
            records.append(r)
            print(
                f"{length:>6} {mode:>28} {r['provider']:>28} {r['milliseconds_p50']:>9.1f} {r['times_plain']:>8.2f} "
                f"{r['times_inside']:>9.2f} {r['peak_extra_bytes'] / 1e6:>9.1f}",
                flush=True,
            )
    if args.json:
        meta = metadata(args.repeats) | {"script": "benchmarks/weighting_cost.py", "load_average": load}
        meta |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device == "cuda" else {}
        args.json.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
