"""Ahead-of-time check: compiles every kernel variant that the configurations can choose, without a GPU.

    python -m sar_kernels.aot [--arch sm_90 ...] [--head-dim 64 ...] [--dtype bfloat16] [--kernel forward ...] [--json]

Prints registers per thread, spilled bytes per thread, shared memory per block, blocks resident per multiprocessor, and
whether the tensor cores are driven by wgmma. The launches are the very ones that a call on a GPU would make, planned on
tensors that have no memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.configs import SHARED_MEMORY_LIMIT, SHORT, KernelConfig
from sar_kernels.launch import Launch
from sar_kernels.plan import Through, plan_attention_forward, plan_backward, plan_sar_forward

ARCHS = ("sm_80", "sm_90", "gfx942")
HEAD_DIMS = (64, 128, 256)
PASSES = ("attention", "sar", "sar_sav_grad")
REGISTERS = 65536  # per NVIDIA multiprocessor
OPTIONS = ("window", "softcap", "padding", "packed")


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: what it is for, how it is tiled, and what the compiler made of it."""

    arch: str
    kernel: str
    purpose: str  # "attention", "sar" (c constant in backward) or "sar_sav_grad"
    head_dim: int
    dtype: str
    causal: bool
    options: tuple[str, ...]
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    wgmma: bool = False
    blocks_per_sm: int = 0  # by registers, shared memory and threads; 0 where not computed (AMD)


def target_of(arch: str) -> GPUTarget:
    """Triton's name for "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compiles a launch as the just-in-time compiler would on that device, given 16-byte aligned pointers."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = triton.runtime.jit.mangle_type(value)
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.compiler_options())


def plan(
    arch: str,
    purpose: str,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    seqlen: int,
    options: tuple[str, ...] = (),
    configs: Mapping[str, KernelConfig] | None = None,
) -> list[Launch]:
    """All launches of a forward and a backward call on memory-less tensors."""
    batch, heads, kv_heads = 2, 32, 8
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    packed = "packed" in options
    tokens = (batch * seqlen,) if packed else (batch, seqlen)
    q, dout = empty(*tokens, heads, head_dim), empty(*tokens, heads, head_dim)
    k, v = empty(*tokens, kv_heads, head_dim), empty(*tokens, kv_heads, head_dim)
    mask = empty(*tokens, dtype=torch.bool)
    cu = empty(batch + 1, dtype=torch.int32) if packed else None
    window = (1024, -1) if "window" in options else (-1, -1)
    attention = AttentionOptions(causal, head_dim**-0.5, window, 30.0 if "softcap" in options else 0.0)
    padding = mask if "padding" in options else None
    longest = seqlen if packed else None
    call = Call(q, k, v, attention, padding, cu, cu, longest, longest, arch=arch, configs=configs)
    if purpose == "attention":
        (out, lse), launches = plan_attention_forward(call)
        return launches + plan_backward(call, dout, out, lse)[1]
    weights = WeightOptions(0.5)
    prior = empty(*tokens, dtype=torch.float32)
    (out, lse, av, sa, c, count), launches = plan_sar_forward(call, mask, mask, prior, weights)
    through = Through(mask, mask, prior, weights, av, sa, count) if purpose == "sar_sav_grad" else None
    return launches + plan_backward(call, dout, out, lse, c, through)[1]


def variants(
    archs=ARCHS, head_dims=HEAD_DIMS, dtypes=(torch.bfloat16,), kernels=None, options=()
) -> Iterator[tuple[Variant, tuple]]:
    """Every distinct variant with the arguments of `plan` that lead to it."""
    seen = set()
    for where in itertools.product(archs, PASSES, head_dims, dtypes, (True, False), (SHORT, 8 * SHORT), [options]):
        for launch in plan(*where):
            variant, key = _describe(launch, *where), _compile_key(launch, where[0])
            if key not in seen and (kernels is None or variant.kernel in kernels):
                seen.add(key)
                yield variant, where


def _describe(launch: Launch, arch, purpose, head_dim, dtype, causal, seqlen, options) -> Variant:
    block = launch.arguments.get("BLOCK", 0)
    return Variant(
        arch=arch,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        purpose=purpose,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        causal=causal,
        options=options,
        block_m=launch.arguments.get("BLOCK_M", block),
        block_n=launch.arguments.get("BLOCK_N", 0),
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
    )


def _compile_key(launch: Launch, arch: str) -> tuple:
    """What tells two compiled kernels apart."""
    values = ((p, launch.arguments[p.name]) for p in launch.kernel.params)
    constants = tuple(str(value) for p, value in values if p.is_constexpr or value is None)
    dtypes = tuple(a.dtype for a in launch.arguments.values() if isinstance(a, torch.Tensor))
    return arch, launch.kernel.__name__, constants, dtypes, launch.config


def measure(variant: Variant, where: tuple) -> Variant:
    """Compiles one variant and reads the compiler's figures."""
    launch = next(x for x in plan(*where) if _describe(x, *where) == variant)
    compiled = compile_launch(launch, target_of(variant.arch))
    shared = compiled.metadata.shared
    if variant.arch.startswith("sm_"):
        registers, spills = _cuda_usage(compiled.asm["cubin"])
        wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
        threads = 32 * variant.num_warps
        by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        limit = SHARED_MEMORY_LIMIT[variant.arch]
        resident = min(by_registers, (limit + 1024) // (shared + 1024), 2048 // threads)
    else:
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
        wgmma, resident = False, 0
    return replace(
        variant,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        wgmma=wgmma,
        blocks_per_sm=resident,
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread; the kernels have no stack but what the register allocator spills."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes per thread."""
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]), 4 * int(spilled[1])


def measure_all(work: list[tuple[Variant, tuple]], jobs: int | None = None) -> list[Variant]:
    """Compiles in parallel processes, results in order."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(measure, *zip(*work))) if work else []


def table(rows: list[Variant]) -> str:
    """The figures as an aligned text table."""
    columns = "arch kernel purpose head_dim dtype causal options tile warps stages regs spill shared blocks/SM wgmma"
    cells = [columns.split(" ")]
    for r in rows:
        what = (r.arch, r.kernel, r.purpose, r.head_dim, r.dtype, r.causal, "+".join(r.options) or "-")
        how = (f"{r.block_m}x{r.block_n}", r.num_warps, r.num_stages)
        cells.append([*what, *how, r.registers, r.spill_bytes, r.shared_bytes, r.blocks_per_sm, r.wgmma])
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip() for row in cells)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if a kernel needs more shared memory than its device has."""
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--kernel", nargs="+", help="forward, dq, dkdv, statistics, delta, ...")
    parser.add_argument("--options", nargs="+", default=(), choices=OPTIONS, help="compile with these switched on")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    dtypes = [getattr(torch, name) for name in args.dtype]
    rows = measure_all(list(variants(args.arch, args.head_dim, dtypes, args.kernel, tuple(args.options))), args.jobs)
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else table(rows))
    return int(any(r.shared_bytes > SHARED_MEMORY_LIMIT[r.arch] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
