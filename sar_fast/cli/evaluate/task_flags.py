"""Flags of a benchmark's own options: those of the task that a command line asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from sar_fast.base.errors import ArgumentError, arguments_named
from sar_fast.lab.benchmark.tasks import TASKS, Task, find_task
from sar_fast.lab.run.flags import expand, parse_words

Group = TypeVar("Group")


def parse_with_task(kind: type[Group], argv: Sequence[str]) -> Group:
    """One ``kind``, from a command line, whose ``task_options`` are those of the task that ``--task`` names.

    Args:
        kind: a dataclass with the fields ``task`` and ``task_options``. With ``--help`` the options of all shipped
            tasks, and of the one that is named, are among its flags.

    Raises:
        ValueError: a bad flag, one of another task, a task that is not known.
    """
    words = expand(argv)
    with arguments_named({"task": "--task"}):
        name = _value_of("--task", words)
        task = None if name is None else find_task(name)
    if {"-h", "--help"} & set(words):
        tasks = TASKS if task is None else {**TASKS, name: task}
        (parsed,) = parse_words((_with_all_options(kind, tasks),), words)
        return parsed
    _refuse_others(kind, task, words)
    if task is None:
        (parsed,) = parse_words((kind,), words)
        return parsed
    with arguments_named({field.name: f"--{field.name}" for field in dataclasses.fields(task.Options)}):
        parsed, parsed.task_options = parse_words((kind, task.Options), words)
    return parsed


def task_flags(tasks: Mapping[str, type[Task]] = TASKS) -> dict[str, str]:
    """Name -> help of every option of the tasks, with those that have it unless all do."""
    owners: dict[str, list[str]] = {}
    helps: dict[str, str] = {}
    for name, task in tasks.items():
        for field in dataclasses.fields(task.Options):
            owners.setdefault(field.name, []).append(name)
            helps[field.name] = field.metadata.get("help", "")
    common = {field.name for field in dataclasses.fields(Task.Options)}
    return {n: text if n in common else f"Of {', '.join(owners[n])}. {text}" for n, text in helps.items()}


def _with_all_options(kind: type, tasks: Mapping[str, type[Task]]) -> type:
    """``kind`` with every task's options as further flags, for its help."""
    found = [
        (n, str, dataclasses.field(default=None, metadata={"help": text})) for n, text in task_flags(tasks).items()
    ]
    return dataclasses.make_dataclass(kind.__name__, found, bases=(kind,))


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """What a flag is set to at last; None if it is not, or to nothing."""
    found = None
    for word, following in zip(words, [*words[1:], "--"]):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else None if following.startswith("--") else following
    return found


def _refuse_others(kind: type, task: type[Task] | None, words: Sequence[str]) -> None:
    """``ValueError`` for a flag of another task than the one that is asked for, and for two flags of one name."""
    common = {field.name for field in dataclasses.fields(kind)}
    own = set() if task is None else {field.name for field in dataclasses.fields(task.Options)}
    if clash := sorted(common & own):
        raise ArgumentError("--task", f"{task.name} with {clash[0]}", "have options whose names no other flag has")
    others = task_flags().keys() - common - own
    for word in words:
        name = word.split("=", 1)[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in others:
            why = "without --task" if task is None else f"with --task {task.name}"
            raise ArgumentError(f"--{name}", _value_of(f"--{name}", words), f"be left out {why}")
