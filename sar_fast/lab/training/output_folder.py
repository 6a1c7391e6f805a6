"""A run's output folder: what of an earlier run is in it, and how that makes room without being lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sar_fast.base.weight_files import adapter_weights, whole_weights
from sar_fast.lab.io.stamps import MODEL_FILES
from sar_fast.lab.training.checkpoints import REPLACED, checkpoints
from sar_fast.method.weighting.files import RULE

RESULTS = ("train_results.json", "trainer_state.json")
BESIDE = (  # belongs to a run, and is no loss alone
    "all_results.json",
    "eval_results.json",
    "run_metadata.json",
    "training_args.bin",
    "training_loss.png",
    "gradient_sparsity.jsonl",
    "throughput.jsonl",
    "runs",
    RULE,
    *MODEL_FILES,
)


def earlier_run(output: Path) -> str:
    """What an earlier run left in the folder that a new one would replace: its newest checkpoint or a file; or ''."""
    if old := checkpoints(output):
        return old[-1].name
    found = (*whole_weights(output), *adapter_weights(output), *_matching(output, RESULTS))
    return next((path.name for path in found), "")


def move_aside(output: Path) -> Path | None:
    """Move an earlier run into ``output/replaced_run``; the folder, or None if there was nothing to move.

    One that is there already holds a run that nothing whole has replaced since: it stays, and what a later run left
    without a whole save goes.
    """
    old = [*checkpoints(output), *_matching(output, (*RESULTS, *BESIDE))]
    aside = output / REPLACED
    if not old:
        return aside if aside.is_dir() else None
    kept = not aside.is_dir()
    aside.mkdir(exist_ok=True)
    for path in dict.fromkeys(old):
        if kept:
            path.rename(aside / path.name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return aside


def _matching(output: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in sorted(Path(output).glob(pattern)))
