"""The laboratory: every measurement of this project as one call on a model that you have (docs/laboratory.md).

``evaluate`` and ``sweep`` run benchmarks, ``ask`` one question, ``measure_focus`` and ``probe_layers`` look inside,
``train`` fine-tunes. Imported on first use; all but ``ask`` need the extra ``train``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from sar_fast.base.extras import TRAINING, need

if TYPE_CHECKING:
    from sar_fast.lab.benchmark.ask import ask
    from sar_fast.lab.benchmark.evaluate import evaluate
    from sar_fast.lab.benchmark.sweep import sweep
    from sar_fast.lab.focus.measure import measure_focus
    from sar_fast.lab.probe.measure import probe_layers
    from sar_fast.lab.training.train import train

_MODULE_OF = {
    "ask": "sar_fast.lab.benchmark.ask",
    "evaluate": "sar_fast.lab.benchmark.evaluate",
    "measure_focus": "sar_fast.lab.focus.measure",
    "probe_layers": "sar_fast.lab.probe.measure",
    "sweep": "sar_fast.lab.benchmark.sweep",
    "train": "sar_fast.lab.training.train",
}

__all__ = ["ask", "evaluate", "measure_focus", "probe_layers", "sweep", "train"]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "ask":
        need(f"sar_fast.lab.{name}", *TRAINING)
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
