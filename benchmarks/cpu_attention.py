"""CPU ratios of SAR attention: ours against plain SDPA and against the research code's eager formulation.

Prints, for fp32 and bf16 and two prompt lengths, times (median of interleaved repeats, one process) and the peak memory
that a call adds (one child process each). Every figure of a row is measured in this run; compare within a row only.

    python benchmarks/cpu_attention.py                     # prints the table
    python benchmarks/cpu_attention.py --json out.json     # also writes it, with versions and seed
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import platform
import statistics
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
from resident_memory import Call, extra_resident_bytes

from sar_fast import sar_attn_func
from sar_fast.lab.measure.eager import eager_sar_attention
from sar_fast.lab.measure.timing import attention_inputs, interleaved_times

HERE = Path(__file__).parent
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-VL-7B's attention
SHAPES = {704: 576, 3072: 2880}  # prompt length: visual tokens (LLaVA-1.5; LLaVA-NeXT)


def make_inputs(length: int, visual: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q (1, N, 28, 128), k and v (1, N, 4, 128), visual and text masks, prior: system text, image, question."""
    return attention_inputs(length, visual, dtype, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def sdpa(q, k, v, visual_mask, text_mask, prior):
    """Plain attention as transformers calls it: the floor."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


PROVIDERS = {
    "sdpa (no SAR)": sdpa,
    "sar composed": lambda *inputs: sar_attn_func(*inputs, backend="composed"),
    "sar torch": lambda *inputs: sar_attn_func(*inputs, backend="torch"),
    "sar eager": eager_sar_attention,
}


def _calls(name: str, length: int, visual: int, dtype: torch.dtype) -> tuple[Call, Call]:
    """A small call, and the one that is measured."""
    return tuple(functools.partial(_one, name, make_inputs(*sizes, dtype)) for sizes in ((64, 24), (length, visual)))


def _one(name: str, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [PROVIDERS[name](*inputs)]


def peak_extra_bytes(name: str, length: int, visual: int, dtype: torch.dtype) -> int:
    """Peak resident memory that one call adds, beyond its inputs and its output."""
    return extra_resident_bytes(_calls, name, length, visual, dtype)


def check(inputs: tuple) -> None:
    """Refuse to time a wrong answer: our output against the eager formulation in fp64."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    expected = eager_sar_attention(*wide)
    allowed = 2 * (eager_sar_attention(*inputs).double() - expected).abs().max() + 1e-5
    for name in ("sar composed", "sar torch"):
        error = (PROVIDERS[name](*inputs).double() - expected).abs().max()
        if error > allowed:
            raise SystemExit(
                f"{name}: error {error:.2e} against fp64 exceeds {allowed:.2e}; no timing of a wrong answer"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json", type=Path, help="also write the records here")
    args = parser.parse_args()

    records = []
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    print(f"H {HEADS}, Hkv {KV_HEADS}, D {HEAD_DIM}, causal, batch 1; time is the median of {args.repeats} rounds\n")
    print(
        f"{'N':>5} {'dtype':>9} {'provider':>14} {'ms':>9} {'x SDPA':>7} {'eager/x':>8} {'extra MB':>9} {'% eager':>8}"
    )
    for length in args.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            check(make_inputs(256, 192, dtype))
            inputs = make_inputs(length, SHAPES[length], dtype)
            calls = {name: functools.partial(run, *inputs) for name, run in PROVIDERS.items()}
            rounds = interleaved_times(calls, args.repeats)
            times = {name: statistics.median(seconds) for name, seconds in rounds.items()}
            extra = {name: peak_extra_bytes(name, length, SHAPES[length], dtype) for name in PROVIDERS}
            for name, seconds in times.items():
                record = {
                    "kernel": "sar_attention",
                    "provider": name,
                    "mode": "forward",
                    "shape": {"N": length, "V": SHAPES[length], "H": HEADS, "Hkv": KV_HEADS, "D": HEAD_DIM},
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds_p50": seconds * 1e3,
                    "times_sdpa": seconds / times["sdpa (no SAR)"],
                    "speedup_over_eager": times["sar eager"] / seconds,
                    "peak_extra_bytes": extra[name],
                    "peak_extra_of_eager": extra[name] / extra["sar eager"],
                }
                records.append(record)
                print(
                    f"{length:>5} {record['dtype']:>9} {name:>14} {seconds * 1e3:>9.1f} {record['times_sdpa']:>7.2f} "
                    f"{record['speedup_over_eager']:>8.2f} {extra[name] / 1e6:>9.1f} "
                    f"{100 * record['peak_extra_of_eager']:>7.1f}%"
                )
    if args.json:
        args.json.write_text(json.dumps({"meta": metadata(args.repeats), "records": records}, indent=2) + "\n")


def metadata(repeats: int) -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "script": "benchmarks/cpu_attention.py",
        "cpu": next((x.split(":")[1].strip() for x in cpu_lines if "model name" in x), platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "repeats": repeats,
        "seed": 0,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
