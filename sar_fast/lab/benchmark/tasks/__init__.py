"""Benchmarks: what one is made of, those that are shipped, and how others become known."""

from sar_fast.lab.benchmark.tasks.base import Record, Sample, Skip, Task, option
from sar_fast.lab.benchmark.tasks.registry import TASKS, check_task, find_task, known_tasks, register_task

__all__ = [
    "TASKS",
    "Record",
    "Sample",
    "Skip",
    "Task",
    "check_task",
    "find_task",
    "known_tasks",
    "option",
    "register_task",
]
