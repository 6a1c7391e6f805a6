"""What a benchmark asks: the task with its options, its table, and the samples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import ArgumentError
from sar_fast.base.scalars import is_integer
from sar_fast.lab.benchmark.asking import Asking
from sar_fast.lab.benchmark.tables import Table, open_table
from sar_fast.lab.benchmark.tasks import Sample, Skip, Task, check_task, find_task
from sar_fast.lab.run.subject import Subject


@dataclasses.dataclass(frozen=True)
class Questions:
    """A benchmark that is ready to be asked.

    Attributes:
        task, table: the benchmark, with its options, and its rows.
        samples, skips: what is asked, and what is not, with reasons.
        max_samples: the limit that was given, or None.
    """

    task: Task
    table: Table
    samples: list[Sample]
    skips: list[Skip]
    max_samples: int | None = None

    def settings(self, subject: Mapping[str, Any], asking: Asking) -> dict[str, Any]:
        """What the records depend on; ``subject`` is the model's part. Batch size and processes are not among it."""
        return {
            "task": self.task.name,
            **self.table.stamp,
            **subject,
            "max_samples": self.max_samples,
            "scoring": asking.scoring,
            "max_new_tokens": asking.length(self.task),
            "prompt_suffix": self.task.words_after,
            **self.task.settings(),
        }


def open_questions(
    task: Task,
    asking: Asking,
    *,
    data_dir: str | Path | None = None,
    split: str | None = None,
    max_samples: int | None = None,
) -> Questions:
    """The questions of a benchmark's split; ``max_samples`` are its first ones and those scored together with them.

    Raises:
        ArgumentError: a scoring that the task does not have; ``max_samples`` below 1.
        FileNotFoundError, ConnectionError, ValueError: as :func:`~.tables.open_table`; nothing is left to ask.
    """
    if asking.scoring not in task.scorings:
        raise ArgumentError("scoring", repr(asking.scoring), f"be {' or '.join(task.scorings)} for {task.name}")
    if max_samples is not None and (not is_integer(max_samples) or max_samples < 1):
        raise ArgumentError("max_samples", repr(max_samples), "be a whole number, at least 1")
    table = open_table(task, data_dir, split)
    samples, skips = task.samples(table.rows)
    samples = first_groups(samples, max_samples)
    if not samples:
        raise ValueError(f"{task.name}: nothing to ask; {len(skips)} skipped, first: {skips[0].key}: {skips[0].reason}")
    return Questions(task, table, samples, skips, max_samples)


def first_groups(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` samples, and those that belong to one of their groups."""
    if limit is None or limit >= len(samples):
        return samples
    groups = {sample.group for sample in samples[:limit]}
    return [sample for sample in samples if sample.group in groups]


def make_task(kind: type[Task], options: Task.Options | None, subject: Subject) -> Task:
    """A benchmark for a model; ``ArgumentError`` names an option that does not fit it."""
    return _fitting(kind(options, model_type=subject.model_type), subject)


def task_of(task: str | type[Task] | Task, options: Mapping[str, Any], subject: Subject) -> Task:
    """A benchmark by its name, as a class, or as it is.

    ``ArgumentError``: an unknown name; an option that it does not have, or any beside a benchmark that is made.
    """
    if isinstance(task, Task):
        for name, value in options.items():
            raise ArgumentError(name, repr(value), "be left out where {task} is an instance, which has its options")
        return _fitting(task, subject)
    if not isinstance(task, str):
        check_task(task)
    kind = find_task(task) if isinstance(task, str) else task
    known = [field.name for field in dataclasses.fields(kind.Options)]
    for name, value in options.items():
        if name not in known:
            raise ArgumentError(
                name, repr(value), f"be left out with {{task}} {kind.name}, which takes {', '.join(known)}"
            )
    return make_task(kind, kind.Options(**options), subject)


def _fitting(task: Task, subject: Subject) -> Task:
    if (error := task.misfit(subject.reports_frames)) is not None:
        raise error
    return task
