"""Small programs for tools that watch a process: ``python -m gpu_suite.cases forward`` under ncu or compute-sanitizer.

``small`` runs a dozen odd calls of every kernel; the others one call at the size that is asked about.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from providers import make_inputs

from gpu_suite.decode import decode_call
from gpu_suite.inputs import decode_inputs
from sar_fast import sar_attn_func


def _attend(shape: tuple[int, ...], where: dict, *, backward: bool, sav_grad: bool = False, **options) -> None:
    inputs = make_inputs(*shape, **where)
    leaves = [x.requires_grad_(backward) for x in inputs[:3]]
    out = sar_attn_func(*leaves, *inputs[3:], backend="triton", sav_grad=sav_grad, **options)
    if backward:
        torch.autograd.grad(out, leaves, torch.randn_like(out))


def _decode(shape: dict, where: dict, mode: str) -> None:
    decode_call(mode, decode_inputs(shape, where["dtype"], where["device"]))()


def run(name: str, tiny: bool) -> None:
    """One named case, to its end."""
    where = {"dtype": torch.float32, "device": "cpu"} if tiny else {"dtype": torch.bfloat16, "device": "cuda"}
    large = (1, 48, 4, 2, 16) if tiny else (4, 4096, 32, 8, 128)
    if name in ("forward", "dkdv"):
        _attend(large, where, backward=name == "dkdv")
    elif name == "decode":
        sizes = (2, 45, 4, 2, 16) if tiny else (8, 8192, 32, 8, 128)
        _decode(dict(zip(("B", "KV", "H", "Hkv", "D"), sizes)), where, "sar running")
    else:
        small(where, tiny)
    if not tiny:
        torch.cuda.synchronize()


def small(where: dict, tiny: bool) -> None:
    """Forward and both backwards at odd sizes, options among them, and decode in every mode."""
    for head_dim, sav_grad in itertools.product(small_dims(tiny), (True,) if tiny else (False, True)):
        shape = (2, SMALL_LENGTH[tiny], 4, 2, head_dim)
        padding = torch.ones(shape[:2], dtype=torch.bool, device=where["device"])
        padding[1, -3:] = False
        for options in ({}, {"key_padding_mask": padding}, WINDOW):
            if not (tiny and not options):
                _attend(shape, where, backward=True, sav_grad=sav_grad, **options)
    for head_dim, mode in itertools.product(small_dims(tiny), SMALL_MODES[: 1 if tiny else None]):
        _decode(small_decode(tiny, head_dim), where, mode)


SMALL_LENGTH = {False: 97, True: 45}
SMALL_MODES = ("sar running", "sar step", "sar prompt", "plain")
WINDOW = {"window_size": (30, -1), "softcap": 20.0}


def small_dims(tiny: bool) -> tuple[int, ...]:
    return (16,) if tiny else (64, 128)


def small_decode(tiny: bool, head_dim: int) -> dict[str, int]:
    return {"B": 2, "KV": 45 if tiny else 333, "H": 8, "Hkv": 2, "D": head_dim}


CASES = ("forward", "dkdv", "decode", "small")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    run(arguments.case, arguments.tiny)
    print(f"case {arguments.case}: done")
