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
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from architecture import MINIATURE, build_model, build_processor, vocabulary
from batches import IGNORED, pack_turns, patch_targets, pixel_values, training_scenes
from learning import PatchHeads, Trainer, patch_loss, save
from torch.nn.functional import cross_entropy

from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.drawing import COLOURS, SHAPES

HERE = Path(__file__).parent
SECOND_CYCLE = 0.75  # of both rates


def train_vision(model, processor, args, rng: np.random.Generator, log: list[dict]) -> None:
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size, len(COLOURS), len(SHAPES))
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
    settings = {k: v for k, v in vars(args).items() if k not in ("output_dir", "log")}
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
    processor = build_processor(vocabulary(), MINIATURE)
    model = build_model(processor.tokenizer, MINIATURE)
    vision_seed, *cycle_seeds = np.random.SeedSequence(args.seed).spawn(3)
    train_vision(model, processor, args, np.random.default_rng(vision_seed), log)
    for cycle, (seed, turns, scale) in enumerate(zip(cycle_seeds, args.turns, (1.0, SECOND_CYCLE))):
        rng = np.random.default_rng(seed)
        train_language(model, processor, args, rng, log, cycle=cycle, turns=turns, scale=scale)
    parameters = sum(p.numel() for p in model.parameters())
    log.append({"stage": "done", "parameters": parameters, "seconds": round(time.perf_counter() - start, 1)})
    print(json.dumps(log[-1]), flush=True)

    save(model, processor, args.output_dir, {"settings": log[0], "result": log[-1]})
    args.log.write_text("".join(json.dumps(line) + "\n" for line in log))


if __name__ == "__main__":
    main()
