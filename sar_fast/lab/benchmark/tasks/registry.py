"""Benchmarks by name: the shipped ones, those registered here, and those of installed packages."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import inspect
from typing import Any, TypeVar

from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.base.wording import reason
from sar_fast.lab.benchmark.tasks.base import Task
from sar_fast.lab.benchmark.tasks.mmbench import MMBench
from sar_fast.lab.benchmark.tasks.mme import MME
from sar_fast.lab.benchmark.tasks.pope import POPE
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO, RefCOCOg, RefCOCOPlus
from sar_fast.lab.benchmark.tasks.scienceqa import ScienceQA
from sar_fast.lab.benchmark.tasks.textvqa import TextVQA

ENTRY_POINTS = "sar_fast.tasks"
NEEDED = ("name", "split", "columns")  # that have no default
TAKEN = (  # names of arguments of evaluate and sweep, beside which options are further keywords
    "model", "processor", "task", "sar", "configs", "k", "beta", "weightings", "compare_batches", "data_dir", "split",
    "folder", "overwrite", "batch_size", "scoring", "max_new_tokens", "max_samples", "workers", "seed",
)  # fmt: skip

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (MME, POPE, RefCOCO, RefCOCOPlus, RefCOCOg, ScienceQA, MMBench, TextVQA)
}
_tasks = dict(TASKS)

Registered = TypeVar("Registered", bound=type[Task])


def register_task(task: Registered) -> Registered:
    """Make a benchmark known by its ``name``, to ``evaluate``, ``sweep`` and command lines; also as a decorator.

    Args:
        task: a subclass of :class:`Task`. A name that another one has is an error; a cell of a notebook that defines
            it again is not.

    Returns:
        The class.

    Raises:
        TypeError: not such a class, or its ``Options`` are no frozen dataclass.
        ValueError: something is missing in it, or its name, or one of its options', is another's.
    """
    check_task(task)
    known = _tasks.setdefault(task.name, task)
    if known is not task and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise ValueError(f"name {task.name!r} is another task's: {known!r}")
    _tasks[task.name] = task
    return task


def check_task(task: Any) -> None:
    """The errors of :func:`register_task` about a class alone."""
    if not inspect.isclass(task) or not issubclass(task, Task):
        raise ArgumentTypeError("task", repr(task), "a subclass of Task")
    missing = [*sorted(task.__abstractmethods__), *(name for name in NEEDED if not hasattr(task, name))]
    if missing:
        raise ValueError(f"task {task.__qualname__} lacks {', '.join(missing)}")
    if not isinstance(task.name, str) or not task.name:
        raise ValueError(f"name of {task.__qualname__} must be a text; got {task.name!r}")
    options = task.Options
    made = "__dataclass_params__" in vars(options)  # by a decorator of its own: an inherited one has no fields of it
    if not issubclass(options, Task.Options) or not made or not options.__dataclass_params__.frozen:
        raise TypeError(f"Options of {task.__qualname__} must be a frozen dataclass that extends Task.Options")
    taken = [f.name for f in dataclasses.fields(options) if f.name in TAKEN]
    if taken:
        names = f"names of their own; {', '.join(taken)} is an argument of evaluate or sweep"
        raise ValueError(f"Options of {task.__qualname__} must have {names}")
    needed = [f.name for f in dataclasses.fields(options) if f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        raise TypeError(f"Options of {task.__qualname__} must have defaults; {', '.join(needed)} has none")


def find_task(name: str) -> type[Task]:
    """The benchmark of that name.

    Raises:
        ArgumentError: there is none; it names the nearest one and all others.
        ValueError: several installed packages have one, or theirs has a shipped one's name.
        ImportError: the installed package that has it cannot be imported.
    """
    points = {point.value: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)}
    if len(points) + (name in TASKS) > 1:
        owners = [*(["sar_fast"] if name in TASKS else []), *sorted(map(_package, points.values()))]
        raise ValueError(f"task {name!r} must be one package's; it is of {', '.join(owners)}")
    if name in _tasks:
        return _tasks[name]
    if not points:
        near = difflib.get_close_matches(name, known_tasks(), n=1)
        came = f"{name!r}; did you mean {near[0]!r}?" if near else repr(name)
        raise ArgumentError("task", came, f"one of {', '.join(known_tasks())}; for others: lmms-eval")
    (point,) = points.values()
    return register_task(_load(point, name))


def known_tasks() -> list[str]:
    """The names that are known, those of installed packages last."""
    return list(dict.fromkeys([*_tasks, *sorted(importlib.metadata.entry_points(group=ENTRY_POINTS).names)]))


def _load(point: importlib.metadata.EntryPoint, name: str) -> type[Task]:
    try:
        task = point.load()
    except (ImportError, AttributeError) as error:
        raise ImportError(f"task {name!r} of {_package(point)} cannot be imported: {reason(error)}") from error
    if getattr(task, "name", None) != name:
        raise ValueError(f"task {name!r} of {_package(point)} calls itself {getattr(task, 'name', None)!r}")
    return task


def _package(point: importlib.metadata.EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else point.value
