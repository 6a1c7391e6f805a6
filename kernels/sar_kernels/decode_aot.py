"""The decode kernels' part of the ahead-of-time check (see `sar_kernels.aot`).

python -m sar_kernels.decode_aot [--arch sm_90 ...] [--head-dim 64 ...] [--mode running ...] [--short] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from sar_kernels.aot import ARCHS, HEAD_DIMS, Variant, _amd_usage, _cuda_usage, compile_launch, table, target_of
from sar_kernels.cache import plan_append
from sar_kernels.call import AttentionOptions, WeightOptions
from sar_kernels.configs import SHARED_MEMORY_LIMIT
from sar_kernels.decode_plan import DecodeCall
from sar_kernels.launch import Launch

MODES = ("plain", "running", "step", "prompt")
# Queries and page size (0 = contiguous), with and without window and soft cap
CASES = ((1, 0, ()), (8, 0, ()), (1, 16, ()), (1, 256, ()), (1, 0, ("window", "softcap")))


def plan(arch: str, mode: str, head_dim: int, seqlen_q: int, page: int, options: tuple[str, ...]) -> list[Launch]:
    """All launches of a decode step, with the cache write, on memory-less tensors."""
    batch, heads, kv_heads, capacity = 2, 32, 8, 4096
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    floats = lambda *shape: empty(*shape, dtype=torch.float32)
    q, new = empty(batch, seqlen_q, heads, head_dim), empty(batch, seqlen_q, kv_heads, head_dim)
    rows = (batch * capacity // page, page) if page else (batch, capacity)
    k, v = empty(*rows, kv_heads, head_dim), empty(*rows, kv_heads, head_dim)
    lengths = empty(batch, dtype=torch.int32)
    block_table = empty(batch, capacity // page, dtype=torch.int32) if page else None
    window = (1024, -1) if "window" in options else (-1, -1)
    attention = AttentionOptions(True, head_dim**-0.5, window, 30.0 if "softcap" in options else 0.0)
    call = DecodeCall(q, k, v, lengths, attention, block_table, arch=arch, sm_count=132)
    if mode != "plain":
        call.set_state(floats(batch, heads), floats(batch, heads), floats(batch), floats(batch, heads))
        visual, text = empty(batch, capacity, dtype=torch.bool), empty(batch, seqlen_q, dtype=torch.bool)
        call.set_roles(visual, text, floats(batch, capacity))
    write = plan_append(k, v, new, new, lengths, block_table)[:1] if mode == "plain" else []
    return write + call.plan(mode, WeightOptions(0.5))


def variants(archs=ARCHS, head_dims=HEAD_DIMS, modes=MODES, cases=CASES) -> Iterator[tuple[Variant, Launch]]:
    """Every variant with its launch."""
    for arch, head_dim, mode, (seqlen_q, page, options) in itertools.product(archs, head_dims, modes, cases):
        for launch in plan(arch, mode, head_dim, seqlen_q, page, options):
            yield (
                Variant(
                    arch=arch,
                    kernel=launch.kernel.__name__.removesuffix("_kernel"),
                    purpose=mode,
                    head_dim=head_dim,
                    dtype="bfloat16",
                    causal=True,
                    options=(f"q{seqlen_q}", *([f"page{page}"] if page else []), *options),
                    block_m=launch.arguments.get("BLOCK_M", 0),
                    block_n=launch.arguments.get("BLOCK_N", 0),
                    num_warps=launch.config.num_warps,
                    num_stages=launch.config.num_stages,
                ),
                launch,
            )


def measure(variant: Variant, launch: Launch) -> Variant:
    """Compiles one variant and reads the compiler's figures."""
    compiled = compile_launch(launch, target_of(variant.arch))
    usage = _cuda_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd_usage(compiled.asm["amdgcn"])
    return replace(variant, registers=usage[0], spill_bytes=usage[1], shared_bytes=compiled.metadata.shared)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if a kernel needs more shared memory than its device has."""
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.decode_aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--short", action="store_true", help="one query, contiguous cache, no window, no soft cap")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    work = variants(args.arch, args.head_dim, args.mode, CASES[:1] if args.short else CASES)
    rows = [measure(*item) for item in work]
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else table(rows))
    return int(any(r.shared_bytes > SHARED_MEMORY_LIMIT[r.arch] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
