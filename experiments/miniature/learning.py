"""What both miniatures are trained with: labels of patches, optimizers with their schedule and log, saving."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batches import PatchTargets
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

MUON_RATE, ADAMW_RATE = 0.02, 2e-3


class PatchHeads(nn.Module):
    """Linear heads on the vision tower's last layer, thrown away after stage 1."""

    def __init__(self, width: int, colours: int, shapes: int):
        super().__init__()
        self.sizes = (1 + colours, 1 + shapes, 4)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, N, width) to logits of the colour, logits of the shape and box."""
        return self.linear(self.norm(features)).split(self.sizes, dim=-1)


def patch_loss(
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], targets: PatchTargets
) -> tuple[torch.Tensor, float]:
    """The loss, in which background and foreground count half each, and the accuracy on foreground patches."""
    colour, shape, box = outputs
    foreground = targets.colour > 0
    loss = 20 * smooth_l1_loss(box[foreground], targets.box[foreground], beta=0.05)
    for logits, labels in ((colour, targets.colour), (shape, targets.shape)):
        each = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = loss + each[foreground].mean() / 2 + each[~foreground].mean() / 2
    hit = (colour.argmax(-1) == targets.colour) & (shape.argmax(-1) == targets.shape)
    return loss, hit[foreground].float().mean().item()


class Trainer:
    """Muon for the matrices inside the blocks and AdamW for all else, with linear warm-up and cosine decay to zero.

    At this size Muon reaches in 200 steps what AdamW reaches in 400. It logs a line every ``every`` steps.
    """

    def __init__(
        self, modules: list[nn.Module], stage: str, steps: int, log: list[dict], every: int = 50, scale: float = 1.0
    ):
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and ("layers." in n or "projector" in n)]
        chosen = set(map(id, matrices))
        others = [p for _, p in named if id(p) not in chosen]
        self.parameters = matrices + others
        self.optimizers = [
            torch.optim.Muon(matrices, lr=scale * MUON_RATE, weight_decay=0.05),
            torch.optim.AdamW(others, lr=scale * ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        warm_up = max(1, steps // 20)
        share = lambda s: min((s + 1) / warm_up, (1 + math.cos(math.pi * s / steps)) / 2)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, share) for o in self.optimizers]
        self.stage, self.steps, self.log, self.every = stage, steps, log, every
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        self.step_number, self.recent = 0, []
        self.logged = False  # whether the last step wrote a line

    def state_dict(self) -> dict[str, Any]:
        """For a run that goes on; taken when ``logged``, so that nothing is under way."""
        both = (*self.optimizers, *self.schedules)
        spent = time.perf_counter() - self.start, time.process_time() - self.cpu_start
        return {"step": self.step_number, "spent": spent, "parts": [part.state_dict() for part in both]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, kept in zip((*self.optimizers, *self.schedules), state["parts"]):
            part.load_state_dict(kept)
        self.step_number, (seconds, cpu_seconds) = state["step"], state["spent"]
        self.start, self.cpu_start = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    def step(self, loss: torch.Tensor, accuracy: float) -> None:
        if not torch.isfinite(loss):
            raise RuntimeError(f"{self.stage}: the loss is {loss.item()} at step {self.step_number}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        self.step_number += 1
        self.recent.append((loss.item(), accuracy))
        self.logged = self.step_number % self.every == 0 or self.step_number == self.steps
        if self.logged:
            mean_loss, mean_accuracy = np.mean(self.recent, axis=0)
            line = {
                "stage": self.stage,
                "step": self.step_number,
                "loss": round(float(mean_loss), 4),
                "accuracy": round(float(mean_accuracy), 4),
                "muon_rate": round(self.schedules[0].get_last_lr()[0], 6),
                "seconds": round(time.perf_counter() - self.start, 1),
                "cpu_seconds": round(time.process_time() - self.cpu_start, 1),
            }
            self.log.append(line)
            print(json.dumps(line), flush=True)
            self.recent = []


def keep(path: Path, model: nn.Module, trainer: Trainer, rng: np.random.Generator, log: list[dict]) -> None:
    """Write all that a run needs to go on after the trainer's last step."""
    state = {
        "model": model.state_dict(),
        "trainer": trainer.state_dict(),
        "rng": rng.bit_generator.state,
        "log": log,
    }
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.rename(path)


def go_on(path: Path, model: nn.Module, trainer: Trainer, rng: np.random.Generator, log: list[dict]) -> None:
    """Continue what :func:`keep` wrote; ``ValueError`` if that was a run with other settings."""
    state = torch.load(path, weights_only=True)
    if state["log"][0] != log[0]:
        raise ValueError(f"{path} is of a run with other settings: {state['log'][0]}; remove it or give these")
    model.load_state_dict(state["model"])
    trainer.load_state_dict(state["trainer"])
    rng.bit_generator.state = state["rng"]
    log[:] = state["log"]


def save(model: nn.Module, processor: Any, folder: Path, training: dict[str, Any]) -> None:
    """Write a checkpoint and how it was made, in place of what lies in the folder, once all of it is written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    name_as_published(partial / "model.safetensors")
    processor.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps(training, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def name_as_published(weights: Path) -> None:
    """Name a LLaVA's weights as published checkpoints do: every transformers reads those, older ones no others."""
    published = lambda name: re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    save_file({published(name): x for name, x in load_file(weights).items()}, weights, {"format": "pt"})
