"""A benchmark, from its questions to its scores, in a folder of results."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.lab.benchmark.asking import Asker, Asking, ask_all, cut_batches, pending
from sar_fast.lab.benchmark.questions import Questions
from sar_fast.lab.benchmark.tasks import Record, Sample, Skip, Task
from sar_fast.lab.benchmark.tasks.base import partial_totals
from sar_fast.lab.run.results import SAMPLES, ResultFolder
from sar_fast.lab.run.session import Session
from sar_fast.lab.run.subject import Subject

UNREAD = (  # counts in the results that a score alone does not show
    ("unparsed", f"replies were not understood and count as wrong; they have no prediction in {SAMPLES}"),
    ("unclear", f"replies do not say what POPE's rule takes them for, which is yes; they are unclear in {SAMPLES}"),
)
PARTNER = "another sample of its group is skipped"


def run(subject: Subject, questions: Questions, asking: Asking, session: Session, path: str | Path) -> dict[str, Any]:
    """Answers what is not answered yet, then scores all; every process of a launch calls it.

    The model is opened only where something is left to answer. Returns what ``all_results.json`` in the folder
    ``path`` holds, on the main process; ``{}`` on the others.
    """
    task = questions.task
    folder = session.open(path, questions.settings(subject.settings(), asking))
    batches = pending(cut_batches(questions.samples, questions.table, asking.batch_size), folder.records())
    with contextlib.ExitStack() as stack:
        ask = Asker(task, asking, stack.enter_context(subject.opened())) if batches else None
        session.begin(task.name, len(questions.samples), sum(map(len, batches)))
        if ask is not None:
            session.note(sharing=ask.sharing)
            part = stack.enter_context(folder.open_part(session.state.process_index))

            def keep(asked: list[Sample], facts: list[Record], groups: Any, unreadable: list[Record]) -> None:
                found = ask.replies(asked, groups) if asked else []
                part.append([*({**fact, **reply} for fact, reply in zip(facts, found)), *unreadable])

            ask_all(ask, session.state, questions.table, batches, keep)
    if not session.worked():
        return {}
    results = finish(questions, folder)
    session.finish()
    return results


def finish(questions: Questions, folder: ResultFolder) -> dict[str, Any]:
    """Judges and scores all records and writes ``samples.jsonl`` and ``all_results.json``; what the latter holds."""
    task, answered = questions.task, folder.records()
    records = [answered[sample.key] for sample in questions.samples]
    broken = {record["group"] for record in records if "skipped" in record}
    unread = [
        Skip(record["key"], record["skipped"], record.get("skipped_kind", record["skipped"]))  # older ones have no kind
        for record in records
        if "skipped" in record
    ]
    partners = [
        Skip(record["key"], f"another sample of {record['group']} is skipped", PARTNER)
        for record in records
        if record["group"] in broken and "skipped" not in record
    ]
    records = [record | (task.judge(record) if "skipped" not in record else {}) for record in records]
    scored = [record for record in records if record["group"] not in broken]
    if not scored:
        raise ValueError(f"{task.name}: no sample is left to score; first: {unread[0].key}: {unread[0].reason}")
    results = summary(task, scored, [*questions.skips, *unread, *partners])
    folder.merge(records)
    folder.write_results(results)
    return results


def summary(task: Task, scored: Sequence[Record], skipped: Sequence[Skip]) -> dict[str, Any]:
    """What ``all_results.json`` holds, of the judged records that count and of all that is skipped."""
    scores = task.scores(scored)
    partial = partial_totals(task, scores)
    return {
        "task": task.name,
        **scores,
        "partial": partial,
        "num_samples_evaluated": len(scored),
        "num_samples_skipped": len(skipped),
        "num_skipped_by_kind": dict(Counter(skip.kind for skip in skipped)),
        "skipped": [{"key": skip.key, "reason": skip.reason} for skip in skipped],
        "warnings": warnings(task, scores, partial, len(scored)),
    }


def warnings(task: Task, scores: Mapping[str, Any], partial: Mapping[str, str], total: int) -> list[str]:
    """What a reader of the scores has to know, in sentences."""
    found = [f"{scores[count]} of {total} {what}" for count, what in UNREAD if scores.get(count)]
    if partial:
        parts = ", ".join(f"{name} ({part})" for name, part in partial.items())
        found.append(f"totals of a part of the benchmark, not to be compared with published ones: {parts}")
    return [*found, *task.remarks(scores)]
