"""The slices of the GPU suite, in the order that uses minutes on a GPU best. Imports neither torch nor Triton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SHORTLIST = Path(__file__).parents[1] / "shortlist_sm_90.json"  # made by sar_kernels.tools.shortlist


@dataclass(frozen=True)
class Slice:
    """One slice: a function ``module:name`` of a `gpu_suite.bench.Bench`, and its budget in seconds."""

    name: str
    seconds: int
    where: str
    about: str
    kernels: bool = True  # it launches ours: they are compiled before it begins
    gated: bool = True  # its figures count only where the gate is green


SLICES = (
    Slice("machine", 15, "gpu_suite.machine:facts", "GPU, driver, clocks, versions", kernels=False, gated=False),
    Slice("ceilings", 40, "gpu_suite.attention:ceilings", "copy, matmul, PyTorch's own attention", False, False),
    Slice("gate", 45, "gpu_suite.gate:gate", "outputs, statistics, gradients against fp64", gated=False),
    Slice(
        "visibility",
        30,
        "gpu_suite.patterns:visibility",
        "windows, chunks, blocks and masks: right, and fast",
        gated=False,
    ),
    Slice("forward", 40, "gpu_suite.attention:forward", "prefill, whole calls and every launch"),
    Slice("backward", 50, "gpu_suite.attention:backward", "forward and backward, whole calls and every launch"),
    Slice("libraries", 45, "gpu_suite.libraries:libraries", "composed on every library here, beside the fused kernels"),
    Slice("short", 20, "gpu_suite.attention:short", "prefill too short to hide a launch"),
    Slice("decode", 40, "gpu_suite.decode:decode", "one token over a cache, three modes"),
    Slice("tiles", 30, "gpu_suite.commands:tiles", "the shortlist of tiles", gated=False),
    Slice("tests-gpu", 90, "gpu_suite.commands:tests_gpu", "tests/kernels -m gpu", gated=False),
    Slice("tests", 90, "gpu_suite.commands:tests", "tests/kernels, the everyday cases, compiled", gated=False),
    Slice("profile", 60, "gpu_suite.commands:profile", "ncu on forward, dK/dV and decode", gated=False),
    Slice("sanitize", 100, "gpu_suite.commands:sanitize", "compute-sanitizer on small cases", gated=False),
    Slice("scaling", 50, "gpu_suite.attention:scaling", "time and memory along each axis"),
    Slice("step", 50, "gpu_suite.models:training_step", "a training step of whole models"),
    Slice("others", 40, "gpu_suite.attention:others", "the composed backend, auto, FlexAttention, flash-attn"),
    Slice("model", 90, "gpu_suite.models:whole_model", "prefill and decode of whole models"),
)
BY_NAME = {s.name: s for s in SLICES}
