"""The suite is imported as benchmarks/gpu.py imports it: from its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench(tmp_path, one_thread):
    """A rehearsal's view of a slice, in this process."""
    from gpu_suite.bench import Bench
    from gpu_suite.device import Rehearsal
    from gpu_suite.records import NAME, Records

    return Bench(Rehearsal(), Records(tmp_path / NAME, {"gpu": "none", "key": "k"}), tmp_path)
