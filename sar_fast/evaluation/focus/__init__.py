"""Semantic focus: where a model looks while it reads a query (SFS), and whether wording moves its eyes (FI)."""

from sar_fast.evaluation.focus.command import run
from sar_fast.evaluation.focus.evaluator import FocusMetricsEvaluator, summarise
from sar_fast.evaluation.focus.samples import DatasetMasks, GroundingSample, SampleSkipped

__all__ = ["DatasetMasks", "FocusMetricsEvaluator", "GroundingSample", "SampleSkipped", "run", "summarise"]
