"""Held-out accuracy of the miniature for every kind of question, beside chance and the majority answer.

    python experiments/miniature/evaluate.py         # writes accuracy.json beside this file

Four sets of scenes that training never drew: plain backgrounds (one colour or a gradient), textures, new crops of the
training photographs, and photographs that training never saw. Questions take the canonical wording.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from sar_fast.lab.io.model_source import MINIATURE_PATH
from sar_fast.lab.miniature.checkpoint import answer, load_miniature
from sar_fast.lab.miniature.drawing import (
    COLOURS,
    HELD_OUT_PHOTOGRAPHS,
    SHAPES,
    TRAINING_PHOTOGRAPHS,
    Scene,
)
from sar_fast.lab.miniature.questions import KINDS, POSITIONS, Question, draw_questions, is_correct

HERE = Path(__file__).parent
HELD_OUT_SEED = 20_001  # training draws from the children of SeedSequence(seed), never from default_rng of a list
SETS = {
    "plain": (("plain", "gradient"), ()),
    "texture": (("texture",), ()),
    "photographs_seen": (("photograph",), TRAINING_PHOTOGRAPHS),
    "photographs_unseen": (("photograph",), HELD_OUT_PHOTOGRAPHS),
}
CHANCE = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "existence": 1 / 2,
    "position": 1 / len(POSITIONS),
}


def majority(pairs: list[tuple[Scene, Question]]) -> float:
    """Accuracy of the best constant reply out of the answers that occur: for boxes the best of the 200 commonest."""
    replies = [reply for reply, _ in Counter(q.answer for _, q in pairs).most_common(200)]
    return max(np.mean([is_correct(q, reply, scene) for scene, q in pairs]) for reply in replies)


def accuracy_table(model, processor, pairs: list[tuple[Scene, Question]]) -> dict[str, dict[str, float]]:
    """Per kind: ``accuracy`` with its 95 % ``half_interval``, ``chance``, ``majority`` and the number of questions."""
    replies = answer(model, processor, [s.image for s, _ in pairs], [q.text for _, q in pairs])
    table = {}
    for kind in KINDS:
        mine = [(s, q, r) for (s, q), r in zip(pairs, replies) if q.kind == kind]
        accuracy = float(np.mean([is_correct(q, r, s) for s, q, r in mine]))
        table[kind] = {
            "accuracy": round(accuracy, 4),
            "half_interval": round(1.96 * (accuracy * (1 - accuracy) / len(mine)) ** 0.5, 4),
            "chance": round(CHANCE[kind], 4) if kind in CHANCE else None,
            "majority": round(float(majority([(s, q) for s, q, _ in mine])), 4),
            "questions": len(mine),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=MINIATURE_PATH)
    parser.add_argument("--output_dir", type=Path, default=HERE, help="folder of accuracy.json")
    parser.add_argument("--per_kind", type=int, default=1000, help="questions per kind and set")
    parser.add_argument("--size", type=int, default=64, help="pixels of the drawn pictures, before the processor")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.per_kind < 1:
        parser.error(f"--per_kind is {args.per_kind}, needed at least 1")
    torch.set_num_threads(args.threads)
    model, processor = load_miniature(path=args.checkpoint)
    report = {
        "seed": HELD_OUT_SEED,
        "picture_size": args.size,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "sets": {},
    }
    for name in SETS:
        backgrounds, photographs = SETS[name]
        rng = np.random.default_rng([HELD_OUT_SEED, list(SETS).index(name)])
        pairs = draw_questions(rng, args.per_kind, backgrounds, size=args.size, photographs=photographs)
        table = accuracy_table(model, processor, pairs)
        report["sets"][name] = table
        print(f"{name:20s}" + "".join(f"  {kind} {row['accuracy']:.3f}" for kind, row in table.items()), flush=True)
    (args.output_dir / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    if args.checkpoint == MINIATURE_PATH and args.output_dir == HERE:
        fill_data_card(report["sets"])


def fill_data_card(sets: dict[str, dict[str, dict[str, float]]]) -> None:
    """Write the accuracy table of the shipped checkpoint into the data card."""
    lines = ["| question | chance | majority | " + " | ".join(name.replace("_", ", ") for name in sets) + " |"]
    lines.append("|---" * (3 + len(sets)) + "|")
    for kind in KINDS:
        first = next(iter(sets.values()))[kind]
        chance = "-" if first["chance"] is None else f"{first['chance']:.2f}"
        cells = [
            kind,
            chance,
            f"{first['majority']:.2f}",
            *(f"{table[kind]['accuracy']:.3f}" for table in sets.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    card = HERE / "DATA_CARD.md"
    begin, end = "<!-- accuracy -->", "<!-- /accuracy -->"
    before, rest = card.read_text().split(begin)
    card.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.split(end)[1])


if __name__ == "__main__":
    main()
