"""``--task``: a benchmark, from its flags to its scores on the console."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sar_fast.base.errors import arguments_named
from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import FLAGS, session_of, subject_of
from sar_fast.lab.benchmark import evaluation
from sar_fast.lab.benchmark.asking import Asking
from sar_fast.lab.benchmark.questions import Questions, make_task, open_questions
from sar_fast.lab.benchmark.tasks import Task, find_task
from sar_fast.lab.run.results import RESULTS
from sar_fast.lab.run.subject import Subject


@arguments_named(FLAGS)
def run(arguments: EvaluationArguments) -> dict[str, Any]:
    """Answers what is not answered yet, then scores all; every process of a launch calls it.

    Returns what ``all_results.json`` holds, on the main process; ``{}`` on the others. ``ValueError``,
    ``FileNotFoundError`` or ``ConnectionError`` name what is wrong with the input, before a model is loaded where that
    can be known.
    """
    session = session_of(arguments)
    subject = subject_of(arguments, session.state)
    asking = asking_of(arguments)
    questions = questions_of(arguments, subject, asking)
    results = evaluation.run(subject, questions, asking, session, arguments.output_dir)
    if results:
        report(questions.task, results, Path(arguments.output_dir))
    return results


def asking_of(arguments: EvaluationArguments) -> Asking:
    """How the questions are asked."""
    return Asking(
        scoring=arguments.scoring or "generate",
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.per_device_eval_batch_size,
        workers=arguments.dataloader_num_workers,
        seed=arguments.seed,
    )


def questions_of(arguments: EvaluationArguments, subject: Subject, asking: Asking) -> Questions:
    """What is asked; errors name the task's own flags, too."""
    kind = find_task(arguments.task)
    with arguments_named({field.name: f"--{field.name}" for field in dataclasses.fields(kind.Options)}):
        task = make_task(kind, arguments.task_options, subject)
    return open_questions(
        task, asking, data_dir=arguments.data_dir, split=arguments.split, max_samples=arguments.max_samples
    )


def report(task: Task, results: Mapping[str, Any], folder: Path) -> None:
    """The scores on stdout, what is skipped on stderr."""
    for name, value in task.headline(results):
        shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        part = results["partial"].get(name)
        print(f"{name:>28}  {shown}" + (f"  (partial: {part})" if part else ""))
    print(f"{results['num_samples_evaluated']} samples; {folder / RESULTS}")
    for warning in results["warnings"]:
        sys.stderr.write(f"warning: {warning}\n")
    if results["num_samples_skipped"]:
        first, kinds = results["skipped"][0], results["num_skipped_by_kind"]
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        sys.stderr.write(
            f"warning: {results['num_samples_skipped']} skipped ({counts}; listed in {RESULTS}), first: "
            f"{first['key']}: {first['reason']}\n"
        )
