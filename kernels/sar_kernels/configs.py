"""Tile sizes, warps and pipeline stages: frozen values chosen by a pure function of what the compiler sees.

Nothing is tuned at run time. The rows below were chosen by compiling ahead of time for registers, spills and shared
memory (`python -m sar_kernels.tools.aot`); `python -m sar_kernels.tools.tune` measures on a GPU and writes better ones
to `tuned.json` beside this file, which take precedence.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

TUNED = Path(__file__).with_name("tuned.json")
CLOSED_FORM = 8192  # keys from which the variance's closed form pays; see kernels/README.md
SHORT = 512  # queries; below this the grid is small and smaller row blocks fill more multiprocessors

KERNELS = ("forward", "statistics", "dq", "dkdv", "second_moments")

SHARED_MEMORY_LIMIT = {  # bytes that one thread block can use
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_87": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_103": 227 * 1024,
    "sm_120": 99 * 1024,
    "sm_121": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
LIKE_HOPPER = ("sm_90", "sm_100", "sm_103")  # these take its tiles


@dataclass(frozen=True)
class KernelConfig:
    """Rows and keys per tile, warps, and stages of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # per thread, where the compiler's own choice costs a resident block (NVIDIA)


SMALL = KernelConfig(0, 0, 4, 1)  # kernels without matrix products


def padded_head_dim(head_dim: int) -> int:
    """The power of two, 16 or more, that a head dimension is padded to inside the kernels."""
    return max(16, 1 << (head_dim - 1).bit_length())


def length_class(max_seqlen_q: int) -> str:
    """ "short" or "long": the only thing about the length that may choose another kernel."""
    return "short" if max_seqlen_q <= SHORT else "long"


def has_closed_form(max_seqlen_k: int, softcap: float) -> bool:
    """Whether the forward with statistics takes the variance of rows that see all of V from second moments."""
    return max_seqlen_k >= CLOSED_FORM and softcap == 0


@functools.cache
def device_arch(device: torch.device) -> str:
    """ "sm_90", "gfx942", ..., or "cpu" (the interpreter)."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise ValueError(f"device: got {device}, need a CUDA, ROCm or (with TRITON_INTERPRET=1) CPU tensor")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def tuned() -> dict[str, KernelConfig]:
    """What the tuner measured, by `config_key` and `decode_configs.decode_config_key`."""
    if not TUNED.exists():
        return {}
    return {key: KernelConfig(**value) for key, value in json.loads(TUNED.read_text())["configs"].items()}


def config_key(kernel: str, arch: str, head_dim: int, dtype: torch.dtype, causal: bool, sav: bool, length: str) -> str:
    """The name of one choice in `tuned.json`."""
    name = str(dtype).removeprefix("torch.")
    return f"{kernel}/{arch}/{head_dim}/{name}/{'causal' if causal else 'full'}/{'sav' if sav else 'plain'}/{length}"


@functools.cache
def choose(
    kernel: str,
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    causal: bool,
    sav: bool,
    length: str,
    padded_and_capped: bool = False,
    bits: bool = False,
) -> KernelConfig:
    """The configuration of one kernel, one of KERNELS; second_moments has dims for rows.

    head_dim is the padded one (the larger of D and DV); sav says whether the kernel carries the statistics (forward)
    or their gradient (dq, dkdv). The forward kernel's choice must not depend on it: a sample without text queries has
    to give plain attention's bits, and so needs plain attention's tiles. padded_and_capped lifts the limit on
    registers: with padding, a soft cap and statistics it spills 160 bytes, and a resident block is the lesser loss.
    bits, a packed mask, halves the key block of dkdv and dq, which spill 300 and 96 bytes with its words.
    """
    if padded_and_capped or bits:
        config = choose(kernel, arch, head_dim, dtype, causal=causal, sav=sav, length=length)
        if padded_and_capped:
            config = replace(config, max_registers=None)
        if bits and kernel in ("dkdv", "dq"):
            config = replace(config, block_n=max(16, config.block_n // 2))
        return config
    if kernel == "forward":
        sav = False
    measured = tuned().get(config_key(kernel, arch, head_dim, dtype, causal, sav, length))
    if measured is not None:
        return measured
    if arch == "cpu":  # the interpreter: small and unequal tiles, so that short sequences cross their edges
        return _INTERPRETED.get(kernel, KernelConfig(64, 32, 4, 1))
    if dtype in (torch.float32, torch.float64):
        return _rule_32bit(kernel, head_dim)
    return _RULES[kernel](arch, head_dim, sav)


def _family(arch: str) -> str:
    """The architecture whose tiles this one takes."""
    if arch.startswith("gfx"):
        return "gfx"
    return "sm_90" if arch in LIKE_HOPPER else "sm_80"  # sm_86, sm_89, sm_120: 99 KiB, like sm_80


def _table(rows: dict[tuple, KernelConfig]):
    def rule(arch: str, head_dim: int, sav: bool) -> KernelConfig:
        key = _family(arch), max(head_dim, 64)
        return rows.get((*key, sav)) or rows[key]

    return rule


# (family, padded head dim) or (family, padded head dim, sav): 16-bit inputs
_FORWARD = {
    # 168 registers: three blocks per multiprocessor, with the statistics as without; three stages spill on Triton 3.6
    ("sm_90", 64): KernelConfig(64, 64, 4, 2, max_registers=168),
    ("sm_90", 128): KernelConfig(128, 64, 8, 3),
    ("sm_90", 256): KernelConfig(128, 32, 8, 2),
    ("sm_80", 64): KernelConfig(128, 64, 8, 2),
    ("sm_80", 128): KernelConfig(128, 32, 8, 2),
    ("sm_80", 256): KernelConfig(64, 32, 8, 2),
    ("gfx", 64): KernelConfig(128, 64, 4, 1),
    ("gfx", 128): KernelConfig(128, 32, 4, 1),
    ("gfx", 256): KernelConfig(64, 32, 4, 1),
}
_STATISTICS = {
    ("sm_90", 64): KernelConfig(64, 64, 4, 2),
    ("sm_90", 128): KernelConfig(64, 64, 4, 2),
    ("sm_90", 256): KernelConfig(64, 64, 8, 2),
    ("sm_80", 64): KernelConfig(64, 64, 4, 2),
    ("sm_80", 128): KernelConfig(64, 64, 8, 2),
    ("sm_80", 256): KernelConfig(64, 64, 8, 1),
    ("gfx", 64): KernelConfig(64, 64, 4, 1),
    ("gfx", 128): KernelConfig(64, 64, 4, 1),
    ("gfx", 256): KernelConfig(64, 32, 4, 1),
}
_DQ = {
    ("sm_90", 64): KernelConfig(128, 64, 8, 2),
    ("sm_90", 128): KernelConfig(128, 64, 8, 2),
    ("sm_90", 256): KernelConfig(64, 32, 8, 2),
    ("sm_90", 256, True): KernelConfig(128, 16, 8, 2),
    ("sm_80", 64): KernelConfig(128, 64, 8, 2),
    ("sm_80", 64, True): KernelConfig(128, 32, 8, 2),
    ("sm_80", 128): KernelConfig(64, 64, 8, 2),
    ("sm_80", 256): KernelConfig(64, 32, 8, 1),
    ("gfx", 64): KernelConfig(64, 64, 4, 1),
    ("gfx", 128): KernelConfig(64, 32, 4, 1),
    ("gfx", 256): KernelConfig(64, 32, 4, 1),
}
_DKDV = {
    ("sm_90", 64): KernelConfig(64, 128, 8, 2),
    ("sm_90", 64, True): KernelConfig(32, 128, 8, 2),
    ("sm_90", 128): KernelConfig(32, 128, 8, 2),
    ("sm_90", 256): KernelConfig(32, 64, 8, 2),
    ("sm_90", 256, True): KernelConfig(64, 32, 8, 2),
    ("sm_80", 64): KernelConfig(32, 128, 8, 2),  # 64x64 with Triton 3.6 spills 56 to 72 bytes
    ("sm_80", 128): KernelConfig(64, 64, 8, 2),
    ("sm_80", 256): KernelConfig(32, 32, 8, 2),
    ("gfx", 64): KernelConfig(32, 64, 4, 1),
    ("gfx", 128): KernelConfig(32, 64, 4, 1),
    ("gfx", 256): KernelConfig(32, 64, 4, 1),
}
_SECOND_MOMENTS = {
    ("sm_90", 64): KernelConfig(64, 64, 4, 2),
    ("sm_90", 128): KernelConfig(64, 64, 8, 2),
    ("sm_90", 256): KernelConfig(32, 64, 8, 2),
    ("sm_80", 64): KernelConfig(64, 64, 4, 2),
    ("sm_80", 128): KernelConfig(64, 32, 8, 2),
    ("sm_80", 256): KernelConfig(32, 32, 8, 2),
    ("gfx", 64): KernelConfig(64, 32, 4, 1),
    ("gfx", 128): KernelConfig(32, 32, 4, 1),
    ("gfx", 256): KernelConfig(32, 32, 8, 1),
}
_RULES = {name: _table(rows) for name, rows in zip(KERNELS, (_FORWARD, _STATISTICS, _DQ, _DKDV, _SECOND_MOMENTS))}
_INTERPRETED = {"dkdv": KernelConfig(32, 64, 4, 1), "second_moments": KernelConfig(16, 32, 4, 1)}


def closed_variance_config(arch: str) -> KernelConfig:
    """The closed variance's: left alone, NVIDIA's compiler may spill a few bytes to make room for more blocks."""
    return KernelConfig(0, 0, 4, 1, max_registers=168 if arch.startswith("sm_") else None)


def _rule_32bit(kernel: str, head_dim: int) -> KernelConfig:
    """fp32 inputs: exact products run on the plain units, twice the bytes. For correctness rather than speed."""
    small = 32 if head_dim <= 128 else 16
    return KernelConfig(small, small, 4, 1) if kernel == "dkdv" else KernelConfig(32, small, 4, 1)
