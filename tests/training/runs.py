"""Small training runs: in this process, and as real processes under a launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sar_fast.lab.training.arguments import parse
from sar_fast.lab.training.run import build, run
from tests.training.samples import REPOSITORY

SCRIPT = REPOSITORY / "experiments" / "train.py"
SMALL = {
    "model_name_or_path": "miniature",
    "do_train": True,
    "dataset": "shapes_llava",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 3,
}


def flags(output: Path, **changes: Any) -> list[str]:
    """The small run's flags with changes; None leaves one out."""
    values = {**SMALL, "output_dir": output, **changes}
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def train(output: Path, **changes: Any) -> Any:
    """Runs in this process; returns the Trainer."""
    arguments = parse(flags(output, **changes))
    trainer, checkpoint = build(arguments)
    run(trainer, arguments, checkpoint)
    return trainer


def environment(**changes: str) -> dict[str, str]:
    """Of a process of its own: one thread, no tracker, no network, this interpreter's scripts on the path."""
    scripts = str(Path(sys.executable).parent)
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    own = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    return {**kept, **own, "PATH": scripts + os.pathsep + kept["PATH"], **changes}


def launch(
    words: list[str], processes: int = 2, timeout: float = 300, script: Path = SCRIPT, **env: str
) -> subprocess.CompletedProcess:
    """``train.py`` under torchrun with ``processes`` ranks; 0 is plain Python."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*launcher, str(script), *words], env=environment(**env), capture_output=True, text=True, timeout=timeout
    )


def history(output: Path, name: str = "loss") -> list[float]:
    """A logged value at every step of a finished run."""
    state = json.loads((output / "trainer_state.json").read_text())
    return [line[name] for line in state["log_history"] if name in line]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
