"""Linear probes on every decoder layer, from one forward pass per batch."""

from sar_fast.lab.probe.heads import HeadTraining
from sar_fast.lab.probe.measure import probe_layers
from sar_fast.lab.probe.probe import LayerwiseProbe
from sar_fast.lab.probe.results import ProbeResults

__all__ = ["HeadTraining", "LayerwiseProbe", "ProbeResults", "probe_layers"]
