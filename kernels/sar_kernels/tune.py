"""Measures configurations on the GPU at hand; the fastest go to `tuned.json`, which the choosing functions prefer.

    python -m sar_kernels.tune [--head-dim 64 128] [--dtype bfloat16] [--kernel forward dq decode] [--seqlen 512 4096]

Offline only: nothing is ever tuned inside a call. The forward and the decode kernel's choices are made for the variant
with statistics and hold for plain attention too, because both must use the same tiles (see `configs.choose`). Run
`python -m sar_kernels.aot` afterwards: it shows what the new choices spill and how many blocks they keep resident.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
import triton.testing

from sar_kernels.call import MAX_HEAD_DIM, AttentionOptions, Call, WeightOptions
from sar_kernels.configs import (
    KERNELS,
    SHORT,
    TUNED,
    KernelConfig,
    config_key,
    device_arch,
    length_class,
    padded_head_dim,
)
from sar_kernels.decode_configs import FEW_ROWS, LAYOUTS, decode_config_key
from sar_kernels.decode_plan import DecodeCall
from sar_kernels.launch import Launch, run_all
from sar_kernels.plan import Through, plan_backward, plan_sar_forward

TOKENS = 16384  # per measurement, as batch * seqlen
TUNABLE = (*KERNELS, "decode")
BLOCKS_M = {"dkdv": (16, 32, 64, 128), "second_moments": (32, 64)}  # the others (64, 128)


def candidates(kernel: str) -> Iterator[KernelConfig]:
    """Every tile, warp and stage count worth compiling."""
    for block_m, block_n, warps, stages in itertools.product(
        BLOCKS_M.get(kernel, (64, 128)), (32, 64, 128), (4, 8), (1, 2, 3, 4)
    ):
        yield KernelConfig(block_m, block_n, warps, stages)


def launches(kernel: str, config: KernelConfig | None, head_dim, dtype, causal, sav, seqlen) -> list[Launch]:
    """The launches of one forward and backward call, the last of them of the kernel to be measured."""
    batch, heads, kv_heads = max(1, TOKENS // seqlen), 16, 4
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda h: torch.randn((batch, seqlen, h, head_dim), dtype=dtype, device="cuda", generator=generator)
    q, k, v, dout = normal(heads), normal(kv_heads), normal(kv_heads), normal(heads)
    token = torch.arange(seqlen, device="cuda").expand(batch, -1)
    visual, text = token < seqlen // 2, token >= seqlen // 2
    prior = visual / visual.sum(-1, keepdim=True)
    weights = WeightOptions(0.5)
    options = AttentionOptions(causal, head_dim**-0.5)
    call = Call(
        q,
        k,
        v,
        options,
        configs=None if config is None else {kernel: config},
        closed_form=True if kernel == "second_moments" else None,
    )
    (out, lse, av, sa, c, count), work = plan_sar_forward(call, visual, text, prior, weights)
    through = Through(visual, text, prior, weights, av, sa, count) if sav else None
    work += plan_backward(call, dout, out, lse, c, through)[1]
    index = next(i for i, launch in enumerate(work) if launch.kernel.__name__ == f"{kernel}_kernel")
    return work[: index + 1]


def decode_candidates(few: bool) -> Iterator[KernelConfig]:
    """The same for decode, whose rows are given; on NVIDIA also register limits, which decide the resident blocks."""
    limits = (None,) if torch.version.hip else (None, 128, 168, 255)
    for block_n, warps, stages, limit in itertools.product((16, 32, 64), (4, 8), (1, 2, 3, 4, 5, 7, 9, 15), limits):
        yield KernelConfig(16 if few else 32, block_n, warps, stages, max_registers=limit)


def decode_launches(config: KernelConfig | None, head_dim, dtype, few: bool, layout: str) -> list[Launch]:
    """The split kernel of one decode step, with statistics, over 8k keys."""
    batch, heads, kv_heads, capacity = 4, 32, 8, 8192
    page = {"dense": 0, "paged": 256, "small-pages": 16}[layout]
    seqlen_q = 1 if few else 8
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(shape, dtype=dtype, device="cuda", generator=generator)
    k, v = normal(batch, capacity, kv_heads, head_dim), normal(batch, capacity, kv_heads, head_dim)
    table = None
    if page:
        k, v = (t.view(-1, page, kv_heads, head_dim) for t in (k, v))
        table = torch.randperm(len(k), generator=generator, device="cuda").view(batch, -1).to(torch.int32)
    lengths = torch.full((batch,), capacity, dtype=torch.int32, device="cuda")
    options = AttentionOptions(True, head_dim**-0.5)
    q = normal(batch, seqlen_q, heads, head_dim)
    call = DecodeCall(q, k, v, lengths, options, table, config=config)
    zeros = lambda *shape: torch.zeros(shape, device="cuda")
    call.set_state(zeros(batch, heads), zeros(batch, heads), zeros(batch), zeros(batch, heads))
    visual = (torch.arange(capacity, device="cuda") < capacity // 2).expand(batch, -1)
    text = torch.ones((batch, seqlen_q), dtype=torch.bool, device="cuda")
    call.set_roles(visual, text, visual * (2 / capacity))
    return call.plan("running", WeightOptions(0.5))[:1]


def milliseconds(work: list[Launch]) -> float:
    """Median time of the last launch, after those that it needs have run."""
    run_all(work)
    return triton.testing.do_bench(work[-1].run, return_mode="median")


def fastest(
    plan: Callable[[KernelConfig | None], list[Launch]], configs: Iterator[KernelConfig]
) -> tuple[KernelConfig | None, float, float]:
    """The best candidate (None: the present choice stays), its time and the present choice's, in ms."""
    present = milliseconds(plan(None))
    best, best_time = None, present
    for config in configs:
        try:
            time = milliseconds(plan(config))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue  # needs more shared memory or registers than there are
        if time < best_time:
            best, best_time = config, time
    return best, best_time, present


def searches(kernels, arch, head_dims, dtypes, seqlens) -> Iterator[tuple[str, Callable, Iterator[KernelConfig]]]:
    """For every choice to be made: its key in `tuned.json`, its plan, and the candidates."""
    for kernel, head_dim, dtype in itertools.product(kernels, head_dims, dtypes):
        padded = padded_head_dim(head_dim)
        if kernel == "decode":
            for few, layout in itertools.product((True, False), LAYOUTS):
                key = decode_config_key(arch, padded, dtype, FEW_ROWS if few else FEW_ROWS + 1, layout)
                yield (
                    key,
                    partial(decode_launches, head_dim=head_dim, dtype=dtype, few=few, layout=layout),
                    decode_candidates(few),
                )
            continue
        with_gradient = (False, True) if kernel in ("dq", "dkdv") else (kernel in ("statistics", "second_moments"),)
        for causal, seqlen, sav in itertools.product((True, False), seqlens, with_gradient):
            key = config_key(kernel, arch, padded, dtype, causal, sav, length_class(seqlen))
            plan = partial(launches, kernel, head_dim=head_dim, dtype=dtype, causal=causal, sav=sav, seqlen=seqlen)
            yield key, plan, candidates(kernel)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.tune", description=__doc__.split("\n")[0])
    of = lambda values: f"of {', '.join(values)}"
    dtypes = ("float16", "bfloat16")
    parser.add_argument("--head-dim", nargs="+", type=int, default=(64, 128), metavar="D", help="default: 64 128")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["bfloat16"],
        choices=dtypes,
        metavar="DTYPE",
        help=f"{of(dtypes)}; default: bfloat16",
    )
    parser.add_argument(
        "--kernel", nargs="+", default=TUNABLE, choices=TUNABLE, metavar="KERNEL", help=f"{of(TUNABLE)}; default: all"
    )
    parser.add_argument(
        "--seqlen",
        nargs="+",
        type=int,
        default=(512, 4096),
        metavar="S",
        help="default: 512 4096",
    )
    args = parser.parse_args(argv)
    if not all(1 <= d <= MAX_HEAD_DIM for d in args.head_dim):
        parser.error(f"--head-dim: got {args.head_dim}, need 1 to {MAX_HEAD_DIM}")
    if min(args.seqlen) < 1 or len({length_class(n) for n in args.seqlen}) < len(args.seqlen):
        parser.error(
            f"--seqlen: got {args.seqlen}, need one up to {SHORT}, one above, or both: a choice holds for each"
        )
    if not torch.cuda.is_available():
        parser.error("no GPU: tuning measures; `python -m sar_kernels.aot` checks configurations without one")
    arch = device_arch(torch.device("cuda", torch.cuda.current_device()))
    found = json.loads(TUNED.read_text()) if TUNED.exists() else {"configs": {}}
    found["device"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    dtypes = [getattr(torch, name) for name in args.dtype]
    for key, plan, configs in searches(args.kernel, arch, args.head_dim, dtypes, args.seqlen):
        config, time, present = fastest(plan, configs)
        print(f"{key}: {present:.4f} -> {time:.4f} ms {config or '(unchanged)'}", flush=True)
        if config is not None:
            found["configs"][key] = asdict(config)
            TUNED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
