"""The libraries beneath backend "composed", beside the fused kernels: right, then fast; and what statistics cost."""

from __future__ import annotations

from functools import partial

from providers import PROVIDERS, make_inputs

from gpu_suite.attention import available, graph_of, inputs_of, launches, measure, statistics_launches, training
from gpu_suite.bench import Bench
from gpu_suite.gate import prefill_rows
from gpu_suite.inputs import library_gate_shapes, library_shapes, sizes
from sar_fast import sar_attn_func

NAMES = tuple(name for name in PROVIDERS if name.startswith("sar-composed:"))


def libraries(bench: Bench) -> None:
    """Rows of the gate for every library that is here, then calls and trainings; `speed_table.py` reads the records."""
    names = available(bench, NAMES)
    for shape in library_gate_shapes(bench.tiny):
        inputs = make_inputs(*sizes(shape), dtype=bench.dtype, device=bench.device.name)
        for name in names:
            for mode in ("constant", "through"):
                prefill_rows(bench, name, mode, shape, inputs, sar_attn_func, name.removeprefix("sar-"))
        bench.device.release()
    for shape in library_shapes(bench.tiny):
        inputs, both = inputs_of(bench, shape), ("sar-triton", *names)
        measure(bench, "libraries", shape, {n: partial(graph_of, bench, n, inputs) for n in both}, timed="graph")
        measure(bench, "libraries, forward+backward", shape, {n: partial(training, n, inputs) for n in both})
        launches(bench, "statistics", shape, {"sar launches": partial(statistics_launches, inputs)})
