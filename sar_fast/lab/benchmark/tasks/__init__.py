"""Benchmarks by name."""

from __future__ import annotations

import difflib

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, TaskOptions
from sar_fast.lab.benchmark.tasks.mmbench import MMBench
from sar_fast.lab.benchmark.tasks.mme import MME
from sar_fast.lab.benchmark.tasks.pope import POPE
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO, RefCOCOg, RefCOCOPlus
from sar_fast.lab.benchmark.tasks.scienceqa import ScienceQA
from sar_fast.lab.benchmark.tasks.textvqa import TextVQA

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (MME, POPE, RefCOCO, RefCOCOPlus, RefCOCOg, ScienceQA, MMBench, TextVQA)
}

__all__ = ["TASKS", "Record", "Sample", "Skip", "Task", "TaskOptions", "find_task"]


def find_task(name: str) -> type[Task]:
    """The benchmark of that name; ``ValueError`` names the nearest one and all others."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"task is {name!r}, which is none; {hint}known: {', '.join(TASKS)}. For others: lmms-eval")
    return TASKS[name]
