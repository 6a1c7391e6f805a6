"""Trains the miniature from scratch on drawn pictures and writes its checkpoint.

    python experiments/miniature/train.py            # writes sar_fast/assets/miniature and training_log.jsonl

Stage 1 stands in for CLIP: the vision tower learns to say what every patch shows, and is frozen. Stage 2 is LLaVA's
instruction tuning: projector and language model learn to answer, with the loss on the answers' words alone, in two
cosine cycles. In the first every word counts the same, so boxes, the longest answers, are learnt first; in the second
every answer counts the same, which is what brings the one-word answers (shape, existence) along.
A run starts from the seed, and it replaces the checkpoint only when it has finished.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from architecture import build_model, build_processor
from batches import IGNORED, PatchTargets, pack_turns, patch_targets, pixel_values, training_scenes
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.drawing import COLOURS, SHAPES

HERE = Path(__file__).parent
MUON_RATE, ADAMW_RATE = 0.02, 2e-3
SECOND_CYCLE = 0.75  # of both rates


class PatchHeads(nn.Module):
    """Linear heads on the vision tower's last layer, thrown away after stage 1."""

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (1 + len(COLOURS), 1 + len(SHAPES), 4)
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
        shape = lambda s: min((s + 1) / warm_up, (1 + math.cos(math.pi * s / steps)) / 2)
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, shape) for o in self.optimizers]
        self.stage, self.steps, self.log, self.every = stage, steps, log, every
        self.start, self.cpu_start = time.perf_counter(), time.process_time()
        self.step_number, self.recent = 0, []

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
        if self.step_number % self.every == 0 or self.step_number == self.steps:
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


def train_vision(model, processor, args, rng: np.random.Generator, log: list[dict]) -> None:
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size)
    trainer = Trainer([tower, heads], "vision", args.vision_steps, log)
    for _ in range(args.vision_steps):
        scenes = training_scenes(rng, args.vision_batch)
        features = tower(pixel_values(scenes, processor)).last_hidden_state[:, 1:]
        trainer.step(*patch_loss(heads(features), patch_targets(scenes)))
    tower.requires_grad_(False).eval()


def answer_weights(labels: torch.Tensor, end: int) -> torch.Tensor:
    """Weights (B, S) of the answers' words so that every answer, up to its ``end`` mark, counts 1 in all."""
    weights = torch.zeros(labels.shape)
    for row, marked in zip(labels, weights):
        words: list[int] = []
        for at in (row != IGNORED).nonzero()[:, 0].tolist():
            words.append(at)
            if row[at] == end:
                marked[words] = 1 / len(words)
                words = []
    return weights


def train_language(
    model, processor, args, rng: np.random.Generator, log: list[dict], *, cycle: int, turns: int, scale: float
) -> None:
    model.train()
    model.model.vision_tower.eval()
    steps, end = args.steps[cycle], processor.tokenizer.eos_token_id
    trainer = Trainer([model], f"language cycle {cycle + 1}", steps, log, scale=scale)
    for _ in range(steps):
        scenes = training_scenes(rng, args.batch)
        packed = pack_turns(scenes, rng, processor, turns)
        logits = model(
            input_ids=packed.input_ids,
            pixel_values=pixel_values(scenes, processor),
            position_ids=packed.position_ids,
            attention_mask=packed.attention_mask,
            use_cache=False,
        ).logits[:, :-1]
        labels = packed.labels[:, 1:]
        answered = labels != IGNORED
        weights = answered.float() if cycle == 0 else answer_weights(labels, end)
        each = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        accuracy = (logits.argmax(-1) == labels)[answered].float().mean().item()
        trainer.step(loss, accuracy)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=MINIATURE_PATH, help="folder that the checkpoint replaces")
    parser.add_argument("--log", type=Path, default=HERE / "training_log.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision_steps", type=int, default=600)
    parser.add_argument("--vision_batch", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs=2, default=[700, 900], help="of the two language cycles")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, nargs=2, default=[6, 8], help="most questions behind one image, per cycle")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "log")}
    log: list[dict] = [
        {
            "stage": "settings",
            **settings,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }
    ]
    print(json.dumps(log[0]), flush=True)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    vision_seed, *cycle_seeds = np.random.SeedSequence(args.seed).spawn(3)
    train_vision(model, processor, args, np.random.default_rng(vision_seed), log)
    for cycle, (seed, turns, scale) in enumerate(zip(cycle_seeds, args.turns, (1.0, SECOND_CYCLE))):
        rng = np.random.default_rng(seed)
        train_language(model, processor, args, rng, log, cycle=cycle, turns=turns, scale=scale)
    parameters = sum(p.numel() for p in model.parameters())
    log.append({"stage": "done", "parameters": parameters, "seconds": round(time.perf_counter() - start, 1)})
    print(json.dumps(log[-1]), flush=True)

    partial = args.output_dir.with_name(args.output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    name_as_published(partial / "model.safetensors")
    processor.save_pretrained(partial)
    (partial / "training.json").write_text(json.dumps({"settings": log[0], "result": log[-1]}, indent=2) + "\n")
    shutil.rmtree(args.output_dir, ignore_errors=True)
    partial.rename(args.output_dir)
    args.log.write_text("".join(json.dumps(line) + "\n" for line in log))


def name_as_published(weights: Path) -> None:
    """Name a LLaVA's weights as published checkpoints do: every transformers reads those, older ones no others."""
    published = lambda name: re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    save_file({published(name): x for name, x in load_file(weights).items()}, weights, {"format": "pt"})


if __name__ == "__main__":
    main()
