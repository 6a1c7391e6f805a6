"""Measures configurations on the GPU at hand and writes the fastest to `tuned.json`, which `configs.choose` prefers.

    python -m sar_kernels.tune [--head-dim 64 128] [--dtype bfloat16] [--kernel forward dq dkdv] [--seqlen 512 4096]

Offline only: nothing is ever tuned inside a call. The forward kernel's choice is made for the variant with statistics
and holds for plain attention too, because both must use the same tiles (see `configs.choose`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
import triton.testing

from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.configs import KERNELS, TUNED, KernelConfig, config_key, device_arch, length_class, padded_head_dim
from sar_kernels.launch import Launch, run_all
from sar_kernels.plan import Through, plan_backward, plan_sar_forward

TOKENS = 16384  # per measurement, as batch * seqlen
BLOCKS_M = {"forward": (64, 128), "statistics": (64, 128), "dq": (64, 128), "dkdv": (16, 32, 64, 128)}


def candidates(kernel: str) -> Iterator[KernelConfig]:
    """Every tile, warp and stage count worth compiling."""
    for block_m, block_n, warps, stages in itertools.product(BLOCKS_M[kernel], (32, 64, 128), (4, 8), (1, 2, 3, 4)):
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
    call = Call(q, k, v, options, configs=None if config is None else {kernel: config})
    (out, lse, av, sa, c, count), work = plan_sar_forward(call, visual, text, prior, weights)
    through = Through(visual, text, prior, weights, av, sa, count) if sav else None
    work += plan_backward(call, dout, out, lse, c, through)[1]
    index = next(i for i, launch in enumerate(work) if launch.kernel.__name__ == f"{kernel}_kernel")
    return work[: index + 1]


def milliseconds(work: list[Launch]) -> float:
    """Median time of the last launch, after those that it needs have run."""
    run_all(work)
    return triton.testing.do_bench(work[-1].run, return_mode="median")


def fastest(kernel: str, head_dim, dtype, causal, sav, seqlen) -> tuple[KernelConfig | None, float, float]:
    """The best candidate (None: the present choice stays), its time and the present choice's, in ms."""
    present = milliseconds(launches(kernel, None, head_dim, dtype, causal, sav, seqlen))
    best, best_time = None, present
    for config in candidates(kernel):
        try:
            time = milliseconds(launches(kernel, config, head_dim, dtype, causal, sav, seqlen))
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue  # needs more shared memory or registers than there are
        if time < best_time:
            best, best_time = config, time
    return best, best_time, present


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sar_kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--head-dim", nargs="+", type=int, default=(64, 128))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float16", "bfloat16"])
    parser.add_argument("--kernel", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--seqlen", nargs="+", type=int, default=(512, 4096))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no GPU: tuning measures; `python -m sar_kernels.aot` checks configurations without one")
    arch = device_arch(torch.device("cuda", torch.cuda.current_device()))
    found = json.loads(TUNED.read_text()) if TUNED.exists() else {"configs": {}}
    found["device"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    dtypes = [getattr(torch, name) for name in args.dtype]
    for kernel, head_dim, dtype, causal, seqlen in itertools.product(
        args.kernel, args.head_dim, dtypes, (True, False), args.seqlen
    ):
        for sav in (False, True) if kernel in ("dq", "dkdv") else (kernel == "statistics",):
            config, time, present = fastest(kernel, head_dim, dtype, causal, sav or kernel == "statistics", seqlen)
            key = config_key(kernel, arch, padded_head_dim(head_dim), dtype, causal, sav, length_class(seqlen))
            print(f"{key}: {present:.4f} -> {time:.4f} ms {config or '(unchanged)'}", flush=True)
            if config is not None:
                found["configs"][key] = asdict(config)
                TUNED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
