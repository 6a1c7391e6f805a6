"""``--task``: a benchmark, from its table to its scores."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sar_fast.evaluation.answering import encode, frames, generate, option_log_probabilities
from sar_fast.evaluation.arguments import EvaluationArguments
from sar_fast.evaluation.models import dtype_name, load, model_type_of, start_processes
from sar_fast.evaluation.results import RESULTS, ResultFolder
from sar_fast.evaluation.tables import Table, open_table
from sar_fast.evaluation.tasks import Record, Sample, Skip, Task, TaskOptions, find_task
from sar_fast.miniature.checkpoint import MINIATURE_PATH
from sar_fast.run_metadata import commit, versions
from sar_fast.training.records import RecordError

logger = logging.getLogger(__name__)


def run(arguments: EvaluationArguments) -> dict[str, Any]:
    """Answers what is not answered yet, then scores all; every process of a launch calls it.

    Returns what ``all_results.json`` holds, on the main process; ``{}`` on the others. ``ValueError``,
    ``FileNotFoundError`` or ``ConnectionError`` name what is wrong with the input, before a model is loaded where that
    can be known.
    """
    clock = time.time()
    state = start_processes(arguments.device)
    task, scoring, table, samples, skips = questions(arguments)
    folder = ResultFolder(
        Path(arguments.output_dir), settings_of(arguments, task, table, scoring), arguments.overwrite_output_dir
    )
    state.wait_for_everyone()
    if state.is_main_process:
        folder.prepare()
    state.wait_for_everyone()
    answered = folder.records()
    batches = pending_batches(samples, answered, arguments.per_device_eval_batch_size)
    session = start_session(arguments, state, sum(map(len, batches)))
    state.wait_for_everyone()  # all have read what there is, before one writes
    if state.is_main_process:
        folder.write_session(session)
        logger.info("%s: %d samples, %d answered already", task.name, len(samples), len(samples) - session["samples"])
    if batches:
        answer_batches(arguments, state, task, table, scoring, batches, folder)
    state.wait_for_everyone()
    if not state.is_main_process:
        return {}
    results = finish(task, samples, skips, folder)
    folder.write_session(session | {"finished": now(), "seconds": round(time.time() - clock, 3)})
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
    return task(
        TaskOptions(
            prompt_suffix=arguments.prompt_suffix,
            choice_format=arguments.choice_format or "letters",
            box_format=arguments.box_format,
            model_type=model_type_of(arguments.model_name_or_path) if "box_format" in task.accepts else "",
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
    name = arguments.model_name_or_path
    weights = weights_stamp(name)
    return {
        "task": task.name,
        **table.stamp,
        "model": Path(name).name if weights else name,  # a folder may have moved
        "weights": weights,
        "dtype": dtype_name(arguments),
        "sar": arguments.sar_config().to_dict() if arguments.use_sar else None,
        "scoring": scoring,
        "max_new_tokens": (arguments.max_new_tokens or task.max_new_tokens) if scoring == "generate" else None,
        "max_samples": arguments.max_samples,
        "prompt_suffix": task.words_after,
        "template": template_stamp(arguments.template),
        **task.settings(),
    }


def weights_stamp(name: str) -> str | None:
    """What tells a folder's weights from others that lay there before: a hash of file names, sizes and times."""
    folder = MINIATURE_PATH if name == "miniature" else Path(name).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json"))
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def template_stamp(template: str | None) -> str | None:
    """A hash of the chat template's file; None for the model's own."""
    return hashlib.sha256(Path(template).read_bytes()).hexdigest()[:16] if template else None


def first_groups(samples: list[Sample], limit: int | None) -> list[Sample]:
    """The first ``limit`` samples, and those that belong to one of their groups."""
    if limit is None or limit >= len(samples):
        return samples
    groups = {sample.group for sample in samples[:limit]}
    return [sample for sample in samples if sample.group in groups]


def pending_batches(samples: Sequence[Sample], answered: Mapping[str, Any], size: int) -> list[list[Sample]]:
    """Batches with a sample that has no record; cut before that is asked, so they are the same in every run."""
    batches = [list(samples[start : start + size]) for start in range(0, len(samples), size)]
    return [batch for batch in batches if any(sample.key not in answered for sample in batch)]


class Batches(Dataset):
    """Prepared batches: (samples to ask, their records so far, model inputs or None, records of those not to ask)."""

    def __init__(self, batches: Sequence[Sequence[Sample]], task: Task, table: Table, processor: Any) -> None:
        self.batches, self.task, self.table, self.processor = batches, task, table, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[list[Sample], list[Record], Any, list[Record]]:
        asked, facts, pictures, unreadable = [], [], [], []
        opened: dict[int, Any] = {}
        for sample in self.batches[index]:
            fact = {**sample.about, "key": sample.key, "group": sample.group, "prompt": sample.prompt}
            try:
                if sample.row not in opened:
                    opened[sample.row] = self.table.picture(sample.row)
            except RecordError as error:
                unreadable.append({**fact, "skipped": f"row {sample.row}: {error}"})
                continue
            picture = opened[sample.row]
            objection = self.task.objection(sample, picture.size)
            if objection is not None:
                unreadable.append({**fact, "skipped": f"row {sample.row}: {objection}"})
                continue
            asked.append(sample)
            pictures.append(picture)
            facts.append({**fact, "image_size": list(picture.size)})
        if not asked:
            return [], [], None, unreadable
        inputs = encode(self.processor, pictures, [sample.prompt for sample in asked])
        for fact, frame in zip(facts, frames(inputs, self.processor, len(asked))):
            fact["frame"] = frame
        return asked, facts, inputs, unreadable


def answer_batches(
    arguments: EvaluationArguments,
    state: PartialState,
    task: Task,
    table: Table,
    scoring: str,
    batches: list[list[Sample]],
    folder: ResultFolder,
) -> None:
    """This process's share of the batches, each appended to the folder as soon as it is answered."""
    transformers.set_seed(arguments.seed)
    model, processor, _ = load(arguments, state)
    per_process = -(-len(batches) // state.num_processes)
    mine = batches[state.process_index * per_process : (state.process_index + 1) * per_process]
    workers = arguments.dataloader_num_workers
    workers = (4 if model.device.type == "cuda" else 0) if workers is None else workers
    loader = DataLoader(Batches(mine, task, table, processor), batch_size=None, num_workers=workers)
    bar = tqdm(total=sum(map(len, mine)), desc=task.name, unit="sample", disable=not state.is_main_process)
    with bar, folder.open_part(state.process_index) as part:
        for asked, facts, inputs, unreadable in loader:
            if asked:
                inputs = inputs.to(model.device, model.dtype)
                for fact, reply in zip(facts, replies(arguments, task, scoring, model, processor, asked, inputs)):
                    fact.update(reply)
            part.append([*facts, *unreadable])
            bar.update(len(asked) + len(unreadable))


def replies(
    arguments: EvaluationArguments,
    task: Task,
    scoring: str,
    model: nn.Module,
    processor: Any,
    asked: Sequence[Sample],
    inputs: Any,
) -> list[dict[str, Any]]:
    """``reply`` of every sample, and ``log_probabilities`` where scoring compares first tokens."""
    if scoring == "generate":
        length = arguments.max_new_tokens or task.max_new_tokens
        return [{"reply": reply} for reply in generate(model, processor, inputs, length)]
    options = [sample.options for sample in asked]
    found = []
    for option, log_p in zip(options, option_log_probabilities(model, processor, inputs, options)):
        names = [wordings[0] for wordings in option]
        best = names[max(range(len(log_p)), key=log_p.__getitem__)]
        found.append({"reply": best, "log_probabilities": dict(zip(names, log_p))})
    return found


def finish(task: Task, samples: Sequence[Sample], skips: Sequence[Skip], folder: ResultFolder) -> dict[str, Any]:
    """Judges and scores all records and writes ``samples.jsonl`` and ``all_results.json``."""
    answered = folder.records()
    records = [answered[sample.key] for sample in samples]
    broken = {record["group"] for record in records if "skipped" in record}
    unread = [Skip(record["key"], record["skipped"]) for record in records if "skipped" in record]
    partners = [
        Skip(record["key"], f"another sample of {record['group']} is skipped")
        for record in records
        if record["group"] in broken and "skipped" not in record
    ]
    records = [record | (task.judge(record) if "skipped" not in record else {}) for record in records]
    scored = [record for record in records if record["group"] not in broken]
    if not scored:
        raise ValueError(f"{task.name}: no sample is left to score; first: {unread[0].key}: {unread[0].reason}")
    skipped = [*skips, *unread, *partners]
    results = {
        "task": task.name,
        **task.scores(scored),
        "num_samples_evaluated": len(scored),
        "num_samples_skipped": len(skipped),
        "skipped": [{"key": skip.key, "reason": skip.reason} for skip in skipped],
    }
    folder.merge(records)
    folder.write_results(results)
    report(task, results, folder)
    return results


def report(task: Task, results: Mapping[str, Any], folder: ResultFolder) -> None:
    """The scores on stdout, what is skipped on stderr."""
    for name, value in task.headline(results):
        shown = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
        print(f"{name:>28}  {shown}")
    print(f"{results['num_samples_evaluated']} samples; {folder.path / RESULTS}")
    if results["num_samples_skipped"]:
        first = results["skipped"][0]
        sys.stderr.write(
            f"warning: {results['num_samples_skipped']} skipped (listed in {RESULTS}), first: {first['key']}: "
            f"{first['reason']}\n"
        )


def start_session(arguments: EvaluationArguments, state: PartialState, pending: int) -> dict[str, Any]:
    """Metadata of this session."""
    device = "cpu" if state.device.type == "cpu" else torch.cuda.get_device_name(state.device)
    return {
        "command": sys.argv,
        "versions": versions(),
        "commit": commit(),
        "seed": arguments.seed,
        "world_size": state.num_processes,
        "device": device,
        "configuration": arguments.to_dict(),
        "samples": pending,
        "started": now(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
