"""Semantic focus: where a model looks while it reads a query (SFS), and whether wording moves its eyes (FI).

Public names are imported on first use: looking at a dataset's rows needs no model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sar_fast.lab.focus.evaluator import FocusMetricsEvaluator, summarise
    from sar_fast.lab.focus.measure import measure_focus
    from sar_fast.lab.focus.results import FocusResults
    from sar_fast.lab.focus.samples import DatasetMasks, GroundingSample
    from sar_fast.lab.io.skips import SampleSkipped

_MODULE_OF = {
    "DatasetMasks": "samples",
    "FocusMetricsEvaluator": "evaluator",
    "FocusResults": "results",
    "GroundingSample": "samples",
    "SampleSkipped": "samples",
    "measure_focus": "measure",
    "summarise": "evaluator",
}

__all__ = [
    "DatasetMasks",
    "FocusMetricsEvaluator",
    "FocusResults",
    "GroundingSample",
    "SampleSkipped",
    "measure_focus",
    "summarise",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
