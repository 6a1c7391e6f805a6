"""Metrics under their own names: a JSONL file always, and the trackers that the Trainer reports to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, WandbCallback


class MetricsLog:
    """One line a measurement in ``path``; the same values in Weights & Biases and TensorBoard.

    ``Trainer.log`` would put ``train/`` before every name. Used on the main process alone.
    """

    def __init__(self, trainer: Trainer, path: Path) -> None:
        self.trainer, self.path = trainer, Path(path)

    def start(self, step: int) -> None:
        """Begin, or go on after a checkpoint at ``step``: later lines go, since the run writes them again."""
        keep_until(self.path, step)

    def write(self, values: Mapping[str, float], state: Any) -> None:
        """Values of the optimizer step that just ended; what is not finite becomes null in the file."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": state.global_step, "epoch": state.epoch, **{name: finite.get(name) for name in values}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, WandbCallback) and callback._wandb is not None:
                callback._wandb.log({**finite, "train/global_step": state.global_step})
            elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for name, value in finite.items():
                    callback.tb_writer.add_scalar(name, value, state.global_step)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file after ``step``, and half a last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    path.write_text("".join(kept), encoding="utf-8")
