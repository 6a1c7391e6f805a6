"""Trains the miniature of places on a world without habits: the model that fine-tuning starts from ("Base").

    python experiments/miniature/train_places.py --seed 0 --output_dir results/places/seed_0/base

The vision tower learns to say what every patch shows, and is frozen; then projector and language model learn to
answer, with the loss on the answers' words alone. Questions name places, which say nothing here. Most pictures have
144 patches, some 324 and 576. On a GPU and a CPU with bf16 matrix units (AMX) arithmetic is bf16 under autocast.
An interrupted run goes on, given the same command, from the last 200 steps of the language model; what it needs lies
beside the output folder until it is done.
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
from architecture import build_model, build_processor
from batches import IGNORED, patch_targets, pixel_values
from learning import PatchHeads, Trainer, go_on, keep, patch_loss, save
from places_batches import COVERAGE, pack_turns, training_places
from places_model import DESIGN, LONGEST, Learner, vocabulary
from torch.nn.functional import cross_entropy

from sar_fast.lab.miniature.drawing import FORMS, PALETTE
from sar_fast.lab.miniature.places.questions import KINDS
from sar_fast.lab.miniature.places.scenes import SIDE

SIDES = {96: 0.9, 144: 0.07, 192: 0.03}  # of pictures in pixels, and their shares of the batches
KEEP_EVERY = 200  # steps
END_WEIGHT = 0.3  # of an answer's end mark; a word counts 1


def batches_of_sides(steps: int, rng: np.random.Generator) -> list[int]:
    """The side of every step's pictures, in random order with the shares of ``SIDES``."""
    counts = {side: round(share * steps) for side, share in SIDES.items() if side != SIDE}
    sides = [side for side, count in counts.items() for _ in range(count)]
    return [int(side) for side in rng.permutation([*sides, *[SIDE] * (steps - len(sides))])]


def train_vision(model, processor, args, seed: np.random.SeedSequence, log: list[dict]) -> None:
    rng = np.random.default_rng(seed)
    tower = model.model.vision_tower
    heads = PatchHeads(tower.config.hidden_size, len(PALETTE), len(FORMS)).to(args.device)
    trainer = Trainer([tower, heads], "vision", args.vision_steps, log)
    compiled = torch.compile(tower, dynamic=False) if args.compile else tower
    for side in batches_of_sides(args.vision_steps, rng):
        scenes = [drawn.scene for drawn in training_places(rng, args.vision_batch, bias=0.0, side=side)]
        with autocast(args):
            pixels = pixel_values(scenes, processor).to(args.device)
            outputs = heads(compiled(pixels, interpolate_pos_encoding=side != SIDE).last_hidden_state[:, 1:])
        targets = patch_targets(scenes, tuple(PALETTE), FORMS, COVERAGE).to(args.device)
        trainer.step(*patch_loss(tuple(x.float() for x in outputs), targets))


def train_language(model, processor, args, seed: np.random.SeedSequence, log: list[dict], kept: Path) -> None:
    rng = np.random.default_rng(seed)
    sides = batches_of_sides(args.steps, rng)
    learner = Learner(model, args.turns)
    trainer = Trainer([model], "language", args.steps, log)
    if kept.exists():
        go_on(kept, model, trainer, rng, log)
    else:
        keep(kept, model, trainer, rng, log)
    compiled = torch.compile(learner, dynamic=False) if args.compile else learner
    hits = np.zeros((len(KINDS), 2))
    for side in sides[trainer.step_number :]:
        drawn = training_places(rng, args.batch, bias=0.0, side=side)
        turns = pack_turns(drawn, rng, processor, args.turns).to(args.device)
        answered = turns.labels[:, 1:] != IGNORED
        labels, kinds = turns.labels[:, 1:][answered], turns.kinds[:, 1:][answered]
        with autocast(args):
            with torch.no_grad():
                features = learner.features(pixel_values([d.scene for d in drawn], processor).to(args.device))
            hidden = compiled(turns.input_ids, turns.position_ids, features, turns.first)[:, :-1]
            logits = model.lm_head(hidden[answered])
        each = cross_entropy(logits.float(), labels, reduction="none")
        weights = torch.where(kinds >= 0, 1.0, END_WEIGHT)
        right = (logits.argmax(-1) == labels)[kinds >= 0]
        for index in range(len(KINDS)):
            mine = right[kinds[kinds >= 0] == index]
            hits[index] += int(mine.sum()), len(mine)
        trainer.step((each * weights).sum() / weights.sum(), right.float().mean().item())
        if trainer.logged:
            log[-1]["kinds"] = {kind: round(float(h / n), 3) for kind, (h, n) in zip(KINDS, hits) if n}
            hits[:] = 0
        if trainer.logged and trainer.step_number % KEEP_EVERY == 0:
            keep(kept, model, trainer, rng, log)
    learner.close()


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder that the checkpoint replaces")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision_steps", type=int, default=700)
    parser.add_argument("--vision_batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1000, help="of projector and language model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=20, help="most questions behind one image")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--bf16", action=flag, default=None, help="autocast; by default where there are units for it")
    parser.add_argument("--compile", action=flag, default=True, help="torch.compile")
    args = parser.parse_args()
    if args.bf16 is None:
        args.bf16 = args.device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    settings = {k: str(v) if k == "device" else v for k, v in vars(args).items() if k != "output_dir"}
    versions = {"torch": str(torch.__version__), "transformers": transformers.__version__, "numpy": np.__version__}
    log: list[dict] = [{"stage": "settings", **settings, **versions, "python": platform.python_version()}]
    processor = build_processor(vocabulary(), DESIGN, longest=LONGEST)
    model = build_model(processor.tokenizer, DESIGN).to(args.device)
    vision_seed, language_seed = np.random.SeedSequence([args.seed, 1]).spawn(2)
    kept = args.output_dir.with_name(args.output_dir.name + ".run.pt")
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        train_vision(model, processor, args, vision_seed, log)
    model.model.vision_tower.requires_grad_(False).eval()
    train_language(model, processor, args, language_seed, log, kept)
    parameters = sum(p.numel() for p in model.parameters())
    log.append({"stage": "done", "parameters": parameters, "seconds": round(time.perf_counter() - start, 1)})
    save(model, processor, args.output_dir, {"settings": log[0], "result": log[-1]})
    (args.output_dir / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    kept.unlink()


if __name__ == "__main__":
    main()
