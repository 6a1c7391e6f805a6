"""What the stacks have in common: data, the first batch of a run, plain transformers' loss of it, reports."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

from sar_fast import SARConfig, apply_sar
from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.questions import draw_questions

MARK = "CHECK "  # begins a line that goes into the table
RECORD = "RECORDED_BATCH"  # environment variable: where a run keeps its first batch
CONFIG = SARConfig(activation_layer_k=3, beta=0.01)
BATCH = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "labels")


def draw_records(folder: Path, count: int = 12) -> list[tuple[str, str, str]]:
    """(picture's file, question, answer) of drawn pictures; boxes first, which the miniature knows least."""
    drawn = draw_questions(np.random.default_rng(7), count, ("texture",))[::-1][:count]
    for number, (scene, _) in enumerate(drawn):
        Image.fromarray(scene.image).save(folder / f"{number}.png")
    return [(str(folder / f"{number}.png"), q.text, q.answer) for number, (_, q) in enumerate(drawn)]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def record_first_batch(model: nn.Module) -> None:
    """Keep the keyword arguments of the model's first pass in the file that the environment names."""

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        torch.save({k: v for k, v in kwargs.items() if isinstance(v, int | torch.Tensor)}, os.environ[RECORD])
        hook.remove()

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)


def plain_losses(batch_file: Path, path: str | Path = MINIATURE_PATH) -> dict[str, float]:
    """Loss of a recorded batch by transformers and ``apply_sar`` alone: "plain" and "sar"."""
    batch = torch.load(batch_file)
    inputs = {name: batch[name] for name in (*BATCH, "logits_to_keep") if name in batch}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        plain = model(**inputs).loss.item()
        with apply_sar(model, CONFIG):
            return {"plain": plain, "sar": model(**inputs).loss.item()}


def run(command: list[str], log: Path, **variables: str) -> tuple[int, str]:
    """(exit code, output) of a command, whose output is kept in a file."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write_text(ended.stdout)
    return ended.returncode, ended.stdout


def report(check: str, passed: bool, **figures: Any) -> None:
    """A line of the table."""
    print(MARK + json.dumps({"check": check, "passed": bool(passed), **figures}), flush=True)


def report_losses(check: str, logged: float, batch_file: Path, path: str | Path = MINIATURE_PATH, **given: Any) -> None:
    """Whether a run's first loss, as it is logged, is that of SAR in plain transformers, and not the plain one."""
    losses = plain_losses(batch_file, path)
    near = lambda loss: abs(logged - loss) <= 6e-4 * loss  # four digits are logged
    report(check, near(losses["sar"]) and not near(losses["plain"]), logged=logged, **losses, **given)


def report_refusal(check: str, ended: tuple[int, str], words: str) -> None:
    """Whether a run ended with an error that says ``words``."""
    code, output = ended
    report(check, code != 0 and words in output, exit_code=code, error=words)
