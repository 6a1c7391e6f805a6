"""The launches of every slice, planned on tensors without memory: what must be compiled before the slice begins.

A test holds them against what the slices really launch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from gpu_suite.cases import SMALL_LENGTH, SMALL_MODES, WINDOW, small_decode, small_dims
from gpu_suite.inputs import (
    MODEL_HEADS,
    MODEL_TOKENS,
    Shape,
    attention_shapes,
    decode_shapes,
    gate_decode_shapes,
    gate_shapes,
    library_gate_shapes,
    library_shapes,
    other_shapes,
    part_of,
    pattern_shapes,
    scaling_shapes,
    short_shapes,
)
from gpu_suite.slices import SHORTLIST
from sar_kernels.call import AttentionOptions, Call, WeightOptions
from sar_kernels.decode.plan import DecodeCall
from sar_kernels.dense.beside import plan_beside
from sar_kernels.dense.plan import Through, plan_attention_forward, plan_backward, plan_sar_forward
from sar_kernels.launch import Launch
from sar_kernels.masks import plan_pack_mask
from sar_kernels.tools.decode_aot import masks_of
from sar_kernels.tools.tune import from_shortlist, launches

MULTIPROCESSORS = 132  # an H100's or H200's; they choose the number of splits, which compiles nothing anew
DECODE_MODES = ("running", "step", "prompt", "plain")


class Planner:
    """Plans calls for one architecture and dtype."""

    def __init__(self, arch: str, dtype: torch.dtype) -> None:
        self.arch, self.dtype = arch, dtype

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def prefill(
        self,
        shape: Shape,
        *,
        sar: bool,
        backward: str | None = None,
        padded: bool = False,
        masks: tuple[str, ...] = (),
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> list[Launch]:
        """A forward call and, "constant" or "through", its backward; masks as `sar_kernels.tools.aot` names them."""
        batch, length, heads, kv_heads, head_dim = (shape[n] for n in ("B", "N", "H", "Hkv", "D"))
        q, dout = (self.empty(batch, length, heads, head_dim) for _ in range(2))
        k, v = (self.empty(batch, length, kv_heads, head_dim) for _ in range(2))
        found = masks_of(("padding", *masks) if padded else masks, (1, length), (batch, length))
        options = AttentionOptions(not masks, head_dim**-0.5, window_size, softcap)  # which say all of it
        call = Call(q, k, v, options, found, arch=self.arch)
        if not sar:
            (out, lse), work = plan_attention_forward(call)
            return work + (plan_backward(call, dout, out, lse)[1] if backward else [])
        roles = *(self.empty(batch, length, dtype=torch.bool) for _ in range(2)), self._floats(batch, length)
        weights = WeightOptions(0.5)
        (out, lse, av, sa, c, count), work = plan_sar_forward(call, *roles, weights)
        if backward is None:
            return work
        # autograd hands the statistics' gradients along, zeros where nothing came
        kept = Through(*roles, weights, av, sa, count, av, sa, c) if backward == "through" else None
        return work + plan_backward(call, dout, out, lse, c, kept)[1]

    def beside(self, shape: Shape) -> list[Launch]:
        """What stands beside another library's forward and its backward, both ways."""
        batch, length, heads, kv_heads, head_dim = (shape[n] for n in ("B", "N", "H", "Hkv", "D"))
        q, k = self.empty(batch, length, heads, head_dim), self.empty(batch, length, kv_heads, head_dim)
        call = Call(q, k, k, AttentionOptions(True, head_dim**-0.5), arch=self.arch)
        roles = *(self.empty(batch, length, dtype=torch.bool) for _ in range(2)), self._floats(batch, length)
        return plan_beside(call, q, *roles, WeightOptions(0.5))

    def decode(self, shape: Shape, mode: str, *, full: bool = False) -> list[Launch]:
        """One step with one new token per sequence; ``full``: over keys of one length, as models have them."""
        batch, length, heads, kv_heads, head_dim = (shape[n] for n in ("B", "KV", "H", "Hkv", "D"))
        q, k = self.empty(batch, 1, heads, head_dim), self.empty(batch, length, kv_heads, head_dim)
        lengths = None if full else self.empty(batch, dtype=torch.int32)
        options = AttentionOptions(True, head_dim**-0.5)
        call = DecodeCall(q, k, k, lengths, options, arch=self.arch, sm_count=MULTIPROCESSORS)
        if mode != "plain":
            per_head = self._floats(batch, heads)
            sums = (per_head, per_head, self._floats(batch)) if mode == "running" else (None, None, None)
            call.set_state(*sums, per_head if mode == "prompt" else None)
        if mode in ("running", "step"):
            masks = self.empty(batch, length, dtype=torch.bool), self.empty(batch, 1, dtype=torch.bool)
            call.set_roles(*masks, self._floats(batch, length))
        # given weights ("prompt") come without a rule, which the backend says as equal ones
        weights = {"plain": None, "prompt": WeightOptions(math.inf, False)}.get(mode, WeightOptions(0.5))
        return call.plan(mode, weights)

    def _floats(self, *shape: int) -> torch.Tensor:
        return self.empty(*shape, dtype=torch.float32)


def _gate(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in gate_shapes(tiny):
        for backward in ("constant", "through"):
            yield from plan.prefill(shape, sar=True, backward=backward)
        yield from plan.prefill(shape, sar=False, backward="constant")
    for shape in gate_decode_shapes(tiny):
        for mode in DECODE_MODES:
            yield from plan.decode(shape, mode)


def _forward(plan: Planner, tiny: bool, shapes: Callable = attention_shapes) -> Iterator[Launch]:
    for shape in shapes(tiny):
        for sar in (True, False):
            yield from plan.prefill(shape, sar=sar)


def _visibility(plan: Planner, tiny: bool) -> Iterator[Launch]:
    checked, timed = pattern_shapes(tiny)
    for shape, backward in ((checked, "through"), (timed, None)):
        window = {"window_size": (part_of(shape["N"]) - 1, -1)}
        for options in (window, {"masks": ("ends",)}, {"masks": ("runs",)}, {"masks": ("bits",)}):
            yield from plan.prefill(shape, sar=True, backward=backward, **options)
        yield plan_pack_mask(plan.empty(1, 1, shape["N"], shape["N"], dtype=torch.bool))[1]
    yield from plan.prefill(timed, sar=False)


def _backward(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in attention_shapes(tiny):
        for backward in ("constant", "through"):
            yield from plan.prefill(shape, sar=True, backward=backward)
        yield from plan.prefill(shape, sar=False, backward="constant")


def _libraries(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in (*library_gate_shapes(tiny), *library_shapes(tiny)):
        yield from plan.beside(shape)
    for shape in library_shapes(tiny):
        yield from plan.prefill(shape, sar=True, backward="constant")
        yield from plan.prefill(shape, sar=False)


def _short(plan: Planner, tiny: bool) -> Iterator[Launch]:
    return _forward(plan, tiny, short_shapes)


def _scaling(plan: Planner, tiny: bool) -> Iterator[Launch]:
    return _forward(plan, tiny, lambda tiny: [shape for _, shape in scaling_shapes(tiny)])


def _decode(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in decode_shapes(tiny):
        for mode in DECODE_MODES:
            yield from plan.decode(shape, mode)


def _model_shapes(tiny: bool) -> Iterator[Shape]:
    for name, (heads, kv_heads, head_dim) in MODEL_HEADS.items():
        yield {"B": 1, "N": MODEL_TOKENS[name], "H": heads, "Hkv": kv_heads, "D": head_dim}


def _step(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in _model_shapes(tiny):
        for backward in ("constant", "through"):
            yield from plan.prefill(shape, sar=True, backward=backward)


def _model(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in _model_shapes(tiny):
        yield from plan.prefill(shape, sar=True)
        yield from plan.decode({**shape, "KV": shape["N"]}, "running", full=True)


def _others(plan: Planner, tiny: bool) -> Iterator[Launch]:
    for shape in other_shapes(tiny):
        yield from plan.prefill(shape, sar=True)


def _profile(plan: Planner, tiny: bool) -> Iterator[Launch]:
    if tiny:
        return
    large = {"B": 4, "N": 4096, "H": 32, "Hkv": 8, "D": 128, "KV": 8192}
    yield from plan.prefill(large, sar=True, backward="constant")
    yield from plan.decode(large, "running")


def _sanitize(plan: Planner, tiny: bool) -> Iterator[Launch]:
    backwards = ("through",) if tiny else ("constant", "through")
    for head_dim, backward in itertools.product(small_dims(tiny), backwards):
        shape = {"B": 2, "N": SMALL_LENGTH[tiny], "H": 4, "Hkv": 2, "D": head_dim}
        for options in ({}, {"padded": True}, WINDOW):
            if not (tiny and not options):
                yield from plan.prefill(shape, sar=True, backward=backward, **options)
    for head_dim, mode in itertools.product(small_dims(tiny), SMALL_MODES[: 1 if tiny else None]):
        yield from plan.decode(small_decode(tiny, head_dim), mode.removeprefix("sar "))


def _tiles(plan: Planner, tiny: bool) -> Iterator[Launch]:
    if tiny:
        return
    for choice, configs in from_shortlist(SHORTLIST, plan.arch):
        for config in dict.fromkeys((choice.present(plan.arch), *configs)):
            yield from launches(choice, config, "meta", plan.arch)


_OF = {
    "gate": _gate,
    "forward": _forward,
    "visibility": _visibility,
    "backward": _backward,
    "libraries": _libraries,
    "short": _short,
    "decode": _decode,
    "tiles": _tiles,
    "profile": _profile,
    "sanitize": _sanitize,
    "scaling": _scaling,
    "step": _step,
    "others": _others,
    "model": _model,
}


def launches_of(name: str, *, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16, tiny: bool = False):
    """Every launch of a slice, in any order; none for slices that launch nothing of ours in their own process."""
    return _OF[name](Planner(arch, dtype), tiny) if name in _OF else iter(())
