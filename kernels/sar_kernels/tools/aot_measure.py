"""Compiling one launch for a GPU that is not there, and reading what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sar_kernels.configs import SHARED_MEMORY_LIMIT
from sar_kernels.launch import Launch

REGISTERS = 65536  # per NVIDIA multiprocessor
MAX_THREADS = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100", "sm_103"), 2048),
    **dict.fromkeys(("sm_86", "sm_87", "sm_89", "sm_120", "sm_121"), 1536),
}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: what it is for, how it is tiled, and what the compiler made of it."""

    arch: str
    kernel: str
    purpose: str  # "attention", "sar" (c constant in backward) or "sar_sav_grad"; decode: its mode
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
    wgmma_serialized: bool = False  # every wgmma waits for the one before it: ptxas found no other safe way
    blocks_per_sm: int = 0  # by registers, shared memory and threads; 0 where not computed (AMD)
    instructions: int = 0  # of the whole kernel, as often as they are written; 0 likewise
    loops: tuple[int, ...] = ()  # instructions of each innermost loop, in the kernel's order
    loop_spills: int = 0  # those of them that load or store what was spilled; others do so once a program


def target_of(arch: str) -> GPUTarget:
    """Triton's name for "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """Compiles a launch as the just-in-time compiler would on that device, given 16-byte aligned pointers."""
    source = ASTSource(launch.kernel, *specialization(launch))
    return triton.compile(source, target=target, options=launch.compiler_options())


def specialization(launch: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes): all that the compiler is told of a launch's arguments."""
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
    return signature, constants, attributes


def describe(
    launch: Launch, arch: str, purpose: str, head_dim: int, dtype: torch.dtype, causal: bool, options
) -> Variant:
    """A launch's name and tiles; the compiler's figures are still missing."""
    return Variant(
        arch=arch,
        kernel=launch.kernel.__name__.removesuffix("_kernel"),
        purpose=purpose,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        causal=causal,
        options=options,
        block_m=launch.arguments.get("BLOCK_M", launch.arguments.get("BLOCK", 0)),
        block_n=launch.arguments.get("BLOCK_N", 0),
        num_warps=launch.config.num_warps,
        num_stages=launch.config.num_stages,
    )


def compile_key(launch: Launch, arch: str) -> tuple:
    """What tells two compiled kernels apart: every argument's type and specialization, and the configuration."""
    return arch, launch.kernel.__name__, *map(str, specialization(launch)), launch.config


def measure(variant: Variant, launch: Launch) -> Variant:
    """Compiles one variant and reads the compiler's figures."""
    compiled = compile_launch(launch, target_of(variant.arch))
    shared = compiled.metadata.shared
    if variant.arch.startswith("sm_"):
        registers, spills = _cuda_usage(compiled.asm["cubin"])
        assembly = _cuobjdump("-sass", compiled.asm["cubin"])
        instructions, loops, loop_spills = count_instructions(assembly)
        wgmma = "wgmma.mma_async" in compiled.asm["ptx"]
        serialized = wgmma and _is_serialized(assembly)
        threads = 32 * variant.num_warps
        by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        limit = SHARED_MEMORY_LIMIT[variant.arch]
        resident = min(by_registers, (limit + 1024) // (shared + 1024), MAX_THREADS[variant.arch] // threads)
    else:
        registers, spills = _amd_usage(compiled.asm["amdgcn"])
        wgmma, serialized, resident, instructions, loops, loop_spills = False, False, 0, 0, (), 0
    return replace(
        variant,
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        wgmma=wgmma,
        wgmma_serialized=serialized,
        blocks_per_sm=resident,
        instructions=instructions,
        loops=loops,
        loop_spills=loop_spills,
    )


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread; the kernels have no stack but what the register allocator spills."""
    text = _cuobjdump("-res-usage", cubin)
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def count_instructions(assembly: str) -> tuple[int, tuple[int, ...], int]:
    """Instructions of a kernel's disassembly, of each loop without a loop in it, and the spills in those.

    A loop is what lies between a branch back and its target.
    """
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly, re.MULTILINE)
    place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (_, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        start = place.get(int(branch[1], 16), i) if branch else i
        if start < i:
            loops.append((start, i))
    holds = lambda outer, inner: outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]
    innermost = [loop for loop in loops if not any(holds(loop, other) for other in loops)]
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", lines[i][1])) for a, b in innermost for i in range(a, b + 1))
    return len(lines), tuple(end - start + 1 for start, end in sorted(innermost)), spills


def _is_serialized(assembly: str) -> bool:
    """Whether each wgmma is fenced by itself; those of one product, from head dimension 64 on, should share a fence."""
    return assembly.count("WARPGROUP.ARRIVE") >= assembly.count("HGMMA")


def _cuobjdump(option: str, cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled bytes per thread."""
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    return int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]), 4 * int(spilled[1])


def table(rows: list[Variant]) -> str:
    """The figures as an aligned text table."""
    columns = "arch kernel purpose head_dim dtype causal options tile warps stages regs spill shared blocks/SM wgmma"
    cells = [[*columns.split(" "), "instructions", "loops"]]
    for r in rows:
        what = (r.arch, r.kernel, r.purpose, r.head_dim, r.dtype, r.causal, "+".join(r.options) or "-")
        how = (f"{r.block_m}x{r.block_n}", r.num_warps, r.num_stages)
        made = (r.registers, r.spill_bytes, r.shared_bytes, r.blocks_per_sm, r.wgmma, r.instructions)
        cells.append([*what, *how, *made, "+".join(map(str, r.loops)) or "-"])
    widths = [max(len(str(row[i])) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(str(x).ljust(w) for x, w in zip(row, widths)).rstrip() for row in cells)
