"""The paper in miniature: every experiment on what the repository ships, in one report."""

from sar_fast.lab.paper.run import Commands, run
from sar_fast.lab.paper.settings import Paper

__all__ = ["Commands", "Paper", "run"]
