"""Ahead-of-time check: compiles every kernel variant that the configurations can choose, without a GPU.

    python -m sar_kernels.tools.aot [--arch sm_90 ...] [--head-dim 64 ...] [--dtype bfloat16] [--kernel forward ...]
                              [--purpose sar running ...] [--options window ...] [--heads 32:8 ...] [--json]

Prints registers per thread, spilled bytes per thread, shared memory per block, blocks resident per multiprocessor,
whether the tensor cores are driven by wgmma, and instructions: of the kernel, and of each innermost loop. The launches
are the very ones that a call on a GPU would make, planned on tensors that have no memory.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch

from sar_kernels.call import MAX_HEAD_DIM, AttentionOptions, Call, WeightOptions
from sar_kernels.configs import CLOSED_FORM, SHARED_MEMORY_LIMIT, SHORT, KernelConfig
from sar_kernels.dense.beside import plan_beside
from sar_kernels.dense.plan import Through, plan_attention_forward, plan_backward, plan_sar_forward
from sar_kernels.launch import Launch
from sar_kernels.tools import decode_aot
from sar_kernels.tools.aot_measure import Variant, compile_key, describe, measure, table
from sar_kernels.tools.decode_aot import HEADS, masks_of

ARCHS = ("sm_80", "sm_90", "gfx942")
HEAD_DIMS = (64, 128, 256)
PASSES = ("attention", "sar", "sar_sav_grad", "beside")  # beside: what another library's attention needs
# ends, runs: a run of keys per query, from the first key or from anywhere; bits: a packed mask
OPTIONS = ("window", "softcap", "padding", "packed", "ends", "runs", "bits")

# How a worker process makes a launch again: the function, its arguments, and which of its launches
Recipe = tuple[Callable[..., list[Launch]], tuple, int]


def plan_attention(
    arch: str,
    purpose: str,
    head_dim: int,
    dtype: torch.dtype,
    causal: bool,
    seqlen: int,
    options: tuple[str, ...] = (),
    configs: Mapping[str, KernelConfig] | None = None,
    num_heads: tuple[int, int] = HEADS,
) -> list[Launch]:
    """All launches of a forward and a backward call on memory-less tensors."""
    batch, (heads, kv_heads) = 2, num_heads
    empty = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    packed = "packed" in options
    tokens = (batch * seqlen,) if packed else (batch, seqlen)
    q, dout = empty(*tokens, heads, head_dim), empty(*tokens, heads, head_dim)
    k, v = empty(*tokens, kv_heads, head_dim), empty(*tokens, kv_heads, head_dim)
    mask = empty(*tokens, dtype=torch.bool)
    cu = empty(batch + 1, dtype=torch.int32) if packed else None
    window = (1024, -1) if "window" in options else (-1, -1)
    softcap = 30.0 if "softcap" in options else 0.0
    attention = AttentionOptions(causal and not {"runs", "ends"} & set(options), head_dim**-0.5, window, softcap)
    masks = masks_of(options, tokens, tokens)
    longest = seqlen if packed else None
    call = Call(q, k, v, attention, masks, cu, cu, longest, longest, arch=arch, configs=configs)
    if purpose == "attention":
        (out, lse), launches = plan_attention_forward(call)
        return launches + plan_backward(call, dout, out, lse)[1]
    weights = WeightOptions(0.5)
    prior = empty(*tokens, dtype=torch.float32)
    if purpose == "beside":
        return plan_beside(call, dout, mask, mask, prior, weights)
    (out, lse, av, sa, c, count), launches = plan_sar_forward(call, mask, mask, prior, weights)
    through = Through(mask, mask, prior, weights, av, sa, count) if purpose == "sar_sav_grad" else None
    return launches + plan_backward(call, dout, out, lse, c, through)[1]


def calls(archs, head_dims, dtypes, purposes, options, num_heads) -> Iterator[tuple[Callable, tuple, tuple]]:
    """Every call that can choose another variant: its planning function, that one's arguments, and its name."""
    of_pass = itertools.product(
        archs, PASSES, head_dims, dtypes, (True, False), (SHORT, CLOSED_FORM), [options], [None], num_heads
    )
    for where in of_pass:
        arch, purpose, head_dim, dtype, causal = where[:5]
        if purpose in purposes:
            yield plan_attention, where, (arch, purpose, head_dim, dtype, causal, (*options, *other_heads(where[-1])))
    if "packed" in options:
        return  # a cache's lengths are its samples'
    of_step = itertools.product(
        archs, decode_aot.MODES, head_dims, dtypes, *decode_aot.CASES, [options], [decode_aot.CAPACITY], num_heads
    )
    for where in of_step:
        arch, mode, head_dim, dtype, seqlen_q, page = where[:6]
        if mode in purposes:
            sizes = (f"q{seqlen_q}", f"page{page}") if page else (f"q{seqlen_q}",)
            names = (*sizes, *options, *other_heads(where[-1]))
            yield decode_aot.plan, where, (arch, mode, head_dim, dtype, True, names)


def other_heads(num_heads: tuple[int, int]) -> tuple[str, ...]:
    """How a variant's options name its heads: not at all where they are the usual ones."""
    return () if num_heads == HEADS else ("heads{}:{}".format(*num_heads),)


def variants(
    archs=ARCHS,
    head_dims=HEAD_DIMS,
    dtypes=(torch.bfloat16,),
    options=(),
    purposes=(*PASSES, *decode_aot.MODES),
    num_heads=(HEADS,),
) -> Iterator[tuple[Variant, Recipe]]:
    """Every distinct variant, and how to make its launch."""
    seen = set()
    for plan, where, names in calls(archs, head_dims, dtypes, purposes, options, num_heads):
        for index, launch in enumerate(plan(*where)):
            variant, key = describe(launch, *names), compile_key(launch, names[0])
            if key not in seen:
                seen.add(key)
                yield variant, (plan, where, index)


def measure_recipe(variant: Variant, recipe: Recipe) -> Variant:
    """Makes the launch and measures it; an error says which it was."""
    plan, where, index = recipe
    try:
        return measure(variant, plan(*where)[index])
    except Exception as error:
        raise RuntimeError(f"the compiler fails at {variant}: {type(error).__name__}: {error}") from error


def measure_all(work: list[tuple[Variant, Recipe]], jobs: int | None = None) -> list[Variant]:
    """Compiles in parallel processes, results in order; says on stderr how far it is."""
    context = multiprocessing.get_context("spawn")
    rows = []
    with concurrent.futures.ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        for row in pool.map(measure_recipe, *zip(*work)):
            rows.append(row)
            what = f"{row.arch} {row.kernel} {row.purpose} D {row.head_dim} {'+'.join(row.options)}".rstrip()
            print(f"{len(rows)}/{len(work)} {what}: {row.registers} registers", file=sys.stderr, flush=True)
    return rows


def heads_of(text: str) -> tuple[int, int]:
    """ "32:8" as query heads and kv heads."""
    heads, _, kv_heads = text.partition(":")
    numbers = heads.isdecimal() and kv_heads.isdecimal() and int(heads) > 0 and int(kv_heads) > 0
    if not numbers or int(heads) % int(kv_heads):
        raise argparse.ArgumentTypeError(f"got {text!r}, need query heads:kv heads, the first a multiple of the second")
    return int(heads), int(kv_heads)


def main(argv: list[str] | None = None) -> int:
    """Command line; exit status 1 if a kernel needs more shared memory than its device has."""
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.tools.aot", description=__doc__.split("\n")[0])
    purposes = (*PASSES, *decode_aot.MODES)
    archs, dtypes = sorted(SHARED_MEMORY_LIMIT), ("float16", "bfloat16", "float32")
    of = lambda values, default: f"of {', '.join(values)}; default: {default}"
    several = lambda name, metavar, **kwargs: parser.add_argument(name, nargs="+", metavar=metavar, **kwargs)
    several("--arch", "ARCH", default=ARCHS, choices=archs, help=of(archs, " ".join(ARCHS)))
    several("--head-dim", "D", type=int, default=HEAD_DIMS, help="default: 64 128 256")
    several("--dtype", "DTYPE", default=["bfloat16"], choices=dtypes, help=of(dtypes, "bfloat16"))
    several("--kernel", "KERNEL", help="only these: forward, dq, dkdv, statistics, decode_split, ...")
    several("--purpose", "PURPOSE", default=purposes, choices=purposes, help=of(purposes, "all"))
    several("--options", "OPTION", default=(), choices=OPTIONS, help=f"switched on together, {of(OPTIONS, 'none')}")
    several("--heads", "H:KV", type=heads_of, default=[HEADS], help="query heads and kv heads (default: 32:8)")
    parser.add_argument("--jobs", type=int, help="processes that compile (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter compiles nothing")
    dtypes = [getattr(torch, name) for name in args.dtype]
    if not all(1 <= d <= MAX_HEAD_DIM for d in args.head_dim):
        parser.error(f"--head-dim: got {args.head_dim}, need 1 to {MAX_HEAD_DIM}")
    every = list(variants(args.arch, args.head_dim, dtypes, tuple(args.options), args.purpose, args.heads))
    names = sorted({variant.kernel for variant, _ in every})
    unknown = sorted(set(args.kernel or ()) - set(names))
    if unknown:
        parser.error(f"--kernel: got {', '.join(unknown)}, need some of {', '.join(names)}")
    rows = measure_all([w for w in every if args.kernel is None or w[0].kernel in args.kernel], args.jobs)
    print(json.dumps([asdict(r) for r in rows], indent=1) if args.json else table(rows))
    return int(any(r.shared_bytes > SHARED_MEMORY_LIMIT[r.arch] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
