"""Training batches of the miniature of places."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from batches import BACKGROUND_SHARES, IGNORED
from places_model import TURN, grid_of
from torch import Tensor
from transformers import LlavaProcessor

from sar_fast.lab.miniature.drawing import BACKGROUNDS, TRAINING_PHOTOGRAPHS
from sar_fast.lab.miniature.places.questions import KINDS, PlaceQuestion, ask_place
from sar_fast.lab.miniature.places.scenes import PlaceScene, draw_place
from sar_fast.lab.miniature.questions import build_prompt

COVERAGE = 0.2  # a patch shows an object from this share of its pixels on


def training_places(rng: np.random.Generator, count: int, *, bias: float, side: int) -> list[PlaceScene]:
    """Pictures on the training mix of backgrounds; held-out photographs never occur."""
    kinds = rng.choice(BACKGROUNDS, size=count, p=BACKGROUND_SHARES)
    settings = {"bias": bias, "side": side, "photographs": TRAINING_PHOTOGRAPHS, "recolour": True}
    return [draw_place(rng, background=str(kind), **settings) for kind in kinds]


def choose(questions: list[PlaceQuestion], rng: np.random.Generator, count: int) -> list[PlaceQuestion]:
    """Up to ``count`` of a picture's questions, every kind as likely as the others while there are some of it left."""
    left = {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    chosen: list[PlaceQuestion] = []
    while len(chosen) < count and any(left.values()):
        mine = left[str(rng.choice([kind for kind in KINDS if left[kind]]))]
        chosen.append(mine.pop(int(rng.integers(len(mine)))))
    return chosen


@dataclasses.dataclass(frozen=True)
class Turns:
    """B rows of an image and as many turns of ``TURN`` tokens behind it, all (B, S) int64.

    Every turn's positions start behind the image. ``labels`` are the answers' tokens; ``kinds`` the index in ``KINDS``
    at an answer's words, -1 elsewhere and at its end mark. ``first`` is the image's first token.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    kinds: Tensor
    first: int

    def to(self, device: torch.device) -> Turns:
        tensors = (self.input_ids, self.labels, self.position_ids, self.kinds)
        return Turns(*(x.to(device) for x in tensors), self.first)


def pack_turns(drawn: list[PlaceScene], rng: np.random.Generator, processor: LlavaProcessor, turns: int) -> Turns:
    tokenizer = processor.tokenizer
    visual = grid_of(drawn[0].scene.image.shape[0]) ** 2
    image = tokenizer(build_prompt("").split("\n")[0].replace("<image>", "<image>" * visual))["input_ids"]
    start = len(image)
    shape = (len(drawn), start + turns * TURN)
    ids = torch.full(shape, tokenizer.pad_token_id)
    labels, kinds = torch.full(shape, IGNORED), torch.full(shape, -1)
    ids[:, :start] = torch.tensor(image)
    positions = torch.cat([torch.arange(start), start + torch.arange(TURN).repeat(turns)]).expand(shape)
    for row, place in enumerate(drawn):
        for number, question in enumerate(choose(ask_place(place, rng, paraphrase=True), rng, turns)):
            asked, answer = _turn(question, tokenizer)
            first = start + number * TURN
            middle, end = first + len(asked), first + len(asked) + len(answer)
            if end - first > TURN:
                raise ValueError(f"{question.text!r} with its answer has {end - first} tokens, more than {TURN}")
            ids[row, first:end] = torch.tensor(asked + answer)
            labels[row, middle:end] = torch.tensor(answer)
            kinds[row, middle : end - 1] = KINDS.index(question.kind)
    return Turns(ids, labels, positions, kinds, image.index(tokenizer.image_token_id))


def _turn(question: PlaceQuestion, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of what follows the image up to ``ASSISTANT:``, and of the answer with its end mark."""
    after_image = build_prompt(question.text).split("\n", 1)[1]
    ids = tokenizer(after_image, add_special_tokens=False)["input_ids"]
    answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
    return ids, [*answer, tokenizer.eos_token_id]
