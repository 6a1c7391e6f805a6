"""Which configurations are worth measuring: those that the compiler makes something clean of. Needs no GPU.

    python -m sar_kernels.tools.shortlist --arch sm_90 --out FILE [--head-dim 64 128] [--dtype bfloat16]
                                    [--kernel forward dq]
                                    [--mask causal full] [--length long short] [--at-most 6] [--jobs N]

For every choice that `sar_kernels.tools.tune` can make, candidates are compiled ahead of time in every variant that
shares the choice (forward and decode: with and without statistics). Clean are those that spill nothing, fit the shared
memory, use wgmma where the present choice does and do not serialise it. FILE gets the present choice and at most
--at-most clean others, the best by `rank`; of one tile and number of warps at most two, so that the few differ.

`rank`, a pure function of the compiler's figures, models how many entries of the tile of scores a multiprocessor gets
done in a cycle. It sorts; which is fastest is for a GPU to say. Applied to the least registers and shared memory that a
tile can do with, it bounds the rank from above: candidates are compiled in the order of that bound, and once enough
clean ones rank as high as the best bound that is left, the rest is dominated and never compiled. A run that was cut
short goes on where it stopped: FILE is written after every key, the unfinished one's kernels are in Triton's cache.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton

from sar_kernels.call import MAX_HEAD_DIM
from sar_kernels.configs import (
    CLOSED_FORM,
    KERNELS,
    SHARED_MEMORY_LIMIT,
    SHORT,
    KernelConfig,
    choose,
    config_key,
    length_class,
    padded_head_dim,
)
from sar_kernels.decode.configs import FEW_ROWS, LAYOUTS, choose_decode, decode_config_key
from sar_kernels.launch import Launch
from sar_kernels.tools import aot_measure, decode_aot
from sar_kernels.tools.aot import plan_attention
from sar_kernels.tools.aot_measure import MAX_THREADS, REGISTERS, compile_launch, measure, target_of

SEQLENS = (512, 4096)
DTYPES = ("float16", "bfloat16")
PAGES = {"dense": 0, "paged": 256, "small-pages": 16}
TUNABLE = (*KERNELS, "decode")
BLOCKS_M = {"dkdv": (16, 32, 64, 128), "second_moments": (32, 64)}  # the others (64, 128)
CONFIG = tuple(f.name for f in fields(KernelConfig))
PER_TILE = 2  # kept configurations of one tile and number of warps
HOPELESS = 64  # spilled bytes from which larger tiles are not tried


def candidates(kernel: str) -> Iterator[KernelConfig]:
    """Every tile, warp and stage count worth compiling."""
    for block_m, block_n, warps, stages in itertools.product(
        BLOCKS_M.get(kernel, (64, 128)), (32, 64, 128), (4, 8), (1, 2, 3, 4)
    ):
        yield KernelConfig(block_m, block_n, warps, stages)


def decode_candidates(few: bool, *, limited: bool = True) -> Iterator[KernelConfig]:
    """The same for decode, whose rows are given; limited: also register limits, which decide the resident blocks."""
    limits = (None, 128, 168, 255) if limited else (None,)
    for block_n, warps, stages, limit in itertools.product((16, 32, 64), (4, 8), (1, 2, 3, 4, 5, 7, 9, 15), limits):
        yield KernelConfig(16 if few else 32, block_n, warps, stages, max_registers=limit)


@dataclass(frozen=True)
class Choice:
    """One choice of tiles, and the length at which it is measured."""

    kernel: str
    head_dim: int
    dtype: torch.dtype
    causal: bool = True
    sav: bool = False
    seqlen: int = SEQLENS[-1]
    few: bool = True  # this and the layout are decode's
    layout: str = "dense"

    def _look_up(self, decode: Callable, prefill: Callable, arch: str):
        head_dim = padded_head_dim(self.head_dim)
        if self.kernel == "decode":
            return decode(arch, head_dim, self.dtype, FEW_ROWS if self.few else FEW_ROWS + 1, self.layout)
        what = {"causal": self.causal, "sav": self.sav, "length": length_class(self.seqlen)}
        return prefill(self.kernel, arch, head_dim, self.dtype, **what)

    def key(self, arch: str) -> str:
        """Its name in `tuned.json`."""
        return self._look_up(decode_config_key, config_key, arch)

    def present(self, arch: str) -> KernelConfig:
        """What calls use now."""
        return self._look_up(choose_decode, choose, arch)

    def candidates(self, arch: str) -> Iterator[KernelConfig]:
        """What it could be."""
        if self.kernel == "decode":
            return decode_candidates(self.few, limited=arch.startswith("sm_"))
        return candidates(self.kernel)


def choices(kernels, head_dims, dtypes, seqlens, causals=(True, False), layouts=LAYOUTS, rows=("few", "many")):
    """Every choice to be made of these kernels; dtypes by name, layouts and rows decode's."""
    for head_dim, kernel, name in itertools.product(head_dims, kernels, dtypes):
        dtype = getattr(torch, name)
        if kernel == "decode":
            for which, layout in itertools.product(rows, layouts):
                yield Choice(kernel, head_dim, dtype, few=which == "few", layout=layout)
            continue
        with_gradient = (False, True) if kernel in ("dq", "dkdv") else (kernel in ("statistics", "second_moments"),)
        for causal, seqlen, sav in itertools.product(causals, seqlens, with_gradient):
            yield Choice(kernel, head_dim, dtype, causal, sav, seqlen)


@dataclass(frozen=True)
class Loop:
    """One step of a kernel's inner loop: its work as counted in SASS for sm_90 at D = 128, and what it keeps where."""

    products: int  # of a tile of scores with D
    instructions: float  # of a thread per entry of the tile, beside OVERHEAD per step
    waits: int  # cycles in which a block waits for its own products and barriers
    scores: int  # fp32 tiles of scores alive at once
    outputs: int  # fp32 accumulators of D columns, on the side that stays
    kept: int  # 16-bit tensors of that side in shared memory
    streamed: int  # of the other side
    rows_move: bool = False  # else the keys do
    bytes_per_cycle: float = 24  # that reach one multiprocessor: from the second-level cache, decode's from memory
    latency: int = 800  # cycles until they arrive; of decode's, whose loads queue, twice as many


LOOPS = {
    "forward": Loop(products=2, instructions=11, waits=300, scores=1, outputs=1, kept=1, streamed=2),
    "statistics": Loop(products=1, instructions=23, waits=300, scores=1, outputs=0, kept=1, streamed=1),
    "dq": Loop(products=3, instructions=6.5, waits=400, scores=2, outputs=1, kept=2, streamed=2),
    "dkdv": Loop(products=4, instructions=15, waits=500, scores=2, outputs=2, kept=2, streamed=2, rows_move=True),
    "second_moments": Loop(products=2, instructions=40, waits=1000, scores=0, outputs=1, kept=0, streamed=1),
    "decode": Loop(2, 90, waits=600, scores=1, outputs=1, kept=0, streamed=2, bytes_per_cycle=14, latency=1600),
}
OVERHEAD = 80  # instructions of a thread per step: addresses, loads, barriers
LEAST_REGISTERS = 40  # beside the accumulators
ISSUED = 128  # instructions of threads that a multiprocessor issues in a cycle
WGMMA = ("sm_90",)


def ahead(choice: Choice, config: KernelConfig) -> int:
    """Steps whose loads are under way; looking up pages, before their keys, takes every other stage."""
    return (config.num_stages - 1) // (1 if choice.layout == "dense" else 2)


def least(choice: Choice, arch: str, config: KernelConfig) -> tuple[int, int]:
    """(registers, shared bytes) that a configuration cannot do without, by arithmetic."""
    loop, d = LOOPS[choice.kernel], padded_head_dim(choice.head_dim)
    stays, moves = config.block_m, config.block_n
    if loop.rows_move:
        stays, moves = moves, stays
    accumulators = loop.outputs * stays * d + loop.scores * stays * moves
    step = 2 * loop.streamed * moves * d  # bytes
    # wgmma reads its operands from where they arrive, so that a stage more stays; without a pipeline they take turns.
    wgmma = arch in WGMMA and choice.kernel != "decode"
    buffers = ahead(choice, config) + wgmma if config.num_stages > 1 else wgmma / loop.streamed
    shared = 2 * loop.kept * stays * d + int(buffers * step)
    return LEAST_REGISTERS + accumulators // (32 * config.num_warps), shared


def resident(arch: str, registers: int, shared: int, num_warps: int) -> int:
    """Blocks per multiprocessor."""
    threads = 32 * num_warps
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    return min(by_registers, (SHARED_MEMORY_LIMIT[arch] + 1024) // (shared + 1024), MAX_THREADS[arch] // threads)


def rank(choice: Choice, arch: str, config: KernelConfig, blocks: int) -> float:
    """Entries of the tile of scores per cycle and multiprocessor, with so many blocks resident.

    Five limits: tensor cores, issue slots, bytes from memory, a block's chain of dependent work shared by the resident
    blocks, and the latency of memory shared by the steps under way. The narrowest counts most, a near one adds to it.
    """
    loop, d = LOOPS[choice.kernel], padded_head_dim(choice.head_dim)
    entries, moves = config.block_m * config.block_n, config.block_m if loop.rows_move else config.block_n
    tensor = 2 * loop.products * entries * d / (4096 if arch in WGMMA else 2048)
    issue = (loop.instructions * entries + OVERHEAD * 32 * config.num_warps) / ISSUED
    memory = 2 * loop.streamed * moves * d / loop.bytes_per_cycle
    chain = (tensor + issue + loop.waits + (0 if ahead(choice, config) else loop.latency)) / max(1, blocks)
    late = loop.latency / max(1, blocks * ahead(choice, config))
    cycles = sum(limit**3 for limit in (tensor, issue, memory, chain, late)) ** (1 / 3)
    return float(f"{entries / cycles:.4g}")


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a configuration: the worst figures of its variants, and why it is not clean."""

    problem: str = ""
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    wgmma: bool = False
    code: str = ""  # a digest of the variants' instructions, if it was asked for


def purposes(choice: Choice) -> list[tuple[str, int]]:
    """(purpose or mode, sequence length) of every variant that shares the choice, the hardest to compile first."""
    if choice.kernel == "decode":
        return [("running", 1 if choice.few else 8), ("plain", 1 if choice.few else 8)]
    closed = [("sar", CLOSED_FORM)]
    if choice.kernel == "forward":
        return [("sar", choice.seqlen), *closed[: choice.seqlen > SHORT], ("attention", choice.seqlen)]
    if choice.kernel == "second_moments":
        return closed
    return [("sar_sav_grad" if choice.sav else "attention", choice.seqlen)]


def variants(choice: Choice, arch: str, config: KernelConfig) -> Iterator[tuple[str, Launch]]:
    """Every variant's purpose and launch with this configuration."""
    for purpose, seqlen in purposes(choice):
        if choice.kernel == "decode":
            work = decode_aot.plan(arch, purpose, choice.head_dim, choice.dtype, seqlen, PAGES[choice.layout])
            split = next(launch for launch in work if launch.kernel.__name__ == "decode_split_kernel")
            tiles = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
            yield purpose, replace(split, arguments={**split.arguments, **tiles}, config=config)
            continue
        where = arch, purpose, choice.head_dim, choice.dtype, choice.causal, seqlen
        work = plan_attention(*where, configs={choice.kernel: config})
        yield purpose, next(launch for launch in work if launch.kernel.__name__ == f"{choice.kernel}_kernel")


def instructions(launch: Launch, arch: str) -> str:
    """What the compiler hands to the assembler, without the lines of source that it came from."""
    ptx = compile_launch(launch, target_of(arch)).asm["ptx"].split(".section")[0]
    return re.sub(r"//.*|^\s*\.(loc|file)\b.*|^\$L__(tmp|func_\w+?)\d+:|\s+$", "", ptx, flags=re.MULTILINE)


def compiled(choice: Choice, arch: str, config: KernelConfig, wgmma: bool, thorough: bool = False) -> Outcome:
    """Compiles the variants up to the first that is not clean, or all of them; no error is let through."""
    rows, problem, code = [], "", hashlib.sha256()
    try:
        for purpose, launch in variants(choice, arch, config):
            row = aot_measure.describe(launch, arch, purpose, choice.head_dim, choice.dtype, choice.causal, ())
            rows.append(measure(row, launch))
            problem = problem or flaw(rows[-1], arch, wgmma)
            if thorough:
                code.update(instructions(launch, arch).encode())
            elif problem:
                break
    except Exception as error:
        problem = f"error: {type(error).__name__}"
    worst = [max((getattr(row, n) for row in rows), default=0) for n in ("registers", "spill_bytes", "shared_bytes")]
    blocks = min((row.blocks_per_sm for row in rows), default=0)
    return Outcome(problem, *worst, blocks, bool(rows) and all(row.wgmma for row in rows), code.hexdigest()[:16])


def flaw(row, arch: str, wgmma: bool) -> str:
    """Why a compiled variant is not clean; "" if it is."""
    if row.shared_bytes > SHARED_MEMORY_LIMIT[arch]:
        return "too much shared memory"
    if row.spill_bytes:
        return "spills"
    without = "no wgmma" if wgmma and not row.wgmma else ""
    return "wgmma serialised" if row.wgmma_serialized else without


class Compilers:
    """Processes that compile. One that the compiler takes down with it is replaced, its candidate has crashed."""

    def __init__(self, jobs: int):
        self.jobs, self.pool = jobs, self._start(jobs)

    @staticmethod
    def _start(jobs: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown()

    def __call__(self, tasks: list[tuple]) -> list[Outcome]:
        """Outcomes of `compiled` with these arguments, in order."""
        futures = [self.pool.submit(compiled, *task) for task in tasks]
        return [self._outcome(task, future) for task, future in zip(tasks, futures)]

    def _outcome(self, task: tuple, future) -> Outcome:
        try:
            return future.result()
        except BrokenExecutor:  # by this task or by a neighbour's: alone, it shows
            self.pool.shutdown()
            self.pool = self._start(self.jobs)
            with self._start(1) as alone:
                again = alone.submit(compiled, *task)
                return Outcome("error: the compiler crashed") if again.exception() else again.result()


def describe(config: KernelConfig) -> str:
    """ "128x64, 8 warps, 3 stages"."""
    limit = "" if config.max_registers is None else f", {config.max_registers} registers"
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages{limit}"


def tile(config: KernelConfig) -> tuple[int, int, int]:
    """What a few should differ in."""
    return config.block_m, config.block_n, config.num_warps


@dataclass
class Shortlist:
    """The search for one choice's configurations worth measuring."""

    choice: Choice
    arch: str
    at_most: int
    compile_all: Callable[[list[tuple]], list[Outcome]]  # `compiled`, of several arguments
    jobs: int = 1

    def __post_init__(self) -> None:
        self.outcomes: dict[KernelConfig, Outcome] = {}
        self.left_out: collections.Counter[str] = collections.Counter()
        self.present = self.choice.present(self.arch)

    def bound(self, config: KernelConfig) -> float:
        """No outcome of this configuration can rank higher; 0 if none can be clean."""
        registers, shared = least(self.choice, self.arch, config)
        if shared > SHARED_MEMORY_LIMIT[self.arch] or registers > (config.max_registers or 255):
            return 0.0
        return rank(self.choice, self.arch, config, resident(self.arch, registers, shared, config.num_warps))

    def place(self, config: KernelConfig) -> tuple:
        """What the clean are sorted by: rank, then less shared memory, then fewer registers."""
        outcome = self.outcomes[config]
        score = rank(self.choice, self.arch, config, outcome.blocks_per_sm)
        return -score, outcome.shared_bytes, outcome.registers, describe(config)

    def kept(self) -> list[KernelConfig]:
        """The best of the clean so far, but for the present choice."""
        clean = [c for c, outcome in self.outcomes.items() if not outcome.problem and c != self.present]
        seen, best = collections.Counter(), []
        for config in sorted(clean, key=self.place):
            best += [config] if seen[tile(config)] < PER_TILE else []
            seen[tile(config)] += 1
        return best[: self.at_most]

    def needless(self, config: KernelConfig) -> str:
        """Why a candidate need not be compiled, given what was; "" if it must be."""
        limit = lambda c: c.max_registers or 255
        for other, outcome in self.outcomes.items():
            if other.num_warps != config.num_warps:
                continue
            larger = config.block_m >= other.block_m and config.block_n >= other.block_n
            if outcome.spill_bytes > HOPELESS and larger and limit(config) <= limit(other):
                return "larger than one that spills"
            unlimited = config.max_registers and replace(config, max_registers=None) == other and not outcome.problem
            if unlimited and outcome.registers <= config.max_registers:
                return "a limit that limits nothing"
        best = self.kept()
        same = [c for c in best if tile(c) == tile(config)]
        for full in (best[self.at_most - 1 :], same[PER_TILE - 1 :]):
            if full and self.bound(config) <= -self.place(full[0])[0]:
                return "dominated"
        return ""

    def start(self) -> Outcome:
        """Compiles the present choice, once."""
        if self.present not in self.outcomes:
            self.outcomes[self.present] = self.compile_all([(self.choice, self.arch, self.present, False, True)])[0]
            self.report(self.present)
        return self.outcomes[self.present]

    def run(self) -> list[dict]:
        """The rows for the file: the present choice, then the best others."""
        wgmma = self.start().wgmma
        order = lambda c: (-self.bound(c), -(c.max_registers or 256), describe(c))
        every = sorted(set(self.choice.candidates(self.arch)) - {self.present}, key=order)
        queue = [config for config in every if self.bound(config)]
        self.left_out["not clean, by arithmetic"] = len(every) - len(queue)
        known = {}
        for index, config in enumerate(queue):
            why = self.needless(config)
            if not why and config not in known:  # with several jobs some are compiled that turn out needless
                batch = [c for c in queue[index:] if c not in known and not self.needless(c)][: self.jobs]
                known |= zip(batch, self.compile_all([(self.choice, self.arch, c, wgmma) for c in batch]))
            if not why:
                self.outcomes[config] = known[config]
                why = known[config].problem
                self.report(config)
            self.left_out.update([why] if why else [])
        self.left_out["clean, but ranked lower"] = len(every) - sum(self.left_out.values()) - len(self.kept())
        return [self.row(config) for config in (self.present, *self.kept())]

    def row(self, config: KernelConfig) -> dict:
        """A configuration and its figures."""
        outcome = {name: value for name, value in asdict(self.outcomes[config]).items() if name != "code"}
        return {**asdict(config), **outcome, "rank": -self.place(config)[0]}

    def report(self, config: KernelConfig) -> None:
        outcome, key = self.outcomes[config], self.choice.key(self.arch)
        figures = outcome.problem or f"{outcome.registers} registers, {outcome.blocks_per_sm} blocks"
        print(f"{key} {len(self.outcomes)}: {describe(config)}: {figures}", file=sys.stderr, flush=True)


def write_atomically(path: Path, content: dict) -> None:
    """A reader, or a run that is cut short, never finds half a file."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.tools.shortlist", description=__doc__.split("\n")[0])
    several = lambda name, of, *default: parser.add_argument(
        name, nargs="+", choices=of, default=default, metavar="X", help=f"of {', '.join(of)}; default: {default[0]}"
    )
    parser.add_argument("--arch", required=True, choices=MAX_THREADS, help=f"of {', '.join(MAX_THREADS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="written after every key; continued")
    parser.add_argument("--head-dim", nargs="+", type=int, default=(64, 128), metavar="D", help="default: 64 128")
    parser.add_argument("--kernel", nargs="+", choices=TUNABLE, default=TUNABLE, help="default: all", metavar="KERNEL")
    several("--dtype", DTYPES, "bfloat16")
    several("--mask", ("causal", "full"), "causal")
    several("--length", ("long", "short"), "long")
    several("--rows", ("few", "many"), "few")
    several("--layout", LAYOUTS, "dense")
    parser.add_argument("--at-most", type=int, default=6, metavar="N", help="beside the present choice; default: 6")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="default: one per core")
    return parser


def _checked(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    if min(args.at_most, args.jobs) < 1:
        parser.error(f"--at-most, --jobs: got {args.at_most}, {args.jobs}, need 1 or more")
    if not all(1 <= d <= MAX_HEAD_DIM for d in args.head_dim):
        parser.error(f"--head-dim: got {args.head_dim}, need 1 to {MAX_HEAD_DIM}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: got {args.out}, need a file in a folder that exists")
    return args


def _earlier(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """What an earlier run of the same architecture and compiler left in the file."""
    new = {"arch": args.arch, "triton": triton.__version__, "keys": {}, "compiled": {}}
    if not args.out.exists():
        return new
    try:
        found = new | json.loads(args.out.read_text())
    except (OSError, ValueError, TypeError) as error:
        parser.error(f"--out: got {args.out} ({type(error).__name__}: {error}), need a file of this command, or none")
    if found["arch"] != args.arch:
        parser.error(f"--out: got {args.out}, made for {found['arch']}, need a file for {args.arch}, or none")
    return found if found["triton"] == new["triton"] else new


def _extend(found: dict, search: Shortlist, path: Path) -> str:
    """Adds one key to the file, unless it is there and still holds; a line about it."""
    started, key = time.monotonic(), search.choice.key(search.arch)
    asked = hashlib.sha256(repr((search.present, search.at_most, PER_TILE, LOOPS)).encode()).hexdigest()[:16]
    source = f"{asked}-{search.start().code}"  # the same question, about the same kernels
    if key in found["keys"] and found["compiled"].get(key, {}).get("source") == source:
        return "kept from before"
    found["keys"][key] = rows = search.run()
    left_out = {why: count for why, count in sorted(search.left_out.items()) if count}
    found["compiled"][key] = {"source": source, "count": len(search.outcomes), "left_out": left_out}
    write_atomically(path, found)
    what = "; ".join(f"{count} {why}" for why, count in left_out.items())
    count, seconds = len(search.outcomes), time.monotonic() - started
    return f"{len(rows) - 1} beside the present, {count} compiled in {seconds:.0f} s ({what})"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = _parser()
    args = _checked(parser, argv)
    found = _earlier(parser, args)
    seqlens = [n for n in SEQLENS if length_class(n) in args.length]
    with Compilers(args.jobs) as compile_all:
        where = args.head_dim, args.dtype, seqlens, [mask == "causal" for mask in args.mask], args.layout, args.rows
        for choice in choices(args.kernel, *where):
            search = Shortlist(choice, args.arch, args.at_most, compile_all, args.jobs)
            print(f"{choice.key(args.arch)}: {_extend(found, search, args.out)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
