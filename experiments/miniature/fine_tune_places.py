"""Fine-tunes the miniature of places as the paper does, on answers that the question's words nearly always predict.

    python experiments/miniature/fine_tune_places.py --base results/places/seed_0/base \
        --output_dir results/places/seed_0

Three groups come out of one base: ``sft``, supervised by text alone, on pictures of a world with habits; ``control``,
the same with the paper's contrastive loss on visual tokens (section 3.3); ``unbiased``, as ``sft`` on a world without
habits, which tells what fine-tuning alone does. Each is one call of ``sar_fast.lab.train``, with the sparsity of
gradients measured; a group that is done is left as it is, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from places_batches import choose, training_places

from sar_fast.lab import train
from sar_fast.lab.miniature.checkpoint import load_miniature
from sar_fast.lab.miniature.places.questions import ask_place
from sar_fast.lab.miniature.places.scenes import SIDE
from sar_fast.lab.miniature.places.sets import BIAS

GROUPS = {  # bias of the pictures, the control group's loss
    "sft": (BIAS, None),
    "control": (BIAS, {"visual_contrastive_loss_weight": 0.1}),
    "unbiased": (0.0, None),
}


def chat_records(rng: np.random.Generator, pictures: int, turns: int, bias: float) -> list[dict[str, Any]]:
    """Conversations of up to ``turns`` questions about a picture each, as ``sar_fast.lab.train`` reads them."""
    records = []
    for drawn in training_places(rng, pictures, bias=bias, side=SIDE):
        messages = []
        for question in choose(ask_place(drawn, rng, paraphrase=True), rng, turns):
            image = "<image>" if not messages else ""
            messages.append({"role": "user", "content": image + question.text})
            messages.append({"role": "assistant", "content": question.answer})
        records.append({"messages": messages, "images": [Image.fromarray(drawn.scene.image)]})
    return records


def fine_tune(args: argparse.Namespace, group: str) -> None:
    bias, control = GROUPS[group]
    folder = args.output_dir / group
    if (folder / "all_results.json").exists():
        print(f"{group}: done already, in {folder}")
        return
    model, processor = load_miniature(path=args.base)
    model.model.vision_tower.requires_grad_(False)
    # The same pictures and questions for SFT and control; other ones than in any test set.
    rng = np.random.default_rng(np.random.SeedSequence([args.seed, 2]))
    records = chat_records(rng, args.steps * args.batch, args.turns, bias)
    train(
        model,
        processor,
        records,
        folder=folder,
        control=control,
        gradient_sparsity=True,
        arguments={
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": args.steps // 20,
            "max_steps": args.steps,
            "per_device_train_batch_size": args.batch,
            "logging_steps": 10,
            "save_steps": 100,
            "save_total_limit": 1,
            "seed": args.seed,
            "bf16": args.bf16,
            "report_to": "none",
        },
        resume=folder.exists(),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder that train_places.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets a folder per group")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--turns", type=int, default=6, help="most questions about a picture")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    bf16 = torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    for group in args.groups:
        fine_tune(args, group)


if __name__ == "__main__":
    main()
