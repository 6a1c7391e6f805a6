"""Benchmarks by name: the shipped ones, those registered here, and those of installed packages."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any, TypeVar

from sar_fast.base import plugins
from sar_fast.base.errors import ArgumentError, ArgumentTypeError
from sar_fast.lab.benchmark.tasks.base import Task
from sar_fast.lab.benchmark.tasks.mmbench import MMBench
from sar_fast.lab.benchmark.tasks.mme import MME
from sar_fast.lab.benchmark.tasks.pope import POPE
from sar_fast.lab.benchmark.tasks.refcoco import RefCOCO, RefCOCOg, RefCOCOPlus
from sar_fast.lab.benchmark.tasks.scienceqa import ScienceQA
from sar_fast.lab.benchmark.tasks.textvqa import TextVQA

KIND = "tasks"  # of entry points
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
        raise ArgumentError("task", f"{task.name!r}, which is that of {known!r}", "have a name that no other task has")
    _tasks[task.name] = task
    return task


def check_task(task: Any) -> None:
    """The errors of :func:`register_task` about a class alone."""
    if not inspect.isclass(task) or not issubclass(task, Task):
        raise ArgumentTypeError("task", repr(task), "be a subclass of Task")
    missing = [*sorted(task.__abstractmethods__), *(name for name in NEEDED if not hasattr(task, name))]
    if missing:
        raise ArgumentError("task", f"{task.__qualname__} without", f"have {', '.join(missing)}")
    if not isinstance(task.name, str) or not task.name:
        raise ArgumentError(f"name of {task.__qualname__}", repr(task.name), "be a text")
    options = task.Options
    made = "__dataclass_params__" in vars(options)  # by a decorator of its own: an inherited one has no fields of it
    if not issubclass(options, Task.Options) or not made or not options.__dataclass_params__.frozen:
        raise ArgumentTypeError(
            f"Options of {task.__qualname__}", options, "be a frozen dataclass that extends Task.Options"
        )
    taken = [f.name for f in dataclasses.fields(options) if f.name in TAKEN]
    if taken:
        raise ArgumentError(
            f"Options of {task.__qualname__}",
            taken,
            "have names of their own, none of an argument of evaluate or sweep",
        )
    needed = [f.name for f in dataclasses.fields(options) if f.default is f.default_factory is dataclasses.MISSING]
    if needed:
        raise ArgumentTypeError(f"Options of {task.__qualname__}", f"none for {', '.join(needed)}", "have defaults")


def find_task(name: str) -> type[Task]:
    """The benchmark of that name.

    Raises:
        ArgumentError: there is none, and it names the nearest one and all others; several packages have one.
        ValueError: an installed package's class calls itself otherwise.
        ImportError: the installed package that has it cannot be imported.
    """
    theirs = plugins.owners(KIND, name)
    if name in TASKS and theirs:
        raise ArgumentError("task", f"{name!r} of {' and '.join(['sar_fast', *theirs])}", "be one package's")
    if name in _tasks:
        return _tasks[name]
    task = plugins.load(KIND, name, "task")
    if task is None:
        near = difflib.get_close_matches(name, known_tasks(), n=1)
        came = f"{name!r}; did you mean {near[0]!r}?" if near else repr(name)
        raise ArgumentError("task", came, f"be one of {', '.join(known_tasks())}; for others: lmms-eval")
    if getattr(task, "name", None) != name:
        raise ValueError(f"task {name!r} of {theirs[0]} calls itself {getattr(task, 'name', None)!r}")
    return register_task(task)


def known_tasks() -> list[str]:
    """The names that are known, those of installed packages last."""
    return list(dict.fromkeys([*_tasks, *plugins.installed(KIND)]))
