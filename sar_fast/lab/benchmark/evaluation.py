"""``--task``: a benchmark, from its table to its scores."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sar_fast.cli.evaluate.arguments import EvaluationArguments
from sar_fast.cli.evaluate.loading import load, model_settings, model_type_of, reports_frames, session_of
from sar_fast.lab.benchmark.asking import Asker, ask_all, cut_batches, pending
from sar_fast.lab.benchmark.tables import Table, open_table
from sar_fast.lab.benchmark.tasks import Record, Sample, Skip, Task, TaskOptions, find_task
from sar_fast.lab.benchmark.tasks.base import partial_totals
from sar_fast.lab.io.boxes import NEED_FRAMES
from sar_fast.lab.run.results import RESULTS, SAMPLES, ResultFolder

UNREAD = (  # counts in the results that a score alone does not show
    ("unparsed", f"replies were not understood and count as wrong; they have no prediction in {SAMPLES}"),
    ("unclear", f"replies do not say what POPE's rule takes them for, which is yes; they are unclear in {SAMPLES}"),
)
PARTNER = "another sample of its group is skipped"


def run(arguments: EvaluationArguments) -> dict[str, Any]:
    """Answers what is not answered yet, then scores all; every process of a launch calls it.

    Returns what ``all_results.json`` holds, on the main process; ``{}`` on the others. ``ValueError``,
    ``FileNotFoundError`` or ``ConnectionError`` name what is wrong with the input, before a model is loaded where that
    can be known.
    """
    session = session_of(arguments)
    task, scoring, table, samples, skips = questions(arguments)
    folder = session.open(arguments.output_dir, settings_of(arguments, task, table, scoring))
    batches = pending(cut_batches(samples, table, arguments.per_device_eval_batch_size), folder.records())
    ask = Asker(arguments, task, scoring, *load(arguments, session.state)) if batches else None
    session.begin(task.name, len(samples), sum(map(len, batches)))
    if ask is not None:
        session.note(sharing=ask.sharing)
        with folder.open_part(session.state.process_index) as part:

            def keep(asked: list[Sample], facts: list[Record], groups: Any, unreadable: list[Record]) -> None:
                found = ask.replies(asked, groups) if asked else []
                part.append([*({**fact, **reply} for fact, reply in zip(facts, found)), *unreadable])

            ask_all(ask, session.state, table, batches, keep)
    if not session.worked():
        return {}
    results = finish(task, samples, skips, folder)
    session.finish()
    return results


def questions(arguments: EvaluationArguments) -> tuple[Task, str, Table, list[Sample], list[Skip]]:
    """(benchmark, scoring, its table, what is asked, what is not); ``ValueError`` if nothing is left to ask."""
    task = make_task(arguments)
    scoring = choose_scoring(task, arguments)
    table = open_table(task, arguments.data_dir, arguments.split)
    samples, skips = task.samples(table.rows)
    samples = first_groups(samples, arguments.max_samples)
    if not samples:
        raise ValueError(f"{task.name}: nothing to ask; {len(skips)} skipped, first: {skips[0].key}: {skips[0].reason}")
    return task, scoring, table, samples, skips


def make_task(arguments: EvaluationArguments) -> Task:
    """The benchmark with its options; ``ValueError`` for an unknown name."""
    task = find_task(arguments.task)
    for name in ("choice_format", "box_format"):
        if getattr(arguments, name) is not None and name not in task.accepts:
            raise ValueError(f"--{name} has no effect on --task {task.name}; leave it out")
    if arguments.box_format in NEED_FRAMES and not reports_frames(arguments):
        raise ValueError(
            f"--box_format {arguments.box_format} needs a model whose processor reports the resized picture's grid; "
            f"that of {arguments.model_name_or_path} does not"
        )
    return task(
        TaskOptions(
            prompt_suffix=arguments.prompt_suffix,
            choice_format=arguments.choice_format or "letters",
            box_format=arguments.box_format,
            model_type=model_type_of(arguments) if "box_format" in task.accepts else "",
        )
    )


def choose_scoring(task: Task, arguments: EvaluationArguments) -> str:
    """``generate`` unless ``--scoring`` says otherwise; ``ValueError`` where the task has no such way."""
    scoring = arguments.scoring or "generate"
    if scoring not in task.scorings:
        raise ValueError(f"scoring {scoring} does not fit {task.name}; it takes {', '.join(task.scorings)}")
    return scoring


def settings_of(arguments: EvaluationArguments, task: Task, table: Table, scoring: str) -> dict[str, Any]:
    """What the records depend on. Batch size and processes are not among it."""
    return {
        "task": task.name,
        **table.stamp,
        **model_settings(arguments),
        "scoring": scoring,
        "max_new_tokens": (arguments.max_new_tokens or task.max_new_tokens) if scoring == "generate" else None,
        "prompt_suffix": task.words_after,
        **task.settings(),
    }


def first_groups(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` samples, and those that belong to one of their groups."""
    if limit is None or limit >= len(samples):
        return samples
    groups = {sample.group for sample in samples[:limit]}
    return [sample for sample in samples if sample.group in groups]


def finish(task: Task, samples: Sequence[Sample], skips: Sequence[Skip], folder: ResultFolder) -> dict[str, Any]:
    """Judges and scores all records and writes ``samples.jsonl`` and ``all_results.json``."""
    answered = folder.records()
    records = [answered[sample.key] for sample in samples]
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
    skipped = [*skips, *unread, *partners]
    scores = task.scores(scored)
    partial = partial_totals(task, scores)
    results = {
        "task": task.name,
        **scores,
        "partial": partial,
        "num_samples_evaluated": len(scored),
        "num_samples_skipped": len(skipped),
        "num_skipped_by_kind": dict(Counter(skip.kind for skip in skipped)),
        "skipped": [{"key": skip.key, "reason": skip.reason} for skip in skipped],
        "warnings": warnings(task, scores, partial, len(scored)),
    }
    folder.merge(records)
    folder.write_results(results)
    report(task, results, folder)
    return results


def warnings(task: Task, scores: Mapping[str, Any], partial: Mapping[str, str], total: int) -> list[str]:
    """What a reader of the scores has to know, in sentences."""
    found = [f"{scores[count]} of {total} {what}" for count, what in UNREAD if scores.get(count)]
    if partial:
        parts = ", ".join(f"{name} ({part})" for name, part in partial.items())
        found.append(f"totals of a part of the benchmark, not to be compared with published ones: {parts}")
    return [*found, *task.remarks(scores)]


def report(task: Task, results: Mapping[str, Any], folder: ResultFolder) -> None:
    """The scores on stdout, what is skipped on stderr."""
    for name, value in task.headline(results):
        shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        part = results["partial"].get(name)
        print(f"{name:>28}  {shown}" + (f"  (partial: {part})" if part else ""))
    print(f"{results['num_samples_evaluated']} samples; {folder.path / RESULTS}")
    for warning in results["warnings"]:
        sys.stderr.write(f"warning: {warning}\n")
    if results["num_samples_skipped"]:
        first, kinds = results["skipped"][0], results["num_skipped_by_kind"]
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        sys.stderr.write(
            f"warning: {results['num_samples_skipped']} skipped ({counts}; listed in {RESULTS}), first: "
            f"{first['key']}: {first['reason']}\n"
        )
