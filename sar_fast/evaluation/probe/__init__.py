"""Linear probes on every decoder layer, from one forward pass per batch."""

from sar_fast.evaluation.probe.command import run
from sar_fast.evaluation.probe.heads import HeadTraining
from sar_fast.evaluation.probe.probe import LayerwiseProbe, ProbeResults

__all__ = ["HeadTraining", "LayerwiseProbe", "ProbeResults", "run"]
