"""``sar-fast paper``: trainings, evaluations and analyses one after another, each by the command a reader would type.

Every stage keeps its results in a folder of its own and finds them there again, so an interrupted run goes on; after a
change of the options, stages that depend on it run anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sar_fast.base import json_text
from sar_fast.lab.io.model_source import MINIATURE
from sar_fast.lab.io.stamps import files_stamp
from sar_fast.lab.io.weights import weights_stamp
from sar_fast.lab.paper.report import write_report
from sar_fast.lab.paper.settings import ANALYSES, DATA, MAIN, TASKS, TRAININGS, Paper
from sar_fast.lab.paper.stages import Stage, run_stage
from sar_fast.lab.run.results import read_json
from sar_fast.lab.run.run_metadata import versions
from sar_fast.lab.run.threads import one_thread_for

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@dataclasses.dataclass(frozen=True)
class Commands:
    """The commands that stages run in this process: from their words to what they return."""

    evaluate: Callable[[Sequence[str]], Mapping[str, Any]]
    sweep: Callable[[Sequence[str]], Mapping[str, Any]]


def run(paper: Paper, commands: Commands) -> Path:
    """All stages, then ``report.html`` and ``paper.json`` in the output folder; the report's path.

    ``ValueError`` or ``FileNotFoundError`` name bad input; ``RuntimeError`` names a stage that failed and its log.
    """
    if not EXPERIMENTS.is_dir():
        raise FileNotFoundError(f"{EXPERIMENTS} does not exist: sar-fast paper runs from a checkout of the repository")
    paper = dataclasses.replace(paper, out=paper.out.expanduser().resolve())
    paper.out.mkdir(parents=True, exist_ok=True)
    with one_thread_for(MINIATURE):
        stages = list(_stages(paper, commands))
    summary = {
        "options": {**dataclasses.asdict(paper), "out": str(paper.out)},
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "seconds": sum(stage.seconds for stage in stages),
        "versions": versions(),
        "commits": sorted({stage.commit or "unknown" for stage in stages}),
    }
    (paper.out / "paper.json").write_text(json_text.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return write_report(paper, summary)


def _stages(paper: Paper, commands: Commands) -> Iterator[Stage]:
    files = sorted(f for part in ("data", "sar_paper") for f in (EXPERIMENTS / part).rglob("*") if f.suffix in DATA)
    data = files_stamp(files)
    for name in TRAININGS:
        yield _train(paper, name, data)
    for group, (weights, flags) in paper.groups.items():
        depends = {"--max_samples": paper.max_samples, "weights": weights_stamp(weights), "data": data}
        depends["--k or --beta"] = [paper.k, paper.beta] if flags else None
        for task in TASKS:
            yield _evaluate(paper, commands, group, task, weights, flags, depends)
        for kind in ANALYSES:
            yield _analyse(paper, commands, kind, group, weights, flags, depends)
    yield _sweep(paper, commands, data)


def _train(paper: Paper, name: str, data: str) -> Stage:
    """One training in a process of its own; its words go to ``train.log``."""
    folder = paper.out / name
    words = [str(EXPERIMENTS / TRAININGS[name]), "--output_dir", str(folder), "--run_name", name]
    words += [] if paper.epochs is None else ["--num_train_epochs", str(paper.epochs)]

    def train() -> dict[str, Any]:
        command = [sys.executable, str(EXPERIMENTS / "train.py"), *words]
        begun = any(folder.glob("checkpoint-*"))
        command += ["--resume_from_checkpoint", "true"] if begun else ["--overwrite_output_dir"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "train.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise RuntimeError(f"training {name} ended with exit code {code}; see {folder / 'train.log'}")
        return read_json(folder / "train_results.json")

    return run_stage(
        paper.out,
        f"Training: {name}",
        _typed("experiments/train.py", words),
        folder,
        {"--epochs": paper.epochs, "weights": weights_stamp(MINIATURE), "data": data},
        ["model.safetensors", "gradient_sparsity.jsonl"],
        train,
    )


def _evaluate(
    paper: Paper,
    commands: Commands,
    group: str,
    task: str,
    weights: str,
    flags: Sequence[str],
    depends: Mapping[str, Any],
) -> Stage:
    folder = paper.folder("benchmarks", group, task)
    words = ["--model_name_or_path", weights, "--task", task, "--data_dir", str(EXPERIMENTS / "data/benchmarks" / task)]
    words += [*TASKS[task], *flags, *paper.limits(), "--output_dir", str(folder)]

    def scores() -> dict[str, Any]:
        found = commands.evaluate(words)
        headline = _headline(task, found)
        main = found["overall"]["accuracy"] if task == "mme" else headline[MAIN[task]]
        return {**found, "headline": headline, "main": main}

    return _in_process(paper, f"{task}: {group}", "experiments/evaluate.py", words, folder, depends, [], scores)


def _headline(task: str, scores: dict[str, Any]) -> dict[str, float]:
    from sar_fast.lab.benchmark.tasks import find_task

    rows = find_task(task)().headline(scores)
    return {name: value for name, value in rows if isinstance(value, int | float)}


def _analyse(
    paper: Paper,
    commands: Commands,
    kind: str,
    group: str,
    weights: str,
    flags: Sequence[str],
    depends: Mapping[str, Any],
) -> Stage:
    title, configuration = ANALYSES[kind]
    folder = paper.folder(kind, group)
    words = [str(EXPERIMENTS / configuration), "--model_name_or_path", weights, *flags, *paper.limits()]
    words += ["--output_dir", str(folder)]
    products = {"focus": [], "probe": ["layerwise_probe_details.json"]}[kind]  # what the report reads
    return _in_process(
        paper,
        f"{title}: {group}",
        "experiments/evaluate.py",
        words,
        folder,
        depends,
        products,
        lambda: dict(commands.evaluate(words)),
    )


def _sweep(paper: Paper, commands: Commands, data: str) -> Stage:
    from sar_fast.lab.benchmark.figures import FIGURE

    folder = paper.out / "sweep"
    weights = str(paper.out / "sft")
    words = ["--model_name_or_path", weights, "--task", "mme"]
    words += ["--data_dir", str(EXPERIMENTS / "data/benchmarks/mme"), *paper.limits()]
    words += ["--k", *map(str, paper.swept_k), "--beta", *map(str, paper.swept_beta), "--compare_batches", "4"]
    words += ["--output_dir", str(folder)]
    depends = {"--max_samples": paper.max_samples, "weights": weights_stamp(weights), "data": data}
    depends["swept k or beta"] = [paper.swept_k, paper.swept_beta]
    title = "Ablation over K and beta"
    return _in_process(
        paper, title, "sar-fast sweep", words, folder, depends, [FIGURE], lambda: dict(commands.sweep(words))
    )


def _in_process(
    paper: Paper,
    title: str,
    program: str,
    words: Sequence[str],
    folder: Path,
    depends: Mapping[str, Any],
    products: Sequence[str],
    call: Callable[[], Mapping[str, Any]],
) -> Stage:
    def quiet() -> Mapping[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()):  # the report shows it all
            return call()

    return run_stage(paper.out, title, _typed(program, words), folder, depends, products, quiet)


def _typed(program: str, words: Sequence[str]) -> str:
    python = "" if program.startswith("sar-fast") else "python "
    return f"{python}{program} {' '.join(str(w).replace(str(EXPERIMENTS), 'experiments') for w in words)}"
