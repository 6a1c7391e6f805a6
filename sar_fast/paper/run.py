"""``sar-fast paper``: trainings, evaluations and analyses one after another, each by the command a reader would type.

Every stage keeps its results in a folder of its own and finds them there again, so an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sar_fast.run_metadata import commit, versions

logger = logging.getLogger(__name__)

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
LETTERLESS = ["--scoring", "first_token", "--choice_format", "cloze"]  # the miniature has never seen option letters
TASKS = {
    "mme": [],
    "pope": [],
    "refcoco": ["--box_format", "miniature"],
    "scienceqa": LETTERLESS,
    "mmbench": LETTERLESS,
    "textvqa": [],
}
MAIN = {  # the one score, in percent of right answers, that stands for a benchmark in a mean over them
    "pope": "mean accuracy",
    "refcoco": "accuracy at IoU 0.5",
    "scienceqa": "accuracy",
    "mmbench": "accuracy, circular",
    "textvqa": "accuracy",
}
ANALYSES = {
    "focus": ("SFS and FI", "sar_paper/analysis_sec4.3_sfs_fi_eval_mini.yaml"),
    "probe": ("Layer-wise probe", "sar_paper/analysis_sec6.3_layerwise_probe_mini.yaml"),
}
TRAININGS = {
    "sft": "sar_paper/exp_sec3.2_grad_sparsity_sft_mini.yaml",
    "control": "sar_paper/exp_sec3.3_grad_sparsity_control_mini.yaml",
}


@dataclasses.dataclass(frozen=True)
class Paper:
    """What is run, and where its results go.

    Args:
        out: folder of all results.
        k, beta: SAR's setting in the tables.
        swept_k, swept_beta: the settings of the ablation.
        max_samples: first samples of every benchmark and analysis; None = all.
        epochs: of both trainings; None = the configurations' own.
    """

    out: Path
    k: int = 2
    beta: float = 0.5
    swept_k: tuple[int, ...] = (0, 1, 2, 3, 4)
    swept_beta: tuple[float, ...] = (0.1, 0.5)
    max_samples: int | None = None
    epochs: float | None = None

    @property
    def groups(self) -> dict[str, tuple[str, list[str]]]:
        """The compared models: name -> (weights, further flags)."""
        sar = ["--use_sar", "--sar_activation_layer_k", str(self.k), "--sar_beta", str(self.beta)]
        sft, control = str(self.out / "sft"), str(self.out / "control")
        return {
            "Base": ("miniature", []),
            "SFT": (sft, []),
            "SFT + SAR": (sft, sar),
            "Control": (control, []),
        }

    def folder(self, kind: str, group: str, *more: str) -> Path:
        """Where one group's results of one kind lie."""
        return self.out.joinpath(kind, group.lower().replace(" + ", "_"), *more)

    def limits(self) -> list[str]:
        """Flags that shorten an evaluation."""
        return [] if self.max_samples is None else ["--max_samples", str(self.max_samples)]


@dataclasses.dataclass
class Stage:
    """One command, and what it gave."""

    title: str
    command: str
    seconds: float
    results: dict[str, Any]


def run(paper: Paper) -> Path:
    """All stages, then ``report.html`` and ``paper.json`` in the output folder; the report's path.

    ``ValueError`` or ``FileNotFoundError`` name bad input; ``RuntimeError`` names a stage that failed and its log.
    """
    if not EXPERIMENTS.is_dir():
        raise FileNotFoundError(f"{EXPERIMENTS} does not exist: sar-fast paper runs from a checkout of the repository")
    from sar_fast.paper.report import write_report

    paper.out.mkdir(parents=True, exist_ok=True)
    began, stages = time.time(), []
    for name in TRAININGS:
        stages.append(_train(paper, name))
    for group, (weights, flags) in paper.groups.items():
        for task in TASKS:
            stages.append(_evaluate(paper, group, task, weights, flags))
        stages.append(_analyse(paper, "focus", group, weights, flags))
        stages.append(_analyse(paper, "probe", group, weights, flags))
    stages.append(_sweep(paper))
    summary = {
        "options": {**dataclasses.asdict(paper), "out": str(paper.out)},
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "seconds": time.time() - began,
        "versions": versions(),
        "commit": commit(),
    }
    (paper.out / "paper.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return write_report(paper, summary)


def _train(paper: Paper, name: str) -> Stage:
    """One training in a process of its own; its words go to ``train.log``. A finished one is not run again."""
    folder = paper.out / name
    words = [str(EXPERIMENTS / TRAININGS[name]), "--output_dir", str(folder), "--run_name", name]
    words += [] if paper.epochs is None else ["--num_train_epochs", str(paper.epochs)]
    command = [sys.executable, str(EXPERIMENTS / "train.py"), *words]
    marker, began = folder / "finished.json", time.time()
    finished = json.loads(marker.read_text()) if marker.is_file() else {}
    if finished.get("command") == words:
        seconds = finished["seconds"]
    elif finished:
        raise ValueError(f"{folder} holds a training of other settings: {' '.join(finished['command'])}; delete it")
    else:
        if any(folder.glob("checkpoint-*")):
            command += ["--resume_from_checkpoint", "true"]
        folder.mkdir(parents=True, exist_ok=True)
        _say(f"training {name}")
        with (folder / "train.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            raise RuntimeError(f"training {name} ended with exit code {code}; see {folder / 'train.log'}")
        seconds = time.time() - began
        marker.write_text(json.dumps({"command": words, "seconds": seconds}))
    results = json.loads((folder / "train_results.json").read_text())
    return Stage(f"Training: {name}", _typed("experiments/train.py", words), seconds, results)


def _evaluate(paper: Paper, group: str, task: str, weights: str, flags: Sequence[str]) -> Stage:
    from sar_fast.evaluation import arguments, benchmark

    folder = paper.folder("benchmarks", group, task)
    words = ["--model_name_or_path", weights, "--task", task, "--data_dir", str(EXPERIMENTS / "data/benchmarks" / task)]
    words += [*TASKS[task], *flags, *paper.limits(), "--output_dir", str(folder)]

    def scores() -> dict[str, Any]:
        found = benchmark.run(arguments.parse(words))
        headline = _headline(task, found)
        main = found["overall"]["accuracy"] if task == "mme" else headline[MAIN[task]]
        return {**found, "headline": headline, "main": main}

    return _in_process(f"{task}: {group}", "experiments/evaluate.py", words, scores)


def _headline(task: str, scores: dict[str, Any]) -> dict[str, float]:
    from sar_fast.evaluation.tasks import TaskOptions, find_task

    rows = find_task(task)(TaskOptions()).headline(scores)
    return {name: value for name, value in rows if isinstance(value, int | float)}


def _analyse(paper: Paper, kind: str, group: str, weights: str, flags: Sequence[str]) -> Stage:
    from sar_fast.evaluation import arguments, focus, probe

    (title, configuration), module = ANALYSES[kind], {"focus": focus, "probe": probe}[kind]
    words = [str(EXPERIMENTS / configuration), "--model_name_or_path", weights, *flags, *paper.limits()]
    words += ["--output_dir", str(paper.folder(kind, group))]
    return _in_process(
        f"{title}: {group}", "experiments/evaluate.py", words, lambda: dict(module.run(arguments.parse(words)))
    )


def _sweep(paper: Paper) -> Stage:
    from sar_fast.evaluation import sweep

    words = ["--model_name_or_path", str(paper.out / "sft"), "--task", "mme"]
    words += ["--data_dir", str(EXPERIMENTS / "data/benchmarks/mme"), *paper.limits()]
    words += ["--k", *map(str, paper.swept_k), "--beta", *map(str, paper.swept_beta), "--compare_batches", "4"]
    words += ["--output_dir", str(paper.out / "sweep")]
    return _in_process("Ablation over K and beta", "sar-fast sweep", words, lambda: sweep.run(sweep.parse(words)))


def _in_process(title: str, program: str, words: Sequence[str], call: Callable[[], dict[str, Any]]) -> Stage:
    _say(title)
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):  # the report shows it all
        results = call()
    return Stage(title, _typed(program, words), time.time() - began, results)


def _typed(program: str, words: Sequence[str]) -> str:
    python = "" if program.startswith("sar-fast") else "python "
    return f"{python}{program} {' '.join(str(w).replace(str(EXPERIMENTS), 'experiments') for w in words)}"


def _say(title: str) -> None:
    sys.stderr.write(f"-- {title}\n")
    sys.stderr.flush()
