"""The paper in miniature: every experiment on what the repository ships, in one report."""

from sar_fast.paper.run import Paper, run

__all__ = ["Paper", "run"]
