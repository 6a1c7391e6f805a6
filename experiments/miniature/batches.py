"""Training batches: scenes, what every patch shows, and several questions packed behind one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from architecture import GRID, IMAGE_SIZE
from transformers import LlavaProcessor

from sar_fast.lab.miniature.drawing import (
    BACKGROUNDS,
    COLOURS,
    PATCH_SIZE,
    SHAPES,
    TRAINING_PHOTOGRAPHS,
    Scene,
    draw_scene,
)
from sar_fast.lab.miniature.questions import Question, ask, build_prompt

BACKGROUND_SHARES = (0.25, 0.15, 0.25, 0.35)  # of BACKGROUNDS, in its order
FOREGROUND_COVERAGE = 0.25  # a patch shows an object from this share of its pixels on
UNKNOWN_WORD_RATE = 0.1  # share of questions that get a word out of the vocabulary, as a user's wording would have
IGNORED = -100  # cross_entropy's label for a position that carries no loss


def training_scenes(rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes on the training mix of backgrounds; held-out photographs never occur."""
    settings = {"size": IMAGE_SIZE, "photographs": TRAINING_PHOTOGRAPHS, "recolour": True}
    kinds = rng.choice(BACKGROUNDS, size=count, p=BACKGROUND_SHARES)
    return [draw_scene(rng, background=str(kind), **settings) for kind in kinds]


def pixel_values(scenes: list[Scene], processor: LlavaProcessor) -> torch.Tensor:
    """(B, 3, side, side) fp32: what the processor makes of pictures that already have its size, batched."""
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    settings = processor.image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.image_mean, settings.image_std))
    return (images * settings.rescale_factor - mean) / std


@dataclass
class PatchTargets:
    """What every patch of B pictures shows; ``colour`` and ``shape`` (B, N) int64, 0 is the background; ``box``
    (B, N, 4) fp32, the box (x1, y1, x2, y2) of the patch's object as fractions of the side, 0 for the background."""

    colour: torch.Tensor
    shape: torch.Tensor
    box: torch.Tensor

    def to(self, device: torch.device) -> PatchTargets:
        return PatchTargets(*(x.to(device) for x in (self.colour, self.shape, self.box)))


def patch_targets(
    scenes: list[Scene],
    colours: Sequence[str] = tuple(COLOURS),
    shapes: Sequence[str] = SHAPES,
    coverage: float = FOREGROUND_COVERAGE,
) -> PatchTargets:
    """What the patches of square pictures of one size show; an object from the share ``coverage`` of a patch on."""
    side = scenes[0].image.shape[0]
    grid = side // PATCH_SIZE
    colour = np.zeros((len(scenes), grid * grid), dtype=np.int64)
    shape = np.zeros_like(colour)
    box = np.zeros((len(scenes), grid * grid, 4), dtype=np.float32)
    for b, scene in enumerate(scenes):
        masks = np.stack([o.mask for o in scene.objects]).reshape(-1, grid, PATCH_SIZE, grid, PATCH_SIZE)
        covered = masks.mean((2, 4)).reshape(len(scene.objects), -1)
        owner = np.where(covered.max(0) >= coverage, covered.argmax(0), -1)
        for index, item in enumerate(scene.objects):
            own = owner == index
            colour[b, own] = 1 + list(colours).index(item.colour)
            shape[b, own] = 1 + list(shapes).index(item.shape)
            box[b, own] = np.divide(item.box, side)
    return PatchTargets(*(torch.from_numpy(a) for a in (colour, shape, box)))


@dataclass
class PackedTurns:
    """B rows of S tokens: the image once, then independent turns; all tensors but the mask are (B, S) int64.

    ``attention_mask`` (B, 1, S, S) bool is causal and lets a turn see the image and itself, never another turn;
    positions restart behind the image in every turn. So the loss is the one of single-turn prompts at the cost of one
    image, and no answer leaks from one turn into another.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor


def pack_turns(scenes: list[Scene], rng: np.random.Generator, processor: LlavaProcessor, turns: int) -> PackedTurns:
    """Packs up to ``turns`` random questions behind every scene's image."""
    tokenizer = processor.tokenizer
    image_text = build_prompt("").split("\n")[0].replace("<image>", "<image>" * GRID**2)
    prefix = tokenizer(image_text)["input_ids"]
    rows = []
    for scene in scenes:
        questions = ask(scene, rng, paraphrase=True)
        chosen = [questions[i] for i in rng.permutation(len(questions))[:turns]]
        rows.append([_turn(q, rng, tokenizer) for q in chosen])
    length = len(prefix) + max(sum(len(q) + len(a) for q, a in row) for row in rows)
    ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    turn_of = torch.full((len(rows), length), -1)  # -1: padding, which sees the image and itself and is never seen
    ids[:, : len(prefix)] = torch.tensor(prefix)
    positions[:, : len(prefix)] = torch.arange(len(prefix))
    turn_of[:, : len(prefix)] = 0
    for b, row in enumerate(rows):
        start = len(prefix)
        for number, (question, answer) in enumerate(row, start=1):
            end = start + len(question) + len(answer)
            ids[b, start:end] = torch.tensor(question + answer)
            labels[b, end - len(answer) : end] = torch.tensor(answer)
            positions[b, start:end] = len(prefix) + torch.arange(end - start)
            turn_of[b, start:end] = number
            start = end
    same_turn = turn_of[:, :, None] == turn_of[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (causal & (same_turn | (turn_of == 0)[:, None, :]))[:, None]
    return PackedTurns(ids, labels, positions, mask)


def _turn(question: Question, rng: np.random.Generator, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a turn: what follows the image up to ``ASSISTANT:``, and the answer with its end mark."""
    after_image = build_prompt(question.text).split("\n", 1)[1]
    ids = tokenizer(after_image, add_special_tokens=False)["input_ids"]
    if rng.random() < UNKNOWN_WORD_RATE:
        ids.insert(int(rng.integers(len(ids) - 2)), tokenizer.unk_token_id)  # never inside "ASSISTANT:"
    answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    return ids, [*answer, tokenizer.eos_token_id]
