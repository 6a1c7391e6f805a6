"""Linear probes on every decoder layer, from one forward pass per batch."""

from sar_fast.lab.probe.command import run
from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.probe import LayerwiseProbe, ProbeResults

__all__ = ["HeadTraining", "LayerwiseProbe", "ProbeResults", "run"]
